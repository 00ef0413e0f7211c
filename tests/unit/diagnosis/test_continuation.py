"""The continuation curve of toy policies that fail at a known place."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.core.errors import ConfigError, TaskError
from posttrain.diagnosis.continuation import continuation, prefix_of
from posttrain.diagnosis.drawing import Demonstration
from posttrain.testing import RuleTaskSet, TablePolicy

LENGTH = 8
TASKS = RuleTaskSet(tuple(f"{i}:" for i in range(12)), lambda p, a: a == "a" * LENGTH)
DEMOS = [
    Demonstration(task=t, tokens=np.array([ord("a")] * LENGTH + [0], np.int32))
    for t in TASKS.held_out
]


def walker(right: list[float]) -> TablePolicy:
    """Writes the next "a" with the probability of its depth, then ends; any "b" is fatal."""

    def table(text: str) -> tuple[float, ...]:
        answer = text.partition(":")[2]
        if len(answer) == LENGTH:
            return (0.0, 0.0, 1.0)
        p = right[len(answer)]
        return (p, 1 - p, 0.0)

    return TablePolicy("ab", table)


def curve(right: list[float], samples: int = 64):  # type: ignore[no-untyped-def]
    return continuation(
        walker(right), TASKS, DEMOS, samples=samples, max_new_tokens=LENGTH + 1, seed=2
    )


@pytest.mark.parametrize(
    ("right", "missing"),
    [
        ([0.05] + [1.0] * 7, "entry"),
        ([1.0] + [0.7] * 5 + [1.0] * 2, "skill"),
        ([1.0] * 7 + [0.02], "support"),
    ],
)
def test_success_from_every_share_is_the_product_of_what_is_left(right, missing) -> None:  # type: ignore[no-untyped-def]
    got = curve(right)
    for share, given in zip(got.shares, (0, 2, 4, 6), strict=True):
        truth = float(np.prod(right[given:]))
        interval = got.success(share)
        assert interval.low - 0.01 <= truth <= interval.high + 0.01
    assert got.given == (0.0, 0.25, 0.5, 0.75)
    entry, way = got.gain(0.0, 0.25), got.gain(0.25, 0.75)
    if missing == "entry":
        assert entry.low > 0.8
        assert way.high < 0.3
    elif missing == "skill":
        assert way.low > 0.5
    else:
        assert got.success(0.75).high < 0.3
        assert entry.high < 0.3
    assert [r.name for r in got.readings] == [
        "continue@0", "continue@0.25", "continue@0.5", "continue@0.75",
    ]  # fmt: skip


def test_intervals_cover_the_truth_over_seeds() -> None:
    # Prompts differ: the rate of prompt i is known, and the mean over a large pool is the truth.
    rng, hits = np.random.default_rng(0), []
    for seed in range(60):
        rates = rng.beta(1, 2, 12)

        def table(text: str, rates: np.ndarray = rates) -> tuple[float, ...]:
            prompt, _, answer = text.partition(":")
            p = float(rates[int(prompt)]) if len(answer) == LENGTH - 1 else 1.0
            return (0.0, 0.0, 1.0) if len(answer) == LENGTH else (p, 1 - p, 0.0)

        got = continuation(
            TablePolicy("ab", table), TASKS, DEMOS, samples=8, max_new_tokens=LENGTH + 1,
            seed=seed, shares=(0.75,),
        )  # fmt: skip
        interval = got.success(0.75)
        hits.append(interval.low <= 1 / 3 <= interval.high)
    assert np.mean(hits) >= 0.87


def test_prompts_count_alike_however_many_demonstrations_they_have() -> None:
    policy = walker([1.0] * 7 + [0.5])
    once = continuation(policy, TASKS, DEMOS[:2], samples=200, max_new_tokens=9, seed=0)
    other = Demonstration(task=DEMOS[0].task, tokens=np.array([98] * 8 + [0], np.int32))
    more = continuation(
        policy, TASKS, [*DEMOS[:2], *[other] * 3], samples=200, max_new_tokens=9, seed=0
    )
    assert once.rates[1].tolist() == more.rates[1].tolist()
    assert once.rates[0, 0] == more.rates[0, 0]  # no beginning: drawn once
    assert more.rates[0, 3] == pytest.approx(once.rates[0, 3] / 4)  # three beginnings are hopeless


def test_a_beginning_never_gives_more_than_was_asked_for() -> None:
    for length in range(2, 12):
        tokens = np.arange(length)
        for share in (0.0, 0.25, 0.5, 0.75, 0.99):
            assert len(prefix_of(tokens, share)) <= share * (length - 1)
    short = [Demonstration(task=DEMOS[0].task, tokens=np.array([97, 97, 0], np.int32))]
    got = continuation(walker([1.0] * 8), TASKS, short, samples=1, max_new_tokens=9, seed=0)
    assert got.given == (0.0, 0.0, 0.5, 0.5)
    assert "nothing is given" in got.readings[1].words


def test_nothing_to_begin_with_and_no_room_are_refused() -> None:
    policy = walker([1.0] * 8)
    with pytest.raises(ConfigError, match="0 demonstrations"):
        continuation(policy, TASKS, [], max_new_tokens=9, seed=0)
    for shares in ((0.5, 0.25), (0.5, 1.0), (-0.1,)):
        with pytest.raises(ConfigError):
            continuation(policy, TASKS, DEMOS, max_new_tokens=9, seed=0, shares=shares)
    tight = TablePolicy("ab", policy.next, context=7)
    with pytest.raises(TaskError, match="has 7 tokens"):
        continuation(tight, TASKS, DEMOS, max_new_tokens=9, seed=0)
    with pytest.raises(ConfigError):
        curve([1.0] * 8, samples=2).success(0.3)
