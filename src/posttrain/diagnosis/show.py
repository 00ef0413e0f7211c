"""The card in a terminal: a bar per task set, what it means, and what to do next."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from posttrain.diagnosis.card import (
    Bottleneck,
    Diagnosis,
    Evidence,
    Prescription,
    TaskDiagnosis,
)
from posttrain.diagnosis.treat import Treated
from posttrain.measure.passk import pass_interval
from posttrain.measure.registry import plain_words

INDENT = 14
BAR = 30
"""Width of a task set's bar."""

COLOURS = {
    Bottleneck.MEASUREMENT: "magenta",
    Bottleneck.SUPPORT: "red",
    Bottleneck.ENTRY: "red",
    Bottleneck.SIGNAL: "yellow",
    Bottleneck.CHOICE: "yellow",
    Bottleneck.DIVERSITY: "yellow",
    Bottleneck.LEARNER_STATE: "yellow",
    Bottleneck.AMORTISATION: "blue",
    Bottleneck.RETENTION: "blue",
    Bottleneck.SATURATION: "green",
    Bottleneck.UNDETERMINED: "white",
}


def card(found: Diagnosis, *, written: tuple[Path, ...] = ()) -> RenderableType:
    """The diagnosis as something that rich can print.

    Args:
        found: the diagnosis.
        written: files to name at the end.
    """
    parts: list[RenderableType] = [_heading(found), Text()]
    for task in found.tasks:
        parts += [_task(task), Text()]
    parts += [_legend(), Text()]
    for prescription in sorted(found.prescriptions, key=lambda p: p is not found.next):
        parts += [_prescription(prescription, now=prescription is found.next), Text()]
    if not found.prescriptions:
        parts += [Text("Nothing to treat on these task sets.", style="green"), Text()]
    parts += [Text(f"  {path}", style="dim") for path in written]
    return Group(*parts)


def course(done: Treated) -> RenderableType:
    """What a treatment did, round by round, and where it ended."""
    rounds = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("round", "for", "bottleneck", "treatment", "what came of it"):
        rounds.add_column(column, header_style="bold")
    for r in done.rounds:
        style = "" if r.kept else "dim"
        tasks = ", ".join(r.tasks)
        rounds.add_row(str(r.number), tasks, r.bottleneck, r.treatment, r.words, style=style)
    ends = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("task", "pass@1 before", "pass@1 after"):
        ends.add_column(column, header_style="bold")
    for task in done.before.tasks:
        sides = (pass_interval(m.task(task.taskset), 1) for m in (done.before, done.after))
        words = (f"{i.value:.2f} [{i.low:.2f}, {i.high:.2f}]" for i in sides)
        ends.add_row(task.taskset, *words)
    cost = done.spent
    return Group(
        rounds,
        Text(),
        ends,
        Text(),
        Text(f"ended: {done.ended}"),
        Text(
            f"spent {cost.total:,} of {done.budget:,} tokens: {cost.looking:,} looking, "
            f"{cost.sampled:,} sampled and {cost.trained:,} trained in stages",
            style="dim",
        ),
        Text(f"result: {done.policy}  {done.model}"),
    )


def _heading(found: Diagnosis) -> Text:
    cost = found.cost
    name = Path(found.model).name or found.model
    return Text.assemble(
        ("What holds ", "bold"),
        (name, "bold cyan"),
        (" back", "bold"),
        (f"    {cost.rollouts:,} rollouts, {cost.seconds:.0f} s", "dim"),
    )


def _task(task: TaskDiagnosis) -> RenderableType:
    colour = COLOURS[task.bottleneck]
    title = Text.assemble(
        (f"{task.task:<14}", "bold"),
        _bar(task.evidence),
        "  ",
        (task.bottleneck.upper().replace("_", " "), f"bold {colour}"),
        (f", likely {task.leaning.replace('_', ' ')}" if task.leaning else "", "dim"),
    )
    lines: list[RenderableType] = [title, Text(plain_words(task.headline))]
    if task.findings and task.bottleneck is not Bottleneck.UNDETERMINED:
        first = task.findings[0]
        lines += [Text(f"because {plain_words(b)}", style="dim") for b in first.because]
        lines.append(Text(f"overturned by {first.overturned_by}", style="dim italic"))
        others = [f for f in task.findings[1:] if f.bottleneck is not first.bottleneck]
        lines += [Text(f"also: {f.words}", style="dim") for f in others]
    else:
        lines += [
            Text(
                f"{o.bottleneck.replace('_', ' ')}: {plain_words('; '.join(o.because))}",
                style="dim",
            )
            for o in task.open[:2]
        ]
        lines += [Text(f"shown already: {f.words}", style="dim") for f in task.findings[:1]]
    return Group(lines[0], *(_indented(line) for line in lines[1:]))


def _bar(evidence: Evidence) -> Text:
    """Solved, in reach but not chosen, and not seen in 64 tries, as parts of one bar."""
    first, many = evidence.get("pass@1"), evidence.get("pass@64")
    if first is None or many is None:
        return Text(" " * BAR)
    solved = round(first.value * BAR)
    reach = max(round(many.value * BAR) - solved, 0)
    return Text.assemble(
        ("█" * solved, "green"),
        ("▒" * reach, "yellow"),
        ("·" * (BAR - solved - reach), "red"),
    )


def _legend() -> Text:
    return Text.assemble(
        (" " * 14, ""),
        ("█", "green"),
        (" right at the first try   ", "dim"),
        ("▒", "yellow"),
        (" right within 64 tries   ", "dim"),
        ("·", "red"),
        (" never seen", "dim"),
    )


def _prescription(prescription: Prescription, *, now: bool) -> RenderableType:
    tasks = ", ".join(prescription.tasks)
    label = "Next" if now else "Later" if prescription.recipe else "Not yet"
    head = Text.assemble(
        (f"{label:<14}", "bold"),
        (prescription.title, "bold cyan" if prescription.recipe else "bold red"),
        f"  ({tasks}: {prescription.bottleneck.replace('_', ' ')})",
        ("  provisional: likely, not shown" if prescription.provisional else "", "yellow"),
    )
    if prescription.recipe is None:
        return Group(head, _indented(Text(f"needed: {prescription.obtain}")))
    if not now:
        return Group(head, _indented(Text("diagnose again before", style="dim")))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(max_width=36)
    table.add_column(style="dim")
    for choice in prescription.choices:
        table.add_row(choice.what, choice.setting, choice.why)
    table.add_row("gate", prescription.gate or "", "tells whether it worked")
    return Group(head, _indented(table))


def _indented(part: RenderableType) -> Padding:
    return Padding(part, (0, 0, 0, INDENT))
