"""Files are old or new, never half; folders too; locks die with their process."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.core import files
from posttrain.core.errors import DataError, DiskFull, RunError, RunLocked
from posttrain.core.files import (
    as_disk_full,
    atomic_folder,
    folder_lock,
    hash_file,
    hash_folder,
    recover_folder,
    write_all,
    write_atomic,
    writing,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def fill(folder: Path, content: str) -> None:
    folder.mkdir()
    (folder / "weights").write_text(content)


def fail_with(number: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_write_atomic_replaces_the_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_atomic(path, "a longer old text")
    write_atomic(path, "né")
    assert path.read_bytes() == b"n\xc3\xa9"
    assert names(path.parent) == ["a.txt"]


def test_write_atomic_syncs_the_content_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    sync, replace = os.fsync, os.replace

    def spy_sync(fd: int) -> None:
        seen.append("folder" if Path(f"/proc/self/fd/{fd}").is_dir() else "file")
        sync(fd)

    def spy_replace(source: Path, target: Path) -> None:
        seen.append("rename")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", spy_sync)
    monkeypatch.setattr(files.os, "replace", spy_replace)
    write_atomic(tmp_path / "a", b"1")
    assert seen == ["file", "rename", "folder"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_old_file_and_leaves_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    path = tmp_path / "a"
    write_atomic(path, "old")
    monkeypatch.setattr(files.os, call, fail_with(number))
    with pytest.raises(DiskFull) as caught:
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]
    message = str(caught.value)
    assert str(path) in message
    assert "MB free" in message
    assert "intact" in message
    assert "run the same command again" in message
    assert ("quota" in message) == (number == errno.EDQUOT)


def test_another_failed_write_names_its_file_and_what_the_disk_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.os, "fsync", fail_with(errno.EIO))
    with pytest.raises(RunError, match=r"cannot write .*/a: Input/output error"):
        write_atomic(tmp_path / "a", "new")
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST])
def test_a_path_that_leads_nowhere_is_no_failed_write(tmp_path: Path, number: int) -> None:
    for error in (OSError(number, os.strerror(number)), ValueError("no write at all")):
        with pytest.raises(type(error)) as caught, writing(tmp_path):
            raise error
        assert caught.value is error


def test_write_all_goes_on_after_a_short_write(monkeypatch: pytest.MonkeyPatch) -> None:
    written = bytearray()

    def two_bytes(_: int, content: memoryview) -> int:
        written.extend(content[:2])
        return len(content[:2])

    monkeypatch.setattr(files.os, "write", two_bytes)
    write_all(0, b"abcde")
    assert bytes(written) == b"abcde"


class SafetensorError(Exception):
    """Stands for the class of that name: no OSError, no RuntimeError, only a message."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "anything"),
        OSError(errno.EDQUOT, "anything"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        RuntimeError("[enforce fail] write failed: No space left on device"),
        OSError("Disk quota exceeded"),
    ],
)
def test_full_disks_are_recognised(error: Exception) -> None:
    assert isinstance(as_disk_full(error), DiskFull)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied: 'No space left on device'"),
        RuntimeError("CUDA out of memory"),
        DataError("No space left on device"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert as_disk_full(error) is None


def test_the_cause_is_looked_at_unless_it_was_denied() -> None:
    outer = RuntimeError("unexpected pos 704 vs 598")
    outer.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(as_disk_full(outer), DiskFull)
    outer.__suppress_context__ = True
    assert as_disk_full(outer) is None


@pytest.mark.parametrize(("free", "full"), [(0, True), (1 << 30, False)])
def test_a_broken_torch_stream_counts_only_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, full: bool
) -> None:
    usage = type(files.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, free))
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    assert (as_disk_full(error, writing=tmp_path / "a") is not None) == full


def test_a_disk_full_is_itself() -> None:
    error = DiskFull("the disk is full")
    assert as_disk_full(error) is error


@pytest.mark.parametrize("existed", [False, True])
def test_atomic_folder_replaces_everything(tmp_path: Path, existed: bool) -> None:
    final = tmp_path / "f"
    if existed:
        fill(final, "old")
        (final / "stale").touch()
    with atomic_folder(final) as folder:
        assert folder == tmp_path / ".f.partial"
        assert final.exists() == existed
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text("new")
    assert names(tmp_path) == ["f"]
    assert names(final) == ["sub"]
    assert (final / "sub" / "weights").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_atomic_folder_changes_nothing_when_the_block_raises(
    tmp_path: Path, error: BaseException
) -> None:
    final = tmp_path / "f"
    fill(final, "old")

    def spoil() -> None:
        with atomic_folder(final) as folder:
            (folder / "weights").write_text("half")
            raise error

    with pytest.raises(type(error)):
        spoil()
    assert names(tmp_path) == ["f"]
    assert (final / "weights").read_text() == "old"


def test_atomic_folder_translates_a_full_disk(tmp_path: Path) -> None:
    final = tmp_path / "f"
    fill(final, "old")
    with pytest.raises(DiskFull, match=str(final)), atomic_folder(final):
        raise SafetensorError("No space left on device (os error 28)")
    assert (final / "weights").read_text() == "old"
    assert names(tmp_path) == ["f"]


def test_atomic_folder_puts_the_old_one_back_when_the_second_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "f"
    fill(final, "old")
    rename = Path.rename

    def spoilt(self: Path, target: Path) -> Path:
        if self.name == ".f.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", spoilt)
    with pytest.raises(RunError, match="Input/output"), atomic_folder(final) as folder:
        (folder / "weights").write_text("new")
    assert names(tmp_path) == ["f"]
    assert (final / "weights").read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from posttrain.core import files
final, stop = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def counted(real):
    def call(*args, **kwargs):
        global calls
        if calls == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return real(*args, **kwargs)
    return call
Path.rename = counted(Path.rename)
files.os.fsync = counted(os.fsync)
files._remove_quietly = counted(files._remove_quietly)
with files.atomic_folder(final) as folder:
    (folder / "weights").write_text("new")
"""


def test_a_kill_at_any_point_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    outcomes = []
    for stop in range(20):
        top = tmp_path / str(stop)
        top.mkdir()
        fill(top / "f", "old")
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(top / "f"), str(stop)], check=False
        )
        recover_folder(top / "f")
        assert names(top) == ["f"]
        outcomes.append((top / "f" / "weights").read_text())
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    # fsync file, fsync folder, rename aside | fsync, rename in, fsync, delete old, delete partial
    assert outcomes == ["old"] * 3 + ["new"] * 6


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"f": "old"}, "old"),
        ({"f": "old", ".f.partial": "half"}, "old"),
        ({".f.partial": "half"}, None),
        ({".f.old": "old", ".f.partial": "new"}, "new"),
        ({".f.old": "old"}, "old"),
        ({"f": "new", ".f.old": "old"}, "new"),
        ({}, None),
    ],
)
def test_recover_folder_settles_every_state(
    tmp_path: Path, there: dict[str, str], expected: str | None
) -> None:
    for name, content in there.items():
        fill(tmp_path / name, content)
    recover_folder(tmp_path / "f")
    assert names(tmp_path) == ([] if expected is None else ["f"])
    if expected is not None:
        assert (tmp_path / "f" / "weights").read_text() == expected


def test_hash_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_file(tmp_path / "a") == expected


def test_hash_folder_covers_names_and_content_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"2")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1")
    (tmp_path / "a!").write_bytes(b"2")  # "!" sorts before "/", and so before what is in "a"
    one, two = hashlib.sha256(b"1").hexdigest(), hashlib.sha256(b"2").hexdigest()
    expected = hashlib.sha256(f"a!\0{two}\na/x\0{one}\nb\0{two}\n".encode()).hexdigest()
    assert hash_folder(tmp_path) == expected
    (tmp_path / "empty").mkdir()
    os.utime(tmp_path / "b", (0, 0))
    assert hash_folder(tmp_path) == expected
    (tmp_path / "b").rename(tmp_path / "c")
    assert hash_folder(tmp_path) != expected


def test_hash_folder_refuses_what_it_would_not_see(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hash_folder(tmp_path / "nowhere")
    (tmp_path / "real").mkdir()
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "link").symlink_to(tmp_path / "real")
    with pytest.raises(DataError, match="link to a folder"):
        hash_folder(tmp_path / "top")


def test_a_second_process_gets_the_name_of_the_lock_holder(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "run"):
        with pytest.raises(RunLocked) as caught, folder_lock(tmp_path / "run"):
            pass
        message = str(caught.value)
        assert f"process {os.getpid()} on {os.uname().nodename} since 20" in message
        assert "wait for it" in message
    with folder_lock(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / "lock").read_bytes() == b""


def test_the_lock_is_given_back_when_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), folder_lock(tmp_path):
        raise ValueError("no")
    with folder_lock(tmp_path):
        pass


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom posttrain.core.files import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match=f"process {holder.pid} on"), folder_lock(tmp_path):
            pass
        holder.kill()
    assert f'"pid": {holder.pid}' in (tmp_path / "lock").read_text()  # it could not clean up
    with folder_lock(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / "lock").read_text()
