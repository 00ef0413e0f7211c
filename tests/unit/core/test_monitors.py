"""Alarms ring once, calm down, and ring again; each bound is by itself."""

import math

import pytest

from posttrain.core.errors import ConfigError
from posttrain.core.monitors import Monitors, Watch, alarms


def rang(bounds, *steps):
    """Names of the alarms that begin with each step."""
    watch = Watch(bounds)
    return [[a.name for a in watch.see(i, metrics)] for i, metrics in enumerate(steps)]


def flat(share, wrong=None):
    wrong = share if wrong is None else wrong
    return {"zero_variance": share, "all_wrong": wrong, "all_right": share - wrong}


def test_an_alarm_rings_once_and_again_after_it_calmed_down():
    bounds = Monitors(window=1, zero_variance=0.5)
    steps = [flat(x) for x in (0.4, 0.5, 0.9, 0.45, 0.6, 0.39, 0.5)]
    # 0.45 is below the bound but not below 0.8 of it: the same alarm still rings.
    expected = [[], ["no_signal"], [], [], [], [], ["no_signal"]]
    assert rang(bounds, *steps) == expected


def test_nothing_rings_before_the_window_is_full_and_the_mean_counts():
    bounds = Monitors(window=3, zero_variance=0.5)
    assert rang(bounds, flat(1.0), flat(1.0), flat(0.0)) == [[], [], ["no_signal"]]
    assert rang(bounds, flat(1.0), flat(0.2), flat(0.0)) == [[], [], []]


@pytest.mark.parametrize(("wrong", "word"), [(0.9, "too hard"), (0.0, "solved")])
def test_the_advice_depends_on_why_there_is_no_signal(wrong, word):
    (alarm,) = Watch(Monitors(window=1)).see(0, flat(0.9, wrong))
    assert word in alarm.advice
    assert "90%" in alarm.words


def test_entropy_is_compared_with_the_first_window():
    bounds = Monitors(window=1, entropy_left=0.25)
    steps = [{"authors/learner/entropy": x} for x in (2.0, 1.0, 0.51, 0.5)]
    assert rang(bounds, *steps) == [[], [], [], ["entropy"]]
    others = [{"authors/teacher/entropy": x} for x in (2.0, 0.1)]
    assert rang(bounds, *others) == [[], []]


def test_ratios_ring_for_each_author_apart():
    healthy, ill = 0.9, 0.1
    step = {"authors/learner/effective_share": healthy, "authors/external/effective_share": ill}
    (alarm,) = Watch(Monitors(window=1)).see(0, step)
    assert alarm.name == "ratios/external"
    assert "supervised term" in alarm.advice
    assert rang(Monitors(window=1), {"authors/learner/effective_share": ill}) == [
        ["ratios/learner"]
    ]


@pytest.mark.parametrize(
    ("metric", "field", "name"),
    [
        ("stale_share", "stale_share", "stale"),
        ("truncated_share", "truncated_share", "truncated"),
        ("policy_gradient/kl", "kl", "kl:policy_gradient/kl"),
    ],
)
def test_each_bound_can_be_moved_and_switched_off(metric, field, name):
    assert name.partition(":")[0] in str(rang(Monitors(window=1, **{field: 0.5}), {metric: 0.5}))
    assert rang(Monitors(window=1, **{field: 0.5}), {metric: 0.49}) == [[]]
    assert rang(Monitors(window=1, **{field: None}), {metric: 9.0}) == [[]]


def test_a_report_reads_the_alarms_that_the_run_gave():
    bounds = Monitors(window=2)
    lines = [{"step": s, **flat(x)} for s, x in enumerate((0.1, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0))]
    watch = Watch(bounds)
    live = [a for line in lines for a in watch.see(line["step"], line)]
    assert alarms(bounds, lines) == live
    assert [a.step for a in live] == [2, 6]


@pytest.mark.parametrize(
    "options",
    [{"window": 0}, {"zero_variance": 1.5}, {"entropy_left": 0.0}, {"kl": math.nan}, {"kl": 0}],
)
def test_bounds_that_mean_nothing(options):
    with pytest.raises(ConfigError, match="Monitors: "):
        Monitors(**options)


def test_entropy_that_explodes_rings():
    bounds = Monitors(window=2, entropy_risen=1.0)
    steps = [{"authors/learner/entropy": x} for x in (0.5, 0.6, 2.0, 2.6)]
    assert rang(bounds, *steps) == [[], [], [], ["entropy_risen"]]


def fresh(share, *, ratio=1.0, age=0.0):
    return {
        "authors/learner/effective_share": share,
        "authors/learner/ratio": ratio,
        "age": age,
    }


@pytest.mark.parametrize(
    ("step", "rings"),
    [
        (fresh(0.999), False),
        (fresh(0.9), True),
        (fresh(1.0, ratio=1.2), True),
        (fresh(0.9, age=1.0), False),
    ],
)
def test_weights_of_fresh_rollouts_are_one(step, rings):
    """After an update they are not, and other alarms look at them."""
    assert rang(Monitors(window=2), step, step)[1] == (["fresh"] if rings else [])


def given(loss, *, unlikely=0.1):
    return {"loss": loss, "authors/external/nll": loss, "authors/external/unlikely": unlikely}


def test_a_loss_on_given_text_that_diverges_rings():
    bounds = Monitors(window=1, loss_risen=3.0)
    steps = [given(x) for x in (0.5, 1.4, 1.6)]
    assert rang(bounds, *steps) == [[], [], ["loss"]]
    own = [{**s, "authors/learner/nll": 1.0} for s in steps]
    assert rang(bounds, *own) == [[], [], []], "the loss of a policy gradient may be anything"


def test_text_that_the_model_cannot_read_rings_at_the_start_only():
    bounds = Monitors(window=1)
    assert rang(bounds, given(7.0, unlikely=0.6)) == [["unlikely"]]
    assert rang(bounds, given(1.0), given(1.0, unlikely=0.9)) == [[], []]


def step(norm, moved, lr=1e-3):
    return {"grad_norm": norm, "moved": moved, "lr": lr}


@pytest.mark.parametrize(
    ("last", "rings"),
    [
        (step(0.1, 1e-4), []),
        (step(0.0, 0.0), ["no_gradient"]),
        (step(0.1, 0.0), ["still"]),
        (step(0.1, 0.0, lr=0.0), []),
    ],
)
def test_steps_that_teach_nothing_ring(last, rings):
    assert rang(Monitors(window=2), last, last)[1] == rings
