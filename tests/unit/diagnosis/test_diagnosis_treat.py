"""Decisions of the loop on measurements made up, and who may go on with a treatment."""

import numpy as np
import pytest
from measurements import measured, policy

from posttrain.core.errors import DataError, FileChanged, ResumeRefused
from posttrain.diagnosis.rounds import TreatmentLog
from posttrain.diagnosis.stage_decision import decide_stage
from posttrain.diagnosis.treat import _opened
from posttrain.run.audit import audit
from posttrain.run.folder import RunFolder


def rates(**by_task: float):
    """Twenty prompts a task set, each solved at about the given rate."""
    tasks = []
    for place, (name, rate) in enumerate(by_task.items()):
        rng = np.random.default_rng(place)
        tasks.append(measured(rng.random((20, 64)) < rate, name))
    return policy(*tasks)


def decided(before, after, treated, counted=None):
    return decide_stage(
        before,
        after,
        treated=treated,
        counted=counted or [t.taskset for t in before.tasks],
        confidence=0.95,
    )


@pytest.mark.parametrize(
    ("before", "after", "helped", "kept"),
    [
        ((0.1, 0.9), (0.8, 0.9), True, True),  # a gain that costs nothing
        ((0.1, 0.9), (0.8, 0.5), True, True),  # a gain that costs less than it brings
        ((0.1, 0.9), (0.3, 0.4), True, False),  # it costs more than it brings
        ((0.1, 0.9), (0.1, 0.5), False, False),  # only harm
        ((0.5, 0.9), (0.5, 0.9), False, False),  # the very same samples: no gain, no reason
        ((0.1, 0.5), (0.1, 0.9), False, True),  # it helped what it was not for
    ],
)
def test_a_stage_is_judged_on_what_it_was_for_and_on_everything(before, after, helped, kept):
    old, new = (rates(aim=x, other=y) for x, y in (before, after))
    found = decided(old, new, ["aim"])
    assert (found.helped, found.kept) == (helped, kept), found.words


def test_what_is_not_counted_neither_keeps_nor_rolls_back():
    old, new = rates(aim=0.1, later=0.9), rates(aim=0.3, later=0.1)
    assert decided(old, new, ["aim"], ["aim"]).kept
    assert not decided(old, new, ["aim"]).kept


def test_task_sets_count_alike_whatever_their_size():
    """Ten prompts that gain 0.5 against forty that lose 0.25: the mean is (0.5 − 0.25) / 2."""
    small = [np.zeros((10, 4)), np.tile([1, 1, 0, 0], (10, 1))]
    large = [np.ones((40, 4)), np.tile([1, 1, 1, 0], (40, 1))]
    old, new = (policy(measured(small[i], "a"), measured(large[i], "b")) for i in (0, 1))
    assert "all together +0.12 [" in decided(old, new, ["a"]).words  # 0.125, to even


def test_only_the_same_treatment_goes_on_and_a_larger_budget_reopens_it(tmp_path):
    path = tmp_path / "treat.json"
    with RunFolder(tmp_path).lock() as run:
        run.write_treatment(TreatmentLog(ground="g", budget=10, ended="budget spent"))
    assert _opened(RunFolder(tmp_path), digest="g", budget=10).ended == "budget spent"
    assert _opened(RunFolder(tmp_path), digest="g", budget=20) == TreatmentLog(
        ground="g", budget=20
    )
    with pytest.raises(ResumeRefused, match="another model"):
        _opened(RunFolder(tmp_path), digest="h", budget=10)
    path.write_text("{")
    with pytest.raises(FileChanged, match=r"treat\.json holds 1 bytes"):
        _opened(RunFolder(tmp_path), digest="g", budget=10)
    with RunFolder(tmp_path).lock() as run:
        run.accept_files(audit(run))
    with pytest.raises(DataError, match=r"treat\.json is damaged"):
        _opened(RunFolder(tmp_path), digest="g", budget=10)
    assert _opened(RunFolder(tmp_path / "new"), digest="g", budget=5).rounds == ()
