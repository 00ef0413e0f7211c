"""Measurements made up from successes, for tests of whatever reads them."""

from __future__ import annotations

import numpy as np

from posttrain.measure.columns import raw_columns
from posttrain.measure.measurement import Measurement, TaskMeasurement


def measured(successes: np.ndarray, taskset: str = "sums", **others: object) -> TaskMeasurement:
    """A task measurement from successes [P, n]."""
    shape = np.shape(successes)
    fields: dict[str, object] = {
        "taskset": taskset,
        "prompts": tuple(f"{taskset}/{i}" for i in range(shape[0])),
        "scores": np.asarray(successes, np.float32),
        "success": 1.0,
        "lengths": np.ones(shape, np.int32),
        "truncated": np.zeros(shape, bool),
        "nll": np.zeros(shape, np.float32),
        "distinct": np.ones(shape[0], np.int32),
    }
    raw = {name: others.pop(name) for name in raw_columns() if name in others}
    return TaskMeasurement(**{**fields, **others}, raw=raw)  # type: ignore[arg-type]


def policy(*tasks: TaskMeasurement, name: str = "base", protocol: str = "p" * 64) -> Measurement:
    """A measurement of these task sets."""
    return Measurement(policy=name, digest="d" * 64, protocol=protocol, tasks=tasks)


def drawn(rate: float, seed: int = 0, prompts: int = 24, n: int = 64) -> TaskMeasurement:
    """Samples with everything that a measurement may hold."""
    rng = np.random.default_rng(seed)
    answers = (rng.random((prompts, n)) >= rate) * rng.integers(1, 4, (prompts, n))
    return measured(
        answers == 0,
        answers=answers,
        distinct=[len(set(row)) for row in answers.tolist()],
        nll=rng.random((prompts, n)),
        lengths=rng.integers(1, 9, (prompts, n)),
        self_bleu=rng.random(prompts),
        repetition=rng.random((prompts, n)) / 50,
        recheck=np.zeros((prompts, 4)),
    )


def counted(counts: list[int] | np.ndarray, n: int = 64, taskset: str = "sums") -> TaskMeasurement:
    """A measurement with these successes."""
    return measured(np.arange(n) < np.asarray(counts)[:, None], taskset)


def sampled(rates: np.ndarray, n: int = 64, seed: int = 0) -> TaskMeasurement:
    """Samples that succeed at these rates, prompt by prompt."""
    rng = np.random.default_rng(seed)
    return measured(rng.random((len(rates), n)) < np.asarray(rates)[:, None])
