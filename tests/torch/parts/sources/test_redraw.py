"""Drawing again: when it stops, what comes back, and what the record keeps."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from material import random_groups, with_column
from staging import check_resume, make_world

from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.trajectory import Column, Discard
from posttrain.parts.base import bound
from posttrain.parts.composition import Composition
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.credit.selection import DropCutOff, KeepInformative
from posttrain.parts.legality import admit, check_composition
from posttrain.parts.offline.filters import KeepRewards
from posttrain.parts.policy.losses import ClippedPolicyGradient
from posttrain.parts.policy.presets import Dapo
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.members import Guided
from posttrain.parts.sources.redraw import Redraw, RedrawStream
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.protocols import PureStream
from posttrain.run.store import read_uses
from posttrain.testing import fake_tools
from posttrain.training.stage import group_metrics

INNER = Rollouts(tasks=("rows",), group_size=2, max_new_tokens=4)
SPEC = Redraw(source=INNER, max_draws=4)


@dataclass
class Scripted(PureStream):
    """A stream whose draws have these rewards: per draw a list of groups."""

    script: list
    asked: list = field(default_factory=list)

    def draw(self, num_groups, *, step):
        self.asked.append((num_groups, step))
        rows = self.script[step % len(self.script)]
        assert len(rows) == num_groups
        rewards = iter([r for row in rows for r in row])
        groups = random_groups(num_groups=num_groups, size=2, seed=step)
        return with_column(groups, Column.REWARD, lambda t: np.array(float(next(rewards))))


YES, NO = (1, 0), (1, 1)
KEEP = (bound(KeepInformative(), fake_tools()),)


def verdicts(groups):
    return [tuple(m.scalar(Column.DISCARD) for m in g.members) for g in groups]


EQUAL, SURPLUS = float(Discard.EQUAL_REWARDS.code), float(Discard.SURPLUS.code)


def test_it_draws_until_a_step_is_full():
    inner = Scripted([[YES, NO, NO], [NO, YES, NO], [YES, YES, NO], [YES, YES, YES]])
    drawn = RedrawStream(SPEC, inner, KEEP).draw(3, step=0)
    assert inner.asked == [(3, 0), (3, 1), (3, 2)]
    # three that count, the fourth that came too much, then the five useless ones
    assert verdicts(drawn) == [(0, 0)] * 3 + [(SURPLUS, SURPLUS)] + [(EQUAL, EQUAL)] * 5
    kept = admit(drawn, (ClippedPolicyGradient(),), version=0, max_age=0)
    assert len(kept.kept) == 3
    metrics = group_metrics(kept)
    assert metrics["groups"] == 9
    assert metrics["discarded/equal rewards"] == 10
    assert metrics["discarded/surplus"] == 2
    assert metrics["zero_variance"] == pytest.approx(5 / 9), "of all that was drawn"


def test_the_number_of_draws_is_bounded():
    inner = Scripted([[NO, NO], [NO, YES], [NO, NO], [NO, NO]])
    drawn = RedrawStream(SPEC, inner, KEEP).draw(2, step=0)
    assert len(inner.asked) == 4
    assert verdicts(drawn) == [(0, 0)] + [(EQUAL, EQUAL)] * 7


def test_one_draw_is_enough_when_it_is():
    inner = Scripted([[YES, YES], [NO, NO], [NO, NO], [NO, NO]])
    assert verdicts(RedrawStream(SPEC, inner, KEEP).draw(2, step=3)) == [(0, 0)] * 2
    assert inner.asked == [(2, 12)], "a step has a block of draws of its own"


def test_a_group_counts_when_something_of_it_is_left():
    keep = KeepRewards(at_least=1.0)
    spec = Redraw(source=INNER, keep=(Verify(), keep), max_draws=2)
    inner = Scripted([[YES, (0, 0)], [NO, NO]])
    drawn = RedrawStream(spec, inner, (bound(keep, fake_tools()),)).draw(2, step=0)
    low = float(Discard.LOW_REWARD.code)
    assert verdicts(drawn) == [(0, low), (0, 0), (SURPLUS, SURPLUS), (low, low)]
    # a verdict that a member has stays, also in a group that came too much
    inner = Scripted([[(0, 0), YES], [YES, YES]])
    drawn = RedrawStream(spec, inner, (bound(keep, fake_tools()),)).draw(2, step=0)
    assert verdicts(drawn)[2] == (SURPLUS, low)


@pytest.fixture
def world(tmp_path, engine, tiny_folder):
    return make_world(tmp_path, engine, tiny_folder)


def test_dapo_fills_its_steps_and_resumes_exactly(world):
    method = Dapo(tasks=("rows",), group_size=2, max_new_tokens=3, max_draws=6)
    _, metrics = check_resume(world, method, steps=4, stop_after=2, lr=1e-3, groups_per_step=4)
    once = Dapo(tasks=("rows",), group_size=2, max_new_tokens=3, max_draws=1)
    _, poor = world.run(once, "once", steps=4, lr=1e-3, groups_per_step=4)
    kept = [m["groups"] * 2 - sum(v for k, v in m.items() if "discarded" in k) for m in metrics]
    assert kept == [8.0] * 4, "four groups of two at every step"
    assert max(m["groups"] for m in metrics) > 4
    assert all(m["groups"] == 4 for m in poor)
    assert min(4 * 2 - m.get("discarded/equal rewards", 0) for m in poor) < 8
    uses = [
        u
        for p in sorted((world.root / "straight/stage/shards").glob("*.uses.parquet"))
        for u in read_uses(p)
    ]
    assert len(uses) == sum(m["groups"] * 2 for m in metrics), "everything drawn is recorded"
    assert {u.reason for u in uses} <= {None, "equal rewards", "surplus"}


def test_the_composition_of_dapo_written_out():
    source = Rollouts(tasks=("t",), group_size=16)
    full = Dapo(tasks=("t",), overlong="filter").compose()
    assert full.source == Redraw(source=source, keep=(Verify(), KeepInformative()), max_draws=10)
    assert full.signals == (DropCutOff(), GroupAdvantage())
    once = Dapo(tasks=("t",), overlong="filter", max_draws=1).compose()
    assert once.source == source
    assert once.signals == (Verify(), DropCutOff(), GroupAdvantage(), KeepInformative())
    for composition in (full, once):
        check_composition(composition, stage="s")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Redraw(source=INNER, max_draws=1), "at least 2 draws"),
        (lambda: Redraw(source=INNER, keep=(Verify(),)), "a signal that discards"),
        (
            lambda: Redraw(source=Rollouts(tasks=("t",), members=Guided(start=0.5)), max_draws=2),
            "share moves",
        ),
    ],
)
def test_options_without_a_meaning(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_its_judges_are_checked_like_any_signal():
    def composed(size, *keep):
        source = Redraw(source=Rollouts(tasks=("t",), group_size=size), keep=keep, max_draws=2)
        credit = GroupAdvantage(baseline="batch_mean", scale="none")
        return Composition(source=source, signals=(credit,), terms=(ClippedPolicyGradient(),))

    check_composition(composed(2, Verify(), KeepInformative()), stage="s")
    with pytest.raises(LegalityError, match="keep_informative needs reward"):
        check_composition(composed(2, KeepInformative()), stage="s")
    with pytest.raises(LegalityError, match="groups of 1"):
        check_composition(composed(1, Verify(), KeepInformative()), stage="s")
