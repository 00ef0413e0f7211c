"""From a :class:`RunView` to one self-contained HTML page.

    RunView ──▶ headline, drawings ──▶ report.html.j2 (autoescape) ──▶ str

The page loads nothing: its style, script and drawings are inside it, and a content security
policy refuses everything else. It reads fully without the script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from posttrain.core.provenance import Kind
from posttrain.report.change import change_chart
from posttrain.report.charts import (
    curve,
    pass_at_k,
    reach_strip,
    support_map,
    time_bar,
    token_bar,
)
from posttrain.report.headline import Headline, headline
from posttrain.report.pages import Filter, fill
from posttrain.report.picture import effect_glyph, pipeline
from posttrain.report.svg import compact, duration
from posttrain.report.view import (
    Account,
    Change,
    Comparison,
    Effect,
    Estimate,
    FoundView,
    PolicyTask,
    PolicyView,
    RoundView,
    RunView,
    StageView,
    TimePart,
    Token,
    task_of,
)
from posttrain.report.waterfall import waterfall

SURE, UNSURE = 0.5, 0.1
"""A sampled token at or above SURE is unmarked; below UNSURE it is marked as a surprise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRow:
    """One policy in the table behind a pass@k drawing; cells follow the table's ks."""

    policy: str
    counted: str
    pass_at_1: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPanel:
    """One task set: the drawing and the table behind it."""

    task: str
    drawing: Markup
    ks: tuple[int, ...]
    rows: tuple[PassRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPanel:
    """One round of a treatment: what was found, each task set with its bar."""

    round: RoundView
    found: tuple[tuple[FoundView, Markup | str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fall:
    """One task set of the whole run: the waterfall and the numbers behind it."""

    change: Change
    drawing: Markup | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePanel:
    """One stage with its drawings."""

    stage: StageView
    number: int
    curves: tuple[Markup, ...]
    change_wide: Markup | None
    change_narrow: Markup | None
    versus: str
    tokens: Markup | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountPanel:
    """One stage of the token accounting."""

    stage: str
    bar: Markup
    rows: tuple[Account, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePanel:
    """One stage of where the time went: the bar, and (part, share of the stage) behind it."""

    stage: str
    bar: Markup
    rows: tuple[tuple[TimePart, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Everything the template places."""

    view: RunView
    headline: Headline
    pipeline_wide: Markup
    pipeline_narrow: Markup
    pipeline_width: int
    rounds: tuple[RoundPanel, ...]
    falls: tuple[Fall, ...]
    versus: str
    passes: tuple[PassPanel, ...]
    drift: tuple[tuple[str, tuple[tuple[str, PolicyTask], ...]], ...]
    support: tuple[tuple[str, int, Markup], ...]
    stages: tuple[StagePanel, ...]
    times: tuple[TimePanel, ...]
    time_groups: tuple[str, ...]
    accounts: tuple[AccountPanel, ...]
    trained: int
    discarded: int
    kinds: tuple[str, ...]


def render(view: RunView) -> str:
    """The page as HTML text. Equal views give equal pages.

    Every string of the view is escaped, in the text and in the drawings.

    Example:
        >>> from posttrain.report.view import Seal, Totals
        >>> view = RunView(name="<first>", created="today", base_model="lab-base", machine="cpu",
        ...                totals=Totals(wall_seconds=1, tokens_generated=0, tokens_trained=0),
        ...                ledger=Seal(head="00ff"), recipe_digest="ab12")
        >>> page = render(view)
        >>> "&lt;first&gt;" in page, "<first>" in page
        (True, False)
    """
    return fill("report.html.j2", filters=_FILTERS, page=_page(view), view=view)


def _page(view: RunView) -> Page:
    whole = view.between(None)
    wide = len(view.stages) * 230 + 110
    written = {p.kind for s in view.samples for p in s.pieces}
    written |= {t.kind for s in view.stages for t in s.tokens} | {a.kind for a in view.accounts}
    return Page(
        view=view,
        headline=headline(view),
        pipeline_wide=pipeline(view, ident="pipe-w"),
        pipeline_narrow=pipeline(view, ident="pipe-n", vertical=True),
        pipeline_width=wide if wide > 1040 else 0,
        rounds=tuple(
            RoundPanel(
                round=r,
                found=tuple(
                    (f, _reach(f, ident=f"round-{r.number}-{i}")) for i, f in enumerate(r.found)
                ),
            )
            for r in (view.treatment.rounds if view.treatment else ())
        ),
        falls=_falls(whole),
        versus=f"{whole.before} to {whole.after}" if whole else "",
        passes=tuple(_passes(view.policies, task, i) for i, task in enumerate(view.tasks)),
        drift=tuple(
            (t, tuple((p.name, m) for p in view.policies if (m := task_of(p, t)) is not None))
            for t in view.tasks
        ),
        support=tuple(
            (m.task, len(m.prompts), support_map(m, ident=f"sup-{i}"))
            for i, m in enumerate(view.support)
        ),
        stages=tuple(_stage(view, stage, i) for i, stage in enumerate(view.stages)),
        times=_times(view.stages),
        time_groups=tuple(dict.fromkeys(p.group for s in view.stages for p in s.times)),
        accounts=_accounts(view.accounts),
        trained=sum(a.trained for a in view.accounts),
        discarded=sum(a.discarded for a in view.accounts),
        kinds=tuple(k.value for k in Kind if k in written),
    )


def _passes(policies: Sequence[PolicyView], task: str, index: int) -> PassPanel:
    measured = [(p.name, m) for p in policies if (m := task_of(p, task)) is not None]
    ks = tuple(sorted({point.k for _, m in measured for point in m.curve}))
    rows = []
    for name, m in measured:
        rates: dict[int, Estimate] = {point.k: point.rate for point in m.curve}
        cells = tuple(rates[k].words if k in rates else "–" for k in ks)
        counted = f"{m.num_prompts:,} × {m.num_samples:,}"
        rows.append(PassRow(policy=name, counted=counted, pass_at_1=m.pass_at_1.words, cells=cells))
    drawing = pass_at_k(task, policies, ident=f"pass-{index}")
    return PassPanel(task=task, drawing=drawing, ks=ks, rows=tuple(rows))


def _reach(found: FoundView, *, ident: str) -> Markup | str:
    """The bar of what was found; nothing where pass@1 was not read."""
    if found.first.value is None:
        return ""
    many = found.first.value if found.reach.value is None else found.reach.value
    return reach_strip(found.task, found.first.value, many, tries=found.tries, ident=ident)


def _falls(whole: Comparison | None) -> tuple[Fall, ...]:
    if whole is None:
        return ()
    return tuple(
        Fall(
            change=c,
            drawing=waterfall(c, before=whole.before, after=whole.after, ident=f"fall-{i}"),
        )
        for i, c in enumerate(whole.changes)
    )


def _change(
    view: RunView, comparison: Comparison | None, *, ident: str, narrow: bool
) -> Markup | None:
    if comparison is None or not comparison.changes:
        return None
    title = f"Change from {comparison.before} to {comparison.after}"
    return change_chart(comparison.changes, ident=ident, title=title, unit=view.unit, narrow=narrow)


def _stage(view: RunView, stage: StageView, index: int) -> StagePanel:
    comparison = view.between(stage.name)
    parts = [(t.kind, f"{t.kind.value}:{t.name}", t.tokens, t.discarded) for t in stage.tokens]
    return StagePanel(
        stage=stage,
        number=index + 1,
        curves=tuple(
            curve(s, ident=f"st{index}-c{i}", stage=stage.name)
            for i, s in enumerate(stage.series)
            if s.points
        ),
        change_wide=_change(view, comparison, ident=f"st{index}-cw", narrow=False),
        change_narrow=_change(view, comparison, ident=f"st{index}-cn", narrow=True),
        versus=f"{comparison.before} → {comparison.after}" if comparison else "",
        tokens=token_bar(parts, ident=f"st{index}-tok", title=f"Tokens of {stage.name} by producer")
        if parts
        else None,
    )


def _times(stages: Sequence[StageView]) -> tuple[TimePanel, ...]:
    totals = {s.name: sum(p.seconds for p in s.times) for s in stages}
    most = max(totals.values(), default=0.0)
    return tuple(
        TimePanel(
            stage=s.name,
            bar=time_bar(s.times, ident=f"time-{i}", title=f"Time of {s.name}", most=most),
            rows=tuple((p, f"{p.seconds / totals[s.name]:.1%}") for p in s.times),
        )
        for i, s in enumerate(stages)
        if totals[s.name] > 0
    )


def _accounts(accounts: Sequence[Account]) -> tuple[AccountPanel, ...]:
    names = list(dict.fromkeys(a.stage for a in accounts))
    by_stage = {name: tuple(a for a in accounts if a.stage == name) for name in names}
    most = max(
        (sum(a.trained + a.discarded for a in rows) for rows in by_stage.values()), default=0
    )
    panels = []
    for i, (name, rows) in enumerate(by_stage.items()):
        parts = [
            (a.kind, f"{a.kind.value}, {words}", tokens, words == "discarded")
            for a in rows
            for words, tokens in (("trained", a.trained), ("discarded", a.discarded))
            if tokens
        ]
        bar = token_bar(parts, ident=f"acc-{i}", title=f"Tokens of {name}", most=most)
        panels.append(AccountPanel(stage=name, bar=bar, rows=rows))
    return tuple(panels)


# --- filters ---------------------------------------------------------------------------------


def _glyph(effect: Effect) -> Markup:
    """The mark of a role, decorative: the word stands beside it."""
    drawn = effect_glyph(effect, 8, 8)
    return Markup('<svg class="mark" viewBox="0 0 16 16" aria-hidden="true">{}</svg>').format(drawn)


def _surprise(token: Token) -> str:
    """CSS class of a token by how likely its author found it."""
    if token.logprob is None or not math.isfinite(token.logprob):
        return "tok"
    likely = math.exp(min(token.logprob, 0.0))
    return "tok" if likely >= SURE else "tok s1" if likely >= UNSURE else "tok s2"


def _likelihood(token: Token) -> str:
    """The log-prob of a token in words, or an empty string."""
    if token.logprob is None or not math.isfinite(token.logprob):
        return ""
    return f"log-prob {token.logprob:.2f}, probability {math.exp(min(token.logprob, 0.0)):.2f}"


def _reward(reward: float | None) -> str:
    known = reward is not None and math.isfinite(reward)
    return f"{reward:.2f}" if known else "no reward"


_FILTERS: dict[str, Filter] = {
    "duration": duration,
    "compact": compact,
    "count": lambda n: f"{n:,}",
    "glyph": _glyph,
    "surprise": _surprise,
    "likelihood": _likelihood,
    "reward": _reward,
}
