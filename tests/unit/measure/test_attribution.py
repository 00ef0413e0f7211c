"""Attribution: parts that add up exactly, and their expectation by full enumeration."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest
from measurements import measured, policy

from posttrain.core.errors import ConfigError, RunError
from posttrain.measure.attribution import (
    FOLDS,
    MATERIAL,
    ChangeKind,
    MeasuredRole,
    attribute,
    attribute_changes,
    contributions,
    role_in_run,
)
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.spec import Measure
from posttrain.measure.support import cutoffs

EPSILON = Measure(samples=64).threshold
NAMES = (
    "kept",
    "newly_reachable",
    "sharpened",
    "weakened",
    "lost",
    "undetermined_gain",
    "undetermined_loss",
)


def sampled(rates: np.ndarray, rng: np.random.Generator, n: int = 64) -> TaskMeasurement:
    return measured(rng.random((len(rates), n)) < np.asarray(rates)[:, None])


def split(before: TaskMeasurement, after: TaskMeasurement, epsilon: float = EPSILON) -> dict:  # type: ignore[type-arg]
    cells = contributions(before, after, epsilon=epsilon, confidence=0.95)
    return {name: np.asarray(object.__getattribute__(cells, name)) for name in NAMES}


# --- exact identities ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 16, 63, 64])
@pytest.mark.parametrize("seed", range(4))
def test_parts_add_up_for_every_prompt(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = np.round(rng.beta(0.3, 0.5, 50), 2)
    before, after = sampled(p, rng, n), sampled(np.roll(p, seed), rng, n)
    part = split(before, after, epsilon=max(0.05, 1 - 0.05 ** (1 / n)))
    p0, p1 = before.counts / n, after.counts / n
    gains = part["newly_reachable"] + part["sharpened"] + part["undetermined_gain"]
    losses = part["weakened"] + part["lost"] + part["undetermined_loss"]
    assert part["kept"] + gains == pytest.approx(p1, abs=1e-12)
    assert part["kept"] + losses == pytest.approx(p0, abs=1e-12)


def test_reported_parts_add_up_to_the_change() -> None:
    rng = np.random.default_rng(1)
    p = rng.beta(0.3, 0.5, 40)
    a = attribute(sampled(p, rng), sampled(p[::-1], rng), epsilon=EPSILON)
    v = {part: interval.value for part, interval in a.parts.items()}
    signed = (
        v[ChangeKind.NEWLY_REACHABLE]
        + v[ChangeKind.SHARPENED]
        - v[ChangeKind.WEAKENED]
        - v[ChangeKind.LOST]
    )
    assert set(v) == set(ChangeKind)
    assert signed + v[ChangeKind.UNDETERMINED] == pytest.approx(a.change.value, abs=1e-12)
    assert a.after.value - a.before.value == pytest.approx(a.change.value, abs=1e-12)
    net = a.undetermined_gain.value - a.undetermined_loss.value
    assert v[ChangeKind.UNDETERMINED] == pytest.approx(net, abs=1e-12)
    assert a.balance.value == pytest.approx(a.gained.value - a.gone.value, abs=1e-12)
    assert a.gained.value == pytest.approx(
        v[ChangeKind.NEWLY_REACHABLE] + v[ChangeKind.SHARPENED], abs=1e-12
    )
    assert a.gone.value == pytest.approx(v[ChangeKind.WEAKENED] + v[ChangeKind.LOST], abs=1e-12)
    gains = a.gained.value + a.undetermined_gain.value
    assert v[ChangeKind.KEPT] + gains == pytest.approx(a.after.value, abs=1e-12)


def test_turning_time_around_turns_gains_into_losses() -> None:
    rng = np.random.default_rng(2)
    p = rng.beta(0.3, 0.5, 40)
    before, after = sampled(p, rng), sampled(p[::-1], rng)
    there, back = split(before, after), split(after, before)
    assert back["kept"] == pytest.approx(there["kept"], abs=1e-15)
    assert back["lost"] == pytest.approx(there["newly_reachable"], abs=1e-15)
    assert back["weakened"] == pytest.approx(there["sharpened"], abs=1e-15)
    assert back["undetermined_loss"] == pytest.approx(there["undetermined_gain"], abs=1e-15)


def test_identical_samples_are_all_kept() -> None:
    task = sampled(np.linspace(0, 1, 11), np.random.default_rng(3))
    part = split(task, task)
    assert part["kept"] == pytest.approx(task.counts / 64, abs=1e-15)
    assert all(not part[name].any() for name in NAMES if name != "kept")


@pytest.mark.parametrize(
    ("rates", "name"),
    [
        ((0.0, 0.9), "newly_reachable"),
        ((0.3, 0.9), "sharpened"),
        ((0.9, 0.3), "weakened"),
        ((0.9, 0.0), "lost"),
    ],
)
def test_clear_changes_land_in_their_part(rates: tuple[float, float], name: str) -> None:
    spread = np.arange(64) % 10  # every fold sees nearly the rate
    before, after = (measured((spread < 10 * r)[None]) for r in rates)
    part = split(before, after)
    moved = abs(after.counts[0] - before.counts[0]) / 64
    assert part[name] == pytest.approx(moved, abs=1e-12)
    assert part["kept"] == pytest.approx(min(before.counts[0], after.counts[0]) / 64, abs=1e-12)


def test_a_change_that_labels_cannot_place_is_undetermined() -> None:
    few = measured(np.isin(np.arange(64), (0, 33))[None])  # 2 of 64, in two folds: not sure
    many = measured((np.arange(64) % 2 == 0)[None])
    gain = split(few, many)
    assert gain["undetermined_gain"] == pytest.approx(30 / 64)
    assert split(many, few)["undetermined_loss"] == pytest.approx(30 / 64)


# --- exact expectations ----------------------------------------------------------------------


def expectation(p0: float, p1: float, n: int, epsilon: float) -> dict[str, float]:
    """E[part] for one prompt with known success rates, over every outcome of every fold."""
    size = n // FOLDS
    grid = np.array(list(product(range(size + 1), repeat=FOLDS)))  # successes per fold
    binomial = [np.array([comb(size, c) * p**c * (1 - p) ** (size - c) for c in range(size + 1)])
                for p in (p0, p1)]  # fmt: skip
    w0, w1 = (np.prod(b[grid], axis=1) for b in binomial)
    i, j = (x.ravel() for x in np.meshgrid(range(len(grid)), range(len(grid)), indexing="ij"))

    def samples(counts: np.ndarray) -> np.ndarray:
        turn = np.arange(size)  # sample s of fold f stands at s * FOLDS + f
        return (turn[None, :, None] < counts[:, None, :]).reshape(len(counts), n)

    part = split(measured(samples(grid[i])), measured(samples(grid[j])), epsilon)
    return {name: float((w0[i] * w1[j]) @ part[name]) for name in NAMES}


@pytest.mark.parametrize("p", [0.0, 0.03, 0.12, 0.3, 0.5, 0.85, 1.0])
def test_no_change_gives_every_part_expectation_zero(p: float) -> None:
    # The 6 samples that decide give all three labels, so that every cell has its share.
    assert cutoffs(6, epsilon=0.32, confidence=1 - 0.05**0.75) == (0, 4)
    e = expectation(p, p, 8, 0.32)
    assert e.pop("kept") == pytest.approx(p, abs=1e-12)
    assert e == pytest.approx(dict.fromkeys(e, 0.0), abs=1e-12)


def test_a_real_change_is_expected_in_full_and_mostly_in_its_part() -> None:
    e = expectation(0.0, 0.95, 8, 0.32)
    gains = e["newly_reachable"] + e["sharpened"] + e["undetermined_gain"]
    losses = e["weakened"] + e["lost"] + e["undetermined_loss"]
    assert gains - losses == pytest.approx(0.95, abs=1e-12)
    assert losses == pytest.approx(-0.95 * 0.05**6 / 2, abs=1e-15)  # six samples tie, all failed
    assert e["newly_reachable"] > 0.8
    assert e["sharpened"] == pytest.approx(0.0, abs=1e-12)


def test_no_change_over_many_prompts_within_monte_carlo_error() -> None:
    rng = np.random.default_rng(4)
    p = rng.beta(0.4, 0.8, 20_000)
    part = split(sampled(p, rng), sampled(p, rng))
    for name in NAMES[1:]:
        error = part[name].std() / np.sqrt(len(p))
        assert error < 4e-4
        assert abs(part[name].mean()) < 4 * error + 1e-9, name
    naive = np.clip(sampled(p, rng).counts - sampled(p, rng).counts, 0, None).mean() / 64
    assert naive > 0.01  # what positive parts of noisy differences would have claimed


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_intervals_of_the_parts_cover(power: float) -> None:
    rng = np.random.default_rng(5)
    p = rng.beta(0.4, 0.8, 30_000)
    part = split(sampled(p, rng), sampled(p**power, rng))
    truth = {
        p: part[str(p)].mean()
        for p in (ChangeKind.SHARPENED, ChangeKind.WEAKENED, ChangeKind.KEPT, ChangeKind.LOST)
    }
    hits: dict[ChangeKind, list[bool]] = {t: [] for t in truth}
    for _ in range(150):
        p = rng.beta(0.4, 0.8, 24)
        a = attribute(sampled(p, rng), sampled(p**power, rng), epsilon=EPSILON)
        for t, expected in truth.items():
            value = max(expected, 0.0)  # an amount below zero reads as zero
            hits[t].append(a.parts[t].low <= value <= a.parts[t].high)
    for t in truth:
        assert np.mean(hits[t]) >= 0.9, t


# --- roles -----------------------------------------------------------------------------------


def role(p0: np.ndarray, p1: np.ndarray, seed: int = 0) -> MeasuredRole:
    rng = np.random.default_rng(seed)
    return attribute(sampled(p0, rng), sampled(p1, rng), epsilon=EPSILON).dominant


MIDDLE = np.linspace(0.2, 0.8, 24)
HALF_OUT = np.where(np.arange(24) < 12, 0.0, 0.6)


@pytest.mark.parametrize("seed", range(5))
def test_roles_of_policies_with_known_rates(seed: int) -> None:
    reach = np.where(HALF_OUT == 0, 0.7, HALF_OUT)
    assert role(HALF_OUT, reach, seed) is MeasuredRole.EXPANSION
    assert role(MIDDLE, MIDDLE**0.3, seed) is MeasuredRole.RESHAPING
    assert role(MIDDLE**0.3, MIDDLE, seed) is MeasuredRole.ATTRITION
    assert role(reach, HALF_OUT, seed) is MeasuredRole.ATTRITION
    assert role(np.zeros(24), np.zeros(24), seed) is MeasuredRole.UNDETERMINED
    assert role(np.full(24, 0.03), np.full(24, 0.4), seed) is MeasuredRole.UNDETERMINED


def test_gains_smaller_than_losses_are_attrition() -> None:
    before = np.where(np.arange(24) < 4, 0.0, 0.9)
    after = np.where(np.arange(24) < 4, 0.9, 0.2)
    assert role(before, after) is MeasuredRole.ATTRITION


def test_no_change_is_consolidation_and_hardly_ever_anything_else() -> None:
    roles = [role(MIDDLE, MIDDLE, seed) for seed in range(60)]
    assert roles.count(MeasuredRole.CONSOLIDATION) >= 48
    assert roles.count(MeasuredRole.EXPANSION) == 0
    assert role(np.ones(24), np.ones(24)) is MeasuredRole.CONSOLIDATION


def test_gains_and_losses_of_equal_size_are_no_role() -> None:
    half = np.where(np.arange(24) < 12, 0.9, 0.0)
    roles = [role(half, half[::-1], seed) for seed in range(10)]
    assert roles == [MeasuredRole.UNDETERMINED] * 10


def test_an_amount_never_claims_to_be_below_zero() -> None:
    rng = np.random.default_rng(8)
    for _ in range(20):
        a = attribute(sampled(MIDDLE, rng), sampled(MIDDLE**0.8, rng), epsilon=EPSILON)
        for amount in (a.gained, a.gone, a.parts[ChangeKind.WEAKENED], a.undetermined_loss):
            assert amount.low <= amount.value <= amount.high
            assert amount.high >= 0
        assert a.retention is not None
        assert a.retention.low <= 1


def test_too_few_prompts_to_speak_of_keeping() -> None:
    assert role(np.ones(4), np.ones(4)) is MeasuredRole.UNDETERMINED


def test_retention() -> None:
    rng = np.random.default_rng(6)
    half = np.where(np.arange(40) % 2 == 0, 0.8, 0.0)
    a = attribute(sampled(np.full(40, 0.8), rng), sampled(half, rng), epsilon=EPSILON)
    assert a.retention is not None
    assert a.retention.low <= 0.5 <= a.retention.high
    kept = a.parts[ChangeKind.KEPT].value / a.before.value
    assert a.retention.value == pytest.approx(kept, abs=1e-12)
    from_nothing = attribute(sampled(half * 0, rng), sampled(half, rng), epsilon=EPSILON)
    assert from_nothing.retention is None


# --- comparing -------------------------------------------------------------------------------


def test_compare_takes_tasks_by_name_and_repeats() -> None:
    rng = np.random.default_rng(7)
    sums, products = (rng.random((16, 64)) < rng.beta(0.5, 0.5, (16, 1)) for _ in range(2))
    base = policy(measured(sums, "sums"), measured(products, "products"))
    tuned = policy(measured(products, "products"), measured(~sums, "sums"), name="tuned")
    c = attribute_changes(base, tuned, epsilon=EPSILON, seed=5)
    assert (c.before, c.after) == ("base", "tuned")
    assert [t.task for t in c.tasks] == [s.task for s in c.support] == ["sums", "products"]
    assert c.tasks[0].after.value == pytest.approx((~sums).mean())
    assert c.tasks[1].change.value == 0.0
    assert c == attribute_changes(base, tuned, epsilon=EPSILON, seed=5)
    assert c.task("products") is c.tasks[1]
    assert c.task("other") is None


def test_what_cannot_be_compared_is_refused() -> None:
    task = measured(np.zeros((3, 4)))
    with pytest.raises(RunError, match="measured in different ways"):
        attribute_changes(policy(task), policy(task, protocol="q" * 64), epsilon=0.5)
    with pytest.raises(RunError, match="4 and 8 samples"):
        attribute(task, measured(np.zeros((3, 8))), epsilon=0.5)
    with pytest.raises(ConfigError, match="1 sample"):
        attribute(measured(np.zeros((3, 1))), measured(np.zeros((3, 1))), epsilon=0.5)
    with pytest.raises(ConfigError, match="epsilon=0"):
        attribute(task, task, epsilon=0.0)


def test_a_certain_but_immaterial_loss_is_consolidation():
    change = measured_change(np.ones(24), np.full(24, 0.98))
    assert change.gone.is_positive
    assert change.gone.value < MATERIAL
    assert change.dominant is MeasuredRole.CONSOLIDATION


def test_bringing_back_what_an_earlier_policy_could_do_is_consolidation():
    rng = np.random.default_rng(3)
    good, ruined = np.full(24, 0.95), np.full(24, 0.3)
    first, input_, result = (sampled(p, rng) for p in (good, ruined, good))
    change = attribute(input_, result, epsilon=EPSILON)
    earlier = attribute(first, result, epsilon=EPSILON)
    assert change.dominant is MeasuredRole.RESHAPING
    assert role_in_run(change, [earlier]) is MeasuredRole.CONSOLIDATION
    assert role_in_run(change, []) is MeasuredRole.RESHAPING
    never_better = attribute(input_, result, epsilon=EPSILON)
    assert role_in_run(change, [never_better]) is MeasuredRole.RESHAPING
    fell = attribute(first, input_, epsilon=EPSILON)
    assert role_in_run(fell, [earlier]) is MeasuredRole.ATTRITION


def measured_change(p0: np.ndarray, p1: np.ndarray):
    rng = np.random.default_rng(0)
    return attribute(sampled(p0, rng), sampled(p1, rng), epsilon=EPSILON)
