"""Headers of safetensors files, read and checked without reading a weight.

8 bytes: length n (little endian) | n bytes: JSON | data, without holes
JSON: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from posttrain.core.errors import ModelError
from posttrain.models.entries import once, plain_file

MAX_HEADER = 100_000_000
"""Longest header in bytes; the library's own limit."""

BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64},
    **{"I64": 64, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64},
    **{"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits of an element, by the format's name of the number type."""

_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor as its file declares it."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def num_elements(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file, by name.

    Raises:
        ModelError: not a safetensors file, damaged, or cut.
    """
    plain_file(path)
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if start + stream.read(len(_POINTER) - 8) == _POINTER:
            raise ModelError(
                f"{path} is a Git LFS pointer and not the file it points to",
                expected="weights",
                fix="git lfs pull, in the folder of the model",
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_HEADER, size - 8):
            raise _damaged(path, f"{size:,} bytes, and a header of {length:,}")
        stream.seek(8)
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is a JSON {type(header).__name__}")
    header.pop("__metadata__", None)
    found = {name: _tensor(path, name, entry) for name, entry in header.items()}
    _check_data(path, [entry["data_offsets"] for entry in header.values()], size - 8 - length)
    return found


def _tensor(path: Path, name: str, entry: object) -> TensorHeader:
    """A tensor's entry, checked by itself."""
    if not isinstance(entry, dict):
        raise _damaged(path, f"{name} is a JSON {type(entry).__name__}")
    dtype, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(path, f"{name} has the number type {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or not _are_sizes(place) or len(place) != 2:
        raise _damaged(path, f"{name} has the shape {shape!r:.60} at {place!r:.60}")
    bits = math.prod(shape) * BITS[dtype]
    if bits != (place[1] - place[0]) * 8:
        held = place[1] - place[0]
        raise _damaged(path, f"{name} {dtype} {shape} takes {bits // 8:,} bytes and has {held:,}")
    return TensorHeader(dtype, tuple(shape), path.name)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    """A short list of counts that fit into 64 bits."""
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )


def _check_data(path: Path, places: list[list[int]], num_bytes: int) -> None:
    """Check that the tensors fill the data without holes or overlaps."""
    at = 0
    for begin, end in sorted(places):
        if begin != at:
            raise _damaged(path, f"a hole or an overlap at byte {min(begin, at):,} of its data")
        at = end
    if at != num_bytes:
        more = "more" if num_bytes > at else "fewer"
        raise _damaged(
            path, f"its data have {num_bytes:,} bytes, {abs(num_bytes - at):,} {more} than declared"
        )


def _damaged(path: Path, words: str) -> ModelError:
    return ModelError(
        f"{path} is damaged or no safetensors file: {words}",
        expected="a whole safetensors file",
        fix="copy or download it again",
    )
