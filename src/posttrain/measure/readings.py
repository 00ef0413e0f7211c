"""Everything that can be read off samples alone: one policy, or a policy and an earlier one.

TaskMeasurement ──take──▶ Readings of one policy
two of them ──take_change──▶ Readings of what changed
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.measure.attribution import attribute
from posttrain.measure.bootstrap import mean_interval, proportion_interval
from posttrain.measure.calibration import calibration_error
from posttrain.measure.curves import cover, crossover, efficiency_gap, sharpening_tax
from posttrain.measure.diversity import (
    answer_entropies,
    answer_variety,
    form,
    highest_entropy,
    token_entropy,
    verifier_disagreement,
)
from posttrain.measure.learnability import informative, needed_group, support_shares, zero_variance
from posttrain.measure.measurement import Measurement, TaskMeasurement, require_same_task
from posttrain.measure.passk import pass_hat_k, pass_interval
from posttrain.measure.reading import FEWEST, Reading, reading
from posttrain.measure.retention import kept_reading
from posttrain.measure.support import Label, SupportChange, support_change
from posttrain.measure.voting import majority

COVER = (0.1, 0.5, 0.9)
GROUPS = (4, 8, 16)
VOTES = 16


def require_prompts(measurement: Measurement) -> None:
    """Refuse task sets with too few prompts to say how much prompts differ.

    The probes themselves answer for any number of prompts, with intervals that are wide for few.
    Commands that draw conclusions ask here first.

    Raises:
        ConfigError: names the task sets.
    """
    few = [f"{t.taskset} ({len(t.prompts)})" for t in measurement.tasks if len(t.prompts) < FEWEST]
    if few:
        raise ConfigError(
            f"{measurement.policy}: too few prompts to judge by: {', '.join(few)}",
            expected=f"at least {FEWEST} held-out prompts per task set, better 32",
            fix="raise held_out of these task sets, or leave them out with --tasks",
        )


def take(
    task: TaskMeasurement, *, epsilon: float, confidence: float = 0.95, seed: int = 0
) -> tuple[Reading, ...]:
    """Every reading of one policy on one task set that its samples allow.

    pass@k for k = 1, 2, 4, … and n, pass^k, the support shares, the zero-variance split, groups,
    coverage, calibration, diversity and form. Readings that need what an old file lacks are left
    out; :func:`not_taken` says which and why.
    """
    n = task.num_samples

    def with_interval(name: str, values: npt.ArrayLike, words: str) -> Reading:
        interval = mean_interval(values, confidence=confidence, seed=seed)
        said = words.format(interval.value)
        return reading(name, task.taskset, interval, samples=n, words=said)

    ks = sorted({n, *(2**i for i in range(n.bit_length()))})
    found = [_pass_reading(task, k, confidence=confidence, seed=seed) for k in ks]
    found += [
        with_interval(
            f"pass^{k}",
            pass_hat_k(task.counts, n, k),
            f"all of {k} tries succeed with probability {{:.2f}}",
        )
        for k in (4, 8)
        if k <= n
    ]
    found += [cover(task, t, confidence=confidence) for t in COVER]
    found += support_shares(task, epsilon=epsilon, confidence=confidence)
    found += zero_variance(task, confidence=confidence)
    found += [informative(task, g, confidence=confidence, seed=seed) for g in GROUPS if g <= n]
    found.append(needed_group(task, confidence=confidence, seed=seed))
    found.append(efficiency_gap(task, confidence=confidence, seed=seed))
    found += form(task, confidence=confidence, seed=seed)
    if _has_logprobs(task):
        found.append(token_entropy(task, confidence=confidence, seed=seed))
    if task.answers is not None:
        found += answer_variety(task, confidence=confidence, seed=seed)
        if n >= VOTES:
            found.append(majority(task, VOTES, confidence=confidence, seed=seed))
        if n >= 4:
            found.append(calibration_error(task, confidence=confidence, seed=seed))
    if task.recheck is not None:
        found.append(verifier_disagreement(task, confidence=confidence))
    return tuple(found)


def _pass_reading(task: TaskMeasurement, k: int, *, confidence: float, seed: int) -> Reading:
    interval = pass_interval(task, k, confidence=confidence, seed=seed)
    tries = "one try succeeds" if k == 1 else f"at least one of {k} tries succeeds"
    words = f"{tries} with probability {interval.value:.2f}"
    return reading(f"pass@{k}", task.taskset, interval, samples=task.num_samples, words=words)


ROOM = 0.5
"""An answer that takes at most this share of the token budget fits with room to spare."""


def answer_room(
    task: TaskMeasurement, known: Mapping[str, int], *, budget: int, confidence: float = 0.95
) -> Reading | None:
    """Of the prompts with a known right answer, the share whose answer fits comfortably.

    Where answers are cut off, it tells a budget that is too small from a policy that rambles. A
    policy's own right answers count as well, where it takes more room than the known one: a bare
    result says little about the way that this policy takes to get there. The interval is exact.

    Args:
        task: what the policy itself said.
        known: tokens of a right answer by prompt, its end included.
        budget: ``max_new_tokens``.
        confidence: of the two-sided interval.

    Returns:
        None when no right answer is known.
    """
    needed: dict[str, float] = dict(known)
    for key, right, lengths in zip(task.prompts, task.successes, task.lengths, strict=True):
        if key in needed and right.any():
            needed[key] = max(needed[key], float(np.median(lengths[right])))
    if not needed:
        return None
    fits = sum(length <= ROOM * budget for length in needed.values())
    interval = proportion_interval(fits, len(needed), confidence=confidence)
    words = f"{fits} of {len(needed)} known right answers take at most half of {budget} tokens"
    return reading("answer_room", task.taskset, interval, samples=task.num_samples, words=words)


def not_taken(task: TaskMeasurement) -> tuple[str, ...]:
    """Why readings are missing from :func:`take`, in sentences."""
    n, why = task.num_samples, []
    if task.answers is None:
        why.append("answers were not kept: no answer entropy, majority vote or calibration")
    elif n < VOTES:
        why.append(f"{n} samples per prompt: no majority vote of {VOTES}")
    if task.self_bleu is None or task.repetition is None:
        why.append("texts were not looked at: no self-BLEU or repetition")
    if task.recheck is None:
        why.append("no answer was scored twice: the verifier may not be deterministic")
    if not _has_logprobs(task):
        why.append("no finite log-probs: no token entropy")
    return tuple(why)


def _has_logprobs(task: TaskMeasurement) -> bool:
    return bool((np.isfinite(task.nll) & (task.lengths > 0)).any())


def take_change(
    before: TaskMeasurement,
    after: TaskMeasurement,
    *,
    epsilon: float,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Reading, ...]:
    """Readings of what changed from an earlier policy to a later one on one task set.

    retention, expanded and shrunk shares, crossover, and the sharpening tax. ``retention`` is
    missing when nothing was certainly in reach before.

    Raises:
        RunError: the two were not measured on the same prompts in the same way.
    """
    parts = attribute(before, after, epsilon=epsilon, confidence=confidence, seed=seed)
    support = support_change(before, after, epsilon=epsilon, confidence=confidence)
    found = [*changed_support(support, samples=after.num_samples, confidence=confidence)]
    if kept := kept_reading(parts, samples=after.num_samples):
        found.append(kept)
    found.append(crossover(before, after, confidence=confidence, seed=seed))
    found.append(sharpening_tax(before, after, confidence=confidence, seed=seed))
    return tuple(found)


def changed_support(
    support: SupportChange, *, samples: int, confidence: float = 0.95
) -> tuple[Reading, ...]:
    """expanded_share and shrunk_share: prompts whose label crossed over, with exact intervals."""
    num = len(support.before)
    kinds = (
        ("expanded_share", support.expanded, f"came from {Label.OUT} to {Label.IN}"),
        ("shrunk_share", support.shrunk, f"went from {Label.IN} to {Label.OUT}"),
    )
    return tuple(
        reading(
            name,
            support.task,
            proportion_interval(count, num, confidence=confidence),
            samples=samples,
            words=f"{count} of {num} prompts {words}",
        )
        for name, count, words in kinds
    )


# --- paired differences of readings ----------------------------------------------------------

Score = Callable[[TaskMeasurement], npt.NDArray[np.float64]]


def paired_change(
    name: str,
    before: TaskMeasurement,
    after: TaskMeasurement,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Reading | None:
    """After minus before of ``answer_entropy``, ``distinct_answers`` or ``tokens_per_answer``.

    Paired by prompt. The reading keeps the name of what changed. None when a measurement lacks
    what it needs.

    Raises:
        ConfigError: another name.
        RunError: the two were not measured on the same prompts in the same way.
    """
    require_same_task(before, after)
    n = before.num_samples
    sides = (before, after)
    if name == "answer_entropy":
        if before.answers is None or after.answers is None:
            return None
        old, new = answer_entropies(before.answers), answer_entropies(after.answers)
        room = highest_entropy(n)
    elif name == "distinct_answers":
        old, new = (t.distinct.astype(np.float64) for t in sides)
        room = float(n - 1)
    elif name == "tokens_per_answer":
        old, new = (t.lengths.mean(axis=1, dtype=np.float64) for t in sides)
        room = float(max(t.lengths.max() for t in sides))
    else:
        raise ConfigError(
            f"the change of {name}",
            expected="answer_entropy, distinct_answers or tokens_per_answer",
        )
    room = max(room, 1e-9)
    interval = mean_interval(
        new - old, lowest=-room, highest=room, confidence=confidence, seed=seed
    )
    unit = {"answer_entropy": "nats", "distinct_answers": "answers"}.get(name, "tokens")
    words = f"{interval.value:+.2f} {unit}"
    return reading(name, after.taskset, interval, samples=n, words=words)
