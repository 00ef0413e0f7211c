"""Monitors of a running stage: alarms that explain a metric and advise what to do.

metrics of a step ──Watch.see──▶ window of the last steps ──▶ Alarm, once until it resets

An alarm is a pure function of the metrics in order, so a report computes the same alarms from
``metrics.jsonl`` as the run showed. Alarms change nothing: gates decide, monitors report.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import final

from posttrain.core.bounds import Inner, Positive, Size
from posttrain.core.config import Config
from posttrain.core.provenance import Kind

CALM = 0.8
"""An alarm resets, and may be raised again, below this share of the way to its bound."""


class Monitors(Config):
    """Bounds of the alarms of a running stage, on means over ``window`` steps.

    Alarms change nothing. null switches an alarm off.
    """

    window: Size = 5  # steps
    zero_variance: Inner | None = 0.8  # share of groups with equal rewards
    entropy_left: Inner | None = 0.2  # share of the first window's entropy, on the learner's tokens
    effective_share: Inner | None = 0.3  # of importance weights, per kind of author (verl's alarm)
    stale_share: Inner | None = 0.2  # of groups too old to train on
    truncated_share: Inner | None = 0.3  # of completions that the token budget cut off
    kl: Positive | None = 1.0  # nats per token from the reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A warning about a running stage."""

    name: str
    step: int
    words: str  # what was observed and what it means
    advice: str  # what to do


@final
@dataclass(slots=True)
class Watch:
    """The monitors of one stage. Call :meth:`see` with every step in order.

    Example:
        >>> watch = Watch(Monitors(window=2))
        >>> flat = {"zero_variance": 1.0, "all_wrong": 1.0, "all_right": 0.0}
        >>> [len(watch.see(step, flat)) for step in range(4)]
        [0, 1, 0, 0]
    """

    bounds: Monitors
    _window: deque[Mapping[str, float]] = field(init=False)
    _first: dict[str, float] = field(init=False, default_factory=dict)
    _ringing: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._window = deque(maxlen=self.bounds.window)

    def see(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms that are raised at this step."""
        self._window.append(metrics)
        if len(self._window) < self.bounds.window:
            return []
        raised: list[Alarm] = []
        for name, over, alarm in self._checks(step):
            if over >= 1 and name not in self._ringing:
                self._ringing.add(name)
                raised.append(alarm)
            elif over < CALM:
                self._ringing.discard(name)
        return raised

    def _mean(self, name: str) -> float | None:
        """Mean over the steps of the window that have it."""
        seen = [m[name] for m in self._window if name in m]
        return sum(seen) / len(seen) if seen else None

    def _checks(self, step: int) -> Iterable[tuple[str, float, Alarm]]:
        """(name, distance to the bound as a share: 1 is at the bound, the alarm if raised)."""
        yield from self._no_signal(step)
        yield from self._entropy(step)
        yield from self._ratios(step)
        yield from self._waste(step)
        yield from self._drift(step)

    def _no_signal(self, step: int) -> Iterable[tuple[str, float, Alarm]]:
        share, bound = self._mean("zero_variance"), self.bounds.zero_variance
        if share is None or bound is None:
            return
        wrong, right = self._mean("all_wrong") or 0.0, self._mean("all_right") or 0.0
        advice = (
            "the prompts are too hard for the policy: larger groups, a prefix or a demonstration "
            "to start from, or supervised steps first"
            if wrong >= right
            else "the prompts are solved: harder ones, or stop here"
        )
        words = (
            f"{share:.0%} of the groups had equal rewards ({wrong:.0%} all wrong, {right:.0%} all "
            "right) and taught nothing by comparison"
        )
        yield (
            "no_signal",
            share / bound,
            Alarm(name="no_signal", step=step, words=words, advice=advice),
        )

    def _entropy(self, step: int) -> Iterable[tuple[str, float, Alarm]]:
        name = f"authors/{Kind.LEARNER}/entropy"
        now, bound = self._mean(name), self.bounds.entropy_left
        if now is None or bound is None:
            return
        start = self._first.setdefault(name, now)
        if start <= 0:
            return
        left = now / start
        yield (
            "entropy",
            (1 - left) / (1 - bound) if bound < 1 else 0.0,
            Alarm(
                name="entropy",
                step=step,
                words=f"entropy on the learner's own tokens is {left:.0%} of what it began with "
                f"({now:.3f} of {start:.3f} nats per token): it hardly explores any more",
                advice="an entropy bonus, a higher upper clip, a KL term, or fewer steps; pass@k "
                "at a large k will show what was given up",
            ),
        )

    def _ratios(self, step: int) -> Iterable[tuple[str, float, Alarm]]:
        """Effective share of the importance weights, separately for each kind of author."""
        bound = self.bounds.effective_share
        if bound is None:
            return
        for kind in Kind:
            share = self._mean(f"authors/{kind}/effective_share")
            if share is None:
                continue
            ratio = self._mean(f"authors/{kind}/ratio") or 0.0
            advice = (
                "take fewer updates per draw, draw more often, or correct the mismatch "
                "(truncated importance weights); check that sampler and trainer compute the same"
                if kind is Kind.LEARNER
                else "this text is far from the policy: shape or cap its weights, or learn it "
                "with a supervised term"
            )
            yield (
                f"ratios/{kind}",
                (1 - share) / (1 - bound),
                Alarm(
                    name=f"ratios/{kind}",
                    step=step,
                    words=f"weights of {kind} tokens are worth {share:.0%} of their number "
                    f"(mean ratio {ratio:.2f}): a few tokens carry the gradient",
                    advice=advice,
                ),
            )

    def _waste(self, step: int) -> Iterable[tuple[str, float, Alarm]]:
        """Discarded work: groups too old, or completions cut off."""
        bound = self.bounds.stale_share
        share = self._mean("stale_share")
        if share is not None and bound is not None:
            yield (
                "stale",
                share / bound,
                Alarm(
                    name="stale",
                    step=step,
                    words=f"{share:.0%} of the groups were older than max_age and not trained on "
                    f"(groups were {self._mean('age') or 0.0:.1f} updates old on average)",
                    advice="fewer updates per draw, or a larger max_age with a corrected ratio",
                ),
            )
        bound = self.bounds.truncated_share
        share = self._mean("truncated_share")
        if share is not None and bound is not None:
            yield (
                "truncated",
                share / bound,
                Alarm(
                    name="truncated",
                    step=step,
                    words=f"{share:.0%} of the answers were cut off by the token budget, so their "
                    "rewards say little",
                    advice="raise max_new_tokens, or use an overlong penalty or filter",
                ),
            )

    def _drift(self, step: int) -> Iterable[tuple[str, float, Alarm]]:
        """KL divergence of the policy from the reference, on the policy's own completions."""
        bound = self.bounds.kl
        names = {n for m in self._window for n in m if n == "kl" or n.endswith("/kl")}
        for name in sorted(names):
            now = self._mean(name)
            if now is None or bound is None:
                continue
            yield (
                f"kl:{name}",
                now / bound,
                Alarm(
                    name="kl",
                    step=step,
                    words=f"KL from the reference is {now:.2f} nats per token on the policy's own "
                    "answers: far from what it began with, and other abilities pay for that",
                    advice="a larger KL weight, a lower learning rate, or stop here; measure the "
                    "tasks that must be kept",
                ),
            )


def alarms(bounds: Monitors, lines: Iterable[Mapping[str, float]]) -> list[Alarm]:
    """All alarms of a stage, from its metrics in order; each line holds its ``step``."""
    watch = Watch(bounds)
    return [alarm for line in lines for alarm in watch.see(int(line["step"]), line)]
