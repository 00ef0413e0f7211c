"""Tables for a terminal: measurements, comparisons, methods."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console as Terminal
from rich.table import Table

from posttrain.catalogue import entry, families, paper_words, prose
from posttrain.composition import TermSpec
from posttrain.probes.attribution import Attribution, Comparison, Part, compare
from posttrain.probes.bootstrap import Interval
from posttrain.probes.measurement import Measurement
from posttrain.probes.passk import pass_interval
from posttrain.probes.support import Label, labels
from posttrain.recipe import Measure, load_recipe

WIDTH = 118


def interval_words(interval: Interval | None) -> str:
    """A value and its interval, or a dash.

    Example:
        >>> interval_words(Interval(value=.5, low=.4, high=.6, num_prompts=8, seed=0,
        ...                         confidence=.95))
        '0.50 [0.40, 0.60]'
    """
    if interval is None:
        return "–"
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def measurement_table(measurement: Measurement, spec: Measure) -> str:
    """pass@1 and pass@n with intervals, support, and what the answers look like."""
    n = measurement.tasks[0].num_samples if measurement.tasks else 0
    table = _table(
        f"{measurement.policy}: {n} samples per prompt, support threshold {spec.threshold:.3g}",
        ("task", "pass@1", f"pass@{n}", "in", "out", "?", "tokens", "entropy", "cut off"),
    )
    for task in measurement.tasks:
        support = labels(task, epsilon=spec.threshold, confidence=spec.confidence)
        table.add_row(
            task.taskset,
            interval_words(pass_interval(task, 1, confidence=spec.confidence)),
            interval_words(pass_interval(task, n, confidence=spec.confidence)),
            *(str(sum(x is label for x in support)) for label in Label),
            f"{task.lengths.mean():.1f}",
            f"{task.nll.mean():.2f}",
            f"{task.truncated.mean():.0%}",
        )
    return _text(table)


def comparison_table(comparison: Comparison) -> str:
    """The five-way change per task set, with the role that the intervals support."""
    table = _table(
        f"{comparison.before} → {comparison.after}: where the change in pass@1 came from",
        (
            "task",
            "before",
            "after",
            "newly reachable",
            "sharpened",
            "kept",
            "weakened",
            "lost",
            "role",
        ),
    )
    for task in comparison.tasks:
        parts = [task.parts[p] for p in Part if p is not Part.UNDETERMINED]
        table.add_row(
            task.task,
            f"{task.before.value:.2f}",
            f"{task.after.value:.2f}",
            *(_highlighted(p) for p in parts),
            str(task.dominant),
        )
    notes = [_note(t) for t in comparison.tasks]
    confidence = comparison.tasks[0].confidence if comparison.tasks else 0.95
    lines = [
        _text(table),
        *(n for n in notes if n),
        f"[low, high]: {confidence:.0%} intervals over prompts; * excludes zero. "
        "kept + gains = after; kept + losses = before.",
    ]
    return "\n".join(lines)


def _highlighted(interval: Interval) -> str:
    star = "*" if interval.is_positive else ""
    # "+ 0.0" turns the minus zero of a rounded value into zero.
    value, low, high = (round(x, 2) + 0.0 for x in (interval.value, interval.low, interval.high))
    return f"{value:.2f}{star}\n[{low:.2f},{high:.2f}]"


def _note(task: Attribution) -> str:
    kept = f"retention {interval_words(task.retention)}" if task.retention else ""
    unclear = task.parts[Part.UNDETERMINED]
    open_ = f"undetermined {interval_words(unclear)}" if abs(unclear.value) >= 0.005 else ""
    words = ", ".join(w for w in (kept, open_) if w)
    return f"  {task.task}: {words}" if words else ""


def outcome_table(out: Path, *, final: str) -> str:
    """Base to final policy of a run."""
    recipe = load_recipe(out / "recipe.json")
    if final == "base":
        return "the run ended with the base: every stage was rolled back, or there was none"
    files = [out / "measurements" / f"{name}.json" for name in ("base", final)]
    if not all(f.is_file() for f in files):
        return "nothing was measured: the recipe has no task sets"
    base, result = (Measurement.from_json(f.read_text("utf-8")) for f in files)
    if not base.tasks:
        return "nothing was measured: the recipe has no task sets"
    spec = recipe.measure
    change = compare(base, result, epsilon=spec.threshold, confidence=spec.confidence)
    return comparison_table(change)


def methods_table() -> str:
    """The map: every named method by family, with its formula and its usual role."""
    every = [(n, m) for members in families().values() for n, m in members.items()]
    name_width = max(len(n) for n, _ in every)
    from_width = max(len(_short(m.provenance)) for _, m in every)
    by_width = max(len(m.interface) for _, m in every)
    lines: list[str] = []
    for family, members in families().items():
        lines += ["", family]
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
    """``off-policy: ...`` without what follows."""
    return provenance.partition(":")[0]


def method_page(name: str) -> str:
    """One method: what it composes, its options and defaults, and a recipe.

    Raises:
        ConfigError: no such method.
    """
    e = entry(name)
    lines = [
        f"{name}: {prose(e.doc)}",
        "",
        f"family      {e.family}",
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


def terms_words(terms: Sequence[TermSpec]) -> str:
    """An objective as a sum: ``1 cross_entropy + 0.1 reference_kl``."""
    return " + ".join(f"{t.weight:g} {t.__struct_config__.tag}" for t in terms)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="left", no_wrap=column in ("task", "name"))
    return table


def _text(table: Table) -> str:
    target = io.StringIO()
    Terminal(file=target, width=WIDTH, highlight=False).print(table)
    return target.getvalue().rstrip()
