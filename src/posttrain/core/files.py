"""Atomic writes of files and folders, their digests, and the run lock.

    write_atomic    content -> .name.<random>.partial -> fsync -> rename -> fsync folder
    atomic_folder   .name.partial -> fsync -> rename old to .name.old -> rename new -> delete old

A process may be killed at any point: a file is the old one or the new one, and so is a folder
after :func:`recover_folder`. A full disk raises :class:`~posttrain.core.errors.DiskFull`.
POSIX only: renames replace, and locks are advisory ``flock`` locks.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from posttrain.core.errors import DataError, DiskFull, PosttrainError, RunError, RunLocked

__all__ = [
    "as_disk_full",
    "atomic_folder",
    "file_target",
    "folder_lock",
    "hash_file",
    "hash_files",
    "hash_folder",
    "recover_folder",
    "sync_folder",
    "write_all",
    "write_atomic",
    "writing",
]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")
# torch.save writes through a C++ stream and loses the errno; these texts also come from other
# causes, so they count only while the disk is nearly full.
_STREAM_TEXTS = ("PytorchStreamWriter failed writing", "unexpected pos", "iostream error")
_WRONG_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
_NEXT_TO_NOTHING = 1 << 20  # bytes
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS})


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file: afterwards it holds ``content``, or its old content on any failure.

    Text is written as UTF-8. Missing parent folders are created. A link stays one: what it leads
    to is written.

    Raises:
        RunError: the path leads to a folder, a device, a pipe or a socket.
        DiskFull: the disk or the quota is full; the temporary file is removed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomic(Path(folder, "note.txt"), "kept")
        ...     [p.name for p in Path(folder).iterdir()], Path(folder, "note.txt").read_text()
        (['note.txt'], 'kept')
    """
    raw = content.encode() if isinstance(content, str) else content
    path = file_target(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                write_all(fd, raw)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(partial, path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # the error above says more; the next writer removes it
            partial.unlink(missing_ok=True)


def file_target(path: Path) -> Path:
    """The file that is written under a path: itself, or what its links lead to.

    Raises:
        RunError: something other than a file stands there, and a rename would replace it.

    Example:
        >>> file_target(Path("/dev/null"))
        Traceback (most recent call last):
        ...
        posttrain.core.errors.RunError: /dev/null is not a file
          expected: a file to replace, or a new name
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if os.path.lexists(target) and not target.is_file():
        raise RunError(f"{path} is not a file", expected="a file to replace, or a new name")
    return target


def write_all(fd: int, content: bytes) -> None:
    """Write every byte to an open file descriptor; ``os.write`` alone may write fewer."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(fd, rest) :]


def sync_folder(folder: Path) -> None:
    """Flush a folder's renames and new names to disk, so that they survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:  # some network file systems cannot, and need not
            raise
    finally:
        os.close(fd)


def as_disk_full(error: BaseException, *, writing: Path | None = None) -> DiskFull | None:
    """The :class:`DiskFull` for an error that reports a full disk, or None for another error.

    Libraries report a full disk in different ways: an errno, a message only (safetensors), or a
    broken stream (torch). The error and its causes are checked.

    Args:
        error: the caught exception.
        writing: the file or folder being written, for the message and for the space left.

    Example:
        >>> print(as_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"), writing=Path("/a")))
        ... # doctest: +ELLIPSIS
        the disk quota is used up: cannot write /a (... free on the disk)
          expected: room for the write; everything committed before it is intact
          to mend:  free some space, then run the same command again
        >>> as_disk_full(OSError(errno.EACCES, "Permission denied")) is None
        True
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DiskFull):
            return seen
        if _says_full(seen, writing):
            return _disk_full(seen, writing)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a write that fails inside into an error of the tree that names the file or folder.

    Errors that are no failed writes, such as a path that leads nowhere, pass unchanged.

    Raises:
        DiskFull: the disk or the quota is full.
        RunError: the disk refused for another reason, in its own words.

    Example:
        >>> with writing(Path("/a")):
        ...     raise OSError(errno.EIO, "Input/output error")
        Traceback (most recent call last):
        posttrain.core.errors.RunError: cannot write /a: Input/output error
          expected: a disk that takes the write; everything committed before it is intact
          to mend:  see to the disk, its limits and permissions, then run the same command again
    """
    try:
        yield
    except Exception as error:  # libraries wrap what a disk says; what is no such word goes on
        failed = as_disk_full(error, writing=path) or _refused(error, path)
        if failed is None or failed is error:
            raise
        raise failed from error


def _refused(error: Exception, path: Path) -> RunError | None:
    words = None if isinstance(error, PosttrainError) else _write_words(error)
    if words is None:
        return None
    return RunError(
        f"cannot write {path}: {words}",
        expected="a disk that takes the write; everything committed before it is intact",
        fix="see to the disk, its limits and permissions, then run the same command again",
    )


def _write_words(error: BaseException) -> str | None:
    """What an operating system or a library said of a failed write; None for another error."""
    if isinstance(error, _WRONG_PATH):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or str(error)
    text = str(error)
    if isinstance(error, RuntimeError) and any(t in text for t in _STREAM_TEXTS):
        return "the write ended early (a limit on file sizes, a quota, or the disk)"
    # safetensors and tokenizers, which are written in Rust, end so.
    return text if "(os error " in text else None


def _says_full(error: BaseException, writing: Path | None) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    if isinstance(error, PosttrainError):
        return False
    text = str(error)
    if any(t in text for t in _FULL_TEXTS):
        return True
    free = _free(writing)
    broken_stream = isinstance(error, RuntimeError) and any(t in text for t in _STREAM_TEXTS)
    return broken_stream and free is not None and free < _NEXT_TO_NOTHING


def _disk_full(error: BaseException, writing: Path | None) -> DiskFull:
    quota = (isinstance(error, OSError) and error.errno == errno.EDQUOT) or "quota" in str(error)
    free = _free(writing)
    what = "the disk quota is used up" if quota else "the disk is full"
    place = "" if writing is None else f": cannot write {writing}"
    room = "" if free is None else f" ({free / 1e6:.1f} MB free on the disk)"
    return DiskFull(
        f"{what}{place}{room}",
        expected="room for the write; everything committed before it is intact",
        fix="free some space, then run the same command again",
    )


def _free(path: Path | None) -> int | None:
    """Free bytes on the disk of ``path``, which may not exist yet. None when unknown."""
    while path is not None:
        with suppress(OSError):
            return shutil.disk_usage(path).free
        path = path.parent if path.parent != path else None
    return None


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Fill a temporary folder that replaces ``final`` when the block succeeds.

    When the block raises, ``final`` is unchanged. POSIX has no atomic exchange of folders: a
    kill between the two renames leaves ``final`` missing, with both versions complete beside it.
    A writer calls :func:`recover_folder` when it opens the folder; so does this function.

    Raises:
        DiskFull: the disk or the quota is full; the temporary folder is removed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as top:
        ...     with atomic_folder(Path(top, "checkpoint")) as folder:
        ...         _ = Path(folder, "weights").write_bytes(b"...")
        ...     [p.name for p in Path(top).iterdir()]
        ['checkpoint']
    """
    partial, old = _beside(final)
    try:
        with writing(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            recover_folder(final)
            partial.mkdir()
            yield partial
            _sync_tree(partial)
            _swap(partial, final=final, old=old)
    finally:
        _remove_quietly(partial)


def recover_folder(final: Path) -> None:
    """Finish or undo a write that was killed inside :func:`atomic_folder`; else do nothing.

    For the writer of the folder only: it would delete what another process is writing now.
    The old folder is renamed only after the new one is complete on disk. So without ``final``,
    an existing ``.name.old`` proves that the new one is complete, and it is moved in.

    ===== ============ ======== =====================================================
    final .name.old    .partial then
    ===== ============ ======== =====================================================
    any   no           yes      killed while writing: the partial one is deleted
    no    yes          yes      killed between the renames: the new one is moved in
    no    yes          no       the old one is put back
    yes   yes          any      killed after the renames: old and partial are deleted
    ===== ============ ======== =====================================================
    """
    partial, old = _beside(final)
    if old.is_dir() and not final.exists():
        (partial if partial.is_dir() else old).rename(final)
        sync_folder(final.parent)
    for stale in (old, partial):
        if stale.is_dir():
            shutil.rmtree(stale)


def _beside(final: Path) -> tuple[Path, Path]:
    return final.with_name(f".{final.name}.partial"), final.with_name(f".{final.name}.old")


def _swap(partial: Path, *, final: Path, old: Path) -> None:
    if not final.exists():
        partial.rename(final)
        sync_folder(final.parent)
        return
    final.rename(old)
    try:
        sync_folder(final.parent)
        partial.rename(final)
    except BaseException:  # Ctrl-C too: there is never no folder
        if not final.exists():
            old.rename(final)
        raise
    sync_folder(final.parent)
    _remove_quietly(old)


def _remove_quietly(folder: Path) -> None:
    # The next recover_folder removes a folder that stays; an error raised here would hide the
    # original one.
    shutil.rmtree(folder, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for here, _, names in os.walk(folder, topdown=False, onerror=_raise):
        for name in names:
            fd = os.open(Path(here, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(here))


def _raise(error: OSError) -> None:
    raise error


def content_of(path: str, root: Path) -> str:
    """Digest of a data file's content, whatever its path.

    Raises:
        DataError: no such file.
    """
    full = root / path
    if not full.is_file():
        raise DataError(
            f"no file {full}", fix="check the path; it is relative to the recipe's folder"
        )
    return hash_file(full)


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits. Reads in pieces, so any size fits in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path, names: Iterable[str]) -> str:
    """sha256 over (relative name, file digest) pairs of some files of a folder, 64 hex digits.

    Each pair is hashed as ``name NUL digest LF``, names with ``/`` between parts and sorted by
    their bytes. Times and modes do not count. A link to a file counts as the file.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    total = hashlib.sha256()
    for name in sorted(map(os.fsencode, names)):
        digest = hash_file(folder / os.fsdecode(name))
        total.update(name + b"\0" + digest.encode() + b"\n")
    return total.hexdigest()


def hash_folder(path: Path) -> str:
    """:func:`hash_files` of all files below a folder. Empty folders do not count.

    Raises:
        DataError: a link to a folder, whose content would silently not count.
        OSError: the folder is missing or cannot be read.
    """
    files: list[str] = []
    for here, folders, names in os.walk(path, onerror=_raise):
        for linked in (p for p in (Path(here, f) for f in folders) if p.is_symlink()):
            raise DataError(
                f"{linked} is a link to a folder",
                expected="a folder that holds all of its own content",
                fix="replace the link by a copy",
            )
        files += [Path(here, n).relative_to(path).as_posix() for n in names]
    return hash_files(path, files)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock a folder for this process. The lock ends with the process, however it ends.

    ``<folder>/lock`` names the holder. When the lock is released the file stays, empty: deleting
    it would let two processes lock two files of the same name. Children forked inside the block
    share the lock until they end too.

    Raises:
        RunLocked: another process holds it; the message has its pid, host and start time.
        RunError: the file system does not support locks.
    """
    path = folder / "lock"
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(fd, folder)
        try:
            _sign(fd, path)
            yield
        finally:
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)  # releases the lock


def _take(fd: int, folder: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _locked(os.pread(fd, 4096, 0), folder) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise RunError(
            f"the file system of {folder} cannot lock files ({error.strerror})",
            expected="a file system with locks, so that two processes cannot write one run",
            fix="keep the run folder on a local disk",
        ) from error


def _sign(fd: int, path: Path) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    with writing(path):
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(holder).encode(), 0)


def _locked(content: bytes, folder: Path) -> RunLocked:
    try:
        holder = json.loads(content)
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        stop = f"kill {holder['pid']}"
    except (ValueError, KeyError, TypeError):  # locked, and its name is not written yet
        who, stop = "another process", "end it"
    return RunLocked(
        f"{folder} is in use by {who}",
        expected="one process at a time in a run folder",
        fix=f"wait for it, or stop it ({stop}), or choose another folder",
    )
