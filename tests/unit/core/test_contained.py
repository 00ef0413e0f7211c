"""Code that is not ours: whatever it does becomes one error, and this process stays as it was."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import warnings

import numpy as np
import pytest

from posttrain.core.contained import Contained, Failed
from posttrain.core.errors import TaskError


def contained(seconds=5.0):
    return Contained(files={__file__}, seconds=seconds)


def exits():
    sys.exit(0)


def ends_at_once():
    os._exit(0)


def replaces_the_process():
    os.execv("/bin/true", ["true"])


def presses_ctrl_c():
    raise KeyboardInterrupt


def cancels():
    raise asyncio.CancelledError


def recurses():
    return recurses()


def raises_without_words():
    class Silent(Exception):
        def __str__(self):
            raise ValueError

    raise Silent


def writes_a_large_number():
    return str(10**10000)


@pytest.mark.parametrize(
    ("code", "says", "ended"),
    [
        (exits, "tried to end the process with exit code 0", True),
        (ends_at_once, "tried to end the process with exit code 0", True),
        (replaces_the_process, "tried to end the process", True),
        (presses_ctrl_c, "raised KeyboardInterrupt", True),
        (cancels, "raised asyncio.exceptions.CancelledError", False),
        (recurses, "raised RecursionError", False),
        (raises_without_words, "exception str() failed", False),
        (writes_a_large_number, "raised ValueError: Exceeds the limit", False),
    ],
)
def test_every_end_is_one_error_with_its_line(code, says, ended):
    with pytest.raises(Failed) as caught:
        contained().run(code)
    assert says in caught.value.words
    assert f"at {__file__}:" in caught.value.words
    assert caught.value.ended is ended
    assert os.getpid()  # still here
    assert os._exit is not None
    assert "refused" not in repr(os._exit)


def test_errors_of_ours_pass():
    def complains():
        raise TaskError("no")

    with pytest.raises(TaskError, match="no"):
        contained().run(complains)


@pytest.mark.parametrize("swallows", [False, True])
def test_a_call_ends_when_its_time_is_over(swallows):
    def loops():
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                if not swallows:
                    raise

    started = time.perf_counter()
    with pytest.raises(Failed, match=r"took longer than 0\.2 seconds"):
        contained(0.2).run(loops)
    assert time.perf_counter() - started < 5


def test_code_that_never_comes_back_ends_the_process():
    script = """
        from posttrain.core import contained
        contained._NUDGES = 1
        def loops():
            while True:
                try:
                    while True:
                        pass
                except BaseException:
                    pass
        contained.Contained(seconds=0.2).run(loops)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "in loops" in done.stderr


def test_a_real_ctrl_c_passes():
    def waits():
        signal.raise_signal(signal.SIGINT)
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        contained().run(waits)


@pytest.mark.filterwarnings("ignore:no error")
def test_what_code_changes_is_put_back_and_named(tmp_path):
    def changes():
        os.chdir(tmp_path)
        os.environ["POSTTRAIN_TEST"] = "1"
        sys.path.append("elsewhere")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.alarm(100)
        sys.setrecursionlimit(5000)
        os.umask(0o000)
        np.seterr(all="raise")
        warnings.simplefilter("error")
        gc.disable()
        logging.disable(50)
        sys.stdout = None
        return 7

    before = (os.getcwd(), dict(os.environ), list(sys.path), sys.getrecursionlimit(), sys.stdout)
    mask = os.umask(0o022)
    os.umask(mask)
    alarm = signal.getitimer(signal.ITIMER_REAL)[0]  # that of the test run
    box = contained()
    assert box.run(changes) == 7
    now = (os.getcwd(), dict(os.environ), list(sys.path), sys.getrecursionlimit(), sys.stdout)
    assert now == before
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
    assert signal.getitimer(signal.ITIMER_REAL)[0] == pytest.approx(alarm, abs=5)
    assert os.umask(mask) == mask
    assert np.geterr()["divide"] != "raise"
    assert gc.isenabled()
    assert logging.root.manager.disable == 0
    warnings.warn("no error", stacklevel=1)
    assert list(box.changed) == [
        "the recursion limit",
        "the working directory",
        "environment variables",
        "the module search path",
        "the standard streams",
        "signal handlers",
        "an alarm",
        "the mode of new files",
        "warning filters",
        "garbage collection",
        "logging",
        "NumPy's error handling",
    ]


def test_code_finds_its_own_folder_and_environment_again(tmp_path):
    def sets():
        os.chdir(tmp_path)
        os.environ["POSTTRAIN_KEY"] = "k"
        os.environ.pop("HOME", None)

    box, home, folder = contained(), os.environ.get("HOME"), os.getcwd()
    box.run(sets)
    assert (os.environ.get("HOME"), os.environ.get("POSTTRAIN_KEY")) == (home, None)
    found = box.run(lambda: (os.getcwd(), os.environ["POSTTRAIN_KEY"], os.environ.get("HOME")))
    assert found == (str(tmp_path), "k", None)
    assert os.getcwd() == folder
    assert contained().run(os.getcwd) == folder


def test_code_that_changes_nothing_is_not_blamed(capsys):
    def prints():
        print("hello")
        sys.stdout.close()
        sys.stdout.flush()

    box = contained()
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1)
    box.run(prints)
    print("still open")
    assert not box.changed
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1)) == before
    assert capsys.readouterr().out == "hello\nstill open\n"


def test_random_numbers_of_both_sides_do_not_disturb_each_other():
    def draws():
        return random.random(), float(np.random.rand())

    random.seed(3)
    np.random.seed(3)
    alone = draws()
    random.seed(3)
    np.random.seed(3)
    one, two = contained(), contained()
    first = [one.run(draws) for _ in range(3)]
    assert draws() == alone
    random.seed(9)
    assert [two.run(draws) for _ in range(3)] == first
    assert len(set(first)) == 3  # a stream, and not one number again and again


def test_code_that_leaves_no_room_for_calls_does_not_hang():
    def narrows():
        depth = len(traceback.extract_stack())
        sys.setrecursionlimit(depth + 40)  # what the stack shows is less than what is counted
        return depth

    before, box = sys.getrecursionlimit(), contained()
    for _ in range(3):
        box.run(narrows)
        assert sys.getrecursionlimit() == before
    assert list(box.changed) == ["the recursion limit"]


def test_a_child_that_comes_back_does_not_go_on():
    script = """
        import os
        from posttrain.core.contained import Contained
        Contained(seconds=5.0).run(os.fork)
        print("went on")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "went on\n"
