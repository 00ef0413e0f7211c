"""Decisions on bounds, by name of a metric, and the way that they lead."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from posttrain.core.errors import ConfigError, RunError
from posttrain.core.sampling import SamplingSpec
from posttrain.measure.columns import raw_columns
from posttrain.measure.diversity import answer_entropies
from posttrain.measure.gates import (
    Detour,
    Gate,
    GateVerdict,
    check_gate,
    decide,
    detour,
    gate_interval,
)
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.readings import take
from posttrain.measure.registry import Estimation, find_metric, metrics
from posttrain.measure.spec import Measure

SAMPLES = 8


def measured(counts, *, scores=None, lengths=4, **changes):
    """One task set with so many successes of SAMPLES per prompt."""
    counts = np.asarray(counts)
    right = np.arange(SAMPLES)[None, :] < counts[:, None]
    shape = right.shape
    options = {
        "taskset": "sums",
        "prompts": tuple(f"sums/{i}" for i in range(len(counts))),
        "scores": right if scores is None else scores,
        "success": 1.0,
        "lengths": np.full(shape, lengths),
        "truncated": np.zeros(shape),
        "nll": np.full(shape, 0.5),
        "distinct": np.full(len(counts), 2),
        "answers": np.where(right, 0, 1),
        "self_bleu": np.full(len(counts), 0.25),
        "repetition": np.full(shape, 0.125),
    }
    given = {**options, **changes}
    raw = {name: given.pop(name) for name in raw_columns() if name in given}
    return TaskMeasurement(**given, raw=raw)


def per_prompt(name, task):
    """[P] the values whose mean a gate on this metric decides on."""
    asked = find_metric(name)
    return asked.metric.estimator.values(task, asked.k)


def interval(name, task, *, since=None):
    """What a gate decides on; with ``since``, of the change."""
    bound = {"at_least": 0.0} if since is None else {"at_least_gained": 0.0}
    gate = Gate(task="sums", metric=name, **bound)
    return gate_interval(gate, now=task, since=since or task, how=Estimation())


# --- metrics, by brute force over all groups of k of the n samples -----------------------------


def over_groups(task, k, of):
    """[P] the mean of ``of(scores of a group)`` over all groups of k samples of each prompt."""
    return [np.mean([of(row[list(g)]) for g in combinations(range(SAMPLES), k)]) for row in task]


@pytest.mark.parametrize("k", [1, 3, SAMPLES])
@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("pass@", lambda r: r.max()),
        ("pass^", lambda r: r.min()),
        ("best@", lambda r: r.max()),
        ("all_wrong@", lambda r: r.max() == 0),
        ("zero_variance@", lambda r: r.max() == r.min()),
        ("informative@", lambda r: r.max() != r.min()),
        # Two answers, one of them right; a tie is won half the time.
        ("maj@", lambda r: (r.mean() > 0.5) + (r.mean() == 0.5) / 2),
    ],
)
def test_metrics_of_groups(name, of, k):
    task = measured([0, 1, 4, 7, 8])
    expected = over_groups(np.asarray(task.successes, float), k, of)
    np.testing.assert_allclose(per_prompt(f"{name}{k}", task), expected, atol=1e-12)


def test_metrics_of_samples():
    task = measured(
        [1, 2],
        scores=np.linspace(-1, 3, 2 * SAMPLES).reshape(2, -1),
        kl_base=[[1.0, 2.0], [3.0, 5.0]],
    )
    assert per_prompt("kl_reverse", task).tolist() == [1.5, 4.0]
    assert per_prompt("tokens_per_answer", task).tolist() == [4, 4]
    assert per_prompt("distinct_answers", task).tolist() == [2, 2]
    np.testing.assert_allclose(per_prompt("best@1", task), task.scores.mean(1), rtol=1e-6)


def test_metrics_of_texts():
    task = measured([0, SAMPLES // 2])
    np.testing.assert_allclose(per_prompt("self_bleu", task), 0.25)
    np.testing.assert_allclose(per_prompt("repetition", task), 0.125)
    np.testing.assert_allclose(
        per_prompt("answer_entropy", task), answer_entropies(task.raw["answers"]), atol=1e-12
    )
    with pytest.raises(ConfigError, match="texts were not looked at"):
        per_prompt("self_bleu", replace(task, raw={**task.raw, "self_bleu": None}))


PAIRED = [m.at(2) for m in metrics() if m.pairs]


@pytest.mark.parametrize("name", PAIRED)
def test_every_metric_with_a_change_has_intervals_that_hold_their_values(name):
    rng = np.random.default_rng(0)
    nll, lengths = rng.random((5, SAMPLES)), rng.integers(1, 9, (5, SAMPLES))
    then = measured([0, 3, 5, 8, 8], kl_base=np.ones((5, 2)), nll=nll, lengths=lengths)
    now = measured([1, 3, 4, 8, 0], kl_base=np.zeros((5, 2)), nll=nll[::-1], lengths=lengths)
    seen = interval(name, now)
    assert seen.low <= seen.value <= seen.high
    assert interval(name, now, since=now).value == 0
    change = interval(name, now, since=then)
    assert change.low <= change.value <= change.high
    assert change.value == pytest.approx(seen.value - interval(name, then).value, abs=1e-12)


@pytest.mark.parametrize(
    "name", [n for n in PAIRED if n not in ("token_entropy",)]
)  # which weighs tokens, not prompts
def test_a_mean_over_prompts_is_one(name):
    task = measured([0, 3, 5, 8, 8], kl_base=np.ones((5, 2)))
    assert interval(name, task).value == pytest.approx(per_prompt(name, task).mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("pas@1", "pass"),
        ("pass", "k >= 1"),
        ("pass@0", "k >= 1"),
        ("tokens_per_answer@2", "without"),
    ],
)
def test_names_that_mean_nothing(name, word):
    with pytest.raises(ConfigError, match=word):
        find_metric(name)


@pytest.mark.parametrize(
    ("retired", "new"),
    [
        ("reliable@4", "pass\\^4"),
        ("all_right@4", "pass\\^4"),
        ("all_right", "pass\\^k"),
        ("all_wrong", "all_wrong@k"),
        ("score", "best@1"),
        ("tokens", "tokens_per_answer"),
        ("distinct", "distinct_answers"),
        ("entropy", "token_entropy"),
        ("kl_base", "kl_reverse"),
    ],
)
def test_a_retired_name_names_its_replacement(retired, new):
    with pytest.raises(ConfigError, match=f"{new}\\b" if new[-1] != "k" else new):
        check_gate(Gate(task="sums", metric=retired, at_least=0.5), Measure(samples=SAMPLES))


def test_more_tries_than_samples_and_what_was_not_measured():
    with pytest.raises(ConfigError, match="k = 9"):
        interval("pass@9", measured([1]))
    with pytest.raises(ConfigError, match="no KL"):
        interval("kl_reverse", measured([1]))


def test_the_change_of_a_ratio_is_covered_by_its_interval():
    """token_entropy of two policies whose tokens have 0.5 and 0.8 nats on average."""
    rng = np.random.default_rng(0)
    missed, runs = 0, 200
    for _ in range(runs):
        sides = []
        for mean in (0.5, 0.8):
            lengths = rng.integers(1, 30, (32, SAMPLES))
            nll = rng.gamma(4.0, mean / 4, (32, SAMPLES))
            sides.append(measured([1] * 32, nll=nll, lengths=lengths))
        seen = interval("token_entropy", sides[1], since=sides[0])
        missed += not seen.low <= 0.3 <= seen.high
    assert missed <= 0.05 * runs + 3 * math.sqrt(0.05 * 0.95 * runs)


def test_a_change_needs_the_same_prompts():
    other = measured([1, 2], prompts=("sums/0", "sums/9"))
    gate = Gate(task="sums", at_most_lost=0.1)
    with pytest.raises(RunError, match="prompts"):
        decide(gate, now=measured([1, 2]), since=other, confidence=0.95)


# --- decisions -------------------------------------------------------------------------------

LOW, HIGH = measured([1] * 12), measured([7] * 12)
MIXED = measured([0, 1, 2, 3, 4, 5, 6, 7, 8] * 2)


@pytest.mark.parametrize(
    ("asked", "now", "since", "verdict"),
    [
        ({"at_least": 0.5}, HIGH, LOW, GateVerdict.SHOWN),
        ({"at_least": 0.5}, LOW, LOW, GateVerdict.REFUTED),
        ({"at_least": 0.5}, MIXED, LOW, GateVerdict.OPEN),
        ({"at_most": 0.5}, LOW, LOW, GateVerdict.SHOWN),
        ({"at_most": 0.5}, HIGH, LOW, GateVerdict.REFUTED),
        ({"at_most": 0.5}, MIXED, LOW, GateVerdict.OPEN),
        ({"at_most_lost": 0.2}, HIGH, LOW, GateVerdict.SHOWN),
        ({"at_most_lost": 0.2}, LOW, HIGH, GateVerdict.REFUTED),
        ({"at_least_gained": 0.2}, HIGH, LOW, GateVerdict.SHOWN),
        ({"at_least_gained": 0.2}, LOW, HIGH, GateVerdict.REFUTED),
        ({"at_least_gained": 0.0}, LOW, LOW, GateVerdict.OPEN),
        ({"at_most_gained": 0.2}, LOW, HIGH, GateVerdict.SHOWN),
        ({"at_most_gained": 0.2}, HIGH, LOW, GateVerdict.REFUTED),
    ],
)
def test_the_whole_interval_decides(asked, now, since, verdict):
    decision = decide(Gate(task="sums", **asked), now=now, since=since, confidence=0.95)
    assert decision.verdict is verdict
    assert decision.passed == (verdict is GateVerdict.SHOWN)
    assert f"{decision.interval.low:.3f}" in decision.words


def test_a_doubt_may_pass_but_a_refutation_never_does():
    gate = Gate(task="sums", at_least=0.5, doubt="passes")
    assert decide(gate, now=MIXED, since=LOW, confidence=0.95).passed
    assert not decide(gate, now=LOW, since=LOW, confidence=0.95).passed


def test_a_policy_compared_with_itself_is_almost_never_found_worse():
    """Two independent measurements of one policy: at most 2.5 % refuted, binomially judged.

    At 32 prompts; below that the bootstrap is known to cover somewhat less than it says.
    """
    rng = np.random.default_rng(0)
    gate = Gate(task="sums", at_most_lost=0.0, doubt="passes")
    refuted, runs = 0, 600
    for _ in range(runs):
        rates = rng.uniform(size=32)
        now, since = (measured(rng.binomial(SAMPLES, rates)) for _ in range(2))
        refuted += not decide(gate, now=now, since=since, confidence=0.95).passed
    assert refuted <= 0.025 * runs + 3 * math.sqrt(0.025 * 0.975 * runs)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "no bound"),
        ({"at_least": 0.1, "at_most": 0.2}, "exactly one"),
        ({"at_least": 0.1, "otherwise": "branch"}, "`to`"),
        ({"at_least": 0.1, "to": "next"}, "`to`"),
        ({"at_least": 0.1, "since": "input"}, "a bound on a change"),
    ],
)
def test_gates_that_ask_nothing_sensible(options, word):
    with pytest.raises(ConfigError, match=word):
        Gate(task="sums", **options)


# --- readings of a whole task set, and of what changed ------------------------------------------


OF_ONE = [
    name
    for m in metrics()
    if m.can_be_asked and not m.looks_back
    for name in [m.at(k) for k in m.routine_numbers(SAMPLES) if not m.name.startswith("maj")]
    if "@16" not in name
]


@pytest.mark.parametrize("name", OF_ONE)
def test_a_gate_on_a_reading_decides_on_its_interval(name):
    task = measured([0, 1, 4, 7, 8, 8], recheck=np.zeros((6, 4), bool))
    gate = Gate(task="sums", metric=name, at_least=-1.0)
    seen = decide(gate, now=task, since=task, confidence=0.95).interval
    (reading,) = [r for r in take(task) if r.name == name]
    assert (seen.value, seen.low, seen.high) == (reading.value, reading.low, reading.high)
    assert seen.value == 4 / 6 or name != "cover@0.5"
    assert decide(gate, now=task, since=task, confidence=0.95).verdict is GateVerdict.SHOWN


def test_gates_on_what_changed():
    many = {"now": measured([0] * 30, prompts=tuple(f"sums/{i}" for i in range(30))),
            "since": measured([8] * 30, prompts=tuple(f"sums/{i}" for i in range(30)))}  # fmt: skip

    def verdict(metric, **bound):
        gate = Gate(task="sums", metric=metric, since="input", **bound)
        decision = decide(gate, **many, confidence=0.95, epsilon=0.4)
        assert "since input" in decision.words
        return decision.verdict

    assert verdict("retention", at_least=0.8) is GateVerdict.REFUTED
    assert verdict("shrunk_share", at_most=0.2) is GateVerdict.REFUTED
    assert verdict("expanded_share", at_most=0.2) is GateVerdict.SHOWN
    assert verdict("crossover", at_least=2) is GateVerdict.REFUTED


def test_retention_of_nothing_is_not_known():
    task = measured([0] * 12)
    gate = Gate(task="sums", metric="retention", at_least=0.5)
    assert decide(gate, now=task, since=task, confidence=0.95).verdict is GateVerdict.OPEN


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("in_shere", False, "did you mean 'in_share'"),
        ("pass@9", False, "8 samples"),
        ("in_share", True, "no number per prompt"),
        ("retention", True, "no number per prompt"),
        ("cover@2", False, "0 to 1"),
        ("continue@0.5", False, "no metric"),
    ],
)
def test_what_a_gate_cannot_ask_is_refused_before_training(name, change, says):
    bound = {"at_least_gained": 0.5} if change else {"at_least": 0.5}
    with pytest.raises(ConfigError, match=says):
        check_gate(Gate(task="sums", metric=name, **bound), Measure(samples=SAMPLES))


def test_a_tempered_policy_has_no_kl_to_ask_for():
    gate = Gate(task="sums", metric="kl_reverse", at_most=1.0)
    check_gate(gate, Measure(samples=SAMPLES))
    with pytest.raises(ConfigError, match="tempered"):
        check_gate(gate, Measure(samples=SAMPLES, sampling=SamplingSpec(temperature=0.5)))


# --- where the run goes on ---------------------------------------------------------------------


def missed(**options):
    gate = Gate(task="sums", at_least=0.5, **options)
    return decide(gate, now=LOW, since=LOW, confidence=0.95)


def test_what_several_decisions_come_to():
    passed = decide(Gate(task="sums", at_least=0.5), now=HIGH, since=LOW, confidence=0.95)
    back, warn = missed(otherwise="roll_back"), missed(otherwise="warn")
    one, two = (missed(otherwise="branch", to=name) for name in ("one", "two"))
    stop = missed()
    assert detour([passed, warn]) == Detour()
    assert detour([two, one]) == Detour(to="two")
    assert detour([one, back]) == Detour(rolled_back=True, to="one")
    assert detour([back, stop]) == Detour(rolled_back=True, stopped_by=stop.words)
    assert detour([replace(stop, words="first"), stop]).stopped_by == "first"
