"""Signals between a reward and a policy gradient: shaping, credit, selection, mismatch.

    REWARD ─┬─▶ shaping ──TOKEN_REWARD──▶ credit ──ADVANTAGE──▶ selection ──DISCARD, MARK──▶ terms
            └─▶ greedy_baseline ──BASELINE──▶┘

The verifier's ``REWARD`` is never changed: penalties stand beside it, token by token, and a
trajectory's *return* is its reward plus the sum of its token rewards. The code is in
``signals/credit.py``, ``shaping.py``, ``selection.py`` and ``mismatch.py``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column

Baseline = Literal[
    "group_mean", "leave_one_out", "length_weighted", "batch_mean", "greedy", "constant"
]
Scale = Literal["std", "none", "batch_std", "whiten", "informative"]
Columns = frozenset[Column]


class GroupAdvantage(Config, tag="group_advantage", tag_field="type"):
    """The return R minus a baseline b, scaled, spread over the completion's tokens.

    | ``baseline`` | b_i | known from |
    |---|---|---|
    | ``group_mean`` | mean of the group | GRPO 2402.03300, Dr.GRPO 2503.20783 |
    | ``leave_one_out`` | mean of the siblings, so A = G/(G−1)·(R − mean) | RLOO 2402.14740 |
    | ``length_weighted`` | Σ_j l_j R_j / Σ_j l_j, l tokens written | OPO 2505.23585 |
    | ``batch_mean`` | mean of the draw | REINFORCE |
    | ``greedy`` | reward of the likeliest answer | ReMax 2310.10505 |
    | ``constant`` | ``value`` | REINFORCE |

    | ``scale`` | divides R − b by | known from |
    |---|---|---|
    | ``std`` | unbiased std of the group's R, + 1e-6 | GRPO |
    | ``none`` | 1 | Dr.GRPO, RLOO, OPO |
    | ``batch_std`` | unbiased std of the draw's R, + 1e-6 | Lite-PPO 2508.08221 |
    | ``whiten`` | subtracts the mean and divides by the std of R − b over the draw's trained tokens | REINFORCE++ 2501.03262 |
    | ``informative`` | share of members whose group has unequal R | GPG 2504.02546 |

    ``credit: to_go`` gives a token the token rewards that come at or after it, not all of them.
    ``kept_only`` compares members with those of their group that no earlier signal discarded, and
    gives the others, and groups with too few of them, exactly 0.
    A group of equal returns gets exactly 0 where the baseline is its own (with ``whiten`` when
    the whole draw is equal). Baselines of the group refuse a group of one.
    """  # noqa: E501

    baseline: Baseline = "group_mean"
    value: float | None = None
    scale: Scale = "std"
    credit: Literal["outcome", "to_go"] = "outcome"
    kept_only: bool = False
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE})

    def __post_init__(self) -> None:
        if (self.baseline == "constant") != (self.value is not None):
            raise ConfigError(
                f"group_advantage with baseline={self.baseline}, value={self.value}",
                expected="a value with baseline constant, and with no other",
            )
        if self.scale in ("std", "informative") and not self.of_the_group:
            raise ConfigError(
                f"group_advantage with baseline={self.baseline}, scale={self.scale}",
                expected="a baseline of the group: group_mean, leave_one_out or length_weighted",
                fix="scale none, batch_std or whiten",
            )

    @property
    def of_the_group(self) -> bool:
        """True when the baseline is made of the member's own group."""
        return self.baseline in ("group_mean", "leave_one_out", "length_weighted")

    @property
    def needs(self) -> Columns:
        """The reward, and what the options ask for."""
        extra = {Column.BASELINE} if self.baseline == "greedy" else set()
        extra |= {Column.TOKEN_REWARD} if self.credit == "to_go" else set()
        extra |= {Column.DISCARD} if self.kept_only else set()
        return frozenset({Column.REWARD}) | extra

    @property
    def min_group(self) -> int:
        """Members that a group must have."""
        return 2 if self.of_the_group else 1


class BestOfKAdvantage(Config, tag="best_of_k_advantage", tag_field="type"):
    """What a member adds to the best of k: mean over sets S of k members with it of
    max R_S − max R_{S without it} (arXiv 2503.19595; with rewards 0 and 1 the best of k is pass@k).

    Σ_i A_i ∇log π_i is an unbiased gradient of the expected best of k, times G/k. For k = G only
    the best member has credit: its lead over the second best. ``k: null`` is the group's size.
    """

    k: int | None = None
    needs: ClassVar[Columns] = frozenset({Column.REWARD})
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE})

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 2:
            raise ConfigError(
                f"best_of_k_advantage with k={self.k}",
                expected="at least 2: with k = 1 there is nothing to compare with",
                fix="group_advantage with baseline leave_one_out is the advantage for k = 1",
            )

    @property
    def min_group(self) -> int:
        """Members that a group must have."""
        return self.k or 2


class DecoupledAdvantage(Config, tag="decoupled_advantage", tag_field="type"):
    """GDPO (arXiv 2601.05242): each reward is normalised in its group on its own,
    a_i = Σ_k w_k (r_ik − mean_k) / (std_k + 1e-6), then a is normalised over the draw.

    The two rewards are the verifier's and the sum of the token rewards (a length penalty, say).
    Summing them first would let the wider one hide the other.
    """

    weights: tuple[float, float] = (1.0, 1.0)
    needs: ClassVar[Columns] = frozenset({Column.REWARD, Column.TOKEN_REWARD})
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE})
    min_group: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if min(self.weights) <= 0:
            raise ConfigError(f"weights {self.weights}", expected="two numbers above 0")


class GreedyBaseline(Config, tag="greedy_baseline", tag_field="type"):
    """The reward of the learner's likeliest answer to each prompt (ReMax, arXiv 2310.10505).

    One more completion per group, at temperature 0. It is judged and never trained on, so it is
    no member of the group and leaves no trace but its reward.
    """

    needs: ClassVar[Columns] = frozenset()
    provides: ClassVar[Columns] = frozenset({Column.BASELINE})


class KLPenalty(Config, tag="kl_penalty", tag_field="type"):
    """−β (log π_behaviour − log π_ref) as a reward of every token: k1 in the reward.

    The gradient of E[R − β Σ k1] is that of the reward minus β times the sequence KL(π ‖ π_ref),
    exactly (RLOO, REINFORCE++; survey section 5, trap 11).
    """

    beta: float = 0.05
    needs: ClassVar[Columns] = frozenset({Column.BEHAVIOUR_LOGPROB, Column.REFERENCE_LOGPROB})
    provides: ClassVar[Columns] = frozenset({Column.TOKEN_REWARD})

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"kl_penalty with beta={self.beta}", expected="above 0")


class SoftLengthPenalty(Config, tag="soft_length_penalty", tag_field="type"):
    """DAPO's soft overlong punishment, as a reward of the last token (arXiv 2503.14476).

    0 up to ``max_tokens − cache_tokens`` tokens, then falling linearly to −``weight`` at
    ``max_tokens`` and beyond.
    """

    max_tokens: int
    cache_tokens: int
    weight: float = 1.0
    needs: ClassVar[Columns] = frozenset()
    provides: ClassVar[Columns] = frozenset({Column.TOKEN_REWARD})

    def __post_init__(self) -> None:
        if not 0 < self.cache_tokens <= self.max_tokens or self.weight <= 0:
            raise ConfigError(
                f"soft_length_penalty with max_tokens={self.max_tokens}, "
                f"cache_tokens={self.cache_tokens}, weight={self.weight}",
                expected="0 < cache_tokens <= max_tokens, weight > 0",
            )


class KeepInformative(Config, tag="keep_informative", tag_field="type"):
    """Discards groups whose verifier rewards are all equal (DAPO's dynamic sampling, 2503.14476).

    They give no gradient, and without them a token mean is over the others only. Discarded
    trajectories stay in the record with their reason. The paper also draws more groups until the
    batch is full; here a step is smaller when a draw teaches less.
    """

    needs: ClassVar[Columns] = frozenset({Column.REWARD})
    provides: ClassVar[Columns] = frozenset({Column.DISCARD})
    min_group: ClassVar[int] = 2


class DropCutOff(Config, tag="drop_cut_off", tag_field="type"):
    """Discards answers that the token budget ended (DAPO's overlong filtering, 2503.14476).

    They stay in their group's mean and std, as in the paper, and out of the loss.
    """

    needs: ClassVar[Columns] = frozenset()
    provides: ClassVar[Columns] = frozenset({Column.DISCARD})


class ClipCovariance(Config, tag="clip_covariance", tag_field="type"):
    """Clip-Cov (arXiv 2505.22617): no gradient at a few tokens that would cost most entropy.

    A token's covariance is (A − mean A)(log π − mean log π) over the draw's trained tokens, with
    the log-probs it was sampled with. Of those strictly between ``low`` and ``high`` a random
    ``share`` of all tokens (at least one) gets advantage 0, and still counts in every mean.
    """

    share: float = 2e-4
    low: float = 1.0
    high: float = 5.0
    needs: ClassVar[Columns] = frozenset({Column.ADVANTAGE, Column.BEHAVIOUR_LOGPROB})
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE})

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.low >= self.high:
            raise ConfigError(
                f"clip_covariance with share={self.share}, low={self.low}, high={self.high}",
                expected="0 < share < 1 and low < high",
            )


class MarkCovariance(Config, tag="mark_covariance", tag_field="type"):
    """KL-Cov (arXiv 2505.22617): marks the ``share`` of tokens with the largest covariance
    (defined in clip_covariance; at least one) for the ``log_ratio_penalty`` term."""

    share: float = 2e-4
    needs: ClassVar[Columns] = frozenset({Column.ADVANTAGE, Column.BEHAVIOUR_LOGPROB})
    provides: ClassVar[Columns] = frozenset({Column.MARK})

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"mark_covariance with share={self.share}", expected="0 < share < 1")


class MarkEntropy(Config, tag="mark_entropy", tag_field="type"):
    """Marks the ⌈share · N⌉ of a draw's N trained tokens at which the learner is least sure, for
    ``limit: {marked: true}`` (arXiv 2506.01939, which takes a fifth of a batch).

    One more pass over the draw, with the weights before the update. Discarded answers neither
    count nor are marked. Of equal entropies the earlier token is marked.
    """

    share: float = 0.2
    needs: ClassVar[Columns] = frozenset()
    provides: ClassVar[Columns] = frozenset({Column.MARK})

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"mark_entropy with share={self.share}", expected="0 < share < 1")


class ImitateFailures(Config, tag="imitate_failures", tag_field="type"):
    """Groups that fail are shown the demonstration, others learn from themselves (HPT, 2509.04419).

    A group in which at most ``gate`` rollouts have a reward of ``success`` or more keeps its
    members by ``author`` and discards the rollouts; any other group does the opposite.
    """

    gate: int = 0
    success: float = 1.0
    author: Kind = Kind.EXTERNAL
    needs: ClassVar[Columns] = frozenset({Column.REWARD})
    provides: ClassVar[Columns] = frozenset({Column.DISCARD})

    def __post_init__(self) -> None:
        if self.gate < 0:
            raise ConfigError(f"imitate_failures with gate={self.gate}", expected="0 or more")


class TrainerLogprobs(Config, tag="trainer_logprobs", tag_field="type"):
    """The learner's own log-probs of what its sampler wrote, before the update.

    Sampler and trainer compute the same policy in different ways; terms with ``mismatch`` correct
    for what is left between them, and the step shows how large it is.
    """

    needs: ClassVar[Columns] = frozenset({Column.BEHAVIOUR_LOGPROB})
    provides: ClassVar[Columns] = frozenset({Column.TRAINER_LOGPROB})


CreditSpec = (
    GroupAdvantage
    | BestOfKAdvantage
    | DecoupledAdvantage
    | GreedyBaseline
    | KLPenalty
    | SoftLengthPenalty
    | KeepInformative
    | DropCutOff
    | ClipCovariance
    | MarkCovariance
    | MarkEntropy
    | ImitateFailures
    | TrainerLogprobs
)

Grouped = GroupAdvantage | BestOfKAdvantage | DecoupledAdvantage | KeepInformative
"""Signals that compare the members of a group, at least ``min_group`` of them."""
