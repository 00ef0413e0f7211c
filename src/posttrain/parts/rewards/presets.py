"""Methods that train reward models of answers, and process models of steps."""

from __future__ import annotations

from typing import ClassVar, Literal

from msgspec.structs import replace

from posttrain.core.bounds import Size, Tokens
from posttrain.core.sampling import SamplingSpec
from posttrain.parts.base import PolicyRef, Signal, Term
from posttrain.parts.composition import Composition, Method
from posttrain.parts.policy.shapes import rollouts
from posttrain.parts.registry import part
from posttrain.parts.rewards.process import StepLabels
from posttrain.parts.rewards.reward_models import OutcomeBCE, StepBCE
from posttrain.parts.rewards.shapes import JUDGE, NO_ROLE
from posttrain.parts.rewards.steps import Steps
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.dataset import Dataset


@part
class Orm(Method):
    """An outcome reward model from answers labelled right or wrong.

    Use it with ``squash: sigmoid``: its score is the log-odds of being right. ``at: every``
    trains the score after every token, like the paper's token-level verifiers.
    """

    data: Dataset
    at: Literal["last", "every"] = "last"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "outcome labels"
    tendency: ClassVar[str] = NO_ROLE
    formula: ClassVar[str] = "-y log sigmoid(s) - (1 - y) log sigmoid(-s)"
    paper: ClassVar[str] = "2110.14168"

    def compose(self) -> Composition:
        """Labelled answers; binary cross-entropy."""
        return Composition(
            source=replace(self.data, unpaired=True),
            terms=(OutcomeBCE(at=self.at),),
            scalar_head=JUDGE,
        )


@part
class OrmOnRollouts(Method):
    """An outcome reward model from a frozen policy's own answers, labelled by the verifier."""

    tasks: tuple[str, ...]
    generator: PolicyRef = "input"
    at: Literal["last", "every"] = "last"
    group_size: Size = 8
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec()

    provenance: ClassVar[str] = "off-policy: a frozen policy's answers"
    interface: ClassVar[str] = "verifier reward"
    tendency: ClassVar[str] = NO_ROLE
    formula: ClassVar[str] = "-R log sigmoid(s) - (1 - R) log sigmoid(-s)"
    paper: ClassVar[str] = "2110.14168"

    def compose(self) -> Composition:
        """Frozen rollouts; verifier; binary cross-entropy."""
        return _judge(self, Verify(), OutcomeBCE(at=self.at, target="reward"))


@part
class Prm(Method):
    """A process reward model from answers whose steps are labelled.

    Rows are a prompt, a list of ``completions`` (the steps) and a list of ``labels``: true, false,
    or numbers from 0 to 1. ``steps`` must be the same where the model is used.

    Unconfirmed: the loss per step was read at second hand.
    """

    data: Dataset
    steps: Steps = Steps()

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "process labels"
    tendency: ClassVar[str] = NO_ROLE
    formula: ClassVar[str] = "-y_k log sigmoid(s_k) - (1 - y_k) log sigmoid(-s_k) at step ends"
    paper: ClassVar[str] = "2305.20050, 2211.14275"

    def compose(self) -> Composition:
        """Labelled steps; cross-entropy at their ends."""
        return Composition(
            source=replace(self.data, steps=self.steps),
            terms=(StepBCE(),),
            scalar_head=JUDGE,
        )


@part
class MathShepherd(Method):
    """A process reward model without human labels: steps are labelled by roll-outs from them.

    A frozen policy answers; from the end of every step ``completer`` samples ``samples``
    continuations. The label is 1 if the verifier accepts any of them, the paper's hard
    estimation; ``soft`` labels are the share that it accepts.

    Soft labels are below 1 also for a correct first step: their ``min`` or ``product`` over an
    answer's steps prefers answers with few steps. Use ``last`` with them.

    Unconfirmed: the formula was read at second hand; the number of samples is ours.
    """

    tasks: tuple[str, ...]
    generator: PolicyRef = "input"
    completer: PolicyRef = "input"
    samples: Size = 8
    labels: Literal["soft", "hard"] = "hard"
    steps: Steps = Steps()
    group_size: Size = 4
    max_new_tokens: Tokens = 256
    sampling: SamplingSpec = SamplingSpec()

    provenance: ClassVar[str] = "off-policy: a frozen policy's answers"
    interface: ClassVar[str] = "process labels from verified roll-outs"
    tendency: ClassVar[str] = NO_ROLE
    formula: ClassVar[str] = "prm with y_k = 1 if any continuation from step k succeeds"
    paper: ClassVar[str] = "2312.08935"

    def compose(self) -> Composition:
        """Frozen rollouts; labels by continuation; cross-entropy at step ends."""
        labels = StepLabels(
            policy=self.completer,
            samples=self.samples,
            labels=self.labels,
            steps=self.steps,
            max_new_tokens=self.max_new_tokens,
        )
        return _judge(self, labels, StepBCE())


def _judge(method: OrmOnRollouts | MathShepherd, signal: Signal, term: Term) -> Composition:
    """A reward model trained on the answers of a frozen policy."""
    return Composition(
        source=rollouts(method, policy=method.generator),
        signals=(signal,),
        terms=(term,),
        scalar_head=JUDGE,
    )
