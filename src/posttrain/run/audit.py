"""Every file of a run folder against its ledger.

records ──RecordedFiles──▶ entry per file ──sizes, digests──▶ faults: changed, missing, unrecorded
"""

from __future__ import annotations

from posttrain.core.proofs import Proof, Subject
from posttrain.run.folder import RunFolder
from posttrain.run.ledger import head_file
from posttrain.run.recorded import Fault, entry_at


def audit(run: RunFolder, *, weights: bool = True, shards: bool = True) -> list[Fault]:
    """Files that are changed or missing, and files that no row names.

    Args:
        run: the run folder.
        weights: read the weights of models and checkpoints too; else only their sizes are compared.
        shards: the same for shards.

    Raises:
        LedgerBroken: the ledger is missing, its chain is broken, or it was cut at its end.
    """
    known = run.recorded()
    bulk = {
        *(f for s in run.stage_folders() for f in (s.model, s.checkpoint) if not weights),
        *(s.shards for s in run.stage_folders() if not shards),
    }
    faults = []
    for name in known.names:
        small = name.endswith(".json")
        content = small or not bulk & set((run.path / name).parents)
        if (fault := known.fault(name, content=content)) is not None:
            faults.append(fault)
    for path in run.unrecorded(known):
        name = path.relative_to(run.path).as_posix()
        faults.append(Fault(path=name, words="is not in the ledger", found=entry_at(path)))
    head = head_file(run.ledger_file)
    if known.entries and not head.is_file():
        words = "is missing: whether rows were cut from the ledger's end cannot be told"
        faults.append(Fault(path=head.name, words=words))
    return faults


def agreed(run: RunFolder) -> tuple[Proof, ...]:
    """The proof of an audit without faults; none for a folder without files yet."""
    files = len(run.recorded().entries)
    words = f"{files} files are what the ledger records"
    return (Proof(subject=Subject.DIGESTS, of="its files", words=words),) if files else ()
