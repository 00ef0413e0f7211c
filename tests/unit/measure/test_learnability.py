"""Signal for on-policy learning: unbiased group statistics, exact shares, known group sizes."""

from __future__ import annotations

import math
from math import comb

import numpy as np
import pytest
from measurements import counted, sampled

from posttrain.core.errors import ConfigError
from posttrain.measure.learnability import informative_at, needed_group
from posttrain.measure.readings import read, take
from posttrain.measure.registry import Estimation


@pytest.mark.parametrize("p", [0.01, 0.3, 0.95])
@pytest.mark.parametrize("group", [1, 2, 5, 12])
def test_the_expectation_of_informative_is_exact(p: float, group: int) -> None:
    n, c = 12, np.arange(13)
    weights = np.array([comb(n, int(i)) * p**i * (1 - p) ** (n - i) for i in c])
    truth = 1 - p**group - (1 - p) ** group
    assert weights @ informative_at(c, n, group) == pytest.approx(truth, abs=1e-14)


def test_zero_variance_split() -> None:
    task = counted([0, 0, 0, 64, 20, 5, 12, 13])
    readings = {name: read(name, task) for name in ("all_wrong@64", "pass^64", "band_share")}
    assert {n: r.value for n, r in readings.items()} == {
        "all_wrong@64": 3 / 8,
        "pass^64": 1 / 8,
        "band_share": 2 / 8,  # 20 and 13 of 64; 12 is below a fifth
    }
    # Clopper and Pearson for 3 of 8, from tables.
    assert readings["all_wrong@64"].low == pytest.approx(0.0852, abs=5e-5)
    assert readings["all_wrong@64"].high == pytest.approx(0.7551, abs=5e-5)


def test_support_shares_add_up() -> None:
    found = {r.name: r for r in take(counted([0, 0, 3, 64]), Estimation(epsilon=0.05))}
    assert [found[n].value for n in ("in_share", "out_share", "undetermined_share")] == [
        0.25,
        0.5,
        0.25,
    ]


def test_needed_group_of_known_rates() -> None:
    # 1 − 0.9^G − 0.1^G first reaches one half at G = 7 (0.522; 0.469 at 6).
    r = read("needed_group", sampled(np.full(600, 0.1), n=64))
    assert r.value == 7.0
    assert 6.0 <= r.low <= 7.0 <= r.high <= 8.0


def test_prompts_without_variance_never_help() -> None:
    mixed = read(
        "needed_group", counted([0, 0, 0, 32] * 10)
    )  # at most a quarter is ever informative
    assert (mixed.value, mixed.high) == (math.inf, math.inf)
    assert math.isfinite(needed_group(counted([0, 0, 0, 32] * 10), share=0.1).interval.high)
    with pytest.raises(ConfigError, match="0 < share < 1"):
        needed_group(counted([0] * 6), share=1.0)


def test_a_group_larger_than_the_samples_is_refused() -> None:
    assert read("informative@8", counted([32] * 8)).value > 0.98
    with pytest.raises(ConfigError, match="64 samples"):
        read("informative@65", counted([32] * 8))
