"""Support labels by sequential sampling: draw only where a label is still undetermined.

counts so far ──evidence──▶ labels ──next_draws──▶ {prompt: samples} ──draw──▶ counts …
                                       └── {} : every label decided, or the budget spent

Testing after every batch and stopping at the first decision makes ordinary bounds wrong far more
often than their nominal level. The labels here are *anytime-valid*: the probability that one is
ever wrong holds for any stopping rule. The price is some 5 % more failures in a row before a
prompt is OUT (62 instead of 59 at ε = 0.05).

Success *rates* of prompts that were stopped early are biased, and none is reported: pass@1 comes
from a measurement with a fixed number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from posttrain.core.bounds import Count, Inner
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.sampling import SamplingSpec
from posttrain.core.task import TaskSet
from posttrain.diagnosis.drawing import check_prompts, draw_answers
from posttrain.measure.bootstrap import mean_interval
from posttrain.measure.reading import Reading, reading
from posttrain.measure.support import Label, incomplete_beta
from posttrain.protocols import Policy

NEVER = 0.75
"""Prior weight of "it never succeeds" among the alternatives to being in reach."""
PRIOR = 0.5
"""Both parameters of the Beta prior of the other alternatives (Jeffreys)."""
FAR = 1 << 40
"""Expected samples to a label when the evidence favours neither side."""


class AdaptiveDesign(Config):
    """Threshold, confidence and budget of sequential labelling.

    ``epsilon`` is the success probability from which a prompt counts as in reach. ``budget`` is in
    samples over all prompts; each prompt gets ``first`` of them before anything is decided.
    """

    epsilon: Inner
    budget: Count
    confidence: Inner = 0.95
    first: Count = 16

    def __post_init__(self) -> None:
        fits = 0 < self.epsilon < 1 and 0.5 < self.confidence < 1
        if not fits or self.budget < 1 or self.first < 1:
            raise ConfigError(
                f"adaptive sampling with epsilon={self.epsilon}, confidence={self.confidence}, "
                f"budget={self.budget}, first={self.first}",
                expected="0 < epsilon < 1, 0.5 < confidence < 1, at least one sample each",
            )

    @property
    def threshold(self) -> float:
        """Log of the test martingale at which a label is decided: −log(1 − confidence)."""
        return -math.log1p(-self.confidence)


# --- evidence --------------------------------------------------------------------------------


def log_wealths(successes: int, samples: int, *, epsilon: float) -> tuple[float, float]:
    """Logs of two test martingales: of a bet that p > ε, and of a bet that p < ε.

    The first is the likelihood of the counts averaged over a Beta(½, ½) prior cut to (ε, 1],
    divided by their likelihood at ε. For every p <= ε it is a non-negative supermartingale that
    starts at 1 (each likelihood ratio p'/ε multiplies, on average, by at most 1, and by less the
    smaller p is), so it ever reaches 1/α with probability α at most (Ville 1939; mixtures:
    Robbins 1970). The second is its mirror image, with weight NEVER on p = 0, under which n
    failures multiply it by (1 − ε)^−n.

    Example:
        >>> inside, outside = log_wealths(0, 64, epsilon=0.05)
        >>> inside < 0 < outside, round(outside, 2)
        (True, 3.15)
    """
    c, n = successes, samples
    if not 0 <= c <= n or not 0 < epsilon < 1:
        raise ConfigError(f"{c} successes of {n} at epsilon={epsilon}")
    a, b = PRIOR + c, PRIOR + n - c
    likelihood = c * math.log(epsilon) + (n - c) * math.log1p(-epsilon)
    shared = _log_beta(a, b) - _log_beta(PRIOR, PRIOR) - likelihood
    # The upper tail through the mirrored function, so that small tails keep their digits.
    above = _log(incomplete_beta(1 - epsilon, b, a))
    above -= _log(incomplete_beta(1 - epsilon, PRIOR, PRIOR))
    below = _log(incomplete_beta(epsilon, a, b)) - _log(incomplete_beta(epsilon, PRIOR, PRIOR))
    seldom = math.log1p(-NEVER) + shared + below
    never = math.log(NEVER) - likelihood if c == 0 else -math.inf
    return shared + above, float(np.logaddexp(seldom, never))


def sequential_label(successes: int, samples: int, *, design: AdaptiveDesign) -> Label:
    """The label that these counts allow, valid under optional stopping.

    IN is wrong (p < ε) with probability 1 − confidence at most, and so is OUT (p > ε), over the
    whole course of sampling.
    """
    inside, outside = log_wealths(successes, samples, epsilon=design.epsilon)
    if inside >= design.threshold:
        return Label.IN
    return Label.OUT if outside >= design.threshold else Label.UNDETERMINED


def expected_draws(successes: int, samples: int, *, design: AdaptiveDesign) -> int:
    """Expected further samples to a label at the observed success rate.

    The martingale on the likelier side grows by KL(p̂ ‖ ε) per sample; with no success so far, by
    about −log(1 − ε). It only schedules sampling; the labels do not depend on it.
    """
    inside, outside = log_wealths(successes, samples, epsilon=design.epsilon)
    eps, rate = design.epsilon, (successes + PRIOR) / (samples + 2 * PRIOR)
    if successes == 0:
        growth = -math.log1p(-eps)
        missing = design.threshold - math.log(NEVER) - samples * growth
    else:
        missing = design.threshold - (inside if rate > eps else outside)
        growth = rate * math.log(rate / eps) + (1 - rate) * math.log((1 - rate) / (1 - eps))
    if growth * FAR <= missing:
        return FAR
    return max(math.ceil(missing / growth), 1)


# --- scheduling ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Counts and labels so far, one entry per prompt. A decided label is final."""

    successes: tuple[int, ...]
    samples: tuple[int, ...]
    labels: tuple[Label, ...]

    @staticmethod
    def empty(num_prompts: int) -> Tally:
        """Nothing drawn yet."""
        nothing = (0,) * num_prompts
        return Tally(successes=nothing, samples=nothing, labels=(Label.UNDETERMINED,) * num_prompts)

    @property
    def spent(self) -> int:
        """Samples drawn."""
        return sum(self.samples)

    def add(
        self, drawn: Mapping[int, int], successes: Mapping[int, int], *, design: AdaptiveDesign
    ) -> Tally:
        """Counts after ``drawn[i]`` more samples of prompt i with ``successes[i]`` successes."""
        samples = [n + drawn.get(i, 0) for i, n in enumerate(self.samples)]
        counts = [c + successes.get(i, 0) for i, c in enumerate(self.successes)]
        labels = [
            sequential_label(c, n, design=design)
            if old is Label.UNDETERMINED and i in drawn
            else old
            for i, (c, n, old) in enumerate(zip(counts, samples, self.labels, strict=True))
        ]
        return replace(self, successes=tuple(counts), samples=tuple(samples), labels=tuple(labels))


def next_draws(tally: Tally, *, design: AdaptiveDesign) -> dict[int, int]:
    """Which prompts to sample next, and how often. Empty: stop.

    First every prompt gets ``first`` samples. Then those undetermined prompts whose labels are
    expected soonest, as many as the rest of the budget is expected to decide and at least one.
    None gets more at a time than it has had, since the expectation rests on those samples.

    Example:
        >>> design = AdaptiveDesign(epsilon=0.1, budget=100, first=10)
        >>> next_draws(Tally.empty(2), design=design)
        {0: 10, 1: 10}
        >>> seen = Tally.empty(2).add({0: 10, 1: 10}, {0: 9, 1: 0}, design=design)
        >>> seen.labels, next_draws(seen, design=design)
        ((<Label.IN: 'in'>, <Label.UNDETERMINED: 'undetermined'>), {1: 10})
    """
    num, left = len(tally.samples), design.budget - tally.spent
    if not tally.spent:
        share = min(design.first, left // num) if num else 0
        return dict.fromkeys(range(num), share) if share else {}
    needs = sorted(
        (expected_draws(c, n, design=design), i)
        for i, (c, n, label) in enumerate(
            zip(tally.successes, tally.samples, tally.labels, strict=True)
        )
        if label is Label.UNDETERMINED
    )
    plan: dict[int, int] = {}
    expected = 0
    for need, i in needs:
        expected += need
        if left < 1 or (plan and expected > design.budget - tally.spent):
            break
        plan[i] = min(need, max(tally.samples[i], design.first), left)
        left -= plan[i]
    return plan


# --- with a policy ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveSupport:
    """Labels of a task's held-out prompts, and their cost in samples.

    The quotient of the counts is a biased success rate, since sampling stopped on them.
    """

    task: str
    prompts: tuple[str, ...]
    tally: Tally
    design: AdaptiveDesign
    rounds: int
    seed: int

    @property
    def labels(self) -> tuple[Label, ...]:
        """One per prompt."""
        return self.tally.labels

    @property
    def readings(self) -> tuple[Reading, ...]:
        """``in_share``, ``out_share`` and ``undetermined_share`` with intervals over prompts."""
        words = {
            Label.IN: "are in reach",
            Label.OUT: "are out of reach",
            Label.UNDETERMINED: "got no label within the budget",
        }
        out = []
        for label, says in words.items():
            flags = [float(mine is label) for mine in self.labels]
            interval = mean_interval(flags, seed=self.seed)
            out.append(
                reading(
                    f"{label.value}_share",
                    self.task,
                    interval,
                    samples=max(self.tally.samples),
                    words=f"{sum(flags):.0f} of {len(flags)} prompts {says} at "
                    f"{self.design.epsilon:.2g}, from {self.tally.spent} samples in all",
                )
            )
        return tuple(out)


def adaptive_support(
    policy: Policy,
    taskset: TaskSet,
    *,
    design: AdaptiveDesign,
    max_new_tokens: int,
    seed: int,
    sampling: SamplingSpec = SamplingSpec(),
    observe: Callable[[Tally], None] = lambda tally: None,
    stop: Callable[[], bool] = lambda: False,
) -> AdaptiveSupport:
    """Label the held-out prompts of a task set within a budget of samples.

    Answers are numbered per prompt and seeded by number, so the same seed gives the same labels,
    and a larger budget extends the samples of a smaller one.

    Args:
        policy: the policy to label.
        taskset: prompts and scorer.
        design: threshold, confidence and budget.
        max_new_tokens: budget of an answer, in tokens.
        seed: of the draws.
        sampling: decoding; labels hold for this decoding.
        observe: called with the counts after every round.
        stop: called before every round; True ends sampling, and the labels so far stay valid.

    Raises:
        ConfigError: no prompts, or a budget below one sample per prompt.
        TaskError: a prompt that does not fit.
    """
    tasks = list(taskset.held_out)
    check_prompts(policy, tasks)
    if not tasks or design.budget < len(tasks):
        raise ConfigError(
            f"a budget of {design.budget} samples for the {len(tasks)} prompts of {taskset.name}",
            expected="at least one prompt, and one sample for each",
        )
    tally, rounds = Tally.empty(len(tasks)), 0
    while not stop() and (plan := next_draws(tally, design=design)):
        chosen = sorted(plan)
        groups = draw_answers(
            policy,
            taskset,
            [tasks[i] for i in chosen],
            samples=[plan[i] for i in chosen],
            first=[tally.samples[i] for i in chosen],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
        )
        hits = {i: sum(a.success for a in group) for i, group in zip(chosen, groups, strict=True)}
        tally, rounds = tally.add(plan, hits, design=design), rounds + 1
        observe(tally)
    return AdaptiveSupport(
        task=taskset.name,
        prompts=tuple(t.key for t in tasks),
        tally=tally,
        design=design,
        rounds=rounds,
        seed=seed,
    )


def boundaries(longest: int, *, design: AdaptiveDesign) -> tuple[Sequence[int], Sequence[int]]:
    """For n = 1 ... ``longest``: most successes that are OUT, and fewest that are IN.

    −1 and n + 1 where no count decides. For tables and simulations.
    """
    outs, ins = [], []
    most, fewest = -1, 1
    for n in range(1, longest + 1):
        while most < n and log_wealths(most + 1, n, epsilon=design.epsilon)[1] >= design.threshold:
            most += 1
        fewest = min(fewest, n + 1)
        while fewest <= n and (
            log_wealths(fewest, n, epsilon=design.epsilon)[0] < design.threshold
        ):
            fewest += 1
        outs.append(most)
        ins.append(fewest)
    return outs, ins


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
