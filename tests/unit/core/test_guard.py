"""Whatever a parser raises becomes one error with file, kind and row; nothing is waited for."""

from __future__ import annotations

import os
import struct
import zlib

import pytest

from posttrain.core.errors import ConfigError, DataError, ModelError
from posttrain.core.guard import read_bytes, read_text, reading, regular_file


def endless():
    return endless()


@pytest.mark.parametrize(
    "parse",
    [
        endless,
        lambda: struct.unpack("<d", b"1"),
        lambda: zlib.decompress(b"nope"),
        lambda: float(10**400),
        lambda: 1 / 0,
        lambda: b"\xff".decode(),
        lambda: [][1],
        lambda: {}["x"],
        lambda: "\ud800".encode(),
        lambda: (_ for _ in ()).throw(MemoryError()),
        lambda: (_ for _ in ()).throw(ValueError("x" * 10_000 + "\n" + "\ud800")),
        lambda: (_ for _ in ()).throw(OSError(5, "Input/output error")),
    ],
)
def test_every_exception_becomes_an_error_of_the_tree(parse):
    with (
        pytest.raises(ModelError) as error,
        reading("m.bin", kind="weights", row=2, error=ModelError),
    ):
        parse()
    assert error.value.found.startswith("m.bin, row 2: ")
    assert error.value.expected == "weights"
    assert error.value.__cause__ is not None
    assert len(str(error.value).encode()) < 600


def test_errors_of_the_tree_pass_and_so_does_the_end_of_a_process():
    with pytest.raises(ConfigError, match="mine"), reading("x", kind="y"):
        raise ConfigError("mine")
    for kind in (KeyboardInterrupt, SystemExit):
        with pytest.raises(kind), reading("x", kind="y"):
            raise kind


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, words in (
        (tmp_path / "pipe", "is a named pipe"),
        (tmp_path / "link", "is a named pipe"),
        (tmp_path / "loop", "symbolic links"),
        (tmp_path, "is a folder"),
        (tmp_path / "gone", "no file"),
        (tmp_path / "\udcff", "no file"),
        (tmp_path / "a\x00b", "null byte"),
        (os.devnull, "is a device"),
    ):
        with pytest.raises(DataError, match=words):
            read_bytes(tmp_path / path, kind="rows", at_most=10)


def test_a_link_to_a_file_is_the_file_and_size_is_bounded(tmp_path):
    (tmp_path / "real").write_text("\ufeffé", encoding="utf-8")
    (tmp_path / "link").symlink_to("real")
    assert read_text(tmp_path / "link", kind="text", at_most=10) == "é"
    assert regular_file(tmp_path / "link").st_size == 5
    with pytest.raises(DataError, match="MiB"):
        read_text(tmp_path / "link", kind="text", at_most=4)
