"""The ledger rows of a run. Each is appended exactly once, also after a crash.

A process that records nothing writes no row: the ``run`` row comes before its next one.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import final

import msgspec

from posttrain.core import config
from posttrain.core.files import hash_file
from posttrain.core.proofs import Proof
from posttrain.measure.gates import GateDecision
from posttrain.measure.measurement import Measurement
from posttrain.measure.passk import pass_interval
from posttrain.protocols import DataFile
from posttrain.recipe import Recipe
from posttrain.run.ledger import Ledger, RecordKind
from posttrain.run.plan import PlannedStage
from posttrain.run.resume import versions


@final
class Records:
    """Writes the rows of one process, apart from those of optimiser steps (see journal.py)."""

    def __init__(self, ledger: Ledger, recipe: Recipe) -> None:
        self._ledger, self._recipe = ledger, recipe
        body = {
            "recipe": config.digest(recipe),
            "name": recipe.name,
            "seed": recipe.seed,
            "python": platform.python_version(),
            "libraries": {"posttrain": version("posttrain"), **versions()},
            "machine": f"{platform.system()} {platform.machine()}",
            "command": sys.argv[:1],
        }
        ledger.introduce(RecordKind.RUN, body)

    def model(self, name: str, *, digest: str | None, role: str) -> None:
        """A model from outside the run: the base, or a ``path:`` policy."""
        self._once(RecordKind.MODEL, {"digest": digest, "name": name, "role": role})

    def dataset(self, file: DataFile) -> None:
        """A data file, identified by its content."""
        self._once(
            RecordKind.SOURCE,
            {
                "name": file.name,
                "category": file.producer.kind,
                "digest": file.digest,
                "licence": file.licence,
                "rows": file.rows,
                "skipped": file.skipped,
                **({"notes": list(file.notes)} if file.notes else {}),
            },
        )

    def tasks(self, name: str, identity: Mapping[str, object]) -> None:
        """A task set: its options, with the content of its files and of its reward's code."""
        self._once(RecordKind.SOURCE, {"name": name, "category": "tasks", "content": identity})

    def checkpoint(self, planned: PlannedStage, *, digest: str, path: str) -> None:
        """The exported model of a stage."""
        self._once(
            RecordKind.CHECKPOINT,
            {
                "digest": digest,
                "path": path,
                "parents": [planned.inputs["init"]],
                "name": planned.spec.name,
                "identity": planned.identity,
            },
        )

    def measured(self, result: Measurement, path: Path) -> None:
        """pass@1 of a policy, one row per task set."""
        spec, file = self._recipe.measure, hash_file(path)
        for task in result.tasks:
            first = pass_interval(task, 1, confidence=spec.confidence)
            self._once(
                RecordKind.EVAL,
                {
                    "checkpoint": result.digest,
                    "suite": task.taskset,
                    "metric": "pass@1",
                    "value": first.value,
                    "ci": [first.low, first.high],
                    "confidence": spec.confidence,
                    "prompts": len(task.prompts),
                    "n": task.num_samples,
                    "seed": spec.seed,
                    "file": file,
                },
            )

    def proof(self, proof: Proof) -> None:
        """Something is what it claims to be. The same words again are no news."""
        about = {"subject": proof.subject, "of": proof.of}
        earlier = [
            r.body["words"]
            for r in self._ledger.records
            if r.kind is RecordKind.PROOF and about.items() <= r.body.items()
        ]
        if earlier[-1:] != [proof.words]:
            body = {**about, "words": proof.words, "figures": dict(proof.figures)}
            self._ledger.append(RecordKind.PROOF, body)

    def gate(self, stage: str, decision: GateDecision) -> None:
        """A gate of a stage, the measured value, and the decision."""
        seen = decision.interval
        self._once(
            RecordKind.GATE,
            {
                "stage": stage,
                "gate": msgspec.to_builtins(decision.gate),
                "value": _finite(seen.value),
                "ci": [_finite(seen.low), _finite(seen.high)],
                "confidence": seen.confidence,
                "verdict": decision.verdict,
                "passed": decision.passed,
                "words": decision.words,
            },
        )

    def _once(self, kind: RecordKind, body: Mapping[str, object]) -> None:
        same = msgspec.json.decode(msgspec.json.encode(body))
        if not any(r.kind is kind and r.body == same for r in self._ledger.records):
            self._ledger.append(kind, body)


def _finite(value: float) -> float | None:
    """The number; None for infinity or NaN, such as a group size that does not exist."""
    return value if math.isfinite(value) else None
