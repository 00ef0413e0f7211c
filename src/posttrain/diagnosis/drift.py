"""KL between a policy and its base, and the base's perplexity of the policy's successes.

policy's draws ──both score──▶ KL(policy ‖ base)   and the base's perplexity of its successes
base's draws   ──both score──▶ KL(base ‖ policy)   on the task, and on earlier tasks

KL(base ‖ policy) on the task correlates with forgetting (arXiv 2509.04259), on earlier tasks more
directly (2607.04364). Successes that the base finds *less* surprising than its own samples indicate
sharpening (2504.13837, section 4.1).

Shape legend: ``P`` prompts, ``A`` tokens of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posttrain.core.sampling import SamplingSpec
from posttrain.core.task import TaskSet
from posttrain.diagnosis.drawing import (
    Answer,
    check_prompts,
    draw_answers,
    require_plain,
    require_same_vocabulary,
    token_logprobs,
)
from posttrain.diagnosis.median import MedianInterval, median_interval
from posttrain.diagnosis.unbounded import mean_of, ratio_of
from posttrain.measure.bootstrap import Interval, mean_interval
from posttrain.measure.reading import Reading, reading
from posttrain.protocols import Policy

Floats = npt.NDArray[np.float64]
WHY_PLAIN = "a divergence is estimated on samples of the policy's own distribution"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyDistance:
    """KL(first ‖ second) within the token budget, on samples of ``first``.

    For a sample y it is Σ_t log first − log second: unbiased, and negative for some samples (the
    k1 estimator). The alternative k3, r − 1 − log r with r = second/first per token, is unbiased
    too and never negative, but its mean is dominated by single tokens that are rare under
    ``first`` and likely under ``second``. Both need samples of the first argument.
    """

    task: str
    first: str
    second: str
    prompts: tuple[str, ...]  # [P]
    nats: Floats  # [P] mean over samples of the sum over tokens
    tokens: Floats  # [P] mean tokens per sample
    samples: int
    confidence: float
    seed: int

    @property
    def per_answer(self) -> Interval:
        """Nats per answer, mean over prompts."""
        return mean_of(self.nats, confidence=self.confidence, seed=self.seed)

    @property
    def per_token(self) -> Interval:
        """Nats per token: all nats over all tokens."""
        return ratio_of(self.nats, self.tokens, confidence=self.confidence, seed=self.seed)

    def reading(self, name: str) -> Reading:
        """``kl_forward``, ``kl_reverse`` or ``kl_prior``: nats per answer."""
        answer, token = self.per_answer, self.per_token
        author, other = ("policy", "base") if name == "kl_reverse" else ("base", "policy")
        words = (
            f"the {author}'s answers are {answer.value:.3g} nats likelier to itself than to the "
            f"{other}, {token.value:.2g} per token"
        )
        return reading(name, self.task, answer, samples=self.samples, words=words)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surprise:
    """The base's perplexity exp(−mean_t log π₀) of the policy's successes and of its own samples.

    One number per prompt that has a success: the median over samples, robust to outliers.
    ``rank`` is the share of pairs (own sample, success) in which the base finds the success less
    surprising, ties counted half: ½ when successes are distributed like its own samples.
    """

    task: str
    prompts: tuple[str, ...]  # [P'] prompts with at least one success
    successes: Floats  # [P'] perplexity
    own: Floats  # [P']
    rank: Floats  # [P']
    samples: int
    confidence: float
    seed: int

    @property
    def perplexity(self) -> MedianInterval:
        """Median over prompts of the successes' perplexity."""
        return median_interval(self.successes, confidence=self.confidence)

    @property
    def ratio(self) -> MedianInterval:
        """Median over prompts of the successes' perplexity over that of the base's own samples.

        Below 1: the policy's successes were already likely under the base.
        """
        return median_interval(self.successes / self.own, confidence=self.confidence)

    @property
    def mean_rank(self) -> Interval:
        """Mean over prompts of ``rank``."""
        return mean_interval(self.rank, confidence=self.confidence, seed=self.seed)

    @property
    def reading(self) -> Reading:
        """``base_perplexity``."""
        got, ratio = self.perplexity, self.ratio
        return Reading(
            "base_perplexity",
            self.task,
            got.value,
            max(got.low, 1.0),
            got.high,
            got.num_prompts,
            self.samples,
            f"to the base the successes have perplexity {got.value:.3g}, {ratio.value:.2g} times "
            f"that of its own samples; in {self.mean_rank.value:.0%} of pairs it finds the success "
            "the less surprising",
            self.confidence,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Both divergences on a task, the base's perplexity of successes, and KL on earlier tasks."""

    reverse: PolicyDistance
    forward: PolicyDistance
    surprise: Surprise | None  # None: no success among the policy's samples
    prior: tuple[PolicyDistance, ...] = ()

    @property
    def readings(self) -> tuple[Reading, ...]:
        """All readings, by name."""
        out = [self.reverse.reading("kl_reverse"), self.forward.reading("kl_forward")]
        out += [one.reading("kl_prior") for one in self.prior]
        return (*out, self.surprise.reading) if self.surprise else tuple(out)


def drift(
    policy: Policy,
    base: Policy,
    taskset: TaskSet,
    *,
    prior: Sequence[TaskSet] = (),
    samples: int = 16,
    max_new_tokens: int,
    seed: int,
    sampling: SamplingSpec = SamplingSpec(),
    confidence: float = 0.95,
) -> Drift:
    """Measure the distance of ``policy`` from ``base``.

    Args:
        policy: the later policy.
        base: the earlier one.
        taskset: held-out prompts of the task.
        prior: task sets of earlier stages.
        samples: answers per prompt and policy.
        max_new_tokens: budget of an answer. Divergences are of answers truncated there.
        seed: of the draws.
        sampling: must be the policies' own distributions.
        confidence: of the intervals.

    Raises:
        ConfigError: sampling with another temperature or truncation.
        ModelError: different tokenizers, templates, or too short a context.
        TaskError: a prompt that does not fit; nothing was drawn.
    """
    require_plain(sampling, why=WHY_PLAIN)
    for one in (taskset, *prior):
        require_same_vocabulary(policy, base, one.held_out)
        for who in (policy, base):
            check_prompts(who, one.held_out)

    def draw(who: Policy, of: TaskSet) -> list[tuple[Answer, ...]]:
        return draw_answers(
            who, of, of.held_out, samples=samples, max_new_tokens=max_new_tokens, seed=seed
        )

    later, own = draw(policy, taskset), draw(base, taskset)
    asked = {"samples": samples, "seed": seed}
    return Drift(
        reverse=policy_distance(policy, base, later, confidence=confidence, **asked),
        forward=policy_distance(base, policy, own, confidence=confidence, **asked),
        surprise=surprise(base, later, own, confidence=confidence, **asked),
        prior=tuple(
            policy_distance(base, policy, draw(base, one), confidence=confidence, **asked)
            for one in prior
        ),
    )


def policy_distance(
    first: Policy,
    second: Policy,
    answers: Sequence[tuple[Answer, ...]],
    *,
    samples: int,
    seed: int,
    confidence: float = 0.95,
) -> PolicyDistance:
    """KL(first ‖ second) from answers that ``first`` drew at temperature 1, untruncated."""
    flat = [a for group in answers for a in group]
    trajectories = [a.trajectory for a in flat]
    # Both policies score: log-probs recorded while sampling would not give exactly 0 for equal
    # weights.
    mine, theirs = token_logprobs(first, trajectories), token_logprobs(second, trajectories)
    gaps = iter([float((p - q).sum()) for p, q in zip(mine, theirs, strict=True)])
    lengths = iter([len(p) for p in mine])
    return PolicyDistance(
        task=flat[0].task.taskset,
        first=first.producer.name,
        second=second.producer.name,
        prompts=tuple(group[0].task.key for group in answers),
        nats=np.array([np.mean([next(gaps) for _ in group]) for group in answers]),
        tokens=np.array([np.mean([next(lengths) for _ in group]) for group in answers]),
        samples=samples,
        confidence=confidence,
        seed=seed,
    )


def surprise(
    base: Policy,
    later: Sequence[tuple[Answer, ...]],
    own: Sequence[tuple[Answer, ...]],
    *,
    samples: int,
    seed: int,
    confidence: float = 0.95,
) -> Surprise | None:
    """The base's perplexity of the successes in ``later`` and of its ``own`` answers.

    None when no prompt has a success.
    """
    pairs = [
        ([a for a in theirs if a.success], mine)
        for theirs, mine in zip(later, own, strict=True)
        if any(a.success for a in theirs)
    ]
    flat = [a.trajectory for good, mine in pairs for a in (*good, *mine)]
    worth = iter([-float(logs.mean()) for logs in token_logprobs(base, flat)])
    rows = []
    for good, mine in pairs:
        a, b = (np.array([next(worth) for _ in some]) for some in (good, mine))
        wins = (a[:, None] < b[None]).mean() + (a[:, None] == b[None]).mean() / 2
        rows.append((math.exp(np.median(a)), math.exp(np.median(b)), float(wins)))
    if not rows:
        return None
    successes, others, rank = np.array(rows).T
    return Surprise(
        task=later[0][0].task.taskset,
        prompts=tuple(good[0].task.key for good, _ in pairs),
        successes=successes,
        own=others,
        rank=rank,
        samples=samples,
        confidence=confidence,
        seed=seed,
    )
