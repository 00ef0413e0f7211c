"""The table of families says what a load says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from families import all_families, outcome, page

PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def rows() -> dict[str, tuple[str, str]]:
    """Verdict and words of each family on the page."""
    found, verdict = {}, ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            verdict = line[3:].lower()
        elif row := re.fullmatch(r"\| (\S+) \| (.*) \|", line):
            found[row[1]] = verdict, row[2]
    found.pop("family", None)
    return found


def test_every_family_has_a_row_and_none_is_wrong():
    assert sorted(rows()) == all_families()
    assert not [name for name, (verdict, _) in rows().items() if verdict == "wrong"]


@pytest.mark.parametrize(
    ("family", "verdict"),
    [
        ("llama", "exact"),
        ("deepseek_v3", "exact"),
        ("diffllama", "exact"),
        ("gpt2", "exact"),
        ("gemma3_text", "exact"),
        ("gptj", "refused"),
        ("gpt_oss", "refused"),
        ("mamba", "refused"),
        ("qwen3_next", "refused"),
    ],
)
def test_a_family_is_what_the_page_says(family, verdict, tmp_path):
    found = outcome(family, tmp_path / family)
    assert (found.verdict, rows()[family][0]) == (verdict, verdict), found.words
    if verdict == "refused":
        assert found.words == rows()[family][1]
    assert f"| {family} |" in page([found])
