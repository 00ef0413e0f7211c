"""Monitors of a running stage: alarms that explain a metric and advise what to do.

metrics of a step ──Watch.see──▶ window of the last steps ──▶ Alarm, once until it resets

An alarm is a pure function of the metrics in order, so a report computes the same alarms from
``metrics.jsonl`` as the run showed. Alarms change nothing: gates decide, monitors report.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from posttrain.core.bounds import Inner, Positive, Size
from posttrain.core.config import Config
from posttrain.core.provenance import Kind

NO_GRADIENT = 1e-7
"""A gradient below it is none: rounding leaves about this much of a sum that cancels."""

LEAST_LOSS = 0.1
"""A first loss below it counts as this much: three times nearly nothing is no divergence."""

CALM = 0.8
"""An alarm resets, and may be raised again, below this share of the way to its bound."""


class Monitors(Config):
    """Bounds of the alarms of a running stage, on means over ``window`` steps.

    Alarms change nothing. null switches an alarm off.
    """

    window: Size = 5  # steps
    zero_variance: Inner | None = 0.8  # share of groups with equal rewards
    entropy_left: Inner | None = 0.2  # share of the first step's entropy, on the learner's tokens
    effective_share: Inner | None = 0.3  # of importance weights, per kind of author (verl's alarm)
    stale_share: Inner | None = 0.2  # of groups too old to train on
    truncated_share: Inner | None = 0.3  # of completions that the token budget cut off
    kl: Positive | None = 1.0  # nats per token from the reference
    entropy_risen: Positive | None = 2.0  # nats per token above the first step's
    fresh_share: Inner | None = 0.98  # effective share of the weights of rollouts of age 0
    unlikely_share: Inner | None = 0.5  # of given tokens rarer than by chance, at the first step
    loss_risen: Positive | None = 3.0  # times the first step's, on given text only
    still: bool = True  # no gradient, or weights that do not move


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
        for name, value in metrics.items():
            self._first.setdefault(name, value)
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
        yield from self._fresh(step)
        yield from self._diverging(step)
        yield from self._standing(step)

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
        if now is None:
            return
        yield from self._exploding(step, now, start=self._first[name])
        if bound is None:
            return
        start = self._first[name]
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

    def _exploding(
        self, step: int, now: float, *, start: float
    ) -> Iterable[tuple[str, float, Alarm]]:
        """Entropy that grows: the policy comes apart."""
        bound = self.bounds.entropy_risen
        if bound is None:
            return
        yield (
            "entropy_risen",
            (now - start) / bound,
            Alarm(
                name="entropy_risen",
                step=step,
                words=f"entropy on the learner's own tokens rose from {start:.2f} to {now:.2f} "
                "nats per token: its answers come apart",
                advice="a lower learning rate, a smaller entropy bonus, or a KL term",
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

    def _fresh(self, step: int) -> Iterable[tuple[str, float, Alarm]]:
        """Rollouts that no update followed: their weights are 1, or sampler and learner differ."""
        bound, name = self.bounds.fresh_share, f"authors/{Kind.LEARNER}"
        fresh = [m for m in self._window if m.get("age") == 0 and f"{name}/ratio" in m]
        if bound is None or not fresh:
            return
        share = sum(m[f"{name}/effective_share"] for m in fresh) / len(fresh)
        ratio = sum(m[f"{name}/ratio"] for m in fresh) / len(fresh)
        yield (
            "fresh",
            max(1 - share, abs(ratio - 1)) / (1 - bound),
            Alarm(
                name="fresh",
                step=step,
                words=f"on fresh rollouts the weights are worth {share:.0%} of their number (mean "
                f"ratio {ratio:.2f}), and would be 1 each: the sampler is not the learner",
                advice="check that the sampler has the learner's weights, its temperature and its "
                "number type; correct what remains (truncated importance weights)",
            ),
        )

    def _diverging(self, step: int) -> Iterable[tuple[str, float, Alarm]]:
        """On given text: a loss that grows, or text that the policy cannot read."""
        given = [k for k in Kind if k is not Kind.LEARNER and f"authors/{k}/nll" in self._first]
        if not given or f"authors/{Kind.LEARNER}/nll" in self._first:
            return  # the loss of a policy gradient may have any value
        yield from self._unreadable(step, given)
        now, bound, start = self._mean("loss"), self.bounds.loss_risen, self._first.get("loss")
        if now is None or bound is None or start is None:
            return
        yield (
            "loss",
            now / (bound * max(abs(start), LEAST_LOSS)),
            Alarm(
                name="loss",
                step=step,
                words=f"the loss is {now:.3g}, and was {start:.3g} at the first step: it diverges",
                advice="a lower learning rate, a warm-up, or a smaller max_grad_norm; and look at "
                "the rows of these steps",
            ),
        )

    def _unreadable(self, step: int, given: Sequence[Kind]) -> Iterable[tuple[str, float, Alarm]]:
        """Text that was less likely than by chance before anything was learnt."""
        bound = self.bounds.unlikely_share
        if bound is None:
            return
        for kind in given:
            share = self._first.get(f"authors/{kind}/unlikely", 0.0)
            yield (
                f"unlikely/{kind}",
                share / bound,
                Alarm(
                    name="unlikely",
                    step=step,
                    words=f"at the first step {share:.0%} of the {kind} tokens were less likely "
                    "than by chance: the model does not read this text as it is written",
                    advice="check that tokenizer and weights belong together, and the chat "
                    "template; text in a language that the model never saw looks alike",
                ),
            )

    def _standing(self, step: int) -> Iterable[tuple[str, float, Alarm]]:
        """Steps that teach nothing, whatever the reason."""
        steps = [m for m in self._window if "grad_norm" in m and m.get("lr", 0) > 0]
        if not self.bounds.still or len(steps) < self.bounds.window:
            return
        gradient = max(m["grad_norm"] for m in steps)
        moved = max(m.get("moved", 1.0) for m in steps)
        yield (
            "no_gradient",
            float(gradient < NO_GRADIENT),
            Alarm(
                name="no_gradient",
                step=step,
                words=f"no gradient above {NO_GRADIENT:g} in {len(steps)} steps: nothing is learnt",
                advice="look at what is compared: equal answers, equal rewards, a weight of 0, or "
                "a mask that leaves nothing",
            ),
        )
        yield (
            "still",
            float(moved == 0 and gradient >= NO_GRADIENT),
            Alarm(
                name="still",
                step=step,
                words=f"the weights did not move in {len(steps)} steps, with gradients up to "
                f"{gradient:.3g}",
                advice="the optimiser does not hold the model's weights, or the learning rate is "
                "lost to rounding",
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
