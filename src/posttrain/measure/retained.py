"""What later stages left of what each task set had: transfer, forgetting and hand-off.

base ─▶ … ─▶ own stage ─▶ … ─▶ last
 └─forward─▶┘   └─ backward, hand-off ─▶┘       forgetting: the best of them minus the last
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.measure.attribution import MeasuredRole, PolicyChange
from posttrain.measure.measurement import Measurement
from posttrain.measure.passk import pass_interval
from posttrain.measure.reading import Reading
from posttrain.measure.retention import handoff, transfer
from posttrain.measure.spec import Measure

TAUGHT = (MeasuredRole.EXPANSION, MeasuredRole.RESHAPING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """What later stages left of what a task set had after the stage that taught it.

    ``learned`` names that stage, or the base. A reading is None where no stage came before, or
    after, that it could be taken over.
    """

    task: str
    learned: str
    forward: Reading | None  # pass@1 before its own stage minus that of the base
    backward: Reading | None  # pass@1 at the end minus just after its own stage
    forgetting: Reading | None  # best earlier pass@1 minus the last
    handoff: Reading | None  # of the prompts its stage brought into reach, those still there


def own_stages(chain: Sequence[Measurement], changes: Sequence[PolicyChange]) -> Mapping[str, int]:
    """By task set, the place in the chain of the first policy that clearly gained on it.

    0, the base, for a task set on which no stage got clearly above the base: bringing back what
    the base could do is no gain. It is read off the measurements, since a stage on demonstrations
    does not say which task sets they belong to.

    Args:
        chain: the base, then the policies of the stages, in order.
        changes: from each stage's input to its result.
    """
    places = {m.policy: i for i, m in enumerate(chain)}
    own = {t.taskset: 0 for t in chain[0].tasks}
    base = {t.taskset: pass_interval(t, 1).high for t in chain[0].tasks}
    for change in sorted(changes, key=lambda c: places.get(c.after, 0)):
        for task in change.tasks:
            gained = task.dominant in TAUGHT and task.after.low > base[task.task]
            if gained and not own[task.task]:
                own[task.task] = places.get(change.after, 0)
    return own


def retained(
    chain: Sequence[Measurement], changes: Sequence[PolicyChange], *, spec: Measure
) -> tuple[Retained, ...]:
    """One entry per task set; none with fewer than two stages, where nothing is earlier."""
    if len(chain) < 3:
        return ()
    own = own_stages(chain, changes)
    found = {(r.task, r.name): r for r in transfer(chain, own, confidence=spec.confidence)}
    by_name = {m.policy: m for m in chain}
    starts = {c.after: c.before for c in changes}
    rows = []
    for task, place in own.items():
        learned = chain[place]
        handed = None
        if 0 < place < len(chain) - 1:
            handed = handoff(
                by_name[starts[learned.policy]].task(task),
                learned.task(task),
                chain[-1].task(task),
                epsilon=spec.threshold,
                confidence=spec.confidence,
            )
        rows.append(
            Retained(
                task=task,
                learned=learned.policy,
                forward=found.get((task, "forward_transfer")),
                backward=found.get((task, "backward_transfer")),
                forgetting=found.get((task, "forgetting")),
                handoff=handed,
            )
        )
    return tuple(rows)
