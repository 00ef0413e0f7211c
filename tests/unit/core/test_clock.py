"""The clock counts every second once."""

import threading
import time

import pytest

from posttrain.core import clock
from posttrain.core.clock import GROUPS, NAMES, Clock, seconds_in


class Hands:
    """A clock's time, moved by hand."""

    def __init__(self):
        self.at = 100.0

    def __call__(self):
        return self.at


def test_nested_times_are_exclusive_and_sum_to_the_wall():
    hands = Hands()
    own = Clock(hands)
    hands.at += 1  # idle
    with own.measure("score"):
        hands.at += 2
        with own.measure("teacher"):
            hands.at += 4
            with own.measure("teacher"):  # itself again: still once
                hands.at += 8
        hands.at += 16
    with own.measure("teacher"):
        hands.at += 32
    hands.at += 64  # idle
    assert own.drain() == {"score": 18.0, "teacher": 44.0, "idle": 65.0}


def test_draining_starts_anew_also_in_the_middle_of_something():
    hands = Hands()
    own = Clock(hands)
    with own.measure("decode"):
        hands.at += 3
        assert own.drain() == {"decode": 3.0, "idle": 0.0}
        hands.at += 5
    assert own.drain() == {"decode": 5.0, "idle": 0.0}
    assert own.drain() == {"idle": 0.0}


def test_an_error_inside_closes_what_was_open():
    hands = Hands()
    own = Clock(hands)

    def fail():
        with own.measure("score"), own.measure("verify"):
            hands.at += 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    hands.at += 7
    assert own.drain() == {"verify": 2.0, "score": 0.0, "idle": 7.0}


def test_another_thread_has_another_clock():
    clock.drain()
    inside, done = threading.Event(), threading.Event()

    def other():
        with clock.timed("decode"):
            inside.set()
            done.wait(5)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(5)
    with clock.timed("pack"):
        time.sleep(0.01)
    seconds = clock.drain()
    done.set()
    thread.join()
    assert set(seconds) == {"pack", "idle"}
    assert seconds["pack"] >= 0.01


def test_every_name_stands_in_one_group():
    assert sorted(n for names in GROUPS.values() for n in names) == sorted(NAMES)
    assert seconds_in({f"seconds/{n}": 1.0 for n in NAMES} | {"loss": 2.0}) == dict.fromkeys(
        NAMES, 1.0
    )
