"""The pages that commands write: a run's report, with a treatment's rounds, and diagnoses."""

from __future__ import annotations

from pathlib import Path

from posttrain.diagnosis.card import Diagnosis
from posttrain.diagnosis.page import render_card
from posttrain.diagnosis.section import treatment_section
from posttrain.report.load import write_report
from posttrain.run.folder import RunFolder


def write_run_report(out: Path) -> Path:
    """Write ``out/report.html``, with the rounds of a treatment if there was one; its path."""
    return write_report(out, sections=[treatment_section])


def write_cards(out: Path) -> list[Path]:
    """Write the page of every diagnosis of a treatment, beside its JSON file; their paths."""
    folder = RunFolder(out)
    pages = []
    for number in folder.diagnoses():
        found = Diagnosis.from_json(folder.diagnosis(number))
        pages.append(folder.write_diagnosis_page(number, render_card(found)))
    return pages
