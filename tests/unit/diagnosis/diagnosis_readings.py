"""Readings made up for tests of rules: as exact or as wide as a test wants them."""

from posttrain.diagnosis.card import Evidence
from posttrain.measure.reading import Reading


def seen(
    name: str, value: float, *, half: float = 0.0, task: str = "t", units: int = 32
) -> Reading:
    """A reading of ``value`` ± ``half``."""
    return Reading(name, task, value, value - half, value + half, units, 64, "made up")


def evidence(values: dict[str, float], *, half: float = 0.0, task: str = "t") -> Evidence:
    """Exact readings by name, or all of one half-width."""
    return Evidence(
        task=task,
        readings=tuple(seen(n, v, half=half, task=task) for n, v in values.items()),
    )


def sampling(first: float, many: float, **more: float) -> dict[str, float]:
    """What every model has: pass@1, pass@64 and what follows, unless given."""
    return {
        "pass@1": first,
        "pass@64": many,
        "efficiency_gap": many - first,
        "informative@8": 1 - first**8 - (1 - first) ** 8,
        "needed_group": 8.0,
        "answer_entropy": 1.0,
        "truncated": 0.0,
        "repetition": 0.0,
        "verifier_disagreement": 0.0,
        "continue@0.5": 0.0,
        **{k.replace("__", "@"): v for k, v in more.items()},
    }


TRUTHS = {
    "scorer": ({**sampling(0.5, 0.9), "verifier_disagreement": 0.1}, "measurement"),
    "cut off": ({**sampling(0.1, 0.3), "truncated": 0.6}, "measurement"),
    "hardly fits": (
        {**sampling(0.1, 0.3), "truncated": 0.6, "answer_room": 0.2},
        "measurement",
    ),
    "rambles": ({**sampling(0.0, 0.0), "truncated": 0.6, "answer_room": 1.0}, "support"),
    "loops": ({**sampling(0.1, 0.3), "truncated": 0.6, "repetition": 0.5}, "support"),
    "forgotten": ({**sampling(0.5, 0.9), "retention": 0.5}, "retention"),
    "kept": ({**sampling(0.5, 0.9), "retention": 0.99, "shrunk_share": 0.0}, "choice"),
    "narrowed": ({**sampling(0.6, 0.65), "retention": 0.99, "shrunk_share": 0.3}, "diversity"),
    "scaffold": ({**sampling(0.3, 0.9), "amortisation_gap": 0.4}, "amortisation"),
    "own states": (
        {**sampling(0.3, 0.6), "exposure_excess": 2.0, "teacher_forced_accuracy": 0.97},
        "learner_state",
    ),
    "collapsed": ({**sampling(0.5, 0.52), "answer_entropy": 0.05}, "diversity"),
    "never": (sampling(0.0, 0.0), "support"),
    "never, unprobed": (
        {k: v for k, v in sampling(0.0, 0.0).items() if k != "continue@0.5"},
        "support",
    ),
    "entry": ({**sampling(0.0, 0.05), "continue@0.5": 0.9}, "entry"),
    "half": (sampling(0.6, 0.65), "support"),
    "rare": (sampling(0.015, 0.62), "signal"),
    "habit": (sampling(0.1, 0.97), "choice"),
    "done": (sampling(0.97, 1.0), "saturation"),
}
"""Exact readings, and the bottleneck that they show."""
