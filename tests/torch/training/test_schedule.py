"""The learning rate over the steps of a stage."""

import pytest

from posttrain.core.learner import Optimizer
from posttrain.training.stage import lr_scale


def scales(steps, **options):
    return [lr_scale(Optimizer(**options), step=s, steps=steps) for s in range(steps)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_it_warms_up_in_equal_parts_to_the_whole_rate(schedule):
    found = scales(12, warmup_steps=4, schedule=schedule)
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_it_falls_from_the_whole_rate_and_never_reaches_zero(schedule):
    found = scales(10, schedule=schedule)
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    assert 0 < found[-1] < 0.2


def test_constant_is_constant():
    assert scales(5) == [1.0] * 5
