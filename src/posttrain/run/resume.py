"""Whether a run may resume from its folder, and on whose word.

    folder ──audit──▶ faults ──accept files──▶ entered in the ledger, or refused
    plan, stage.json ──differences──▶ parts by name ──accept NAME──▶ a new identity, or refused

A stage that started is never silently another one. A change is refused with the names of the parts
that changed; each can be accepted by its name. The stage then goes on from its last checkpoint
under the identity that it has now, and the ledger holds what was, what is, and at which step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec

from posttrain.core import config
from posttrain.core.errors import ConfigError, DataError, ResumeRefused, nearest
from posttrain.core.events import Note, Observer, Proved
from posttrain.measure.measurement import Measurement
from posttrain.models.files import model_digest
from posttrain.recipe import Recipe
from posttrain.run.audit import agreed, audit
from posttrain.run.folder import RunFolder, RunWriter
from posttrain.run.ledger import RecordKind
from posttrain.run.plan import Plan, PlannedStage, all_plans, model_path
from posttrain.run.recorded import changed
from posttrain.run.stage_folder import StageFolder, StageRecord, StageWriter

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")
"""What a stage's numbers come from. Our own code counts by ``SEMANTICS``, in its identity."""

NAMES: Mapping[str, str] = {
    "reward": "how completions are scored",
    "tasks": "prompts and answers of a task set",
    "data": "files of demonstrations, preferences or labels",
    "model": "the model it starts from, or one it refers to",
    "code": "code of extensions",
    "method": "the method and its options",
    "budget": "how long it trains",
    "optimizer": "learning rate, schedule and their like",
    "batch": "how much goes into a step",
    "seed": "the recipe's seed",
    "dtype": "the number type",
    "versions": "versions of libraries, or of what posttrain computes",
    "files": "files of the run folder, as they are now",
}
"""The changes that can be accepted, by name."""

_KEYS = {"init": "model", "references": "model", "extensions": "code", "semantics": "versions",
         "composition": "method", "groups_per_step": "batch", "updates_per_draw": "batch",
         "micro_batch_tokens": "batch", "activation_checkpointing": "batch",
         "max_age": "batch"}  # fmt: skip
_DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{56}\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Consent:
    """What the user said about resuming: changes accepted by name, and stages to start again.

    Example:
        >>> Consent.to(accept=["rewards"])
        Traceback (most recent call last):
        posttrain.core.errors.ConfigError: no change is called 'rewards'
          to mend:  did you mean 'reward'?
    """

    accept: frozenset[str] = frozenset()
    restart: tuple[str, ...] = ()

    @classmethod
    def to(cls, *, accept: Iterable[str] = (), restart: Iterable[str] = ()) -> Consent:
        """Checked: every accepted name must be one of :data:`NAMES`."""
        names = frozenset(accept)
        for name in sorted(names - NAMES.keys()):
            raise ConfigError(f"no change is called {name!r}", fix=nearest(name, NAMES))
        return cls(accept=names, restart=tuple(restart))


NOTHING = Consent()
"""No change is accepted."""


def earlier_measurement(
    folder: RunFolder, policy: str, *, digest: str, protocol: str
) -> Measurement | None:
    """An earlier measurement of the same weights with the same protocol, or None.

    A damaged file gives None: measuring again gives the same result.
    """
    if policy not in folder.measured():
        return None
    try:
        known = folder.measurement(policy, checked=False)
    except DataError:
        return None
    return known if (known.digest, known.protocol) == (digest, protocol) else None


def check_folder(folder: RunWriter, consent: Consent, *, observe: Observer) -> None:
    """Compare the folder with its ledger before anything in it is relied on.

    Weights and shards are compared by their sizes here, and by their content before they are used.

    Raises:
        FileChanged: a file is not what the ledger records, and that was not accepted.
        ConfigError: a stage to start again has no folder.
    """
    if folder.ledger.torn is not None:
        where = folder.ledger.torn.name
        observe(Note(text=f"the ledger's last line was unfinished: it is kept in {where}"))
    for name in consent.restart:
        moved = [to for stage in _builds_on(folder, name) for to in folder.set_aside(stage)]
        if not moved:
            known = {r.name for s in folder.stages() if (r := s.record()) is not None}
            raise ConfigError(f"{folder.path} has no stage {name!r}", fix=nearest(name, known))
        for to in moved:
            observe(Note(text=f"set aside: {to}"))
    accepts = "files" in consent.accept
    faults = audit(folder, weights=accepts, shards=accepts)
    if faults and not accepts:
        raise changed(folder.path, faults)
    for proof in () if faults else agreed(folder):
        observe(Proved(proof=proof))
    if faults:
        folder.accept_files(faults)
        for fault in faults:
            observe(Note(text=f"accepted as it is now: {fault}"))


def _builds_on(folder: RunFolder, name: str) -> list[str]:
    """A stage and the started stages that descend from it, the last ones first."""
    records = [r for s in folder.stage_folders() if (r := s.whole_record()) is not None]
    found = {name}
    while True:
        ids = {r.identity for r in records if r.name in found}
        more = {r.name for r in records if ids & set(_parents(r))} - found
        if not more:
            return sorted(found)
        found |= more


def _parents(record: StageRecord) -> list[str]:
    references = record.inputs.get("references")
    others = references.values() if isinstance(references, Mapping) else ()
    return [str(v) for v in (record.inputs.get("init"), *others)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """A started stage that is another one now."""

    planned: PlannedStage
    stage: StageFolder
    record: StageRecord
    lines: Mapping[str, list[str]]  # what differs, by the name of the part


def accept_changes(plan: Plan, folder: RunWriter, *, consent: Consent, observe: Observer) -> bool:
    """Check that every started stage is what it was, or that its changes were accepted.

    A stage without a checkpoint has not started: it has nothing to lose. A finished stage does
    not depend on the versions of libraries any more.

    Returns:
        Whether changes were accepted: their stages have the identities of the plan now.

    Raises:
        ResumeRefused: a started stage changed; the message lists what, and the names to accept.
    """
    found = _changes(plan, folder)
    asked = [c for c in found if not c.lines.keys() <= consent.accept | _given(c)]
    if asked:
        raise _refused(folder, asked)
    for change in found:
        _accept(folder, change)
        names = ", ".join(sorted(change.lines)) or "what it builds on"
        observe(Note(text=f"stage {change.record.name} goes on; accepted: {names}"))
    return bool(found)


def outside_changes(recipe: Recipe, folder: RunFolder, *, root: Path) -> list[str]:
    """What the started stages were made of and is another now: recipe, data, code, models.

    Args:
        recipe: as it is now.
        folder: only read.
        root: folder that the recipe's paths are relative to.

    Raises:
        PosttrainError: a file that the recipe names is missing.
    """
    lines = dict[str, None]()
    for plan in all_plans(recipe, root=root, base=_base_now(recipe, folder, root)):
        for change in _changes(plan, folder):
            for name in sorted(change.lines.keys() - {"versions"}):
                shown = (f"stage {change.record.name}: {_shortened(x)}" for x in change.lines[name])
                lines.update(dict.fromkeys(shown))
    return list(lines)


def _base_now(recipe: Recipe, folder: RunFolder, root: Path) -> str:
    """The digest of the base's folder; for a hub id, which is read by its revision, the recorded
    one."""
    path = Path(model_path(recipe.model, root)).expanduser()
    if path.is_dir():
        return model_digest(path)
    known = [r.body["digest"] for r in folder.records() if r.kind is RecordKind.MODEL]
    return str(known[0]) if known else recipe.model


def unstarted(plan: Plan, folder: RunWriter) -> list[StageWriter]:
    """Folders of stages that changed before they started; they can be removed."""
    return [
        stage
        for planned in plan.stages
        for stage in folder.stage_writers(planned.spec.name)
        if (record := stage.record()) is not None
        and record.identity != planned.identity
        and not stage.has_started()
    ]


def versions() -> dict[str, str]:
    """The libraries that a stage's numbers come from, with their versions here."""
    return {name: version(name) for name in LIBRARIES}


def _given(change: _Change) -> frozenset[str]:
    """What needs no word of the user."""
    return frozenset({"versions"} if change.stage.result_file.exists() else ())


def _changes(plan: Plan, folder: RunFolder) -> list[_Change]:
    """Started stages that differ from the plan. A stage that only builds on another one that
    differs has no lines of its own."""
    found = list[_Change]()
    became = dict[str, str]()  # identities that earlier stages had, and would have now
    for planned in plan.stages:
        for stage in folder.stages(planned.spec.name):
            record = stage.record()
            if record is None or not stage.holds_work:
                continue
            lines = _lines(planned, record, became)
            if not stage.result_file.exists() and record.versions:
                differ = config.differences(record.versions, versions(), "versions")
                lines.setdefault("versions", []).extend(differ)
            lines = {name: some for name, some in lines.items() if some}
            if lines or record.identity != planned.identity:
                change = _Change(planned=planned, stage=stage, record=record, lines=lines)
                found.append(change)
                became[record.identity] = planned.identity
    return found


def _lines(
    planned: PlannedStage, record: StageRecord, became: Mapping[str, str]
) -> dict[str, list[str]]:
    """What differs from the started stage, by the name of the part."""
    now = msgspec.json.decode(msgspec.json.encode(planned.inputs))
    by_name = dict[str, list[str]]()
    for line in config.differences(record.inputs, now):
        path, _, values = line.partition(": ")
        old, _, new = values.partition(" -> ")
        if became.get(old) != new:
            by_name.setdefault(_name_of(path, line), []).append(line)
    return by_name


def _name_of(path: str, line: str) -> str:
    """The name under which a difference is accepted."""
    top, _, rest = path.partition(".")
    if top == "tasks":
        return "reward" if ".reward" in f".{rest}" else "tasks"
    if top == "composition" and len(_DIGEST.findall(line)) == 2:
        return "data"
    return _KEYS.get(top, top)


def _refused(folder: RunWriter, asked: Sequence[_Change]) -> ResumeRefused:
    first = asked[0]
    lines = [_shortened(line) for name in sorted(first.lines) for line in first.lines[name]]
    names = sorted({name for change in asked for name in change.lines})
    accepted = " ".join(f"--accept {name}" for name in names if name in NAMES)
    also = "" if len(asked) == 1 else f" (and {', '.join(c.record.name for c in asked[1:])})"
    ways = ["undo the change", "choose another --out"]
    if all(name in NAMES for name in names):
        ways.insert(1, f"go on from its last checkpoint all the same: run {accepted}")
    ways.append(f"set the stage{also} aside and start it again: run --restart {first.record.name}")
    return ResumeRefused(
        f"stage {first.record.name} has started in {folder.path} and would now be another: "
        + "; ".join(lines[:6]),
        expected="the recipe, data and libraries that the stage started with",
        fix="; or ".join(ways),
    )


def _shortened(line: str) -> str:
    short, digests = _DIGEST.subn(r"\1…", line)
    return f"{short} (the content changed)" if digests == 2 else short


def _accept(folder: RunWriter, change: _Change) -> None:
    """Give the stage the identity that it has now, and say so in the ledger."""
    planned, record = change.planned, change.record
    progress = change.stage.progress()
    folder.ledger.append(
        RecordKind.ACCEPT,
        {
            "name": record.name,
            "parts": sorted(change.lines),
            "old": record.identity,
            "new": planned.identity,
            "changes": [line for lines in change.lines.values() for line in lines],
            "step": progress.step if progress else 0,
        },
    )
    done = change.stage.result_file.exists()
    StageWriter(change.stage.path, folder.ledger).write_record(
        StageRecord(
            name=record.name,
            identity=planned.identity,
            init=planned.init,
            inputs=planned.inputs,
            versions=record.versions if done else versions(),
        )
    )
