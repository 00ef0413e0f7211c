"""Sections of docs/lab-log.md that a benchmark writes: put in place of the old one, or on top."""

from __future__ import annotations

import platform
from pathlib import Path

from posttrain.core.files import write_atomic

LOG = Path(__file__).parents[1] / "docs/lab-log.md"


def put(page: str, section: str) -> str:
    """The page with this section (it starts with its ``## `` heading) in place of the one of the
    same heading, or before the first."""
    head, *parts = page.split("\n## ")
    mine = section.removeprefix("## ").rstrip("\n") + "\n"
    titles = [p.split("\n", 1)[0] for p in parts]
    title = mine.split("\n", 1)[0]
    if title in titles:
        parts[titles.index(title)] = mine
    else:
        parts.insert(0, mine)
    return "\n## ".join([head, *parts])


def write(section: str) -> None:
    """Put a section into the lab log."""
    write_atomic(LOG, put(LOG.read_text("utf-8"), section))


def processor() -> str:
    """The processor's name, where the system tells it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text("utf-8").splitlines() if facts.is_file() else []
    named = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
