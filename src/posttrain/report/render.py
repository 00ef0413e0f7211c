"""From a :class:`RunReport` to one self-contained HTML page.

    RunReport, sections ──▶ headline, drawings ──▶ report.html.j2 (autoescape) ──▶ str

The page loads nothing: its style, script and drawings are inline, and a content security policy
refuses everything else. It is complete without the script.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from posttrain.core import config
from posttrain.core.monitors import alarms
from posttrain.core.proofs import Proof, Subject
from posttrain.core.provenance import Kind, Span
from posttrain.measure.attribution import ChangeKind, MeasuredRole, PolicyChange
from posttrain.measure.bootstrap import Interval, interval_words
from posttrain.measure.profile import Profile
from posttrain.measure.spec import Measure
from posttrain.pages.svg import compact, duration
from posttrain.pages.template import Filter, Section, fill
from posttrain.report.change import change_chart
from posttrain.report.charts import (
    GROUP_OF,
    curve,
    pass_at_k,
    series,
    support_map,
    time_bar,
    token_bar,
)
from posttrain.report.definitions import HOW_TO_READ
from posttrain.report.headline import Headline, headline
from posttrain.report.picture import pipeline, role_glyph
from posttrain.report.view import PolicyReport, RunReport, Sample, StageReport
from posttrain.report.waterfall import STEPS, waterfall
from posttrain.run.history import GateRecord, StageHistory
from posttrain.run.ledger import GENESIS
from posttrain.run.store import UseRole

SURE, UNSURE = 0.5, 0.1
"""A sampled token at or above SURE is unmarked; below UNSURE it is marked as a surprise."""

UNIT = "share of samples on held-out prompts that succeed (pass@1)"
"""The unit of the parts of a change."""

UNCLEAR = 0.05
"""An unattributed change larger than this gives a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRow:
    """One policy in the table behind a pass@k drawing; cells follow the table's ks."""

    policy: str
    counted: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPanel:
    """One task set: the drawing and the table behind it."""

    task: str
    drawing: Markup
    ks: tuple[int, ...]
    rows: tuple[PassRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fall:
    """One task set of the whole run: the waterfall and the numbers behind it."""

    task: str
    drawing: Markup | None
    numbers: tuple[tuple[str, Interval | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePanel:
    """One stage with its drawings."""

    stage: StageReport
    number: int
    curves: tuple[Markup, ...]
    change_wide: Markup | None
    change_narrow: Markup | None
    versus: str
    tokens: Markup | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountPanel:
    """One stage of the token accounting: the bar, and (kind, trained, discarded) behind it."""

    stage: str
    bar: Markup
    rows: tuple[tuple[Kind, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePanel:
    """One stage of the time accounting: the bar, and (work, seconds, share) behind it."""

    stage: str
    bar: Markup
    rows: tuple[tuple[str, float, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Values of the template besides the report: drawings, tables and sentences."""

    headline: Headline
    warnings: tuple[str, ...]
    seconds: float
    generated: int
    versions: tuple[tuple[str, str], ...]
    proved: tuple[tuple[str, str], ...]  # (subject, of what)
    pipeline_wide: Markup
    pipeline_narrow: Markup
    pipeline_width: int
    falls: tuple[Fall, ...]
    versus: str
    passes: tuple[PassPanel, ...]
    drift: tuple[tuple[str, tuple[tuple[str, Profile], ...]], ...]
    support: tuple[tuple[str, int, Markup], ...]
    stages: tuple[StagePanel, ...]
    times: tuple[TimePanel, ...]
    time_groups: tuple[str, ...]
    accounts: tuple[AccountPanel, ...]
    samples: tuple[tuple[str, Sample], ...]
    trained: int
    discarded: int
    kinds: tuple[str, ...]


def render(report: RunReport, *, sections: Sequence[Section] = ()) -> str:
    """The page as HTML text. Equal reports give equal pages.

    Every string of the report is escaped, in the text and in the drawings.

    Args:
        report: the run.
        sections: sections of other units on this run, placed after the summary.

    Example:
        >>> from posttrain.recipe import Recipe
        >>> run = RunReport(recipe=Recipe(name="first", model="lab-base"), machine="<cpu>")
        >>> page = render(run)
        >>> "&lt;cpu&gt;" in page, "<cpu>" in page
        (True, False)
    """
    return fill(
        "posttrain.report",
        "report.html.j2",
        filters=_FILTERS,
        report=report,
        page=_page(report),
        sections=sections,
        head=report.ledger.head if report.ledger else GENESIS,
        how_to_read=HOW_TO_READ,
        unit=UNIT,
        digest=config.digest(config.plain(report.recipe)),  # as it is: a page refuses nothing
        protocol=_protocol(report.recipe.measure),
    )


def _page(report: RunReport) -> Page:
    whole, records = report.whole, [s.record for s in report.stages]
    wide = len(records) * 230 + 110
    accounts = _accounts(records)
    rows = [row for panel in accounts for row in panel.rows]
    live = sum(t + d for kind, t, d in rows if kind in (Kind.LEARNER, Kind.TEACHER))
    samples = tuple((s.record.name, sample) for s in report.stages for sample in s.samples)
    spans = [span for _, sample in samples for span in sample.trajectory.spans]
    written = {span.producer.kind for span in spans} | {kind for kind, _, _ in rows}
    return Page(
        headline=headline(report),
        warnings=tuple(_warnings(report)),
        seconds=sum(r.done.seconds for r in records if r.done),
        generated=report.tokens_measured + live,
        versions=_versions(report),
        proved=_proved(report.proofs),
        pipeline_wide=pipeline(report, ident="pipe-w"),
        pipeline_narrow=pipeline(report, ident="pipe-n", vertical=True),
        pipeline_width=wide if wide > 1040 else 0,
        falls=_falls(whole),
        versus=f"{whole.before} to {whole.after}" if whole else "",
        passes=tuple(_passes(report.policies, task, i) for i, task in enumerate(report.tasks)),
        drift=tuple(
            (t, tuple((p.name, m) for p in report.policies if (m := p.task(t)) is not None))
            for t in report.tasks
        ),
        support=tuple(_support(report.policies)),
        stages=tuple(_stage(stage, i) for i, stage in enumerate(report.stages)),
        times=_times(records),
        time_groups=tuple(dict.fromkeys(GROUP_OF[n] for r in records for n in r.seconds_by_work)),
        accounts=accounts,
        samples=samples,
        trained=sum(trained for _, trained, _ in rows),
        discarded=sum(discarded for _, _, discarded in rows),
        kinds=tuple(k.value for k in Kind if k in written),
    )


def _versions(report: RunReport) -> tuple[tuple[str, str], ...]:
    libraries = report.began.body["libraries"] if report.began else {}
    assert isinstance(libraries, Mapping)
    return tuple((str(k), str(v)) for k, v in libraries.items())


def _proved(proofs: Sequence[Proof]) -> tuple[tuple[str, str], ...]:
    """(subject, names): what was compared with what it claims to be.

    Example:
        >>> _proved([Proof(subject=Subject.EXPORT, of=name, words="") for name in ("a", "b")])
        (('export', 'a, b'),)
    """
    names = {s: dict.fromkeys(p.of for p in proofs if p.subject is s) for s in Subject}
    return tuple((s.value, ", ".join(of)) for s, of in names.items() if of)


def _protocol(spec: Measure) -> str:
    return (
        f"{spec.samples} samples per prompt at temperature {spec.sampling.temperature:g}, "
        f"seed {spec.seed}, at most {spec.max_new_tokens} tokens; a prompt is in reach from a "
        f"success rate of {spec.threshold:.3g}; {spec.confidence:.0%} intervals over prompts"
    )


def _warnings(report: RunReport) -> Iterator[str]:
    for stage in report.stages:
        name, lines = stage.record.name, stage.record.metrics
        for alarm in alarms(stage.record.planned.spec.monitors, lines):
            yield f"{name}, step {alarm.step + 1}: {alarm.words}. Try: {alarm.advice}"
        if idle := sum(line.get("tokens") == 0 for line in lines):
            yield (
                f"{name}: {idle} steps had nothing to learn from and changed "
                "nothing: every answer was filtered out or too old"
            )
    for task in report.whole.tasks if report.whole else ():
        unclear = max(task.undetermined_gain.value, task.undetermined_loss.value)
        if unclear > UNCLEAR:
            yield (
                f"{task.task}: a change of {unclear:.2f} could not be attributed; more samples "
                "per prompt would decide it"
            )


def _passes(policies: Sequence[PolicyReport], task: str, index: int) -> PassPanel:
    measured = [(p.name, m.curve if (m := p.task(task)) else None) for p in policies]
    ks = tuple(sorted({k for _, curve in measured if curve for k in curve.ks}))
    rows = [
        PassRow(
            policy=name,
            counted=f"{curve.num_prompts:,} × {curve.num_samples:,}",
            cells=tuple(interval_words(curve.at(k)) if k in curve.ks else "–" for k in ks),
        )
        for name, curve in measured
        if curve
    ]
    drawing = pass_at_k(task, measured, ident=f"pass-{index}")
    return PassPanel(task=task, drawing=drawing, ks=ks, rows=tuple(rows))


def _support(policies: Sequence[PolicyReport]) -> Iterator[tuple[str, int, Markup]]:
    """(task set, number of prompts, map) for the task sets of the base's measurement."""
    for i, first in enumerate(policies[0].tasks if policies else ()):
        rows = [(p.name, m.labels) for p in policies if (m := p.task(first.task)) is not None]
        drawing = support_map(first.task, first.prompts, rows, ident=f"sup-{i}")
        yield first.task, len(first.prompts), drawing


def _falls(whole: PolicyChange | None) -> tuple[Fall, ...]:
    if whole is None:
        return ()
    return tuple(
        Fall(
            task=c.task,
            drawing=waterfall(c, before=whole.before, after=whole.after, ident=f"fall-{i}"),
            numbers=(
                ("before", c.before),
                *((str(step.part), c.parts[step.part]) for step in STEPS),
                ("after", c.after),
                ("kept", c.parts[ChangeKind.KEPT]),
                ("retention: kept of before", c.retention),
            ),
        )
        for i, c in enumerate(whole.tasks)
    )


def _change(change: PolicyChange | None, *, ident: str, narrow: bool) -> Markup | None:
    if change is None or not change.tasks:
        return None
    title = f"Change from {change.before} to {change.after}"
    return change_chart(change.tasks, ident=ident, title=title, unit=UNIT, narrow=narrow)


def _stage(stage: StageReport, index: int) -> StagePanel:
    record, change = stage.record, stage.change
    parts = [
        (t.kind, f"{t.kind}:{t.producer}", t.completion_tokens, t.role is UseRole.DISCARDED)
        for t in record.tokens
    ]
    return StagePanel(
        stage=stage,
        number=index + 1,
        curves=tuple(
            curve(name, points, ident=f"st{index}-c{i}", stage=record.name)
            for i, (name, points) in enumerate(series(record.metrics))
        ),
        change_wide=_change(change, ident=f"st{index}-cw", narrow=False),
        change_narrow=_change(change, ident=f"st{index}-cn", narrow=True),
        versus=f"{change.before} → {change.after}" if change else "",
        tokens=token_bar(
            parts, ident=f"st{index}-tok", title=f"Tokens of {record.name} by producer"
        )
        if parts
        else None,
    )


def _times(records: Sequence[StageHistory]) -> tuple[TimePanel, ...]:
    spent = [(r.name, r.seconds_by_work) for r in records]
    most = max((sum(work.values()) for _, work in spent), default=0.0)
    return tuple(
        TimePanel(
            stage=name,
            bar=time_bar(work, ident=f"time-{i}", title=f"Time of {name}", most=most),
            rows=tuple((n, s, f"{s / sum(work.values()):.1%}") for n, s in work.items()),
        )
        for i, (name, work) in enumerate(spent)
        if work
    )


def _accounts(records: Sequence[StageHistory]) -> tuple[AccountPanel, ...]:
    """Per stage the tokens of each kind of producer: read by a loss term, or not."""
    accounts: list[tuple[str, list[tuple[Kind, int, int]]]] = []
    for record in records:
        counts: dict[Kind, list[int]] = {}
        for use in record.tokens:
            both = counts.setdefault(use.kind, [0, 0])
            both[use.role is not UseRole.TRAIN] += use.completion_tokens
        if counts:
            rows = [(kind, trained, lost) for kind, (trained, lost) in counts.items()]
            accounts.append((record.name, rows))
    most = max((sum(t + d for _, t, d in rows) for _, rows in accounts), default=0)
    panels = []
    for i, (name, rows) in enumerate(accounts):
        parts = [
            (kind, f"{kind}, {words}", tokens, words == "discarded")
            for kind, trained, discarded in rows
            for words, tokens in (("trained", trained), ("discarded", discarded))
            if tokens
        ]
        bar = token_bar(parts, ident=f"acc-{i}", title=f"Tokens of {name}", most=most)
        panels.append(AccountPanel(stage=name, bar=bar, rows=tuple(rows)))
    return tuple(panels)


# --- filters ---------------------------------------------------------------------------------

_MISSED = {
    "stop": ("stopped", "✗"),
    "warn": ("warned", "!"),
    "roll_back": ("rolled back", "↶"),
    "branch": ("branched", "↳"),
}
"""The action of a gate that did not pass, and its mark."""


def _outcome(decided: GateRecord) -> tuple[str, str]:
    """The outcome of a gate, and its mark."""
    return ("passed", "✓") if decided.passed else _MISSED[decided.gate.otherwise]


def _glyph(role: MeasuredRole | str) -> Markup:
    """The mark of a role, decorative: the word is next to it."""
    drawn = role_glyph(MeasuredRole(role), 8, 8)
    return Markup('<svg class="mark" viewBox="0 0 16 16" aria-hidden="true">{}</svg>').format(drawn)


def _pieces(sample: Sample) -> list[tuple[Span, list[tuple[str, float | None]]]]:
    """Each span of a trajectory with its tokens: text, and log-prob in nats where known."""
    ends = [0]
    for span in sample.trajectory.spans:
        ends.append(ends[-1] + span.length)
    pieces = []
    for span, (start, end) in zip(sample.trajectory.spans, pairwise(ends), strict=True):
        known = [None] * span.length if span.logprobs is None else span.logprobs.tolist()
        pieces.append((span, list(zip(sample.texts[start:end], known, strict=True))))
    return pieces


def _surprise(logprob: float | None) -> str:
    """CSS class of a token by its log-prob under its author."""
    if logprob is None or not math.isfinite(logprob):
        return "tok"
    likely = math.exp(min(logprob, 0.0))
    return "tok" if likely >= SURE else "tok s1" if likely >= UNSURE else "tok s2"


def _likelihood(logprob: float | None) -> str:
    """The log-prob of a token in words, or an empty string."""
    if logprob is None or not math.isfinite(logprob):
        return ""
    return f"log-prob {logprob:.2f}, probability {math.exp(min(logprob, 0.0)):.2f}"


def _reward(reward: float | None) -> str:
    known = reward is not None and math.isfinite(reward)
    return f"{reward:.2f}" if known else "no reward"


_FILTERS: dict[str, Filter] = {
    "duration": duration,
    "compact": compact,
    "count": lambda n: f"{n:,}",
    "words": interval_words,
    "glyph": _glyph,
    "outcome": _outcome,
    "pieces": _pieces,
    "surprise": _surprise,
    "likelihood": _likelihood,
    "reward": _reward,
}
