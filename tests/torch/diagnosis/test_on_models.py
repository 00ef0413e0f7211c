"""The probes that ask for log-probs, on real (tiny) models: what must hold exactly does."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.core.errors import ModelError, TaskError
from posttrain.diagnosis.adaptive import AdaptiveDesign, adaptive_support
from posttrain.diagnosis.continuation import continuation
from posttrain.diagnosis.drawing import Demonstration, draw_answers, token_logprobs
from posttrain.diagnosis.drift import drift
from posttrain.diagnosis.exposure import exposure_to_demonstrations, exposure_to_teacher
from posttrain.diagnosis.reachability import reachability
from posttrain.engines.local.engine import LocalEngine, LocalPolicy
from posttrain.testing import RuleTaskSet, tiny_model

LENGTH = 5


def has_letter(prompt: str, answer: str) -> bool:
    return any(c in "aeiou" for c in answer)


TASKS = RuleTaskSet(("1+1=", "7*8=", "abc", "what", "x y z", "12"), has_letter)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalPolicy, LocalPolicy]:
    """Two models of one tokenizer: the second is the first with logits multiplied by 1.5."""
    folder = tiny_model(tmp_path_factory.mktemp("model"), seed=1)
    engine = LocalEngine(device=torch.device("cpu"))
    first, second = engine.policy(str(folder)), engine.policy(str(folder))
    with torch.no_grad():
        second.model.causal.get_decoder().norm.weight.mul_(1.5)
    return first, second


def test_log_probs_of_a_draw_are_those_of_its_score(pair) -> None:  # type: ignore[no-untyped-def]
    policy, _ = pair
    groups = draw_answers(policy, TASKS, TASKS.held_out, samples=8, max_new_tokens=LENGTH, seed=0)
    flat = [a for g in groups for a in g]
    for answer, logs in zip(
        flat, token_logprobs(policy, [a.trajectory for a in flat]), strict=True
    ):
        assert logs.sum() == pytest.approx(answer.logprob, abs=1e-4)


def test_a_model_reaches_what_it_does_at_the_rate_it_does(pair) -> None:  # type: ignore[no-untyped-def]
    policy, _ = pair
    found = reachability(
        policy, policy, TASKS, samples=64, max_new_tokens=LENGTH, seed=0, tasks=TASKS.held_out
    )
    for one in found.prompts:  # every weight is 1, so the plain estimate is the rate
        assert one.weighted == pytest.approx(math.log10(one.successes / 64), abs=1e-4)
        assert one.floor <= one.log10 + 1e-9


def test_reachability_of_one_model_through_another_is_its_own_rate(pair) -> None:  # type: ignore[no-untyped-def]
    base, later = pair
    found = reachability(
        base, later, TASKS, samples=512, max_new_tokens=LENGTH, seed=0, tasks=TASKS.held_out
    )
    groups = draw_answers(base, TASKS, TASKS.held_out, samples=512, max_new_tokens=LENGTH, seed=9)
    for one, group in zip(found.prompts, groups, strict=True):
        rate = np.mean([a.success for a in group])
        slack = 4 * math.sqrt(rate * (1 - rate) / 512)
        assert one.low <= math.log10(rate + slack)
        if one.trusted:
            assert 0.5 * (rate - slack) <= 10**one.log10 <= 2 * (rate + slack)


def test_a_model_has_not_moved_from_itself_and_has_from_its_sharper_self(pair) -> None:  # type: ignore[no-untyped-def]
    policy, sharper = pair
    same = drift(policy, policy, TASKS, samples=4, max_new_tokens=LENGTH, seed=0)
    assert same.reverse.nats.tolist() == [0.0] * 6
    moved = drift(sharper, policy, TASKS, samples=64, max_new_tokens=LENGTH, seed=0)
    assert moved.reverse.per_answer.low > 0
    assert moved.forward.per_answer.low > 0
    assert moved.surprise is not None
    assert (
        moved.surprise.mean_rank.value > 0.5
    )  # a sharper policy writes what the base finds likely


def test_the_summed_divergence_of_full_distributions_agrees_with_the_sampled_one(pair) -> None:  # type: ignore[no-untyped-def]
    policy, sharper = pair
    exact = exposure_to_teacher(policy, sharper, TASKS, samples=64, max_new_tokens=3, seed=0)
    per_answer = exact.right.errors.sum(1) / 64  # KL(teacher ‖ policy) on the teacher's draws
    sampled = drift(sharper, policy, TASKS, samples=64, max_new_tokens=3, seed=0).reverse
    assert exact.depth == 3
    assert per_answer.mean() == pytest.approx(sampled.nats.mean(), rel=0.25)
    assert exposure_to_teacher(
        policy, policy, TASKS, samples=2, max_new_tokens=3, seed=0
    ).own.errors.max() < 1e-6  # fmt: skip


def test_demonstrations_adaptive_and_continuation_run_on_a_model(pair) -> None:  # type: ignore[no-untyped-def]
    policy, _ = pair
    groups = draw_answers(policy, TASKS, TASKS.held_out, samples=4, max_new_tokens=LENGTH, seed=3)
    demos = [Demonstration(task=g[0].task, tokens=g[0].tokens) for g in groups]
    along = exposure_to_demonstrations(
        policy, TASKS, demos, samples=4, max_new_tokens=LENGTH, seed=0
    )
    for group, written in zip(groups, along.written, strict=True):
        assert math.log(written) == pytest.approx(group[0].logprob, abs=1e-4)
    design = AdaptiveDesign(epsilon=0.1, budget=600)
    labels = adaptive_support(policy, TASKS, design=design, max_new_tokens=LENGTH, seed=0)
    assert labels.tally.spent <= 600
    curve = continuation(policy, TASKS, demos, samples=4, max_new_tokens=LENGTH, seed=0)
    assert curve.rates.shape == (6, 4)


def test_other_tokenizers_and_long_prompts_are_refused(pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    policy, _ = pair
    engine = LocalEngine(device=torch.device("cpu"))
    folder = tiny_model(tmp_path / "other", seed=2)
    config = folder / "tokenizer.json"
    config.write_text(config.read_text().replace('"q"', '"Q"'))
    other = engine.policy(str(folder))
    with pytest.raises(ModelError, match="different tokens"):
        drift(other, policy, TASKS, max_new_tokens=2, seed=0)
    design = AdaptiveDesign(epsilon=0.1, budget=100)
    assert adaptive_support(other, TASKS, design=design, max_new_tokens=2, seed=0).tally.spent
    long = RuleTaskSet(("a" * 200,), has_letter)
    with pytest.raises(TaskError, match="has 200 tokens"):
        drift(policy, policy, long, max_new_tokens=2, seed=0)
