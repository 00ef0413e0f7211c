"""The page: every figure of ``benchmarks/results.md`` comes from ``results.json`` through here."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from against_trl.plan import (
    EXACT_BAR,
    GROUP_BAR,
    LIMIT_BAR,
    LIMIT_SIZES,
    MEMORY_BAR,
    SIZES,
    SPEED_BARS,
    WORKS,
    Bar,
    Work,
)
from against_trl.results import Conditions, Measured, Pairs, Point, Rate, Results
from against_trl.spread import Spread, judge, ratios, verdict
from posttrain.core.clock import GROUPS

TITLES: dict[Work, str] = {
    "sft": "SFT, tokens/s",
    "dpo": "DPO, pairs/s",
    "grpo": "GRPO, steps/s",
    "opd": "on-policy distillation, steps/s",
    "opd_distinct": "the same, no prompt twice",
}
COLUMNS = {
    "prefill": ("draw", "prefill"),
    "decode": ("decode",),
    "judging": GROUPS["judging"],
    "pack": ("pack",),
    "forward": ("forward",),
    "backward": ("backward",),
    "optimiser": ("optimizer",),
    "rest": GROUPS["the rest"],
}
BUSY = 0.05
"""Share of the processor that others may take before the figures are called disturbed."""

HOW = """\
Both sides train the same stock Qwen3 (random weights, tied embeddings; float32, or what `--dtype`
says) on the same text, with AdamW at the same settings, in two processes that take their steps in
turn. Only one works at a time, and the first step of each is warm-up. A ratio divides two steps
that stood side by side in time; tables show the median and, in brackets, the lowest and highest.
Posttrain runs its real stage loop through a plan, with a journal; TRL runs its own trainers without
logging, evaluation or gradient checkpointing, in the same number type with SDPA, with the
micro-batch (and block length) that was fastest among those tried on a CPU (`--tune` repeats that
search). Neither comes to a checkpoint.

* **SFT**: documents of 32 to 500 tokens, about 4,000 per step. TRL packs best-fit into blocks
  without padding (`packing_strategy="bfd"`). Each side's tokens are counted as they are trained.
* **DPO**: 16 pairs per step, prompts of 112 to 144 tokens, answers of 48 to 80. Both compute the
  reference's log-probs in the step, and no pair comes twice.
* **GRPO**: 8 prompts of 112 to 144 tokens, 8 completions each of exactly 64 tokens (the end token
  has no row in the head), one update, no reference, loss averaged per sequence.
* **Distillation**: TRL's stable on-policy trainer, `DistillationTrainer` (`beta=1`: reverse KL over
  the whole vocabulary, on the student's own rollouts), against our `opd`; student and teacher of
  equal size. TRL draws one completion per row, so groups of 8 are rows that stand 8 times in its
  data. The second line has 64 different prompts with one completion each: nothing to share.
"""


def page(results: Results) -> str:
    """The whole page, with the sections that there are results for."""
    lines = [
        "# posttrain and TRL side by side",
        "",
        "<!-- Written by benchmarks/against_trl: run `make bench` instead of editing. -->",
        "",
        *_disturbed(results),
        *_machine(results),
        "",
        HOW,
    ]
    sections = (
        ("Speed", _speed(results)),
        ("Peak memory of the process", _memory(results)),
        ("Fraction of the arithmetic limit", _limit(results)),
        ("Where our step spends its time", _where(results)),
        ("How the cost of our GRPO step grows", _growth(results)),
        ("The same loss and gradients", _exact(results)),
    )
    for title, rows in sections:
        if body := list(rows):
            lines += [f"## {title}", "", *body, ""]
    return "\n".join(lines).rstrip() + "\n"


def _entries(results: Results) -> list[Pairs]:
    order = [f"{work}/{size}" for work in WORKS for size in SIZES]
    return [results.pairs[key] for key in order if key in results.pairs]


def _conditions(results: Results) -> list[Conditions]:
    kept = (*results.pairs.values(), *results.rates.values(), *results.points.values())
    return [entry.conditions for entry in kept]


def _disturbed(results: Results) -> Iterator[str]:
    """A warning, when somebody else used the machine."""
    entries = _conditions(results)
    busy = [c.others for c in entries if c.others > BUSY]
    if busy:
        yield (
            f"> **The machine was not quiet.** In {len(busy)} of {len(entries)} entries other "
            f" processes took more than {BUSY:.0%} of the processor (up to {max(busy):.0%}). "
            "Times, and ratios of times, are unreliable; ratios of processor seconds are less so."
        )
        yield ""


def _machine(results: Results) -> Iterator[str]:
    machine, seen = results.machine, _conditions(results)
    versions = ", ".join(f"{n} {v}" for n, v in machine.versions.items())
    yield (
        f"{machine.processor}, {machine.cores} cores, {machine.memory / 2**30:.0f} GiB; "
        f"{machine.threads} threads; {machine.system}; {versions}."
    )
    if seen:
        yield (
            f"Measured {min(c.when for c in seen)} to {max(c.when for c in seen)} UTC at commit "
            f"{', '.join(sorted({c.commit for c in seen}))}. Load average (our own threads "
            f"included) up to {max(c.load for c in seen):.1f}; others took up to "
            f"{max(c.others for c in seen):.0%} of the processor."
        )


def _wanted(bar: Bar | None) -> str:
    if bar is None:
        return "–"
    sign = "≤" if bar.most else "≥"
    return f"{sign} {bar.least:g} ({bar.hope:g})"


def _range(spread: Spread, digits: int = 1) -> str:
    return f"{spread.median:.{digits}f} [{spread.low:.{digits}f}, {spread.high:.{digits}f}]"


def _speed(results: Results) -> Iterator[str]:
    entries = _entries(results)
    if not entries:
        return
    yield (
        "Bars: at least (hoped for). *Processor* is the same ratio in processor seconds, all "
        "threads added up.\n"
    )
    yield "| work | model | pairs | ours | TRL | ours is × faster | processor × | bar | |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for entry in entries:
        work: Work = entry.work  # type: ignore[assignment]
        wall = Spread.of(ratios(entry.trl.costs, entry.ours.costs))
        cpu = Spread.of(ratios(entry.trl.cpu_costs, entry.ours.cpu_costs))
        bar = SPEED_BARS.get(work)
        each = [f"{1 / statistics.median(side.costs):.3g}" for side in (entry.ours, entry.trl)]
        yield (
            f"| {TITLES[work]} | {entry.size} | {wall.count} | {each[0]} | {each[1]} | "
            f"{_range(wall)} | {_range(cpu)} | {_wanted(bar)} | "
            f"{verdict(wall, bar) if bar else ''} |"
        )


def _memory(results: Results) -> Iterator[str]:
    entries = _entries(results)
    if not entries:
        return
    yield (
        "High-water mark of the resident set in MiB (of tensors on the GPU with `--device cuda`), "
        "nothing subtracted; *growth* is what came on top of the imported libraries. The bar is on "
        "GRPO.\n"
    )
    yield "| work | model | ours | TRL | ratio | growth, ours | growth, TRL | ratio | bar | |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for entry in entries:
        work: Work = entry.work  # type: ignore[assignment]
        peaks = [side.peak / 2**20 for side in (entry.ours, entry.trl)]
        grown = [(side.peak - side.imported) / 2**20 for side in (entry.ours, entry.trl)]
        bar = MEMORY_BAR if work == "grpo" else None
        yield (
            f"| {TITLES[work].split(',')[0]} | {entry.size} | {peaks[0]:.0f} | {peaks[1]:.0f} | "
            f"{peaks[0] / peaks[1]:.2f} | {grown[0]:.0f} | {grown[1]:.0f} | "
            f"{grown[0] / grown[1]:.2f} | {_wanted(bar)} | "
            f"{judge(peaks[0] / peaks[1], bar) if bar else ''} |"
        )


def _limit(results: Results) -> Iterator[str]:
    entries = [e for e in _entries(results) if e.size in results.rates]
    if not entries:
        return
    yield (
        "Operations that the step's tokens need (`against_trl/flops.py`: matrix products, every "
        "shared prompt once, the head where something is predicted, backward twice forward) over "
        "the rate of matrix products with the model's shapes on the same threads, by the faster "
        "library in torch, divided by the median time. TRL's share is of the same necessary "
        "operations. Per step; SFT per 1,000 tokens, DPO per pair. *At most* is how often faster "
        "than TRL a program at the limit is.\n"
    )
    yield "| work | model | GFLOP | GFLOP/s | limit, s | ours | TRL | at most × | bar | |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for entry in entries:
        work: Work = entry.work  # type: ignore[assignment]
        rate: Rate = results.rates[entry.size]
        limit = entry.operations / rate.per_second
        shares = [limit / statistics.median(s.costs) for s in (entry.ours, entry.trl)]
        shown = 1000 if work == "sft" else 1
        needed, rated = shown * entry.operations / 1e9, rate.per_second / 1e9
        bar = LIMIT_BAR if work == "grpo" and entry.size in LIMIT_SIZES else None
        yield (
            f"| {TITLES[work].split(',')[0]} | {entry.size} | {needed:.3g} | {rated:.0f} | "
            f"{shown * limit:.3g} | {shares[0]:.0%} | {shares[1]:.0%} | "
            f"{1 / shares[1]:.1f} | "
            f"{f'≥ {bar.least:.0%} ({bar.hope:.0%})' if bar else '–'} | "
            f"{judge(shares[0], bar) if bar else ''} |"
        )


def _where(results: Results) -> Iterator[str]:
    entries = _entries(results)
    if not entries:
        return
    yield (
        "Medians in seconds, from the stage's own clock; TRL's generation and whole step beside "
        "them. *Judging* is rewards, references and teachers.\n"
    )
    yield f"| work | model | {' | '.join(COLUMNS)} | TRL generates | TRL's step |"
    yield "|---|---|" + "---|" * (len(COLUMNS) + 2)
    for entry in entries:
        work: Work = entry.work  # type: ignore[assignment]
        cells = [median_of(entry.ours, names) for names in COLUMNS.values()]
        cells += [median_of(entry.trl, ("generate",)), statistics.median(entry.trl.seconds)]
        yield (
            f"| {TITLES[work].split(',')[0]} | {entry.size} | "
            + " | ".join(f"{s:.2f}" if s >= 0.005 else "–" for s in cells)
            + " |"
        )


def median_of(side: Measured, names: Sequence[str]) -> float:
    """Median over steps of the sum of some parts; a part that a step lacks is 0."""
    steps = range(len(side.seconds))
    return statistics.median(
        sum(side.parts[name][i] for name in names if name in side.parts) for i in steps
    )


def _growth(results: Results) -> Iterator[str]:
    points = list(results.points.values())
    if not points:
        return
    first = points[0]
    base = first.load.groups
    yield (
        f"Model {first.size} ({base} prompts per step), one number changed at a time. *Arithmetic* "
        "is how the necessary operations grow.\n"
    )
    yield "| what | at | step, s | of that generating | × the first | arithmetic × | processor × |"
    yield "|---|---|---|---|---|---|---|"
    for series in dict.fromkeys(p.series for p in points):
        mine = sorted((p for p in points if p.series == series), key=lambda p: p.value)
        for point in mine:
            yield _grown(point, mine[0])
    yield from _group_bar([p for p in points if p.series.startswith("group size, prompt 512")])


def _grown(point: Point, start: Point) -> str:
    step_s, start_s = (statistics.median(p.seconds) for p in (point, start))
    cpu = statistics.median(point.cpu) / statistics.median(start.cpu)
    return (
        f"| {point.series} | {point.value} | {step_s:.2f} | {statistics.median(point.draw):.2f} | "
        f"{step_s / start_s:.2f} | {point.operations / start.operations:.2f} | {cpu:.2f} |"
    )


def _group_bar(points: Sequence[Point]) -> Iterator[str]:
    found = {p.value: p for p in points}
    if not {8, 32} <= found.keys():
        return
    few, many = found[8], found[32]
    cost = statistics.median(many.seconds) / statistics.median(few.seconds)
    draw = statistics.median(many.draw) / statistics.median(few.draw)
    yield ""
    yield (
        f"**Group size 32 over 8, prompt 512, completion 32**: {cost:.2f}× for the step, "
        f"{draw:.2f}× for generation alone (bar {_wanted(GROUP_BAR)}: {judge(cost, GROUP_BAR)}). "
        f"The necessary operations grow {many.operations / few.operations:.2f}×."
    )


def _exact(results: Results) -> Iterator[str]:
    found = list(results.exact.values())
    if not found:
        return
    yield (
        "One batch of the same token ids through both libraries. Gaps are relative (of the loss: "
        "absolute where it is 0 by construction); the gradient's is the norm of the difference "
        f"over TRL's norm, over all weights. Bar: {_wanted(EXACT_BAR)}.\n"
    )
    yield "| case | model | loss, ours | loss, TRL | gap | gradient gap | |"
    yield "|---|---|---|---|---|---|---|"
    for e in sorted(found, key=lambda e: (e.case, list(SIZES).index(e.size))):
        worst = max(e.loss_gap, e.gradient_gap)
        yield (
            f"| {e.case} | {e.size} | {e.loss_ours:.6f} | {e.loss_trl:.6f} | {e.loss_gap:.1e} | "
            f"{e.gradient_gap:.1e} | {'met' if worst <= EXACT_BAR.least else 'not met'} |"
        )


def summary(entry: Pairs) -> str:
    """One line while the benchmark runs."""
    wall = Spread.of(ratios(entry.trl.costs, entry.ours.costs))
    cpu = Spread.of(ratios(entry.trl.cpu_costs, entry.ours.cpu_costs))
    memory = entry.ours.peak / entry.trl.peak
    return (
        f"{entry.work} {entry.size}: {_range(wall)}x faster, processor {_range(cpu)}x, "
        f"memory {memory:.2f}x, others {entry.conditions.others:.0%} of the machine"
    )
