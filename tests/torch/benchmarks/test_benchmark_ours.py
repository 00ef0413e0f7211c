"""Our side of the benchmark does the work that it claims: token for token what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from against_trl import ours
from against_trl.flops import Tree
from against_trl.material import make, words
from against_trl.plan import Dims, Job, Load, Theirs
from against_trl.worker import Stopped

from posttrain.core.trajectory import Column

TINY = Dims(name="t", layers=1, hidden=16, inner=16, heads=2, kv_heads=1, head_size=8, vocab=64)
STEPS = 2


class Watch:
    """Lets a few steps pass, and keeps what they report."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def open(self) -> None:
        assert not self.steps

    def step_done(self, parts) -> None:
        self.steps.append(dict(parts))
        if len(self.steps) == STEPS:
            raise Stopped


def run(work: str, load: Load, folder: Path) -> tuple[Job, list[dict[str, float]]]:
    make(folder, TINY, load, steps=STEPS)
    job = Job(
        side="ours", work=work, folder=str(folder), load=load, threads=1, theirs=Theirs(rows=1)
    )
    watch = Watch()
    with pytest.raises(Stopped):
        ours.train(job, watch)
    return job, watch.steps


@pytest.mark.parametrize("work", ["grpo", "opd"])
def test_a_step_on_rollouts_computes_the_tokens_that_are_counted(work, tmp_path):
    load = Load(groups=3, group_size=4, prompt_tokens=8, completion_tokens=5)
    _, steps = run(work, load, tmp_path)
    rows = map(json.loads, (tmp_path / "prompts.jsonl").read_text().splitlines()[:-1])
    prompts = [len(row["prompt"].split()) for row in rows]
    # Every completion has all of its five tokens: the end token cannot be drawn.
    counted = sum(Tree(n, (5,) * 4).tokens for n in prompts)
    assert [step["tokens"] for step in steps] == [counted] * STEPS
    assert all(step["decode"] > 0 and step["backward"] > 0 for step in steps)


def test_documents_and_pairs_are_each_read_once(tmp_path):
    _, steps = run("sft", Load(groups=3), tmp_path / "sft")
    rows = map(json.loads, (tmp_path / "sft/documents.jsonl").read_text().splitlines())
    with_ends = sum(len(row["text"].split()) + 1 for row in rows)
    assert sum(step["tokens"] for step in steps) == with_ends

    load = Load(groups=2, group_size=2, prompt_tokens=8, completion_tokens=4)
    _, steps = run("dpo", load, tmp_path / "dpo")
    assert len((tmp_path / "dpo/pairs.jsonl").read_text().splitlines()) == 2 * STEPS
    assert all(step["reference"] > 0 for step in steps)


def test_a_text_is_its_words_and_an_end_that_only_one_tokenizer_has():
    ending, endless = words(64, ends=True), words(64, ends=False)
    for tokenizer in (ending, endless):
        assert tokenizer("w5 w63 w7")["input_ids"] == [5, 63, 7]
        assert tokenizer.decode([5, 63, 7]) == "w5 w63 w7"
    assert ending("w5<end>")["input_ids"] == [5, 1]
    assert ending.eos_token_id == 1 < 64 <= endless.eos_token_id


def test_one_step_for_comparison_clips_and_moves_nothing(tmp_path):
    load = Load(groups=2, group_size=4, prompt_tokens=8, completion_tokens=16)
    make(tmp_path, TINY, load, steps=1)
    job = Job(
        side="ours", work="grpo", folder=str(tmp_path), load=load, threads=1, theirs=Theirs(rows=1)
    )
    fresh, loss, found = ours.one_step(job, stale=False)
    aged, stale_loss, other = ours.one_step(job, stale=True)
    assert abs(loss) < 1e-6 < abs(stale_loss)
    assert found.keys() == other.keys()
    assert any((found[n] != other[n]).any() for n in found)
    ratios = [
        np.exp(a.columns[Column.BEHAVIOUR_LOGPROB] - b.columns[Column.BEHAVIOUR_LOGPROB])
        for x, y in zip(fresh, aged, strict=True)
        for a, b in zip(x.members, y.members, strict=True)
    ]
    drawn = np.concatenate(ratios)
    drawn = drawn[~np.isnan(drawn)]
    for bound in ours.CLIP:
        assert (drawn < bound).any()
        assert (drawn > bound).any()
        assert (np.abs(drawn - bound) > 5e-4).all()
