"""Running out of memory, called that, with what to turn down.

The library raises it as one of several errors, and on a CPU as a plain RuntimeError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

import torch

from posttrain.core.errors import ModelError

_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cannot allocate memory",
)
_SIZES = "a smaller model, dtype: bfloat16"


class Doing(StrEnum):
    """What may need more memory than there is."""

    LOADING = "a model is loaded"
    TRAINING = "a training step is taken"
    SAMPLING = "completions are sampled"
    SCORING = "trajectories are scored"
    EXPORTING = "the export is proved"


_LESS = {
    Doing.LOADING: f"{_SIZES}, lora (no optimiser state of the weights), or fewer policies at once",
    Doing.TRAINING: "lower micro_batch_tokens, activation_checkpointing: true, lora, "
    "dtype: bfloat16, or a smaller model",
    Doing.SAMPLING: "lower max_new_tokens, group_size or groups_per_step, dtype: bfloat16, or a "
    "smaller model",
    Doing.SCORING: "shorter rows (max_new_tokens), a smaller top_k of a teacher, dtype: bfloat16, "
    "or a smaller model",
    Doing.EXPORTING: f"{_SIZES}, or close what else runs here: the last checkpoint is complete, "
    "and the same run exports from it",
}


@contextmanager
def in_memory(doing: Doing) -> Iterator[None]:
    """Turn an error of an allocator into one that says what to turn down.

    Raises:
        ModelError: the block ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_memory(error):
            raise
        first = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ModelError(
            f"out of memory while {doing.value}" + (f": {first}" if first else ""),
            expected="room for weights, gradients, optimiser state and activations "
            "(posttrain plan shows their sizes)",
            fix=_LESS[doing],
        ) from error


def _is_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)
