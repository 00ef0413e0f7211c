"""From the specifications in ``composition/credit.py`` to signals."""

from __future__ import annotations

from posttrain.composition.credit import (
    BestOfKAdvantage,
    ClipCovariance,
    CreditSpec,
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
)
from posttrain.core.protocols import Policy, Signal
from posttrain.signals.credit import BestOfKSignal, DecoupledSignal, GroupAdvantageSignal
from posttrain.signals.mismatch import GreedyBaselineSignal, TrainerLogprobsSignal
from posttrain.signals.selection import (
    ClipCovarianceSignal,
    DropCutOffSignal,
    ImitateFailuresSignal,
    KeepInformativeSignal,
    MarkCovarianceSignal,
    MarkEntropySignal,
)
from posttrain.signals.shaping import KLPenaltySignal, SoftLengthPenaltySignal


def credit_signal(spec: CreditSpec, *, live: Policy, judge: Signal, max_new_tokens: int) -> Signal:
    """The code behind a specification.

    Args:
        spec: which signal.
        live: the learner's policy, for signals that ask it.
        judge: writes rewards, for signals that need one for an answer of their own.
        max_new_tokens: the longest answer that the stage draws.
    """
    match spec:
        case GroupAdvantage():
            return GroupAdvantageSignal(spec)
        case BestOfKAdvantage():
            return BestOfKSignal(spec)
        case DecoupledAdvantage():
            return DecoupledSignal(spec)
        case KLPenalty():
            return KLPenaltySignal(spec)
        case SoftLengthPenalty():
            return SoftLengthPenaltySignal(spec)
        case KeepInformative():
            return KeepInformativeSignal(spec)
        case DropCutOff():
            return DropCutOffSignal()
        case ClipCovariance():
            return ClipCovarianceSignal(spec)
        case MarkCovariance():
            return MarkCovarianceSignal(spec)
        case MarkEntropy():
            return MarkEntropySignal(spec, live)
        case ImitateFailures():
            return ImitateFailuresSignal(spec)
        case GreedyBaseline():
            return GreedyBaselineSignal(live, judge, max_new_tokens)
    return TrainerLogprobsSignal(live)
