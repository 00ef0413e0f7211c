"""Every seam's contract suite passes on what we ship, and fails on a broken part."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from posttrain.core.errors import LegalityError, TaskError
from posttrain.core.provenance import Kind, Regime
from posttrain.core.trajectory import Column
from posttrain.measure.measure import measure_policy
from posttrain.measure.spec import Measure
from posttrain.parts.base import Signal, Source, bound
from posttrain.parts.columns import attach
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.protocols import PureStream
from posttrain.testing import (
    FakePolicy,
    FakeTaskSet,
    as_group,
    check_policy,
    check_signal,
    check_source,
    check_taskset,
    example_trajectory,
    fake_tools,
)

TASKS = FakeTaskSet(size=8)
SPEC = Rollouts(tasks=("letters",), group_size=4, max_new_tokens=3)


def live(**answers):
    return FakePolicy(answers or {"a": 0.3, "b": 0.7}, version=0)


def tools_of(policy=None, *more, **policies):
    sets = {t.name: t for t in (TASKS, *more)}
    return fake_tools(policy or live(), policies=policies, tasksets=sets)


def rollouts(policy=None, seed=0):
    return SPEC.open(tools_of(policy), seed=seed)


def test_fakes_keep_the_contracts():
    check_taskset(TASKS)
    check_policy(live(), TASKS.held_out[:3])


def test_rollouts_keep_the_contract():
    check_source(SPEC, tools_of())


def test_signals_keep_the_contract():
    groups = rollouts().draw(3, step=0)
    tools = tools_of(input=FakePolicy({"a": 0.5, "b": 0.5}))
    assert Verify().provides == {Column.REWARD}
    judged = check_signal(Verify(), groups, tools)
    assert GroupAdvantage().provides == {Column.ADVANTAGE}
    check_signal(GroupAdvantage(), judged, tools)
    assert ReferenceLogprobs().provides == {Column.REFERENCE_LOGPROB}
    check_signal(ReferenceLogprobs(), groups, tools)


def test_a_broken_part_fails_its_contract():
    class Forgetful(Signal):
        provides = frozenset()

        def score(self, groups, tools):
            return groups[:-1]

    class Copier(Signal):
        provides = frozenset()

        def score(self, groups, tools):
            return [as_group(*(replace(m.trajectory) for m in g.members)) for g in groups]

    class CursorStream(PureStream):
        at = 0

        def draw(self, num_groups, *, step):
            self.at += 1
            return rollouts(seed=self.at).draw(num_groups, step=step)

    class Cursor(Source):
        writes = SPEC.writes
        provides = SPEC.provides

        def open(self, tools, *, seed):
            return CursorStream()

    groups = rollouts().draw(3, step=0)
    with pytest.raises(AssertionError, match="3 groups in, 2 out"):
        check_signal(Forgetful(), groups)
    with pytest.raises(AssertionError, match="must not copy"):
        check_signal(Copier(), groups)
    with pytest.raises(AssertionError, match="same step twice"):
        check_source(Cursor())


def test_a_signal_that_remembers_or_overwrites_fails():
    calls = itertools.count()

    class Counter(Signal):
        provides = frozenset({Column.BASELINE})

        def score(self, groups, tools):
            value = np.asarray(float(next(calls)))
            return attach(groups, [{Column.BASELINE: value} for g in groups for _ in g.members])

    class Overwriter(Signal):
        provides = frozenset()

        def score(self, groups, tools):
            value = np.asarray(0.5)
            return attach(groups, [{Column.REWARD: value} for g in groups for _ in g.members])

    groups = rollouts().draw(2, step=0)
    with pytest.raises(AssertionError, match="got another baseline the second time"):
        check_signal(Counter(), groups)
    judged = check_signal(Verify(), groups, tools_of())
    with pytest.raises(AssertionError, match="changed reward, which it does not provide"):
        check_signal(Overwriter(), judged)


def test_a_task_set_that_scores_at_random_fails():
    draws = itertools.count()

    class AtRandom(FakeTaskSet):
        def score(self, tasks, completions):
            return [float(next(draws)) for _ in tasks]

    with pytest.raises(AssertionError, match="not repeatable"):
        check_taskset(AtRandom())


class CountingStream(PureStream):
    """Records how often it drew, and draws by that."""

    def __init__(self):
        self.drawn = 0

    @property
    def state(self):
        return self

    def draw(self, num_groups, *, step):
        self.drawn += 1
        return rollouts(seed=self.drawn).draw(num_groups, step=step)

    def save(self, folder):
        (folder / "drawn").write_text(str(self.drawn))

    def load(self, folder):
        self.drawn = int((folder / "drawn").read_text())


class Unsaved(CountingStream):
    def load(self, folder):
        pass


@pytest.mark.parametrize(("stream", "holds"), [(CountingStream, True), (Unsaved, False)])
def test_a_source_with_state_is_held_to_resuming_it(stream, holds):
    class Counting(Source):
        writes = SPEC.writes
        provides = SPEC.provides

        def open(self, tools, *, seed):
            return stream()

    if holds:
        check_source(Counting())
        return
    with pytest.raises(AssertionError, match="its state was not resumed"):
        check_source(Counting())


def test_a_source_says_its_regime_by_who_writes():
    class Own(Source):
        writes = frozenset({Kind.HUMAN})
        origin = "a curriculum"

    class Live(Own):
        writes = frozenset({Kind.HUMAN, Kind.LEARNER})

    assert (Own().regime, Live().regime) == (Regime.OFF, Regime.ON)


def test_rollouts_know_their_author_version_and_distribution():
    (group, *_) = rollouts(replace(live(), version=7)).draw(2, step=3)
    for member in group.members:
        span = member.trajectory.spans[-1]
        assert span.producer.kind is Kind.LEARNER
        assert span.versions == (7, 7)
        assert span.sampling is not None
        assert span.logprobs is not None
        assert member.trajectory.age(9) == 2
    frozen = rollouts(FakePolicy({"a": 1.0})).draw(1, step=0)[0].members[0].trajectory
    assert frozen.spans[-1].producer.kind is Kind.TEACHER
    assert frozen.age(9) == 0


def test_rollouts_share_task_sets_and_cover_an_epoch():
    other = FakeTaskSet(name="others", size=4)
    spec = Rollouts(tasks=("letters", "others"), group_size=1, max_new_tokens=3)
    source = spec.open(tools_of(None, other), seed=0)
    keys = [g.task for step in range(4) for g in source.draw(4, step=step)]
    assert sum(k.startswith("letters") for k in keys) == 8
    assert len({k for k in keys if k.startswith("letters")}) == 8, "each prompt once per epoch"
    assert {k for k in keys if k.startswith("others")} == {t.key for t in other.train}


def test_a_prompt_without_room_is_refused():
    with pytest.raises(TaskError, match="fewer than the model's context of 1"):
        rollouts(replace(live(), context=1)).draw(1, step=0)


def test_a_group_of_one_or_without_rewards_is_refused():
    score = bound(GroupAdvantage(), fake_tools())
    with pytest.raises(LegalityError, match="at least two members"):
        score([as_group(example_trajectory())])
    with pytest.raises(LegalityError, match="each with a reward"):
        score([as_group(example_trajectory(), example_trajectory())])


def test_measuring_an_exactly_known_policy():
    """Success rate, entropy and KL of a two-letter policy against their closed forms."""
    policy, base = FakePolicy({"a": 0.3, "b": 0.7}), FakePolicy({"a": 0.6, "b": 0.4})
    seen = []
    result = measure_policy(
        "fake",
        policy,
        [FakeTaskSet(size=40)],
        spec=Measure(samples=100, max_new_tokens=4, seed=1),
        protocol="p",
        observe=seen.append,
        base=base,
    )
    task = result.task("letters")
    n = task.scores.size
    assert task.successes.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / n))
    entropy = -(0.3 * np.log(0.3) + 0.7 * np.log(0.7)) / 2  # two tokens, the second is certain
    assert task.nll.mean() == pytest.approx(entropy, abs=0.02)
    kl = 0.3 * np.log(0.3 / 0.6) + 0.7 * np.log(0.7 / 0.4)
    assert task.raw["kl_base"].mean() == pytest.approx(kl, abs=0.08)
    assert (task.distinct == 2).all()
    assert not task.truncated.any()
    assert [e.done for e in seen] == [0, 1]
    again = measure_policy(
        "fake",
        policy,
        [FakeTaskSet(size=40)],
        spec=Measure(samples=100, max_new_tokens=4, seed=1),
        protocol="p",
        observe=seen.append,
        base=base,
    )
    np.testing.assert_array_equal(again.task("letters").scores, task.scores)


def test_every_update_of_a_draw_sees_every_task_set():
    other = FakeTaskSet(name="others", size=8)
    spec = Rollouts(tasks=("letters", "others"), group_size=1, max_new_tokens=3)
    source = spec.open(tools_of(None, other), seed=0)
    for step in range(3):
        groups = source.draw(8, step=step)
        for update in range(2):
            sets = [g.task.rpartition("/")[0] for g in groups[update::2]]
            assert sorted(sets) == ["letters"] * 2 + ["others"] * 2
