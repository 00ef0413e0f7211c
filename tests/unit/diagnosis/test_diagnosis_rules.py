"""Rules are decided on bounds, leave no gap, and can be changed by a file of one's own."""

import itertools
import math

import pytest
from diagnosis_readings import TRUTHS, evidence, sampling, seen

from posttrain.core.errors import ConfigError
from posttrain.diagnosis.card import Bottleneck, Evidence
from posttrain.diagnosis.conditions import ConditionVerdict, decide_condition, diagnose_task
from posttrain.diagnosis.rules import Condition, load_rules

BOOK = load_rules()


def of(*readings) -> Evidence:
    return Evidence(task="t", readings=readings)


# --- conditions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "half", "expected"),
    [
        (0.6, 0.1, ConditionVerdict.HOLDS),  # the lower bound lies on the threshold
        (0.6, 0.11, ConditionVerdict.OPEN),
        (0.9, 0.41, ConditionVerdict.OPEN),  # the middle is far above; the bound is not
        (0.3, 0.1, ConditionVerdict.FAILS),
        (0.4, 0.1, ConditionVerdict.OPEN),  # the upper bound lies on it
    ],
)
def test_at_least_is_decided_on_the_bounds_and_at_most_is_its_mirror(value, half, expected):
    above = decide_condition(
        Condition(reading="pass@1", at_least=0.5), of(seen("pass@1", value, half=half))
    )
    below = decide_condition(
        Condition(reading="pass@1", at_most=0.5), of(seen("pass@1", 1 - value, half=half))
    )
    assert above.verdict is below.verdict is expected


def test_a_difference_takes_the_cautious_ends():
    both = of(seen("pass@64", 0.8, half=0.1), seen("pass@1", 0.3, half=0.2))
    # 0.8 ± 0.1 less 0.3 ± 0.2 is 0.5 ± 0.3
    for threshold, expected in [(0.2, "holds"), (0.21, "open"), (0.81, "fails")]:
        condition = Condition(reading="pass@64", minus="pass@1", at_least=threshold)
        assert decide_condition(condition, both).verdict == expected


def test_what_was_not_measured_is_neither_true_nor_false():
    condition = Condition(reading="pass@64", minus="pass@1", at_least=0.1)
    assert decide_condition(condition, of(seen("pass@64", 0.8))).verdict is ConditionVerdict.UNREAD


def test_how_much_more_it_takes_follows_the_square_root_law():
    # 0.6 ± 0.3 on 32 prompts against 0.5: a third of the width is needed, so nine times as many.
    found = diagnose_task(evidence({**sampling(0.0, 0.0)}), BOOK)  # decided: nothing is asked for
    assert not found.open
    wide = decide_condition(
        Condition(reading="pass@1", at_least=0.5), of(seen("pass@1", 0.6, half=0.3))
    )
    assert wide.verdict is ConditionVerdict.OPEN
    assert wide.more == pytest.approx(9)
    on_it = decide_condition(
        Condition(reading="pass@1", at_least=0.5), of(seen("pass@1", 0.5, half=0.3))
    )
    assert math.isinf(on_it.more)


def test_an_infinite_reading_is_judged():
    needs = of(seen("needed_group", math.inf))
    assert (
        decide_condition(Condition(reading="needed_group", at_least=64), needs).verdict
        is ConditionVerdict.HOLDS
    )
    half = Evidence(
        task="t",
        readings=(type(seen("pass@1", 0))("needed_group", "t", math.inf, 8, math.inf, 9, 9, ""),),
    )
    straddles = decide_condition(Condition(reading="needed_group", at_least=64), half)
    assert (straddles.verdict, straddles.more) == (ConditionVerdict.OPEN, math.inf)


# --- the shipped rules -----------------------------------------------------------------------


@pytest.mark.parametrize("case", TRUTHS)
def test_each_truth_is_named(case):
    values, truth = TRUTHS[case]
    found = diagnose_task(evidence(values), BOOK)
    assert found.bottleneck == truth, found.headline
    assert found.findings[0].decided_by
    assert found.findings[0].overturned_by
    assert found.leaning is None


def test_every_bottleneck_is_shown_by_a_truth():
    named = {truth for _, truth in TRUTHS.values()}
    assert named == set(Bottleneck) - {Bottleneck.UNDETERMINED}


def test_the_rules_leave_no_gap():
    """Whatever a model's success rates are, exact readings name a bottleneck."""
    grid = [0.0, 0.01, 0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0]
    for first, many, onwards, entropy in itertools.product(grid, grid, (0.0, 0.9), (0.0, 1.0)):
        if many >= first:
            values = sampling(first, many, continue__0=0.0) | {
                "continue@0.5": max(onwards, first),
                "answer_entropy": entropy,
            }
            values.pop("continue@0")
            found = diagnose_task(evidence(values), BOOK)
            assert found.bottleneck is not Bottleneck.UNDETERMINED, (first, many, found)


def test_an_open_rule_in_front_leaves_the_answer_open_and_says_what_decides():
    values = sampling(0.3, 0.5)
    readings = [r for r in evidence(values).readings if r.name not in ("pass@64", "efficiency_gap")]
    wide = of(*readings, seen("pass@64", 0.56, half=0.12), seen("efficiency_gap", 0.26, half=0.1))
    found = diagnose_task(wide, BOOK)
    assert found.bottleneck is Bottleneck.UNDETERMINED
    assert found.leaning is Bottleneck.CHOICE
    assert "pass@64 on about 128 prompts instead of 32" in found.headline  # (0.12 / 0.06)² = 4
    assert {o.bottleneck for o in found.open} >= {Bottleneck.SUPPORT, Bottleneck.CHOICE}


def test_an_open_rule_for_the_same_bottleneck_changes_nothing():
    values = sampling(0.0, 0.0) | {"verifier_disagreement": 0.1}
    readings = [r for r in evidence(values).readings if r.name != "truncated"]
    found = diagnose_task(of(*readings, seen("truncated", 0.3, half=0.1)), BOOK)
    assert found.bottleneck is Bottleneck.MEASUREMENT


# --- one's own rules -------------------------------------------------------------------------


def own(tmp_path, text: str):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_a_threshold_can_be_changed_by_id(tmp_path):
    path = own(
        tmp_path,
        "rules: [{id: forgotten, when: [{reading: retention, at_most: 0.4}]},"
        " {id: narrowed, disabled: true}]",
    )
    book = load_rules(path)
    values = {**sampling(0.5, 0.9), "retention": 0.5, "shrunk_share": 0.5}
    assert diagnose_task(evidence(values), BOOK).bottleneck is Bottleneck.RETENTION
    assert diagnose_task(evidence(values), book).bottleneck is Bottleneck.CHOICE
    assert book.rule("forgotten").words == BOOK.rule("forgotten").words


def test_a_rule_can_be_added(tmp_path):
    path = own(
        tmp_path,
        """
rules:
  - id: too-long
    order: 1
    bottleneck: measurement
    when: [{reading: tokens_per_answer, at_least: 100}]
    words: answers are too long
    overturned_by: shorter answers
    citation: ours
    obtain: a shorter prompt
""",
    )
    values = {**sampling(0.0, 0.0), "tokens_per_answer": 200.0}
    assert diagnose_task(evidence(values), load_rules(path)).findings[0].rule == "too-long"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rulez: []", "did you mean 'rules'"),
        ("rules: [{order: 1}]", "rule 1 has no id"),
        ("rules: [{id: forgoten, disabled: true}]", "did you mean 'forgotten'"),
        ("rules: [{id: forgotten, whn: []}]", "did you mean 'when'"),
        ("rules: [{id: forgotten, when: []}]", "at least one condition"),
        ("rules: [{id: forgotten, when: [{reading: retntion, at_most: 1}]}]", "'retention'"),
        ("rules: [{id: forgotten, when: [{reading: retention}]}]", "exactly one of them"),
        ("rules: [{id: forgotten, treat: [recal]}]", "did you mean 'recall'"),
        ("rules: [{id: forgotten, unless: [narowed]}]", "did you mean 'narrowed'"),
        ("rules: [{id: forgotten, bottleneck: undetermined}]", "can be named"),
        ("rules: {}", "expected: a list"),
        ("rules: [3]", "expected: a mapping"),
        ("treatments: {recall: {titel: x}}", "did you mean 'title'"),
    ],
)
def test_mistakes_are_named(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says):
        load_rules(own(tmp_path, text))
