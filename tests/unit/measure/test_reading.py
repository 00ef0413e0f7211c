"""Readings: names that exist, and bounds on the right side."""

from __future__ import annotations

import math

import pytest

from posttrain.core.errors import ConfigError
from posttrain.measure.reading import Reading
from posttrain.measure.registry import find_metric, metrics

ASKED = [
    "pass@1",
    "pass@64",
    "pass^4",
    "best@8",
    "maj@16",
    "cover@0.5",
    "in_share",
    "out_share",
    "undetermined_share",
    "all_wrong@64",
    "informative@8",
    "needed_group",
    "answer_entropy",
    "token_entropy",
    "distinct_answers",
    "self_bleu",
    "efficiency_gap",
    "crossover",
    "sharpening_tax",
    "calibration_error",
    "repetition",
    "truncated",
    "tokens_per_answer",
    "retention",
    "backward_transfer",
    "forgetting",
    "handoff",
    "amortisation_gap",
    "reach_log10",
    "kl_forward",
    "kl_reverse",
    "kl_prior",
    "base_perplexity",
    "teacher_forced_accuracy",
    "own_rollout_accuracy",
    "exposure_excess",
    "continue@0.25",
    "continue@0.5",
    "continue@0.75",
    "verifier_disagreement",
]


@pytest.mark.parametrize("name", ASKED)
def test_names_that_rules_use_exist(name: str) -> None:
    metric = find_metric(name).metric
    assert metric in metrics()
    assert Reading(name, "sums", 0.5, 0.5, 1.0, 8, 4, "half").metric is metric


def test_every_listed_name_can_be_read_with_its_number() -> None:
    numbers = {"k": "4", "g": "8", "t": "0.5", "f": "0.25"}
    for metric in metrics():
        k = float(numbers[metric.parameter.letter]) if metric.parameter else 0.0
        asked = find_metric(metric.at(k))
        assert (asked.metric, asked.k) == (metric, k)


@pytest.mark.parametrize(
    "name", ["pass@0", "pass@0.5", "pass@k", "pass", "cover@1.5", "cover@t", "retention@2", "x", ""]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no reading"):
        Reading(name, "sums", 0.5, 0.4, 0.6, 8, 4, "half")


def test_a_misspelt_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'retention'"):
        find_metric("retenion")


def test_bounds_hold_the_value_and_infinity_is_a_value() -> None:
    Reading("needed_group", "sums", math.inf, 40.0, math.inf, 8, 4, "none suffices")
    for value, low, high in ((0.5, 0.6, 0.7), (0.5, 0.3, 0.4), (math.nan, 0.0, 1.0)):
        with pytest.raises(ConfigError, match="low <= value <= high"):
            Reading("pass@1", "sums", value, low, high, 8, 4, "half")
