"""The pages that commands write: where a run's report meets what a treatment has to say."""

from __future__ import annotations

from pathlib import Path

from posttrain.core.files import write_atomic
from posttrain.diagnosis.card import Diagnosis
from posttrain.diagnosis.page import render_card
from posttrain.diagnosis.section import treatment_section
from posttrain.report.load import write_report


def write_run_report(out: Path) -> Path:
    """Write ``out/report.html``, with a treatment's rounds where there was one; its path."""
    return write_report(out, sections=[treatment_section])


def write_cards(folder: Path) -> list[Path]:
    """Write the page of every diagnosis of a treatment, beside its numbers; their paths."""
    pages = []
    for found in sorted(folder.glob("*.json"), key=lambda path: int(path.stem)):
        pages.append(found.with_suffix(".html"))
        write_atomic(pages[-1], render_card(Diagnosis.from_json(found.read_text(encoding="utf-8"))))
    return pages
