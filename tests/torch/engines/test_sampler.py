"""The local sampler draws what it says it draws, whatever else is in the batch."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.core.errors import TaskError
from posttrain.core.learner import Lora, Optimizer
from posttrain.core.provenance import Sampling
from posttrain.core.task import Task
from posttrain.core.trajectory import End
from posttrain.engines.local import decoding, sampler
from posttrain.engines.local.attention import PackedPlan
from posttrain.engines.local.decoding import DecodePlan
from posttrain.engines.local.sampler import generate
from posttrain.engines.local.sampling import sample
from posttrain.numerics.batch import Segment
from posttrain.protocols import Request
from posttrain.testing import check_policy, tiny_model
from posttrain.testing.seams import _completed

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


def same(found, expected):
    """Token for token, and log-probs up to rounding."""
    for a, b in zip(found, expected, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.end is b.end
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def watch(monkeypatch):
    """(live rows, row slots, waiting requests) at every decoding step from now on."""
    seen = []
    step = sampler._Batch._step

    def watched(batch):
        seen.append((batch.queue.live, batch.num_slots, batch.queue.num_waiting))
        return step(batch)

    monkeypatch.setattr(sampler._Batch, "_step", watched)
    return seen


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
    same(policy.generate(requests), expected)


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


def test_the_reasons_of_an_end_are_distinguished(engine, tmp_path):
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
    with torch.inference_mode():
        policy.model.recording.prepare()
        assert sampler.key_value_bytes(policy.model) == 256
    requests = requests_for(policy, count=24)
    free = policy.generate(requests)
    longest = max(len(r.prompt) for r in requests)
    # Room for four of the longest prompts and three rows of eight tokens.
    monkeypatch.setattr(sampler, "KEY_VALUE_BYTES", 256 * (4 * longest + 3 * 8))
    seen = []
    step = sampler._Batch._step

    def watched(batch):
        width = max(len(p.tokens) for p in batch.queue.held)
        seen.append(len(batch.queue.held) * width + 8 * batch.queue.live)
        return step(batch)

    monkeypatch.setattr(sampler._Batch, "_step", watched)
    same(policy.generate(requests), free)
    assert all(held <= 4 * longest + 3 * 8 for held in seen)


def mixture(policy, *, seed):
    """Requests of all kinds: lengths of prompts, group sizes, budgets, distributions, stops."""
    rng = np.random.default_rng(seed)
    words = ["a", "12+34", "hello world", "what is it", "zz top of the morning to you all, sir"]
    kinds = [
        {},
        {},
        {"temperature": 0.7},
        {"top_k": 3},
        {"temperature": 0.0},
        {"stop": ("e", "12")},
    ]
    requests = []
    for word in rng.choice(words, rng.integers(1, 6)):
        prompt = policy.renderer.prompt(Task(taskset="t", prompt=str(word))).tokens
        budget, kind = int(rng.choice([1, 3, 9, 20])), kinds[rng.integers(len(kinds))]
        requests += [
            Request(
                prompt=prompt,
                sampling=Sampling(seed=int(rng.integers(1 << 60)), **kind),
                max_new_tokens=budget,
            )
            for _ in range(rng.integers(1, 9))
        ]
    return [requests[i] for i in rng.permutation(len(requests))]


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
@pytest.mark.parametrize("seed", range(8))
def test_a_completion_is_the_same_in_every_mixture(family, seed, engine, tmp_path, monkeypatch):
    policy = engine.policy(str(tiny_model(tmp_path / "m", family=family, seed=5)))
    requests = mixture(policy, seed=seed)
    alone = [policy.generate([r])[0] for r in requests]
    same(policy.generate(requests), alone)
    rng = np.random.default_rng(100 + seed)
    monkeypatch.setattr(sampler, "MAX_ROWS", int(rng.integers(1, 12)))
    monkeypatch.setattr(sampler, "PREFILL_TOKENS", int(rng.choice([1, 40, 8192])))
    monkeypatch.setattr(sampler, "COMPACT_BELOW", float(rng.choice([0.0, 0.5, 1.0])))
    monkeypatch.setattr(sampler, "LOGIT_ELEMENTS", int(rng.choice([1, 200, 2**20])))
    monkeypatch.setattr(sampler, "LOOK_EVERY", {"cpu": int(rng.choice([1, 2, 8]))})
    monkeypatch.setattr(sampler, "STOP_EVERY", int(rng.choice([1, 3, 8])))
    monkeypatch.setattr(decoding, "COLUMNS", int(rng.choice([1, 4, 64])))
    same(policy.generate(requests), alone)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_shapes_that_never_change_give_the_same(family, engine, tmp_path, monkeypatch):
    """The form that a CUDA graph needs: every column read, masks from the device's own ages."""
    policy = engine.policy(str(tiny_model(tmp_path / "m", family=family, seed=5)))
    requests = mixture(policy, seed=3)
    expected = policy.generate(requests)
    monkeypatch.setattr(sampler, "DecodePlan", lambda most: DecodePlan(most, static=True))
    same(policy.generate(requests), expected)


def test_waiting_rows_take_free_places_at_once_and_prompts_are_read_once(
    engine, tiny_folder, monkeypatch
):
    policy = engine.policy(str(tiny_folder))
    requests = requests_for(policy, count=60, max_new_tokens=12)
    read = []
    prefill = sampler._Batch._prefill
    monkeypatch.setattr(
        sampler._Batch, "_prefill", lambda b, fresh: read.extend(fresh) or prefill(b, fresh)
    )
    monkeypatch.setattr(sampler, "MAX_ROWS", 6)
    seen = watch(monkeypatch)
    done = policy.generate(requests)
    assert len({len(c.tokens) for c in done}) > 3, "rows must end at different steps"
    assert sorted(p.tokens.tobytes() for p in read) == sorted(
        {r.prompt.tobytes() for r in requests}
    )
    # Only the whole of a small prompt's rows, or an eighth of the batch, brings in a new prompt:
    # with six rows that is one row, so no place is empty while anybody waits.
    assert all(live == 6 for live, _, waiting in seen if waiting)
    assert all(slots <= 6 for _, slots, _ in seen)
    # The last rows do not drag empty places along.
    assert all(live >= sampler.COMPACT_BELOW * slots for live, slots, _ in seen)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"num_key_value_heads": 1}),
        ("qwen3", {"num_key_value_heads": 4}),
        ("llama", {}),
        ("mistral", {}),
        ("gemma2", {}),
    ],
)
def test_sampled_log_probs_are_those_the_trainer_computes(
    family, changes, engine, tmp_path, monkeypatch
):
    """Grouped heads, sliding windows (of 6), long prompts, rows that enter late: to 1e-5."""
    monkeypatch.setattr(sampler, "MAX_ROWS", 5)
    folder = tiny_model(tmp_path / "m", family=family, seed=2, context=160)
    if changes:
        rebuilt(folder, changes)
    policy = engine.policy(str(folder))
    texts = ("a" * 90, "what is 12+34 " * 3, "b")
    prompts = [policy.renderer.prompt(Task(taskset="t", prompt=t)) for t in texts]
    chosen = [p for p in prompts for _ in range(7)]
    requests = [
        Request(prompt=p.tokens, sampling=Sampling(seed=i), max_new_tokens=30)
        for i, p in enumerate(chosen)
    ]
    drawn = policy.generate(requests)
    assert max(len(c.tokens) for c in drawn) == 30
    trajectories = [_completed(policy, p, c) for p, c in zip(chosen, drawn, strict=True)]
    for trajectory, values in zip(trajectories, policy.logprobs(trajectories), strict=True):
        at = trajectory.trainable
        np.testing.assert_allclose(values[at], trajectory.behaviour_logprobs[at], atol=1e-5)


def rebuilt(folder, changes):
    """The same model with another configuration, and random weights for it."""
    config = AutoConfig.from_pretrained(folder, **changes)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


# --- stop strings ---


@pytest.mark.parametrize("every", [1, 8])
def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(
    engine, tiny_folder, monkeypatch, every
):
    """One character per token, so these stops span two and three tokens."""
    monkeypatch.setattr(sampler, "STOP_EVERY", every)
    monkeypatch.setattr(sampler, "MAX_ROWS", 7)  # places are taken over from rows that ended
    policy = engine.policy(str(tiny_folder))
    free = requests_for(policy, count=40, max_new_tokens=30)
    texts = [policy.renderer.text(c.tokens) for c in policy.generate(free)]
    pairs = Counter(t[i : i + 2] for t in texts for i in range(len(t) - 1))
    stop = (pairs.most_common(1)[0][0], max(texts, key=len)[3:6])
    stopped = [replace(r, sampling=replace(r.sampling, stop=stop)) for r in free]
    num_stopped = 0
    for was, now in zip(policy.generate(free), policy.generate(stopped), strict=True):
        size = len(now.tokens)
        assert now.tokens.tolist() == was.tokens[:size].tolist()
        np.testing.assert_allclose(now.logprobs, was.logprobs[:size], atol=1e-5)
        text = policy.renderer.text(now.tokens)
        shorter = policy.renderer.text(now.tokens[:-1])
        assert not any(s in shorter for s in stop)
        if any(s in text for s in stop):
            num_stopped += 1
            assert now.end is End.COMPLETED
        else:
            assert (size, now.end) == (len(was.tokens), was.end)
    assert num_stopped > 5


# --- drawing ---


def test_tokens_are_those_of_the_exact_cdf():
    """Against a CDF in double precision, over a vocabulary that is no multiple of the blocks."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (400, 1000)).astype(np.float32)
    uniform = rng.random(400)
    tokens, logprobs = sample(torch.from_numpy(logits), Sampling(), torch.from_numpy(uniform))
    exact = logits.astype(np.float64)
    exact = np.exp(exact - exact.max(1, keepdims=True))
    exact /= exact.sum(1, keepdims=True)
    cdf = exact.cumsum(1)
    at = np.arange(400)
    below = np.where(tokens > 0, cdf[at, tokens.numpy() - 1], 0)
    assert (below - 1e-6 <= uniform).all()
    assert (uniform < cdf[at, tokens.numpy()] + 1e-6).all()
    np.testing.assert_allclose(logprobs, np.log(exact[at, tokens.numpy()]), atol=1e-5)


def test_unlikely_tokens_keep_their_chance():
    """A thousand tokens of 1e-9 after one that takes the rest: single precision has no such steps
    near 1, so a CDF in it would draw each of them never, or far too often."""
    p = np.full(1001, 1e-9)
    p[0] = 1 - p[1:].sum()
    logits = torch.from_numpy(np.log(p)).float().repeat(1000, 1)
    uniform = torch.from_numpy(p[0] + (np.arange(1000) + 0.5) * 1e-9)
    tokens, _ = sample(logits, Sampling(), uniform)
    # The single-precision softmax itself moves the boundary by up to 6e-8, or 60 of these tokens.
    expected = np.arange(1, 1001)
    assert np.abs(tokens.numpy() - expected).max() < 130
    assert (np.diff(tokens.numpy()) >= 0).all()
    assert len(set(tokens.tolist())) > 850


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn(uniform):
    logits = torch.full((3, 300), -float("inf"))
    logits[0, 7] = logits[1, 255] = logits[2, 299] = 0.0
    tokens, logprobs = sample(logits, Sampling(), torch.full((3,), uniform).double())
    assert tokens.tolist() == [7, 255, 299]
    assert logprobs.tolist() == [0, 0, 0]


# --- attention over prefixes ---


@pytest.mark.parametrize("masked", [False, True])
def test_reading_a_prefix_gives_outputs_and_their_mass(masked):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 3, n, 8)).astype(np.float32) for n in (5, 7, 7))
    mask = np.zeros((2, 1, 5, 7), np.float32)
    if masked:
        mask[1, 0, :, 4:] = mask[0, 0, 2, :3] = decoding.HIDDEN
    scores = (q.astype(np.float64) * 0.3) @ k.astype(np.float64).swapaxes(-1, -2) + mask
    mass = np.log(np.exp(scores).sum(-1))
    out = np.exp(scores - mass[..., None]) @ v
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    for read in (decoding._read, decoding._read_plainly):
        found = read(*tensors, mask=torch.from_numpy(mask) if masked else None, scaling=0.3)
        np.testing.assert_allclose(found[0], out, atol=1e-5)
        np.testing.assert_allclose(found[1], mass, atol=1e-5)


# --- the recorded forward ---


def test_a_recording_is_the_stock_forward_and_follows_the_weights(learner):
    model = learner.policy.model
    requests = requests_for(learner.policy, count=12)
    first = learner.policy.generate(requests)
    assert model.recording.refusal is None
    with torch.inference_mode():
        for num in (1, 9, 30):
            tokens, positions = torch.arange(num) % 40, torch.arange(num) + 3
            plan = PackedPlan.of([Segment(0, num, None)], device=torch.device("cpu"))
            recorded = model.recording.hidden(tokens, positions, plan)
            torch.testing.assert_close(recorded, model.hidden(tokens, positions, plan))
    with torch.no_grad():
        for weight in model.causal.parameters():
            weight.mul_(1.1)
            weight.data = weight.data.clone()
    second = learner.policy.generate(requests)
    assert [c.tokens.tolist() for c in first] != [c.tokens.tolist() for c in second]
    # A model that was never recorded draws the same from the changed weights.
    fresh = replace(model)
    fresh.recording._refusal = "for this test"
    renderer = learner.policy.renderer
    again = generate(fresh, requests, end_tokens=renderer.end_tokens, decode=renderer.text)
    same(again, second)


def test_adapters_are_not_recorded(engine, tiny_folder):
    lora = Lora(rank=2)
    adapted = engine.learner(str(tiny_folder), name="test", optimizer=Optimizer(lr=1e-3), lora=lora)
    check_policy(adapted.policy, [Task(taskset="t", prompt=p) for p in PROMPTS])
    assert "no module of the model library" in adapted.policy.model.recording.refusal


def test_a_branch_on_values_is_not_recorded(engine, tmp_path):
    """Dynamic rotary embeddings look at the largest position."""
    folder = tiny_model(tmp_path / "m")
    rebuilt(
        folder,
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}},
    )
    policy = engine.policy(str(folder))
    policy.generate(requests_for(policy, count=2))
    assert "a branch depends on values" in policy.model.recording.refusal


# --- ids that no token has ---


class Holed:
    """A tokenizer without some ids."""

    def __init__(self, tokenizer, *holes):
        self._vocab = {t: i for t, i in tokenizer.get_vocab().items() if i not in holes}

    def get_vocab(self):
        return self._vocab


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.5}, {"top_k": 5}, {"top_p": 0.9}, {"temperature": 0.0}]
)
def test_rows_of_the_head_without_a_token_are_never_drawn(engine, tiny_folder, sampling):
    """Padding rows after the tokens, and a hole between them; the others keep their chances."""
    policy = engine.policy(str(tiny_folder))
    model, tokens = policy.model, len(policy.model.tokenizer)
    assert model.unused_U.tolist() == [tokens, tokens + 1, tokens + 2]
    bias = torch.zeros(model.vocab_size)
    bias[[20, tokens, tokens + 2]] = 4.0  # where the model would go most of the time
    hidden = torch.randn(300, model.causal.config.hidden_size)
    logits = model.head(hidden) + bias
    unused = replace(model, tokenizer=Holed(model.tokenizer, 20)).unused_U
    uniform = torch.from_numpy(np.random.default_rng(0).random(300))
    spec = Sampling(**sampling)
    drawn, logprobs = sample(logits, spec, uniform, unused_U=unused)
    assert not set(drawn.tolist()) & {20, tokens, tokens + 1, tokens + 2}
    if spec.is_truncated or spec.temperature == 0:
        narrowed = logits.clone()
        narrowed[:, unused] = -float("inf")
        among, expected = sample(narrowed, spec, uniform)
        assert drawn.tolist() == among.tolist()
    else:
        # What training computes: the softmax over all rows, at the temperature.
        expected = (logits / spec.temperature).log_softmax(-1).gather(-1, drawn[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected)


def test_every_draw_is_a_token_and_on_policy_the_ratio_is_one(engine, tiny_folder):
    policy = engine.policy(str(tiny_folder))
    (prompt,) = [policy.renderer.prompt(Task(taskset="t", prompt="a"))]
    requests = [
        Request(prompt=prompt.tokens, sampling=Sampling(seed=i), max_new_tokens=20)
        for i in range(100)
    ]
    drawn = policy.generate(requests)
    assert max(int(c.tokens.max()) for c in drawn) < len(policy.model.tokenizer)
    trajectories = [_completed(policy, prompt, c) for c in drawn]
    for trajectory, values in zip(trajectories, policy.logprobs(trajectories), strict=True):
        at = trajectory.trainable
        np.testing.assert_allclose(values[at], trajectory.behaviour_logprobs[at], atol=1e-5)
