"""The lab is what it claims to be: support by construction, checked on the sampled model."""

import json

import numpy as np
import pytest

from posttrain.lab.corpus import demonstrations, documents, preference_pairs, taskset
from posttrain.lab.settings import SETTINGS, Support
from posttrain.lab.tokenizer import build_tokenizer
from posttrain.lab.tour import ANSWER, BASE, write_tour
from posttrain.measure.bootstrap import mean_interval
from posttrain.measure.measure import measure_policy
from posttrain.measure.passk import pass_at_k, pass_interval
from posttrain.measure.spec import Measure
from posttrain.measure.support import clopper_pearson
from posttrain.recipe import load_recipe
from posttrain.run.audit import audit
from posttrain.run.folder import RunFolder
from posttrain.run.resume import NOTHING, check_folder

SAMPLES = 256


@pytest.fixture(scope="module")
def measured(engine):
    return measure_policy(
        "base",
        engine.policy(str(BASE)),
        [taskset(s) for s in SETTINGS.values()],
        spec=Measure(samples=SAMPLES, max_new_tokens=ANSWER, seed=3),
        protocol="test",
        observe=lambda event: None,
    )


def informative(setting, task):
    """Prompts on which the habit's answer is not right by luck (2 * 2 = 2 + 2)."""
    tasks = taskset(setting)
    if setting.habit is None:
        return np.ones(len(task.prompts), bool)
    return np.array([setting.habit(tasks.entry(t)) != t.answer for t in tasks.held_out])


@pytest.mark.parametrize("name", [s.name for s in SETTINGS.values()])
def test_support_is_as_constructed(measured, name):
    setting, task = SETTINGS[name], measured.task(name)
    counts = task.counts[informative(setting, task)]
    first = mean_interval(counts / SAMPLES)
    at_64 = mean_interval(pass_at_k(counts, SAMPLES, 64))
    if setting.support is Support.RELIABLE:
        # 32 prompts all solved cannot exclude a few unsolved ones: the interval allows for those.
        assert first.value > 0.99
        assert first.low > 0.85
    elif setting.support is Support.SELDOM:
        assert first.high < 0.25, "seldom: low pass@1"
        assert first.low > 0.01
        assert at_64.value > 0.8, "but it can: high pass@64"
        assert at_64.low > 0.6
    else:
        total = counts.size * SAMPLES
        _, high = clopper_pearson(int(counts.sum()), total, confidence=0.95)
        assert counts.sum() == 0, "never seen: no success in 256 samples of any prompt"
        assert high < 0.001
        assert pass_interval(task, SAMPLES).value == 0


def test_the_base_is_small_and_plain():
    assert sum(p.stat().st_size for p in BASE.iterdir()) < 8 * 2**20
    assert json.loads((BASE / "config.json").read_text())["model_type"] == "qwen3"
    built = build_tokenizer()
    from transformers import AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(BASE)
    assert shipped.get_vocab() == built.get_vocab()
    for text in ("State 1 + 2 =", "naïve — ✓ 🙂\n\ttabs", "Spell this word backward"):
        assert shipped.decode(shipped(text)["input_ids"]) == text


def test_the_corpus_is_reproducible_and_mixed_as_declared():
    first, again = list(documents(seed=5, count=4000)), list(documents(seed=5, count=4000))
    assert first == again
    assert first != list(documents(seed=6, count=4000))
    for setting in SETTINGS.values():
        own = [d for d in first if d.setting == setting.name]
        share = sum(d.is_right for d in own) / len(own)
        assert abs(len(own) / 4000 - setting.weight) < 0.03
        assert abs(share - setting.share_right) < 0.04


def test_lab_data_never_touches_held_out_prompts():
    for setting in SETTINGS.values():
        held_out = {t.text for t in taskset(setting).held_out}
        demos = demonstrations(setting, seed=0, count=500)
        assert not held_out & {d.question for d in demos}
        if setting.habit:
            pairs = preference_pairs(setting, seed=0, count=200)
            assert not held_out & {p["prompt"][0]["content"] for p in pairs}
            assert all(p["chosen"] != p["rejected"] for p in pairs)


def test_the_tour_is_an_ordinary_recipe(tmp_path):
    path = write_tour(tmp_path, seed=1)
    recipe = load_recipe(path)
    assert [s.name for s in recipe.stages] == ["expand", "reshape", "prefer", "consolidate"]
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    write_tour(tmp_path, seed=1)
    assert before == {p.name: p.read_bytes() for p in path.parent.iterdir()}


def test_pretraining_is_reproducible_bit_for_bit(tmp_path):
    from safetensors.numpy import load_file

    from posttrain.lab.pretrain import pretrain

    first, again = (
        load_file(pretrain(tmp_path / name, steps=3) / "model.safetensors") for name in "ab"
    )
    shipped = load_file(BASE / "model.safetensors")
    assert first.keys() == again.keys() == shipped.keys()
    assert all(np.array_equal(w, again[n]) for n, w in first.items())
    assert all(w.shape == shipped[n].shape for n, w in first.items())


def test_the_tours_inputs_may_lie_in_its_own_run_folder(tmp_path):
    """`posttrain tour` writes them there first, and its run begins beside them."""
    write_tour(tmp_path)
    with RunFolder(tmp_path).lock() as folder:
        check_folder(folder, NOTHING, observe=lambda event: None)
        folder.write_recipe(load_recipe(tmp_path / "inputs" / "recipe.yaml"))
    assert audit(RunFolder(tmp_path)) == []
    (tmp_path / "stages" / "x").mkdir(parents=True)
    (tmp_path / "stages" / "x" / "notes.txt").write_text("what a run may read is not free")
    assert [f.path for f in audit(RunFolder(tmp_path))] == ["stages/x/notes.txt"]
