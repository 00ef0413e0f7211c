"""The page of silent failures, from what the runs left in the results files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from results_file import RESULTS, ResultsFile

from silent_failures.clean import Clean
from silent_failures.environment import ENVIRONMENT
from silent_failures.faults import Fault
from silent_failures.inputs import INPUTS
from silent_failures.mutants import MUTANTS
from silent_failures.mutation import Mutated
from silent_failures.score import NOTICED, Judged, Verdict
from silent_failures.world import ROOT

PAGE = ROOT / "docs/silent-failures.md"
SIDES = {"posttrain": "posttrain", "trl": "TRL 1.16"}
FAULTS = (*INPUTS, *ENVIRONMENT)

VERDICTS = ResultsFile(RESULTS / "silent_failures.jsonl", Judged, lambda r: (r.side, r.id))
FATES = ResultsFile(RESULTS / "silent_mutants.jsonl", Mutated, lambda r: r.id)
CLEAN = ResultsFile(RESULTS / "silent_clean.jsonl", Clean, lambda r: (r.name, r.seed))

TABLE = """
| verdict | meaning |
|---|---|
| refused | an error before the first step; after a stop, before the next one |
| done right | nothing went wrong: the result is the twin's, or what was meant |
| alarmed | within 20 steps: an error, an alarm, or a line that names it and that the twin lacks |
| final score | only a measurement at the end is worse, and does not say why |
| never | nothing shows |
| wrongly refused | the inputs are right, and were turned away |
"""

OPENING = (
    "# Silent failures",
    "<!-- Written by benchmarks/silent_failures: run it instead of editing. -->",
    "Known failures of the field, planted one by one into runs of a tiny trained model, each with "
    "a clean twin: what is refused, what raises an alarm, and what nobody says? The list was "
    "written before anything that detects them. Most follow public reports; the others were found "
    "by trying.",
    TABLE,
    "Figures that a run prints at every step are no alarm, on either side: somebody would have to "
    "know which one to look at. TRL's side is its own trainers on the same folder, configured as "
    "`trl sft --config` does, with the choices that its documents advise.",
)


def write() -> Path:
    """Write the page."""
    verdicts = {(r.side, r.id): r for r in VERDICTS.rows().values()}
    blocks = [*OPENING, _shares(verdicts), _clean(), _mutants()]
    for kind, title in (("input", "Inputs"), ("environment", "Environment")):
        faults = [f for f in FAULTS if f.kind == kind]
        blocks.append(f"## {title}\n\n{_table(faults, verdicts)}")
    blocks.append(_left_out(verdicts))
    blocks.append("## Mutants of our own code\n\n" + _fates())
    PAGE.write_text("\n\n".join(b.strip() for b in blocks) + "\n", encoding="utf-8")
    return PAGE


def _shares(verdicts: Mapping[tuple[str, str], Judged]) -> str:
    lines = ["## In short", "", "| | " + " | ".join(SIDES.values()) + " |"]
    lines.append("|---|" + "---|" * len(SIDES))
    rows = {side: [r for (s, _), r in verdicts.items() if s == side] for side in SIDES}
    scored = {side: [r for r in rows[side] if r.verdict in _scored()] for side in SIDES}
    for verdict in _scored():
        counts = (sum(r.verdict is verdict for r in scored[side]) for side in SIDES)
        lines.append(f"| {verdict} | " + " | ".join(map(str, counts)) + " |")
    shares = (_share([r.verdict in NOTICED for r in scored[side]]) for side in SIDES)
    lines.append("| **refused, right or alarmed** | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def _scored() -> list[Verdict]:
    return [v for v in Verdict if v not in (Verdict.BROKEN, Verdict.LEFT_OUT)]


def _share(flags: Sequence[bool]) -> str:
    return f"{sum(flags)} of {len(flags)} ({sum(flags) / len(flags):.0%})" if flags else "not run"


def _clean() -> str:
    runs = list(CLEAN.rows().values())
    false = [r for r in runs if r.is_false]
    words = f"False alarms of posttrain in clean runs: {_share([r.is_false for r in runs])}."
    said = "".join(
        f"\n* {r.name}, seed {r.seed}: {'; '.join(r.alarms) or r.failure}" for r in false
    )
    return words + said


def _mutants() -> str:
    fates = [r for r in FATES.rows().values() if r.id in {m.id for m in MUTANTS}]
    return (
        f"Mutants of posttrain's own code killed by its tests: {_share([r.killed for r in fates])}."
    )


def _table(faults: Iterable[Fault], verdicts: Mapping[tuple[str, str], Judged]) -> str:
    lines = ["| fault | what happened | reports | posttrain | TRL 1.16 |", "|---|---|---|---|---|"]
    for fault in faults:
        found = (_cell(verdicts.get((side, fault.id))) for side in SIDES)
        reports = ", ".join(fault.reports) or "–"
        lines.append(f"| `{fault.id}` | {fault.did} | {reports} | {' | '.join(found)} |")
    return "\n".join(lines)


def _cell(row: Judged | None) -> str:
    return "not run" if row is None else str(row.verdict)


def _left_out(verdicts: Mapping[tuple[str, str], Judged]) -> str:
    rows = [r for r in verdicts.values() if r.verdict is Verdict.LEFT_OUT]
    listed = "\n".join(f"* `{r.id}`, {SIDES[r.side]}: {r.words}" for r in rows)
    return f"## What does not apply\n\n{listed or 'Everything that was run applies.'}"


def _fates() -> str:
    fates = FATES.rows()
    lines = ["| mutant | what is broken | reports | killed by |", "|---|---|---|---|"]
    for mutant in MUTANTS:
        row = fates.get(mutant.id)
        by = "not run" if row is None else f"`{row.by}`" if row.killed else "**nothing**"
        lines.append(
            f"| `{mutant.id}` | {mutant.broke} | {', '.join(mutant.reports) or '–'} | {by} |"
        )
    return "\n".join(lines)
