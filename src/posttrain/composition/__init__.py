"""The algebra of methods, as data: a source, signals, and weighted objective terms.

    source ──draws──▶ groups ──signals──▶ columns beside them ──pack──▶ terms ──sum──▶ loss

A method is a :class:`Composition` of specifications. Each specification says what it provides and
what it needs, so a wrong composition is refused before a model is loaded (``legality.py``). The
code behind a specification lives in the folder of its kind: ``sources``, ``signals``,
``objectives``.
"""

from __future__ import annotations

from posttrain.composition.base import ANYONE, Aggregate, PolicyRef
from posttrain.composition.distillation import DistillationTerm, TeacherReverseKL
from posttrain.composition.policy import ClippedPolicyGradient, PolicyTerm, ReferenceKL
from posttrain.composition.preference import PairwiseLogistic, PreferenceTerm
from posttrain.composition.signals import (
    GroupAdvantage,
    ReferenceLogprobs,
    SignalSpec,
    TeacherDistribution,
    Verify,
)
from posttrain.composition.sources import Dataset, Rollouts, SamplingSpec, SourceSpec
from posttrain.composition.supervised import CrossEntropy, SupervisedTerm
from posttrain.config import Config

__all__ = [
    "ANYONE",
    "Aggregate",
    "ClippedPolicyGradient",
    "Composition",
    "CrossEntropy",
    "Dataset",
    "GroupAdvantage",
    "PairwiseLogistic",
    "PolicyRef",
    "ReferenceKL",
    "ReferenceLogprobs",
    "Rollouts",
    "SamplingSpec",
    "SignalSpec",
    "SourceSpec",
    "TeacherDistribution",
    "TeacherReverseKL",
    "TermSpec",
    "Verify",
]


TermSpec = SupervisedTerm | PreferenceTerm | PolicyTerm | DistillationTerm


class Composition(Config, frozen=True, kw_only=True):
    """A method spelt out: where trajectories come from, who judges them, what is minimised."""

    source: SourceSpec
    terms: tuple[TermSpec, ...]
    signals: tuple[SignalSpec, ...] = ()
