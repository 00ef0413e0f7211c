"""Every file of a run folder against its ledger.

records ──Evidence──▶ entry per file ──sizes, digests──▶ faults: changed, missing, unrecorded
"""

from __future__ import annotations

from posttrain.run.evidence import Fault, entry_at
from posttrain.run.folder import RunFolder
from posttrain.run.ledger import head_file


def audit(run: RunFolder, *, weights: bool = True, shards: bool = True) -> list[Fault]:
    """Files that are changed or missing, and files that no row names.

    Args:
        run: the run folder.
        weights: read the weights of models and checkpoints too; else only their sizes are compared.
        shards: the same for shards.

    Raises:
        LedgerBroken: the ledger is missing, its chain is broken, or it was cut at its end.
    """
    evidence = run.evidence()
    bulk = {
        *(f for s in run.stage_folders() for f in (s.model, s.checkpoint) if not weights),
        *(s.shards for s in run.stage_folders() if not shards),
    }
    faults = []
    for name in evidence.names:
        small = name.endswith(".json")
        content = small or not bulk & set((run.path / name).parents)
        if (fault := evidence.fault(name, content=content)) is not None:
            faults.append(fault)
    for path in run.unrecorded(evidence):
        name = path.relative_to(run.path).as_posix()
        faults.append(Fault(path=name, words="is not in the ledger", found=entry_at(path)))
    head = head_file(run.ledger_file)
    if evidence.entries and not head.is_file():
        words = "is missing: whether rows were cut from the ledger's end cannot be told"
        faults.append(Fault(path=head.name, words=words))
    return faults
