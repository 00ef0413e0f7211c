"""Every step says where its time went, and the report shows it."""

import json
import time

from world import dpo, grpo, opd, recipe, run_recipe, sft, stage_folder, write_recipe

from posttrain.core.clock import NAMES, seconds_in
from posttrain.report.load import write_report

TRAINING = {"draw", "score", "pack", "forward", "backward", "optimizer", "idle"}


def test_a_run_says_where_the_time_went(shared):
    path = write_recipe(shared, recipe(sft(), grpo(), opd()), "timed.yaml")
    out, started = shared / "timed", time.monotonic()
    code, words = run_recipe(path, out)
    assert code == 0, words
    wall = time.monotonic() - started
    expected = {
        "sft": TRAINING,
        "grpo": TRAINING | {"prefill", "decode", "verify", "reference"},
        "opd": TRAINING | {"prefill", "decode", "teacher"},
    }
    total = 0.0
    for name, names in expected.items():
        lines = (stage_folder(out, name) / "metrics.jsonl").read_text().splitlines()
        steps = [seconds_in(json.loads(line)) for line in lines]
        assert [set(s) - {"journal"} for s in steps] == [names] * 4
        # A step's own row is written after it: its writing counts to the next step.
        assert ["journal" in s for s in steps] == [False, True, True, True]
        assert all(v >= 0 for s in steps for v in s.values())
        assert set().union(*steps) <= set(NAMES)
        total += sum(sum(s.values()) for s in steps)
    assert 0 < total < wall
    page = write_report(out).read_text()
    assert "Where the time went" in page
    section = page[page.index('id="time"') : page.index('id="tokens"')]
    assert section.count("<svg") - section.count('class="swatch"') == 3
    for name in ("decode", "reference", "teacher", "backward"):
        assert f"<td>{name}</td>" in section


def test_a_reference_is_asked_once_per_row_of_a_data_set(shared):
    """Six pairs, two at a time, eight steps: after one epoch everything is known."""
    path = write_recipe(shared, recipe(dpo(budget={"steps": 8})), "epochs.yaml")
    out = shared / "epochs"
    code, words = run_recipe(path, out)
    assert code == 0, words
    lines = (stage_folder(out, "dpo") / "metrics.jsonl").read_text().splitlines()
    known = [json.loads(line)["logprobs_remembered"] for line in lines]
    assert known == [0.0] * 3 + [4.0] * 5


def test_under_adapters_the_reference_is_the_learner_itself(shared):
    """The recipe's reference is the policy that the stage starts from: no second model."""
    lora = {"lora": {"rank": 2, "alpha": 4}, "budget": {"steps": 3}}
    path = write_recipe(shared, recipe(sft(), dpo(**lora), grpo(**lora)), "lora.yaml")
    code, words = run_recipe(path, shared / "lora")
    assert code == 0, words
    for name in ("dpo", "grpo"):
        lines = (stage_folder(shared / "lora", name) / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 3
        assert all("seconds/reference" in row for row in rows)
