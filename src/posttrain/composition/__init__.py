"""The algebra of methods, as data: a source, signals, and weighted objective terms.

    source ──draws──▶ groups ──signals──▶ columns beside them ──pack──▶ terms ──sum──▶ loss

A method is a :class:`Composition` of specifications. Each specification says what it provides and
what it needs, so a wrong composition is refused before a model is loaded (``legality.py``). The
code behind a specification lives in the folder of its kind: ``sources``, ``signals``,
``objectives``.
"""

from __future__ import annotations

from posttrain import extensions
from posttrain.composition.base import (
    ANYONE,
    Aggregate,
    Limit,
    PolicyRef,
    Term,
    WeightSchedule,
)
from posttrain.composition.company import Company, Guided, Hinted, Rival
from posttrain.composition.credit import (
    BestOfKAdvantage,
    ClipCovariance,
    DecoupledAdvantage,
    DropCutOff,
    GreedyBaseline,
    GroupAdvantage,
    ImitateFailures,
    KeepInformative,
    KLPenalty,
    MarkCovariance,
    MarkEntropy,
    SoftLengthPenalty,
    TrainerLogprobs,
)
from posttrain.composition.distillation import (
    DistillationTerm,
    EntropyAwareKL,
    TeacherForwardKL,
    TeacherJensenShannon,
    TeacherReverseKL,
    TeacherSkewKL,
    TeacherSkewReverseKL,
    TeacherSortedL1,
    TeacherTotalVariation,
)
from posttrain.composition.external import (
    AssumedCertainGradient,
    AssumedOwnGradient,
    ExplorationBonus,
    ExternalTerm,
)
from posttrain.composition.moving import MOVING, MovingReference
from posttrain.composition.offline import (
    AdvantageWeighted,
    KeepPositiveAdvantages,
    KeepRewards,
    LeftoverLunch,
    OfflineTerm,
    OwnLogprobs,
    RewardGold,
)
from posttrain.composition.policy import (
    AdaptiveEntropyBonus,
    ClippedPolicyGradient,
    ClippedWeightPolicyGradient,
    EntropyBonus,
    GeometricPolicyGradient,
    LogRatioPenalty,
    Mismatch,
    PolicyGradient,
    PolicyTerm,
    ReferenceKL,
    SequencePolicyGradient,
    ShapedWeightPolicyGradient,
    SoftGatedPolicyGradient,
)
from posttrain.composition.preference import (
    BinaryClassifier,
    ContrastiveLogistic,
    OddsRatio,
    PairwiseAnchored,
    PairwiseDiscovered,
    PairwiseDivergence,
    PairwiseExact,
    PairwiseHinge,
    PairwiseLogistic,
    PairwiseMean,
    PairwiseNoiseContrastive,
    PairwiseRobust,
    PairwiseSelfPlay,
    PairwiseShared,
    PairwiseSquared,
    PairwiseTransport,
    PairwiseWeighted,
    PreferenceTerm,
    ProspectValue,
    TargetMargin,
    TransportedReward,
)
from posttrain.composition.preference_signals import (
    LogRatioCentre,
    MatchQuantiles,
    MismatchedKL,
    PreferDemonstration,
    RankPairs,
)
from posttrain.composition.reward_models import (
    BradleyTerry,
    Judge,
    OutcomeClassifier,
    ProcessReward,
    RewardModel,
    StepClassifier,
    StepLabels,
)
from posttrain.composition.scalar_heads import ScalarTerm
from posttrain.composition.signals import ReferenceLogprobs, SignalSpec
from posttrain.composition.sources import (
    Dataset,
    Mix,
    Redraw,
    Rollouts,
    SamplingSpec,
    SourceSpec,
    parts_of,
)
from posttrain.composition.steps import Steps
from posttrain.composition.supervised import (
    BalancedCrossEntropy,
    CrossEntropy,
    DynamicCrossEntropy,
    ProbabilityLoss,
    ProximalCrossEntropy,
    SupervisedTerm,
    WeightedCrossEntropy,
)
from posttrain.composition.teaching import (
    DeltaAdvantage,
    ForeignTeacher,
    SpanAdvantage,
    TeacherAdvantage,
    TeacherDistribution,
    TeacherLogprobs,
)
from posttrain.composition.values import Gae, ScalarHead, ValueLoss
from posttrain.composition.verify import Verify
from posttrain.core.config import Config

__all__ = [
    "ANYONE",
    "MOVING",
    "AdaptiveEntropyBonus",
    "AdvantageWeighted",
    "Aggregate",
    "AssumedCertainGradient",
    "AssumedOwnGradient",
    "BalancedCrossEntropy",
    "BestOfKAdvantage",
    "BinaryClassifier",
    "BradleyTerry",
    "ClipCovariance",
    "ClippedPolicyGradient",
    "ClippedWeightPolicyGradient",
    "Company",
    "Composition",
    "ContrastiveLogistic",
    "CrossEntropy",
    "Dataset",
    "DecoupledAdvantage",
    "DeltaAdvantage",
    "DropCutOff",
    "DynamicCrossEntropy",
    "EntropyAwareKL",
    "EntropyBonus",
    "ExplorationBonus",
    "ForeignTeacher",
    "Gae",
    "GeometricPolicyGradient",
    "GreedyBaseline",
    "GroupAdvantage",
    "Guided",
    "Hinted",
    "ImitateFailures",
    "Judge",
    "KLPenalty",
    "KeepInformative",
    "KeepPositiveAdvantages",
    "KeepRewards",
    "LeftoverLunch",
    "Limit",
    "LogRatioCentre",
    "LogRatioPenalty",
    "MarkCovariance",
    "MarkEntropy",
    "MatchQuantiles",
    "Mismatch",
    "MismatchedKL",
    "Mix",
    "MovingReference",
    "OddsRatio",
    "OutcomeClassifier",
    "OwnLogprobs",
    "PairwiseAnchored",
    "PairwiseDiscovered",
    "PairwiseDivergence",
    "PairwiseExact",
    "PairwiseHinge",
    "PairwiseLogistic",
    "PairwiseMean",
    "PairwiseNoiseContrastive",
    "PairwiseRobust",
    "PairwiseSelfPlay",
    "PairwiseShared",
    "PairwiseSquared",
    "PairwiseTransport",
    "PairwiseWeighted",
    "PolicyGradient",
    "PolicyRef",
    "PreferDemonstration",
    "ProbabilityLoss",
    "ProcessReward",
    "ProspectValue",
    "ProximalCrossEntropy",
    "RankPairs",
    "Redraw",
    "ReferenceKL",
    "ReferenceLogprobs",
    "RewardGold",
    "RewardModel",
    "Rival",
    "Rollouts",
    "SamplingSpec",
    "ScalarHead",
    "ScalarTerm",
    "SequencePolicyGradient",
    "ShapedWeightPolicyGradient",
    "SignalSpec",
    "SoftGatedPolicyGradient",
    "SoftLengthPenalty",
    "SourceSpec",
    "SpanAdvantage",
    "StepClassifier",
    "StepLabels",
    "Steps",
    "TargetMargin",
    "TeacherAdvantage",
    "TeacherDistribution",
    "TeacherForwardKL",
    "TeacherJensenShannon",
    "TeacherLogprobs",
    "TeacherReverseKL",
    "TeacherSkewKL",
    "TeacherSkewReverseKL",
    "TeacherSortedL1",
    "TeacherTotalVariation",
    "Term",
    "TermSpec",
    "TrainerLogprobs",
    "TransportedReward",
    "ValueLoss",
    "Verify",
    "WeightSchedule",
    "WeightedCrossEntropy",
    "parts_of",
]


TermSpec = (
    SupervisedTerm
    | OfflineTerm
    | PreferenceTerm
    | PolicyTerm
    | ExternalTerm
    | DistillationTerm
    | ScalarTerm
)


class Composition(Config):
    """A method spelt out: where trajectories come from, who judges them, what is minimised.

    ``moving`` gives the learner a reference that follows it, for parts that name policy ``moving``.
    ``scalar_head`` is there exactly when a term reads one.
    """

    source: SourceSpec
    terms: tuple[extensions.AnyTerm, ...]
    signals: tuple[extensions.AnySignal, ...] = ()
    moving: MovingReference | None = None
    scalar_head: ScalarHead | None = None
