"""Whatever the schedule, a request gets what it gets alone: same tokens, same log-probs."""

from dataclasses import dataclass, replace
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.core.provenance import Sampling
from posttrain.engines.local import decoding, sampler
from posttrain.engines.local.sampler import generate
from posttrain.protocols import Request
from posttrain.testing import tiny_model
from posttrain.testing.tiny import tiny_tokenizer

KINDS = (
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=3),
    Sampling(temperature=0.0),
    Sampling(stop=("e", "12")),
)


@dataclass(frozen=True)
class Many:
    """A group of requests with one prompt."""

    prompt: int  # length, and content
    count: int = 1
    budget: int = 2
    kind: int = 0

    def requests(self):
        tokens = (np.arange(self.prompt) * 7 + self.prompt) % 40 + 6
        return [
            Request(
                prompt=tokens.astype(np.int32),
                sampling=replace(KINDS[self.kind], seed=seed),
                max_new_tokens=self.budget,
            )
            for seed in range(self.count)
        ]


@dataclass(frozen=True)
class Limits:
    """What bounds a schedule, as small as it may get."""

    rows: int = 4
    prefill: int = 8192
    key_values: int = 2**31
    compact: float = 0.75
    logits: int = 2**20
    look: int = 1
    stop: int = 8
    columns: int = 64

    def applied(self):
        changed = patch.multiple(
            sampler,
            MAX_ROWS=self.rows,
            PREFILL_TOKENS=self.prefill,
            KEY_VALUE_BYTES=self.key_values,
            COMPACT_BELOW=self.compact,
            LOGIT_ELEMENTS=self.logits,
            LOOK_EVERY={"cpu": self.look},
            STOP_EVERY=self.stop,
        )
        return changed, patch.object(decoding, "COLUMNS", self.columns)


groups = st.lists(
    st.builds(
        Many,
        prompt=st.integers(1, 12),
        count=st.integers(1, 9),
        budget=st.sampled_from([1, 2, 3, 7, 12]),
        kind=st.integers(0, len(KINDS) - 1),
    ),
    min_size=1,
    max_size=5,
)
limits = st.builds(
    Limits,
    rows=st.integers(1, 12),
    prefill=st.sampled_from([1, 20, 8192]),
    key_values=st.sampled_from([1, 256 * 40, 256 * 90, 2**31]),
    compact=st.sampled_from([0.0, 0.5, 0.75, 1.0]),
    logits=st.sampled_from([1, 200, 2**20]),
    look=st.sampled_from([1, 2, 8]),
    stop=st.sampled_from([1, 3, 8]),
    columns=st.sampled_from([1, 4, 64]),
)
ends = st.frozensets(st.integers(0, 46), max_size=8)


def learned_positions(folder):
    """A GPT-2 with 20 positions and no more."""
    tokenizer = tiny_tokenizer()
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 20, "initializer_range": 0.3}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), **sizes, **ends)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["qwen3", "mistral", "gpt2"])
def alone(request, engine, tmp_path_factory):
    """A model, and what each request gets from it alone."""
    folder = tmp_path_factory.mktemp("m") / "m"
    if request.param == "gpt2":
        learned_positions(folder)
    else:
        tiny_model(folder, family=request.param, context=20)
    policy = engine.policy(str(folder))
    model, text = policy.model, policy.renderer.text

    @cache
    def drawn(group, end_tokens):
        return [draw([r], end_tokens)[0] for r in group.requests()]

    def draw(requests, end_tokens):
        return generate(model, requests, end_tokens=end_tokens, decode=text)

    return draw, drawn


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(groups=groups, limits=limits, ends=ends, order=st.randoms(use_true_random=False))
@example([Many(2, count=7, budget=12), Many(12, count=1)], Limits(rows=8), frozenset(), None)
@example([Many(3, count=7)], Limits(), frozenset(), None)  # a wave, and most of a wave after it
@example([Many(3, count=6, budget=1), Many(5, count=3)], Limits(), frozenset(), None)
@example([Many(3, count=9), Many(3, count=2, budget=7)], Limits(look=8), frozenset({9}), None)
def test_a_request_gets_what_it_gets_alone(alone, groups, limits, ends, order):
    draw, drawn = alone
    pairs = [p for g in groups for p in zip(g.requests(), drawn(g, ends), strict=True)]
    if order is not None:
        order.shuffle(pairs)
    schedule, storage = limits.applied()
    with schedule, storage:
        found = draw([r for r, _ in pairs], ends)
    for (_, expected), completion in zip(pairs, found, strict=True):
        assert completion.tokens.tolist() == expected.tokens.tolist()
        assert completion.end is expected.end
        np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=1e-5)
