"""Checkpoints: one that is damaged or another learner's is refused, and changes nothing."""

import random
from contextlib import suppress

import pytest
import torch
from material import random_groups

from posttrain.core.errors import ModelError, RunError
from posttrain.core.learner import Lora, MovingReference, Optimizer
from posttrain.engines.local.memory import Doing, in_memory
from posttrain.numerics.batch import pack
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.testing.tiny import tiny_model
from posttrain.training.objective import StageObjective

OBJECTIVE = StageObjective((CrossEntropy(),))


def make(engine, folder, **options):
    return engine.learner(
        str(folder),
        name="t",
        optimizer=Optimizer(lr=1e-2),
        lora=options.pop("lora", None),
        **options,
    )


def stepped(learner, seed=0):
    batches = pack(random_groups(seed=seed), needs=frozenset(), max_tokens=40)
    learner.step(batches, OBJECTIVE, lr_scale=1.0)
    return learner


def refused(learner, folder, match):
    before = {n: p.clone() for n, p in learner.policy.model.causal.named_parameters()}
    with pytest.raises(RunError, match=match) as caught:
        learner.load(folder)
    assert "learner.pt" in caught.value.found
    assert "--out" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    after = dict(learner.policy.model.causal.named_parameters())
    assert all(torch.equal(w, after[n]) for n, w in before.items())
    assert learner.policy.version == 0


@pytest.fixture
def saved(engine, tiny_folder, tmp_path):
    stepped(make(engine, tiny_folder)).save(tmp_path)
    return tmp_path / "learner.pt"


def test_any_cut_or_foreign_bytes_are_refused_or_harmless(engine, tiny_folder, saved):
    raw, rng = saved.read_bytes(), random.Random(0)
    learner = make(engine, tiny_folder)
    for length in [0, 1, 3000, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(40))]:
        saved.write_bytes(raw[:length])
        refused(learner, saved.parent, "damaged")
    for _ in range(60):
        spoilt = bytearray(raw)
        for _ in range(3):
            spoilt[rng.randrange(len(raw) - 5000, len(raw))] = rng.randrange(256)
        saved.write_bytes(spoilt)
        with suppress(RunError):  # any other error is a defect
            learner.load(saved.parent)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"not a checkpoint", b"PK\x03\x04"])
def test_other_files_are_refused(engine, tiny_folder, tmp_path, content):
    (tmp_path / "learner.pt").write_bytes(content)
    refused(make(engine, tiny_folder), tmp_path, "damaged")


def test_a_missing_file_is_refused(engine, tiny_folder, tmp_path):
    refused(make(engine, tiny_folder), tmp_path, "missing")


def edited(change):
    def edit(path):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return edit


FOREIGN = {
    "nothing": (lambda p: torch.save({}, p), "no weights, optimizer, version: another"),
    "a list": (lambda p: torch.save([1], p), "holds a list"),
    "a weight less": (edited(lambda c: c["weights"].popitem()), "is in one only"),
    "a shape": (
        edited(lambda c: c["weights"].update({"model.norm.weight": torch.ones(7)})),
        r"model.norm.weight is \[7\], and the learner's is \[32\]",
    ),
    "no tensor": (
        edited(lambda c: c["weights"].update({"model.norm.weight": 1.0})),
        "model.norm.weight is float",
    ),
    "version": (edited(lambda c: c.update(version="three")), "no version"),
    "no optimiser": (edited(lambda c: c.update(optimizer={})), "no state of an optimiser"),
    "groups": (
        edited(lambda c: c["optimizer"]["param_groups"][0]["params"].pop()),
        "other groups",
    ),
    "moment": (
        edited(lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.ones(3))),
        "state of parameter 0",
    ),
    "a moving reference": (
        edited(lambda c: c.update(moving={"a": torch.ones(1)})),
        "moving reference",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_checkpoint_of_another_learner_is_refused(engine, tiny_folder, saved, kind):
    edit, match = FOREIGN[kind]
    edit(saved)
    refused(make(engine, tiny_folder), saved.parent, match)


def test_learners_of_other_kinds_are_refused(engine, tiny_folder, saved, tmp_path):
    refused(make(engine, tiny_folder, lora=Lora(rank=2)), saved.parent, "is in one only")
    refused(make(engine, tiny_folder, moving=MovingReference()), saved.parent, "moving")
    wider = tiny_model(tmp_path / "untied", tied=False)
    refused(make(engine, wider), saved.parent, "lm_head.weight is in one only")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
@pytest.mark.parametrize("doing", Doing)
def test_out_of_memory_is_called_that(error, doing):
    with pytest.raises(ModelError, match="out of memory while") as caught, in_memory(doing):
        raise error
    assert "bfloat16" in str(caught.value)


def test_other_errors_are_not_called_that():
    with pytest.raises(RuntimeError, match="shapes"), in_memory(Doing.TRAINING):
        raise RuntimeError("shapes do not match")


def test_a_real_allocation_that_fails_in_a_step_is_called_that(engine, tiny_folder, monkeypatch):
    learner = make(engine, tiny_folder)
    monkeypatch.setattr(learner, "_update", lambda *a, **k: torch.empty(2**60))
    with pytest.raises(ModelError, match="out of memory while a training step") as caught:
        stepped(learner)
    assert "micro_batch_tokens" in str(caught.value)
