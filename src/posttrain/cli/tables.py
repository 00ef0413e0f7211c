"""Tables for a terminal: measurements, comparisons, methods."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console as Terminal
from rich.table import Table

from posttrain.catalogue import (
    entry,
    families,
    family_title,
    known_groups,
    known_methods,
    known_parts,
    mentions,
    paper_words,
    prose,
)
from posttrain.core.errors import ConfigError, nearest
from posttrain.diagnosis.reachability import TaskReach
from posttrain.measure.attribution import Attribution, ChangeKind, PolicyChange, attribute_changes
from posttrain.measure.bootstrap import Interval, interval_words
from posttrain.measure.curves import crossover
from posttrain.measure.diversity import repetition_column
from posttrain.measure.measurement import Measurement, TaskMeasurement
from posttrain.measure.reading import FEWEST, Reading, number_words
from posttrain.measure.readings import not_taken, paired_change, read, take
from posttrain.measure.registry import Estimation, metrics
from posttrain.measure.rescoring import verifier_words
from posttrain.measure.retained import Retained
from posttrain.measure.spec import Measure
from posttrain.measure.support import Label, labels, support_change
from posttrain.run.folder import RunFolder

WIDTH = 80
"""Columns of a terminal that everybody has."""

CUT_OFF, LOOPED = 0.05, 0.05
"""Shares of cut-off samples and of repeated 4-grams from which on a table warns (the latter: the
guard of arXiv 2604.08527)."""


def measurement_table(measurement: Measurement, spec: Measure) -> str:
    """Success rates, learning signal and variety of a policy, per task set."""
    n = measurement.tasks[0].num_samples if measurement.tasks else 0
    overview = [m.overview for m in metrics() if m.overview is not None]
    success = _table(
        f"{_named(measurement.policy)}: {n} samples per prompt, "
        f"support threshold {spec.threshold:.3g}",
        ("task", "pass@1", f"pass@{n}", "maj@16", "in", "out", "?"),
    )
    variety = _table(
        "what there is to learn from, and what the answers look like",
        ("task", "no signal", *(heading for _, heading in overview)),
    )
    for task in measurement.tasks:
        found = {r.name: r for r in take(task, _estimation(spec))}
        support = labels(task, epsilon=spec.threshold, confidence=spec.confidence)
        success.add_row(
            task.taskset,
            *(_cell(found.get(name)) for name in ("pass@1", f"pass@{n}", "maj@16")),
            *(str(sum(x is label for x in support)) for label in Label),
        )
        silent = f"{found[f'all_wrong@{n}'].value:.2f} wrong\n{found[f'pass^{n}'].value:.2f} right"
        cells = (_cell(found.get(name), lines=2) for name, _ in overview)
        variety.add_row(task.taskset, silent, *cells)
    notes = [note for task in measurement.tasks for note in _warnings(task)]
    return "\n".join(
        [
            _text(success),
            "",
            _text(variety),
            *notes,
            "",
            _legend(
                f"[low, high]: {spec.confidence:.0%} intervals over prompts. in, out: prompts "
                "within and out of reach, ? not decided by so few samples. no signal: prompts with "
                "only one kind of try. groups of 8: share with a success and a failure. entropy: "
                "of the answer, in nats. calibration: how far success is from agreement with "
                "itself. --details: all in words."
            ),
        ]
    )


def readings_table(measurement: Measurement, spec: Measure) -> str:
    """Every reading of a policy, one line each, with a sentence that explains it."""
    blocks = []
    for task in measurement.tasks:
        found = take(task, _estimation(spec))
        blocks.append(readings_words(task.taskset, found, missing=not_taken(task)))
    return "\n\n".join(blocks)


def readings_words(title: str, found: Sequence[Reading], *, missing: Sequence[str] = ()) -> str:
    """Readings as lines: name, number, interval, sentence; then what is missing and why."""
    table = _table(title, ("reading", "value", "interval", "which means"))
    for r in found:
        bounds = f"[{number_words(r.low)}, {number_words(r.high)}]"
        table.add_row(r.name, number_words(r.value), bounds, r.words)
    return "\n".join([_text(table), *(f"  missing: {m}" for m in missing)])


def _cell(found: Reading | None, *, lines: int = 1) -> str:
    if found is None:
        return "–"
    if lines == 1:
        return f"{_zero(found.value):.2f} [{_zero(found.low):.2f}, {_zero(found.high):.2f}]"
    return f"{_zero(found.value):.2f}\n[{_bare(found.low)},{_bare(found.high)}]"


def _warnings(task: TaskMeasurement) -> list[str]:
    """Reasons not to trust the numbers of a task set."""
    found = []
    if len(task.prompts) < FEWEST:
        found.append(
            f"  ! {task.taskset}: {len(task.prompts)} prompts are too few to judge by; "
            f"compare and diagnose ask for {FEWEST}"
        )
    if doubts := verifier_words(task):
        found.append(f"  ! {doubts}")
    cut, looped = float(task.truncated.mean()), task.find(repetition_column)
    if cut >= CUT_OFF:
        found.append(f"  ! {task.taskset}: {cut:.0%} of samples were cut off by the token budget")
    if looped is not None and float(looped.mean()) >= LOOPED:
        found.append(f"  ! {task.taskset}: {looped.mean():.0%} of the 4-grams of samples repeat")
    return found


def comparison_table(comparison: PolicyChange) -> str:
    """The five-way change per task set, with the dominant role."""
    table = _table(
        f"{_named(comparison.before)} → {_named(comparison.after)}: where the change came from",
        (
            "task\nrole",
            "pass@1",
            "newly\nreachable",
            "sharpened",
            "kept",
            "weakened",
            "lost",
        ),
    )
    for task in comparison.tasks:
        parts = [task.parts[p] for p in ChangeKind if p is not ChangeKind.UNDETERMINED]
        table.add_row(
            f"{task.task}\n{task.dominant}",
            f"{task.before.value:.2f} →\n{task.after.value:.2f}",
            *(_highlighted(p) for p in parts),
        )
    notes = [_note(t) for t in comparison.tasks]
    confidence = comparison.tasks[0].confidence if comparison.tasks else 0.95
    lines = [
        _text(table),
        *(n for n in notes if n),
        f"[low, high]: {confidence:.0%} intervals over prompts; * excludes zero.",
        "kept + gains = after; kept + losses = before.",
    ]
    return "\n".join(lines)


def support_table(before: Measurement, after: Measurement, spec: Measure) -> str:
    """Prompts in and out of support before and after, and the rates computed from them."""
    table = _table(
        f"support at a success rate of {spec.threshold:.3g}: prompts",
        ("task", "preserved", "expanded", "shrunk", "out", "?", "SRR", "NDR", "NSCR",
         "both, before,\nafter, none"),
    )  # fmt: skip
    for old in before.tasks:
        s = support_change(
            old, after.task(old.taskset), epsilon=spec.threshold, confidence=spec.confidence
        )
        seen = s.solvable
        rates = ("–" if r is None else f"{r:.2f}" for r in (s.srr, s.ndr, s.nscr))
        counts = (s.preserved, s.expanded, s.shrunk, s.out, s.undetermined)
        four = (seen.both, seen.before_only, seen.after_only, seen.neither)
        table.add_row(
            old.taskset, *(str(c) for c in counts), *rates, ", ".join(str(c) for c in four)
        )
    return "\n".join(
        [
            _text(table),
            _legend(
                "preserved: in reach before and after; expanded: out, then in; shrunk: in, then "
                "out; ?: too few samples to say. SRR: kept share of what was in reach. NDR: new "
                "share of what is. NSCR: expanded less shrunk, of all three. Last: solved at least "
                "once by both, only BEFORE, only AFTER, neither; with these samples, luck included."
            ),
        ]
    )


def change_table(before: Measurement, after: Measurement, *, confidence: float = 0.95) -> str:
    """Other changes per task set: variety, cost, and the k of the pass@k crossover.

    Differences are paired by prompt.
    """
    how = Estimation(confidence=confidence)
    changing = [m for m in metrics() if m.in_changes]
    headings = (m.name.replace("_", " ") for m in changing)
    table = _table(
        f"{_named(before.policy)} → {_named(after.policy)}: variety and cost",
        ("task", *headings, "behind from k ="),
    )
    for old in before.tasks:
        new = after.task(old.taskset)
        cells = [_changed(m.name, old, new, how) for m in changing]
        crossing = crossover(old, new, how).interval
        k = number_words(crossing.value, digits=0)
        bounds = [number_words(b, digits=0) for b in (crossing.low, crossing.high)]
        table.add_row(old.taskset, *cells, f"{k}\n[{bounds[0]}, {bounds[1]}]")
    return "\n".join(
        [
            _text(table),
            _legend(
                "before → after, then the paired change and its interval; * excludes zero. behind "
                "from k: the first number of tries at which AFTER succeeds less often than BEFORE; "
                "none: not seen."
            ),
        ]
    )


def retention_table(retained: Sequence[Retained]) -> str:
    """Retention of each task set over later stages; a dash where there was no later stage."""
    columns = ("task set", "first gained in", "before that", "since then", "forgotten", "handed on")
    table = _table("retention over the stages", columns)
    for row in retained:
        numbers = (row.forward, row.backward, row.forgetting, row.handoff)
        cells = (interval_words(r, missing="–") for r in numbers)
        table.add_row(row.task, row.learned, *cells)
    legend = _legend(
        "first gained in: the first stage clearly above the base. before that: gain over the base "
        "by earlier stages (forward transfer). since then: change of pass@1 by later stages "
        "(backward transfer). forgotten: best pass@1 so far less the last. handed on: of the "
        "prompts its stage brought into reach, the share still there."
    )
    return f"{_text(table)}\n{legend}"


def reach_words(reached: Sequence[TaskReach], *, most: int = 4) -> str:
    """How probable success on the newly solved prompts was before."""
    lines = ["how probable success was before, on prompts that only AFTER was seen to solve:"]
    for reach in reached:
        many = len(reach.prompts)
        lines.append(f"  {reach.task}: {many} prompt{'s' if many > 1 else ''}, the rarest first")
        rare = sorted(reach.prompts, key=lambda p: p.log10)
        lines += [f"    {p.key}: {p.words}" for p in rare[:most]]
        if len(rare) > most:
            lines.append(f"    and {len(rare) - most} that were likelier")
    return "\n".join(lines)


def _changed(name: str, old: TaskMeasurement, new: TaskMeasurement, how: Estimation) -> str:
    """Values before and after, and the paired change; a dash where it was not measured."""
    change = paired_change(name, old, new, how)
    ends = [read(name, side, how) for side in (old, new)] if change else []
    if change is None or ends[0] is None or ends[1] is None:
        return "–"
    star = "*" if change.low > 0 or change.high < 0 else ""
    bounds = f"[{_bare(change.low)},{_bare(change.high)}]"
    return f"{ends[0].value:.2f} → {ends[1].value:.2f}\n{_zero(change.value):+.2f}{star} {bounds}"


def _estimation(spec: Measure) -> Estimation:
    return Estimation(confidence=spec.confidence, epsilon=spec.threshold)


def _highlighted(interval: Interval) -> str:
    star = "*" if interval.is_positive else ""
    return f"{_zero(interval.value):.2f}{star}\n[{_bare(interval.low)},{_bare(interval.high)}]"


def _zero(x: float) -> float:
    """Rounded to two digits; "+ 0.0" turns a minus zero into zero."""
    return round(x, 2) + 0.0


def _bare(x: float) -> str:
    """Two digits without a leading zero, as narrow as columns are: .05, -.05, 1.2, 120."""
    if abs(_zero(x)) < 1:
        return f"{_zero(x):.2f}".replace("0.", ".", 1)
    return f"{x:.1f}" if abs(x) < 100 else f"{x:.0f}"


def _named(policy: str) -> str:
    """A policy's name; for a path its last two parts, which distinguish runs of the same name."""
    return "/".join(Path(policy).parts[-2:]) if Path(policy).is_absolute() else policy


def _note(task: Attribution) -> str:
    kept = f"retention {interval_words(task.retention)}" if task.retention else ""
    unclear = task.parts[ChangeKind.UNDETERMINED]
    open_ = f"undetermined {interval_words(unclear)}" if abs(unclear.value) >= 0.005 else ""
    words = ", ".join(w for w in (kept, open_) if w)
    return f"  {task.task}: {words}" if words else ""


def outcome_table(out: Path, *, final: str) -> str:
    """Base to final policy of a run."""
    folder = RunFolder(out)
    recipe = folder.recipe()
    if final == "base":
        return "the run ended with the base: every stage was rolled back, or there was none"
    if not {"base", final} <= set(folder.measured()):
        return "nothing was measured: the recipe has no task sets"
    base, result = folder.measurement("base"), folder.measurement(final)
    if not base.tasks:
        return "nothing was measured: the recipe has no task sets"
    spec = recipe.measure
    change = attribute_changes(base, result, epsilon=spec.threshold, confidence=spec.confidence)
    confidence = spec.confidence
    return "\n\n".join(
        [comparison_table(change), change_table(base, result, confidence=confidence)]
    )


def methods_table() -> str:
    """The map: every named method by family, with its formula and its usual role."""
    every = [(n, m) for members in families().values() for n, m in members.items()]
    name_width = max(len(n) for n, _ in every)
    from_width = max(len(_short(m.provenance)) for _, m in every)
    by_width = max(len(m.interface) for _, m in every)
    lines: list[str] = []
    for family, members in families().items():
        lines += ["", family_title(family)]
        for name, method in members.items():
            paper = paper_words(method.paper, link=False)
            lines += [
                f"  {name:{name_width}}  {_short(method.provenance):{from_width}}  "
                f"{method.interface:{by_width}}  tends to {method.tendency}",
                f"  {'':{name_width}}  {method.formula}   [{paper}]",
            ]
    lines += ["", "The role is a tendency: what a stage really did is measured."]
    return "\n".join([*lines, "posttrain methods NAME explains one."]).lstrip("\n")


def _short(provenance: str) -> str:
    """The regime only: ``off-policy`` of ``off-policy: ...``."""
    return provenance.partition(":")[0]


def method_page(name: str) -> str:
    """One method: what it composes, its options and defaults, and a recipe; or one part.

    Raises:
        ConfigError: no such method or part; the message has the methods that mention the name.
    """
    if name not in known_methods():
        return _part_page(name)
    e = entry(name)
    lines = [
        f"{name}: {prose(e.doc)}",
        "",
        f"family      {family_title(e.family)}",
        f"provenance  {e.provenance}",
        f"interface   {e.interface}",
        f"tends to    {e.tendency}",
        f"minimises   {e.formula}",
        f"paper       {paper_words(e.paper, link=False)}",
        "",
        "composes: " + " → ".join(p.tag for p in e.parts),
    ]
    for part in e.parts:
        lines += [f"  {part.role:<6}  {part.tag}: {part.facts}"]
        lines += [f"          {line}".rstrip() for line in prose(part.doc).splitlines()]
    lines += [f"  option {variant}" for variant in e.variants]
    lines += ["", "needs from you:", *(f"  {ask}" for ask in e.asks), "", "options:"]
    wide = max((len(o.name) for o in e.options), default=0)
    lines += [f"  {o.name:{wide}}  {o.default}   ({o.kind})" for o in e.options]
    return "\n".join([*lines, "", "a recipe:", "", e.recipe.rstrip("\n")])


def _part_page(name: str) -> str:
    """A source, signal, term or group of options, explained."""
    for part, its_options in (*known_parts(), *known_groups()):
        if part.tag.lower() == name.lower():
            lines = [f"{part.tag}: {prose(part.doc)}", "", f"{part.role}  {part.facts}".rstrip()]
            lines += [f"  {o.name}  {o.default}   ({o.kind})" for o in its_options]
            return "\n".join(lines)
    if speakers := mentions(name):
        raise ConfigError(
            f"no method is called {name!r}",
            fix=f"these speak of it: {', '.join(speakers)}; `posttrain methods {speakers[0]}`",
        )
    raise ConfigError(f"no method {name!r}", fix=nearest(name, known_methods()))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=title,
        box=SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        padding=(0, 1),
        collapse_padding=True,
    )
    for column in columns:
        table.add_column(column, justify="left", no_wrap=column in ("task", "task\nrole", "name"))
    return table


def _text(table: Table) -> str:
    target = io.StringIO()
    # Without markup: "[none, none]" is an interval, not a tag.
    Terminal(file=target, width=WIDTH, highlight=False, markup=False).print(table)
    return target.getvalue().rstrip()


def _legend(words: str) -> str:
    return textwrap.fill(words, WIDTH)
