"""What was measured, as data: written after every entry, so that a long run can be cut short."""

from __future__ import annotations

from pathlib import Path

import msgspec

from against_trl.plan import Load, Ours, Theirs


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where and with what."""

    processor: str
    cores: int
    memory: int
    threads: int
    system: str
    versions: dict[str, str]


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """What else happened while an entry was measured.

    ``others`` is the share of all cores' time that processes outside the benchmark took; ``load``
    is the one-minute load average, the benchmark's own threads included.
    """

    when: str
    commit: str
    load: float
    others: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One side's steps in order, the warm-up left out; memory in bytes."""

    seconds: list[float]
    cpu: list[float]
    units: list[float]  # tokens, pairs or steps that each step was worth
    parts: dict[str, list[float]]
    imported: int
    ready: int
    peak: int

    @property
    def costs(self) -> list[float]:
        """Seconds per unit."""
        return [s / u for s, u in zip(self.seconds, self.units, strict=True)]

    @property
    def cpu_costs(self) -> list[float]:
        """Processor seconds per unit, all threads together."""
        return [s / u for s, u in zip(self.cpu, self.units, strict=True)]


class Pairs(msgspec.Struct, frozen=True, kw_only=True):
    """Both sides' steps, taken in turn."""

    work: str
    size: str
    load: Load
    settings: Theirs
    own: Ours
    operations: float  # that a unit needs
    ours: Measured
    trl: Measured
    conditions: Conditions


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """Operations per second of matrix products with a model's shapes: the best of its repeats."""

    size: str
    per_second: float
    best_shape: float
    conditions: Conditions


class Exact(msgspec.Struct, frozen=True, kw_only=True):
    """Both libraries on the same batch of token ids."""

    case: str
    size: str
    loss_ours: float
    loss_trl: float
    loss_gap: float  # relative
    gradient_gap: float  # |difference| / |TRL's|, over all weights


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """Our GRPO step at one place of a scaling series."""

    series: str
    value: int
    size: str
    load: Load
    seconds: list[float]
    cpu: list[float]
    draw: list[float]
    operations: int
    conditions: Conditions


class Results(msgspec.Struct, kw_only=True):
    """Everything, by key. A new measurement of the same thing takes the place of the old one."""

    machine: Machine
    pairs: dict[str, Pairs] = {}
    rates: dict[str, Rate] = {}
    exact: dict[str, Exact] = {}
    points: dict[str, Point] = {}


def load_results(path: Path, *, machine: Machine) -> Results:
    """Earlier results of the same machine and versions, to go on from; else an empty set.

    Results that an older form of the benchmark wrote are not gone on from either.
    """
    if path.is_file():
        try:
            found = msgspec.json.decode(path.read_bytes(), type=Results)
        except msgspec.ValidationError:
            return Results(machine=machine)
        if found.machine == machine:
            return found
    return Results(machine=machine)


def save_results(path: Path, results: Results) -> None:
    """Write everything, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    partial.replace(path)
