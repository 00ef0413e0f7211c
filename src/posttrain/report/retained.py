"""What later stages left of what each task set had: transfer, forgetting and hand-off.

base ─▶ … ─▶ own stage ─▶ … ─▶ last
 └─forward─▶┘   └─ backward, hand-off ─▶┘       forgetting: the best of them minus the last
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from posttrain.measure.attribution import MeasuredRole, PolicyChange
from posttrain.measure.measurement import Measurement
from posttrain.measure.passk import pass_interval
from posttrain.measure.reading import Reading
from posttrain.measure.retention import handoff, transfer
from posttrain.measure.spec import Measure
from posttrain.report.view import UNMEASURED, Estimate, RetentionView

TAUGHT = (MeasuredRole.EXPANSION, MeasuredRole.RESHAPING)


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
) -> tuple[RetentionView, ...]:
    """One entry per task set; none with fewer than two stages, where nothing is earlier."""
    if len(chain) < 3:
        return ()
    own = own_stages(chain, changes)
    found = {(r.task, r.name): r for r in transfer(chain, own, confidence=spec.confidence)}
    by_name = {m.policy: m for m in chain}
    starts = {c.after: c.before for c in changes}
    views = []
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
        views.append(
            RetentionView(
                task=task,
                learned=learned.policy,
                forward=_estimate(found.get((task, "forward_transfer"))),
                backward=_estimate(found.get((task, "backward_transfer"))),
                forgetting=_estimate(found.get((task, "forgetting"))),
                handoff=_estimate(handed),
            )
        )
    return tuple(views)


def _estimate(reading: Reading | None) -> Estimate:
    if reading is None:
        return UNMEASURED
    return Estimate(value=reading.value, low=reading.low, high=reading.high)
