"""Methods that imitate a policy's own answers, after choosing among them."""

from __future__ import annotations

from typing import ClassVar

from posttrain.core.bounds import Number, Size, Tokens
from posttrain.core.errors import ConfigError
from posttrain.core.sampling import SamplingSpec
from posttrain.parts.base import Aggregate, PolicyRef
from posttrain.parts.composition import Composition, Method
from posttrain.parts.offline.filters import KeepRewards
from posttrain.parts.policy.shapes import rollouts
from posttrain.parts.registry import part, tag_of
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.members import Hinted
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.parts.supervised.likelihood import CrossEntropy

OWN = "cross-entropy on the sampler's answers that pass the filter"


def imitate(source: Rollouts, *, keep: KeepRewards | None, aggregate: Aggregate) -> Composition:
    """Cross-entropy on the rollouts that a filter keeps; on all of them without one."""
    signals = (Verify(), keep) if keep else ()
    return Composition(source=source, signals=signals, terms=(CrossEntropy(aggregate=aggregate),))


def check_best(method: Method, best: int, group_size: int) -> None:
    """Refuse a cut that would keep everything.

    Raises:
        ConfigError: ``best`` is not below the group's size.
    """
    if not 1 <= best < group_size:
        raise ConfigError(
            f"{tag_of(method)} with best={best} of group_size={group_size}",
            expected="1 <= best < group_size: keeping everything is no choice",
        )


@part
class Rft(Method):
    """Rejection-sampling fine-tuning: distinct right answers of a frozen policy.

    Answers are distinct by their text. The authors compare the equations in them, and keep one
    answer of each list of equations.

    Unconfirmed: from general knowledge, the paper was not opened.
    """

    tasks: tuple[str, ...]
    sampler: PolicyRef = "input"
    at_least: Number = 1.0
    distinct: bool = True
    group_size: Size = 8
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec()
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy: a frozen copy's own answers"
    interface: ClassVar[str] = "verifier reward"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = f"{OWN}: R >= at_least"
    paper: ClassVar[str] = "2308.01825"

    def compose(self) -> Composition:
        """Frozen rollouts; verifier and threshold; cross-entropy."""
        source = rollouts(self, policy=self.sampler)
        keep = KeepRewards(at_least=self.at_least, distinct=self.distinct)
        return imitate(source, keep=keep, aggregate=self.aggregate)


@part
class Raft(Method):
    """Reward-ranked fine-tuning: the best of every group, sampled anew at every draw.

    With another ``sampler`` than the learner this is best-of-n distillation. The best answer of a
    group stays even when it is wrong, unless ``at_least`` says otherwise.
    """

    tasks: tuple[str, ...]
    sampler: PolicyRef = "learner"
    best: Size = 1
    at_least: Number | None = None
    group_size: Size = 8
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec()
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "on-policy"
    interface: ClassVar[str] = "verifier reward"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = f"{OWN}: the group's highest R"
    paper: ClassVar[str] = "2304.06767"

    def __post_init__(self) -> None:
        check_best(self, self.best, self.group_size)

    def compose(self) -> Composition:
        """Rollouts; verifier and rank; cross-entropy."""
        source = rollouts(self, policy=self.sampler)
        keep = KeepRewards(at_least=self.at_least, best=self.best)
        return imitate(source, keep=keep, aggregate=self.aggregate)


@part
class Star(Method):
    """STaR: the greedy answer to each prompt, where it is right.

    One stage is one outer loop. The paper starts every loop from the base again: ``init: base``
    and ``sampler: <the stage before>``. With a ``hint``, such as ``"{question} (the answer is
    {answer})"``, every prompt is answered a second time by a sampler that reads it; where only
    that answer is right it is learnt, after the plain prompt: rationalisation.
    """

    tasks: tuple[str, ...]
    sampler: PolicyRef = "input"
    hint: str | None = None
    at_least: Number = 1.0
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec(temperature=0.0)
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy: a frozen copy's own answers"
    interface: ClassVar[str] = "verifier reward"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = f"{OWN}: the likeliest one, R >= at_least"
    paper: ClassVar[str] = "2203.14465"

    def compose(self) -> Composition:
        """A frozen, greedy rollout per prompt, or two; verifier and threshold; cross-entropy."""
        hinted = None if self.hint is None else Hinted(context=self.hint)
        source = Rollouts(
            tasks=self.tasks,
            policy=self.sampler,
            group_size=2 if hinted else 1,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            members=hinted,
        )
        # Of equal rewards the earlier answer is the best one: that of the plain prompt.
        keep = KeepRewards(at_least=self.at_least, best=1 if hinted else None)
        return imitate(source, keep=keep, aggregate=self.aggregate)


@part
class RestEm(Method):
    """ReST-EM: up to ``best`` right answers per prompt of a frozen policy, learnt from the base.

    One stage is one round of expectation (sampling) and maximisation (learning): ``init: base``
    and ``sampler: <the stage before>``.

    Unconfirmed: the defaults of sampling and of the cut are from memory.
    """

    tasks: tuple[str, ...]
    sampler: PolicyRef = "input"
    at_least: Number = 1.0
    best: Size = 10
    group_size: Size = 32
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec(temperature=0.7, top_k=40)
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy: a frozen copy's own answers"
    interface: ClassVar[str] = "verifier reward"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = f"{OWN}: R >= at_least, at most `best` per prompt"
    paper: ClassVar[str] = "2312.06585"

    def __post_init__(self) -> None:
        check_best(self, self.best, self.group_size)

    def compose(self) -> Composition:
        """Frozen rollouts; verifier, threshold and cut; cross-entropy."""
        source = rollouts(self, policy=self.sampler)
        keep = KeepRewards(at_least=self.at_least, best=self.best)
        return imitate(source, keep=keep, aggregate=self.aggregate)


@part
class Ssd(Method):
    """Simple self-distillation: a frozen copy's own answers, unverified, from the likely part of
    its distribution only."""

    tasks: tuple[str, ...]
    sampler: PolicyRef = "input"
    group_size: Size = 1
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec(temperature=0.6, top_k=20, top_p=0.95)
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy: a frozen copy's own answers"
    interface: ClassVar[str] = "token targets"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "-log pi(y_t), y from the truncated policy itself"
    paper: ClassVar[str] = "2604.01193"

    def compose(self) -> Composition:
        """Frozen, truncated rollouts; no signals; cross-entropy."""
        source = rollouts(self, policy=self.sampler)
        return imitate(source, keep=None, aggregate=self.aggregate)
