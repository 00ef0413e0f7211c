"""The card reads back as it was written, infinities included, and refuses what it is not."""

import json
import math
from dataclasses import replace

import pytest

from posttrain.core.errors import DataError
from posttrain.diagnosis.card import (
    Bottleneck,
    Choice,
    Cost,
    Diagnosis,
    Evidence,
    Finding,
    OpenRule,
    Prescription,
    TaskDiagnosis,
)
from posttrain.measure.reading import Reading

FIRST = Reading("pass@1", "sums", 0.1, 0.05, 0.2, 32, 64, "one try in ten succeeds")
GROUP = Reading("needed_group", "sums", math.inf, 12, math.inf, 32, 64, "no group suffices")


def card() -> Diagnosis:
    task = TaskDiagnosis(
        task="sums",
        bottleneck=Bottleneck.UNDETERMINED,
        headline="?",
        leaning=Bottleneck.CHOICE,
        evidence=Evidence(task="sums", readings=(FIRST, GROUP), missing=("no demonstrations",)),
        findings=(
            Finding(
                rule="choice",
                bottleneck=Bottleneck.CHOICE,
                words="w",
                because=("b",),
                decided_by=(GROUP,),
                overturned_by="o",
                citation="2504.13837",
            ),
        ),
        open=(
            OpenRule(
                rule="support",
                bottleneck=Bottleneck.SUPPORT,
                because=("b",),
                decide="d",
                more=math.inf,
                likely=False,
            ),
        ),
    )
    return Diagnosis(
        model="m",
        digest="d",
        rules="r",
        seed=3,
        confidence=0.9,
        tasks=(task,),
        cost=Cost(rollouts=1, sampled_tokens=2, scored_tokens=3, seconds=0.5),
        prescriptions=(
            Prescription(
                tasks=("sums",),
                bottleneck=Bottleneck.CHOICE,
                treatment="practise",
                title="t",
                choices=(Choice(what="value", setting="inf", why="text stays text in choices"),),
                recipe="name: x\n",
                gate="g",
                provisional=True,
            ),
        ),
        notes=("n",),
    )


def test_a_card_reads_back_equal_and_is_strict_json():
    text = card().to_json()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(text, parse_constant=refuse)
    assert Diagnosis.from_json(text) == card()
    assert card().task("sums").evidence.get("needed_group").high == math.inf
    assert card().task("sums").evidence.get("pass@64") is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "posttrain.measurement/1"}'])
def test_what_is_no_card_is_refused(text):
    with pytest.raises(DataError, match="not a diagnosis"):
        Diagnosis.from_json(text)


def test_a_damaged_number_is_refused():
    with pytest.raises(DataError):
        Diagnosis.from_json(card().to_json().replace('"seed": 3', '"seed": "three"'))


def test_every_bottleneck_has_a_meaning():
    assert len({b.meaning for b in Bottleneck}) == len(Bottleneck)


def test_the_likeliest_is_acted_on_only_when_nothing_is_shown():
    task = card().task("sums")
    assert task.acted_on is Bottleneck.CHOICE


def test_the_next_step_is_the_first_that_has_a_recipe():
    (ready,) = card().prescriptions
    missing = replace(ready, recipe=None, obtain="demonstrations")
    assert replace(card(), prescriptions=(missing, ready)).next is ready
    assert replace(card(), prescriptions=(missing,)).next is None
