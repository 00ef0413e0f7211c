"""Reachability through real draws: toy policies whose chances are enumerated."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from posttrain.core.errors import ConfigError, ModelError, TaskError
from posttrain.core.sampling import SamplingSpec
from posttrain.diagnosis.drawing import (
    NOTHING,
    answer_seeds,
    demonstration_from,
    demonstrations_from,
    draw_answers,
    token_logprobs,
)
from posttrain.diagnosis.reachability import reach_of, reachability
from posttrain.testing import (
    RuleTaskSet,
    TablePolicy,
    check_policy,
    check_taskset,
    example_trajectory,
)

LENGTH = 5


def writer(skill: float, name: str, *, plain: float = 0.0) -> TablePolicy:
    """Writes "a" with probability ``skill``, else "b" or "c"; a prompt's digit makes it harder.

    With probability ``plain`` it opens with "p" and stops, which also counts as success.
    """

    def table(text: str) -> tuple[float, ...]:
        prompt, _, answer = text.partition(":")
        if answer.startswith("p"):
            return (0.0, 0.0, 0.0, 0.0, 1.0)
        p = skill / (1 + int(prompt))
        first = plain if not answer else 0.0
        left = 1 - first
        return (left * p, left * (1 - p) * 0.7, left * (1 - p) * 0.3, first, 0.0)

    return TablePolicy("abcp", table, name=name)


def wins(prompt: str, answer: str) -> bool:
    return answer == "p" or (len(answer) == LENGTH and answer.count("a") >= LENGTH - 1)


def exact(policy: TablePolicy, prompt: str) -> float:
    logs = [lp for text, lp in policy.answers(prompt, longest=LENGTH) if wins(prompt, text)]
    return float(np.logaddexp.reduce(logs)) / math.log(10)


SET = RuleTaskSet(tuple(f"{i}:" for i in range(4)), wins)
ONE = RuleTaskSet(("0:",), wins)


def test_toy_policies_keep_their_contract() -> None:
    policy = writer(0.6, "toy", plain=0.1)
    check_policy(policy, SET.held_out)
    check_taskset(SET)
    total = sum(math.exp(lp) for _, lp in policy.answers("1:", longest=LENGTH))
    assert total == pytest.approx(1.0)
    ids, top = policy.distributions([example_trajectory(prompt=(49, 58), answer=(97,))], top_k=2)[0]
    assert [chr(i) for i in ids[2]] == ["b", "a"]
    assert np.exp(top[2]) == pytest.approx([0.7 * 0.9 * 0.7, 0.3 * 0.9], rel=1e-5)


@pytest.mark.parametrize("rarity", [0.3, 0.01, 1e-3])
def test_estimates_are_right_down_to_1e_12(rarity: float) -> None:
    base, later = writer(rarity, "base"), writer(0.8, "later")
    truth = exact(base, "0:")
    hits, values = [], []
    for seed in range(40):
        found = reachability(
            base, later, ONE, samples=64, max_new_tokens=LENGTH, seed=seed, tasks=ONE.held_out
        )
        (one,) = found.prompts
        hits.append(one.low <= truth <= one.high)
        values.append(10 ** (one.log10 - truth))
        assert one.floor <= truth + 1e-6
        assert one.trusted
    assert min(hits)  # 95 % is promised; bounds for any weights are wide
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values) - 1) < 4 * error + 1e-6
    if rarity == 1e-3:
        assert truth < -11


def test_the_reading_covers_the_median_prompt_and_counts_what_was_skipped() -> None:
    base, later = writer(0.01, "base"), writer(0.9, "later")
    many = RuleTaskSet(tuple(f"{i}:" for i in range(9)), wins)
    truths = sorted(exact(base, t.text) for t in many.held_out)
    found = reachability(base, later, many, samples=64, max_new_tokens=LENGTH, seed=1)
    assert len(found.prompts) + len(found.skipped) == 9
    assert found.skipped  # prompt 8 is solved in one of 10^5 samples
    solved = sorted(exact(base, t.text) for t in many.held_out if t.key not in found.skipped)
    reading = found.reading
    assert reading is not None
    assert reading.low <= solved[len(solved) // 2] <= reading.high
    assert reading.value == pytest.approx(np.median(solved), abs=0.7)
    assert reading.units == len(found.prompts)
    assert truths[0] < -11


def test_the_base_s_own_samples_bound_from_above() -> None:
    base, later = writer(0.01, "base", plain=1e-3), writer(0.8, "later")
    key = ONE.held_out[0].key
    found = reachability(
        base,
        later,
        ONE,
        samples=64,
        max_new_tokens=LENGTH,
        seed=0,
        tasks=ONE.held_out,
        base_counts={key: (0, 256)},
    )
    (one,) = found.prompts
    truth = exact(base, "0:")
    assert one.log10 < truth - 3  # the base's plain form is one that the later policy dropped
    assert one.low <= truth <= one.high < -1.8
    assert found.reachable(-9) == (1, 0, 0)
    assert found.reachable(-3) == (0, 1, 0)
    assert found.reachable(-1.5) == (0, 0, 1)
    assert "the base's own 256 samples allow 1.4 in 100" in one.words
    solved = reach_of(
        base, draw_answers(later, ONE, ONE.held_out, samples=8, max_new_tokens=LENGTH, seed=0),
        task="rule", seed=0, base_counts={key: (40, 256)},
    ).prompts[0]  # fmt: skip
    assert -1.2 < solved.low <= solved.log10 <= solved.high < -0.6


def test_nobody_solves_it() -> None:
    never = RuleTaskSet(("0:",), lambda prompt, answer: False)
    policy = writer(0.5, "toy")
    found = reachability(policy, policy, never, samples=16, max_new_tokens=LENGTH, seed=0)
    assert found.reading is None
    assert found.skipped == (never.held_out[0].key,)
    asked = reachability(
        policy, policy, never, samples=16, max_new_tokens=LENGTH, seed=0, tasks=never.held_out
    )
    assert asked.prompts[0].log10 == -math.inf
    assert "did not succeed either" in str(asked.prompts[0].doubt)


@pytest.mark.parametrize(
    ("option", "says"), [({"temperature": 0.7}, "temperature=0.7"), ({"top_p": 0.9}, "top_p=0.9")]
)
def test_other_decoding_is_refused_and_named(option, says) -> None:  # type: ignore[no-untyped-def]
    policy = writer(0.5, "toy")
    with pytest.raises(ConfigError, match=says):
        reachability(policy, policy, ONE, max_new_tokens=5, seed=0, sampling=SamplingSpec(**option))


def test_other_tokenizers_templates_and_long_prompts_are_refused_before_drawing() -> None:
    base = writer(0.5, "base")
    other = dataclasses.replace(base, vocabulary="bytes", name="other")
    with pytest.raises(ModelError, match="different tokens"):
        reachability(base, other, ONE, max_new_tokens=5, seed=0)
    short = dataclasses.replace(base, context=2)
    with pytest.raises(TaskError, match="has 2 tokens"):
        reachability(base, short, ONE, max_new_tokens=5, seed=0)
    with pytest.raises(ModelError, match="context of base"):
        reachability(dataclasses.replace(base, context=4), base, ONE, max_new_tokens=5, seed=0)


# --- drawing ---------------------------------------------------------------------------------


def test_answers_depend_on_seed_prompt_and_number_only() -> None:
    policy, tasks = writer(0.5, "toy"), list(SET.held_out)
    whole = draw_answers(policy, SET, tasks, samples=6, max_new_tokens=LENGTH, seed=3)
    rest = draw_answers(
        policy, SET, tasks[::-1], samples=[2] * 4, first=[4] * 4, max_new_tokens=LENGTH, seed=3
    )
    for group, more in zip(whole, rest[::-1], strict=True):
        assert [a.tokens.tolist() for a in group[4:]] == [a.tokens.tolist() for a in more]
        assert [a.success for a in group] == [wins(a.task.text, _text(a.tokens)) for a in group]
    assert answer_seeds(0, tasks[0], 4) != answer_seeds(1, tasks[0], 4)
    assert answer_seeds(0, tasks[0], 4) != answer_seeds(0, tasks[1], 4)
    head = np.array([97], np.int32)
    assert answer_seeds(0, tasks[0], 4, given=head) != answer_seeds(0, tasks[0], 4, given=NOTHING)


def test_what_was_given_is_scored_with_what_was_written() -> None:
    policy = writer(1.0, "sure")
    head = np.array([ord("b")], np.int32)
    ((answer,),) = draw_answers(
        policy, ONE, ONE.held_out, samples=1, max_new_tokens=LENGTH, seed=0, given=[head]
    )
    assert _text(answer.tokens) == "baaaa"
    assert answer.success
    assert len(answer.completion.tokens) == LENGTH - 1


def test_log_probs_of_answers_are_those_of_the_draw() -> None:
    policy = writer(0.5, "toy", plain=0.2)
    groups = draw_answers(policy, SET, SET.held_out, samples=8, max_new_tokens=LENGTH, seed=0)
    flat = [a for g in groups for a in g]
    for answer, logs in zip(
        flat, token_logprobs(policy, [a.trajectory for a in flat]), strict=True
    ):
        assert logs.sum() == pytest.approx(answer.logprob, abs=1e-5)
        assert len(logs) == len(answer.tokens)


def test_demonstrations_are_different_finished_successes() -> None:
    policy = writer(0.9, "toy", plain=0.3)
    groups = draw_answers(policy, ONE, ONE.held_out, samples=32, max_new_tokens=LENGTH, seed=0)
    demos = demonstrations_from(groups)
    assert [_text(d.tokens) for d in demos] == ["p"]  # the others were cut off by the budget
    assert demos[0].tokens.tolist() == [ord("p"), 0]
    task = ONE.held_out[0]
    assert demonstration_from(task, example_trajectory()).tokens.tolist() == [4, 5]


def _text(tokens: np.ndarray) -> str:
    return "".join(chr(t) for t in tokens if t)
