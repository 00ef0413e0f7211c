"""The bench of silent failures: its list is whole, and its mutants still fit the code."""

import re

import pytest
from silent_failures.bench import FAULTS
from silent_failures.environment import ENVIRONMENT
from silent_failures.faults import Base, Fault, Silent, Topic
from silent_failures.inputs import INPUTS
from silent_failures.mutants import MUTANTS
from silent_failures.mutation import applied
from silent_failures.planters import ALL
from silent_failures.planting import Planter
from silent_failures.result import Result
from silent_failures.score import Verdict, judge, named
from silent_failures.world import ROOT, STEPS

REPORT = re.compile(r"[\w.-]+#\d+")


def test_the_list_is_as_large_as_the_issue_wants():
    assert len(INPUTS) + len(ENVIRONMENT) >= 60
    assert len(MUTANTS) >= 20
    assert len(FAULTS) == len(INPUTS) + len(ENVIRONMENT), "an id stands twice"
    assert {f.topic for f in FAULTS.values()} == set(Topic)


def test_every_fault_can_be_planted_and_names_its_reports():
    assert ALL.keys() == FAULTS.keys()
    for fault in FAULTS.values():
        assert all(REPORT.fullmatch(r) for r in fault.reports), fault.id
        assert fault.base in Base


@pytest.mark.parametrize("side", ["not_ours", "not_trl"])
def test_at_most_a_fifth_does_not_apply(side):
    left_out = [f for f in FAULTS.values() if getattr(f, side) is not None]
    assert len(left_out) <= 0.2 * len(FAULTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.id)
def test_a_mutant_fits_the_code_and_its_tests_exist(mutant):
    assert applied(mutant, ROOT)
    assert all((ROOT / "tests" / test).is_file() for test in mutant.tests)


FAULT = Fault(
    id="x",
    kind="input",
    topic=Topic.DATA,
    did="",
    planted="",
    twin="",
    base=Base.SFT,
    silent=Silent.SCORE,
)
CLEAN = Result(end="finished", steps=STEPS, weights="w", said=["step 1: loss 0.5"])


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (Result(end="error", words="no"), Verdict.REFUSED),
        (Result(end="error", steps=10, before=10), Verdict.REFUSED),
        (Result(end="error", steps=12, before=10), Verdict.ALARMED),
        (Result(end="finished", steps=STEPS, weights="w"), Verdict.RIGHT),
        (Result(end="finished", alarms=[(4, "kl: far")]), Verdict.ALARMED),
        (Result(end="finished", said=["row 3 stands twice"]), Verdict.ALARMED),
        (Result(end="finished", said=["step 9: loss 0.7"]), Verdict.SCORE),
        (Result(end="hung"), Verdict.SCORE),
    ],
)
def test_verdicts(result, verdict):
    planter = Planter(names="twice|loss", right=lambda r, t: r.weights == t.weights)
    assert judge(FAULT, planter, result, CLEAN)[0] is verdict


def test_what_the_twin_says_too_names_no_fault():
    assert named(["6 rows left out of /a/b"], ["7 rows left out of /c/d"], "left out") is None
    assert named(["{'grad_norm': 'nan'}"], [], "nan") is None
