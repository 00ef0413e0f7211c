"""Signals for terms on preferences. Their code is in ``signals/preference.py``.

REWARD ──rank_pairs──▶ PREFERENCE              (online pairs)
LABEL, REFERENCE_LOGPROB ──log_ratio_centre──▶ LOG_RATIO_CENTRE     (bco)
                           mismatched_kl──▶ MISMATCHED_KL           (kto)
"""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.composition.base import PolicyRef
from posttrain.core.config import Config
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column


class RankPairs(Config, tag="rank_pairs", tag_field="type"):
    """The best of a group by reward is chosen, the worst rejected; the others are not trained on.

    A group in which nothing is strictly better than anything else makes no pair. Both kinds of
    leftover are discarded with their reason, so the ledger counts them. Of equal members the first
    stands for all: rollouts of a group come in no order.
    """

    needs: ClassVar[frozenset[Column]] = frozenset({Column.REWARD})
    provides: ClassVar[frozenset[Column]] = frozenset({Column.PREFERENCE, Column.DISCARD})


class MismatchedKL(Config, tag="mismatched_kl", tag_field="type"):
    """KTO's baseline: mean log-ratio of answers under prompts that they do not belong to.

    Every prompt of the draw is continued with the answer to another one, and both the live policy
    and the reference score it. One number per draw, from the weights before the update. A draw
    with a single prompt is refused. ``policy`` must be that of ``reference_logprobs``.
    """

    policy: PolicyRef = "input"
    needs: ClassVar[frozenset[Column]] = frozenset()
    provides: ClassVar[frozenset[Column]] = frozenset({Column.MISMATCHED_KL})


class LogRatioCentre(Config, tag="log_ratio_centre", tag_field="type"):
    """BCO's shift: half of (mean log-ratio of good answers + mean log-ratio of bad ones).

    One number per draw, from the weights before the update. A draw with answers of one kind only
    takes the mean of those.
    """

    needs: ClassVar[frozenset[Column]] = frozenset({Column.LABEL, Column.REFERENCE_LOGPROB})
    provides: ClassVar[frozenset[Column]] = frozenset({Column.LOG_RATIO_CENTRE})


class PreferDemonstration(Config, tag="prefer_demonstration", tag_field="type"):
    """The members of a group by ``author`` are chosen, all others rejected (SPIN, 2401.01335).

    A sample that repeats a demonstration word for word is discarded, and so is whoever is then
    left without the other side.
    """

    author: Kind = Kind.EXTERNAL
    needs: ClassVar[frozenset[Column]] = frozenset()
    provides: ClassVar[frozenset[Column]] = frozenset({Column.PREFERENCE, Column.DISCARD})


class MatchQuantiles(Config, tag="match_quantiles", tag_field="type"):
    """What each answer of the draw is compared with in optimal transport: the value of its rank.

    ``margins``: a pair's margin of log-probs, log π(y_w) − log π(y_l), is compared with the margin
    of the same rank among those of the reference. ``rewards``: the log-ratio of a chosen answer is
    compared with that of the same rank among the rejected, whatever pair it is in, and the other
    way round.

    Sorting needs all pairs of a draw at once, and the weights before the update are those of its
    first step, so ranks are found here and are constants in the loss. Micro-batches therefore
    change nothing. Further updates on the same draw keep the ranks, and for ``rewards`` the other
    side's values, of the first.
    """

    of: Literal["margins", "rewards"] = "margins"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.PREFERENCE, Column.REFERENCE_LOGPROB})
    provides: ClassVar[frozenset[Column]] = frozenset({Column.QUANTILE})


PreferenceSignal = RankPairs | MismatchedKL | LogRatioCentre | PreferDemonstration | MatchQuantiles
