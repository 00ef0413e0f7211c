"""The local sampler draws what it says it draws, whatever else is in the batch."""

import numpy as np
import pytest
import torch

from posttrain.engines import sampler
from posttrain.engines.sampler import sample
from posttrain.errors import TaskError
from posttrain.protocols import Request
from posttrain.provenance import Sampling
from posttrain.task import Task
from posttrain.testing import check_policy, tiny_model
from posttrain.trajectory import End

PROMPTS = ("hello world", "a", "what is 12+34", "zz top of the morning")


def requests_for(policy, *, count, max_new_tokens=8, **sampling):
    prompts = [policy.renderer.prompt(Task(taskset="t", prompt=p)).tokens for p in PROMPTS]
    return [
        Request(
            prompt=prompts[i % len(prompts)],
            sampling=Sampling(seed=i, **sampling),
            max_new_tokens=max_new_tokens,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral"])
def test_policy_contract(family, tmp_path, engine):
    policy = engine.policy(str(tiny_model(tmp_path / "m", family=family, seed=5)))
    check_policy(policy, [Task(taskset="t", prompt=p) for p in PROMPTS])


@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
def test_wave_size_and_compaction_change_nothing(engine, tiny_folder, monkeypatch, rows):
    policy = engine.policy(str(tiny_folder))
    requests = requests_for(policy, count=40)
    expected = policy.generate(requests)
    assert len({len(c.tokens) for c in expected}) > 2, "completions must end at different steps"
    monkeypatch.setattr(sampler, "MAX_ROWS", rows)
    monkeypatch.setattr(sampler, "COMPACT_BELOW", 0.0 if rows == 3 else 1.0)
    for a, b in zip(expected, policy.generate(requests), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.end is b.end
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 0.0}],
)
def test_log_probs_are_those_of_the_distribution_sampled(sampling):
    """Against a distribution worked out in numpy, and frequencies within sampling error."""
    logits = np.array([2.0, 1.5, 1.0, 0.0, -1.0, -3.0])
    num = 20_000
    spec = Sampling(seed=0, **sampling)
    uniform = torch.from_numpy(np.random.default_rng(0).random(num))
    tokens, logprobs = sample(torch.tensor(logits).float().repeat(num, 1), spec, uniform)
    p = np.exp(logits / (spec.temperature or 1e-9) - (logits / (spec.temperature or 1e-9)).max())
    p /= p.sum()
    if spec.top_k:
        p[np.argsort(-p)[spec.top_k :]] = 0
    if spec.top_p < 1:
        order = np.argsort(-p)
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= spec.top_p]] = 0
    p[p < spec.min_p * p.max()] = 0
    p /= p.sum()
    np.testing.assert_allclose(logprobs.exp().numpy(), p[tokens.numpy()], rtol=1e-5)
    counts = np.bincount(tokens.numpy(), minlength=6)
    assert (counts[p == 0] == 0).all()
    sd = np.sqrt(num * p * (1 - p)) + 1e-9
    assert (np.abs(counts - num * p) < 4.5 * sd).all()


def test_ends_are_told_apart(engine, tmp_path):
    policy = engine.policy(str(tiny_model(tmp_path / "m", context=16)))
    (prompt,) = {r.prompt.tobytes(): r for r in requests_for(policy, count=1)}.values()
    room = 16 - len(prompt.prompt)
    ends = set()
    for seed in range(60):
        request = Request(
            prompt=prompt.prompt, sampling=Sampling(seed=seed), max_new_tokens=3 if seed % 2 else 99
        )
        (done,) = policy.generate([request])
        ends.add(done.end)
        closed = int(done.tokens[-1]) in policy.renderer.end_tokens
        assert (done.end is End.COMPLETED) == closed
        if done.end is End.LENGTH:
            assert len(done.tokens) == 3
        if done.end is End.CONTEXT:
            assert len(done.tokens) == room
    assert ends == {End.COMPLETED, End.LENGTH, End.CONTEXT}


def test_top_k_keeps_no_more_than_k_of_equal_logits():
    uniform = torch.from_numpy(np.random.default_rng(0).random(500))
    logits = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(500, 1)
    tokens, logprobs = sample(logits, Sampling(top_k=1), uniform)
    assert len(set(tokens.tolist())) == 1
    assert float(logprobs.abs().max()) == 0


def test_prompts_without_tokens_or_room_are_refused(engine, tiny_folder):
    policy = engine.policy(str(tiny_folder))
    for prompt in (np.zeros(0, np.int32), np.zeros(policy.context, np.int32)):
        request = Request(prompt=prompt, sampling=Sampling(), max_new_tokens=2)
        with pytest.raises(TaskError, match="prompt tokens"):
            policy.generate([request])


def test_rows_are_bounded_by_memory(engine, tiny_folder, monkeypatch):
    """Two layers, two key/value heads of size 8, float32: 2·2·2·8·4 = 256 bytes per token."""
    policy = engine.policy(str(tiny_folder))
    monkeypatch.setattr(sampler, "KEY_VALUE_BYTES", 256 * 100)
    assert sampler._rows_that_fit(policy.model, 10) == 10
    assert sampler._rows_that_fit(policy.model, 1000) == 1
    requests = requests_for(policy, count=24)
    bounded = policy.generate(requests)
    monkeypatch.undo()
    for a, b in zip(bounded, policy.generate(requests), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
