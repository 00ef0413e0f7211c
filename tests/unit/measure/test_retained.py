"""What later stages left of what was gained."""

import numpy as np
from measurements import measured, policy

from posttrain.cli.tables import retention_table
from posttrain.measure.attribution import attribute_changes
from posttrain.measure.retained import own_stages, retained
from posttrain.measure.spec import Measure

SPEC = Measure(samples=64)


def stages(**rates: tuple[float, ...]):
    """Twenty prompts a task set, each solved at the given rate by each policy of a chain."""
    return [
        policy(
            *(
                measured(np.random.default_rng([i, j]).random((20, 64)) < row[i], task)
                for j, (task, row) in enumerate(rates.items())
            ),
            name=f"p{i}",
        )
        for i in range(3)
    ]


def test_bringing_back_what_the_base_could_do_is_no_gain():
    chain = stages(restored=(0.9, 0.2, 0.9))
    changes = [
        attribute_changes(a, b, epsilon=SPEC.threshold)
        for a, b in ((chain[0], chain[1]), chain[1:])
    ]
    assert own_stages(chain, changes) == {"restored": 0}


def test_what_later_stages_left():
    chain = stages(learned=(0.0, 0.9, 0.5), known=(0.9, 0.9, 0.9), late=(0.0, 0.0, 0.8))
    changes = [
        attribute_changes(a, b, epsilon=SPEC.threshold)
        for a, b in ((chain[0], chain[1]), chain[1:])
    ]
    assert own_stages(chain, changes) == {"learned": 1, "known": 0, "late": 2}
    learned, known, late = retained(chain, changes, spec=SPEC)
    assert learned.backward.high < -0.3
    assert learned.forgetting.low > 0.3
    assert learned.handoff.value == 1  # weaker, and still in reach everywhere
    assert known.backward.low < 0 < known.backward.high
    assert known.handoff is None
    assert (late.forward.value, late.backward) == (0, None)  # nothing came after it
    assert not retained(chain[:2], changes[:1], spec=SPEC)
    assert "p1" in retention_table((learned,))
