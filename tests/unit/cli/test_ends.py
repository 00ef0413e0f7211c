"""Every way for a command to end has an exit code and words, and 0 means that it is done."""

from __future__ import annotations

import errno
import signal
import sys

import click
import pytest
from click.testing import CliRunner

from posttrain.cli.console import interrupts
from posttrain.cli.ends import CODES, DEFECT, DONE, INTERRUPTED, MISTAKE, UNREAD, end
from posttrain.cli.main import cli
from posttrain.core.errors import ConfigError, Interrupted


class OutOfMemoryError(RuntimeError):
    """As PyTorch calls it."""


def raising(error):
    def command():
        raise error

    return command


def code_of(command, *, debug=False):
    try:
        return end(command, debug=debug)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("found", expected="this"), MISTAKE, "ConfigError: found\n  expected: this"),
        (click.UsageError("no such option"), MISTAKE, "no such option"),
        (Interrupted("at step 3"), INTERRUPTED, "goes on from the last checkpoint"),
        (KeyboardInterrupt(), INTERRUPTED, "stopped"),
        (click.Abort(), INTERRUPTED, "stopped"),
        (SystemExit(0), MISTAKE, "ended the process"),
        (SystemExit("bye"), MISTAKE, "ended the process (SystemExit: bye)"),
        (MemoryError(), MISTAKE, "out of memory"),
        (OutOfMemoryError("CUDA"), MISTAKE, "turn down micro_batch_tokens"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MISTAKE, "out of memory"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), MISTAKE, "permissions"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), MISTAKE, "/x"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), MISTAKE, "free some space"),
        (OSError("no number"), MISTAKE, "no number"),
        (TypeError("ours"), DEFECT, "this is a defect of posttrain"),
        (RecursionError(), DEFECT, "this is a defect of posttrain"),
        (RuntimeError("\ud800" * 3), DEFECT, "\\ud800"),
        (AssertionError("x\n" * 5000), DEFECT, "..."),
    ],
)
def test_errors_end_with_words_and_never_with_a_traceback(capsys, error, code, words):
    assert code_of(raising(error)) == code
    said = capsys.readouterr()
    assert words in said.err
    assert "Traceback" not in said.out + said.err
    assert len(said.err) < 1500


def test_debug_shows_where(capsys):
    assert code_of(raising(TypeError("ours")), debug=True) == DEFECT
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "in command" in said


@pytest.mark.parametrize("returned", [None, True, "text", 0])
def test_what_returns_is_done(returned):
    assert end(lambda: returned, debug=False) == DONE


def test_a_code_of_click_is_kept():
    assert end(lambda: 3, debug=False) == 3


def test_a_closed_pipe_is_no_success(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert code_of(raising(BrokenPipeError())) == UNREAD


def test_the_codes_are_in_the_help():
    shown = " ".join(CliRunner().invoke(cli, ["--help"]).output.split())
    for number in ("0 done", "2 a mistake", "3 a gate", "70 a defect", "130 stopped"):
        assert number in CODES
        assert number in shown


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_once_and_then_stops(kind):
    said = []
    before = signal.getsignal(kind)
    with interrupts(said.append) as stop:
        assert not stop()
        signal.raise_signal(kind)
        assert stop()
        assert len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(kind)
    assert signal.getsignal(kind) is before


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts(lambda text: None) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
