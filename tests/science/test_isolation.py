"""Foreign code that dies, hangs or raises loses its own outcome only."""

import importlib
import math
import signal
import time
from pathlib import Path

import pytest

from aiida_eipnn.science.eip.isolation import LEFT_TO_PARENT, Lost, each_apart, side_by_side

# Ignored by default.
HARMLESS = signal.SIGCHLD


@pytest.fixture
def tasks(monkeypatch):
    """Return the module of tasks under a name that other processes find it by."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("tasks_apart")


def test_what_raises_is_lost_and_the_rest_is_not():
    outcomes = [outcome for _, outcome in each_apart(math.sqrt, [4.0, -1.0, 9.0], seconds=60)]

    assert outcomes == [2.0, Lost("ValueError: math domain error"), 3.0]


def test_an_item_on_which_the_process_dies_is_lost_and_the_rest_is_not():
    items = [HARMLESS, signal.SIGABRT, HARMLESS]

    outcomes = list(each_apart(signal.raise_signal, items, seconds=60))

    died = Lost("the process died with signal 6 (SIGABRT)")
    assert outcomes == [(HARMLESS, None), (signal.SIGABRT, died), (HARMLESS, None)]


def test_an_item_that_hangs_is_lost_and_the_rest_is_not():
    outcomes = [outcome for _, outcome in each_apart(time.sleep, [0, 600, 0], seconds=5)]

    assert outcomes == [None, Lost("not done within 5 s"), None]


def test_what_asks_a_job_to_stop_ends_no_process_of_an_eip():
    # A scheduler sends it to all processes of a job, and an EIP must not get the blame.
    outcomes = list(each_apart(signal.raise_signal, LEFT_TO_PARENT, seconds=60))

    assert outcomes == [(number, None) for number in LEFT_TO_PARENT]


def test_items_are_done_side_by_side_as_they_come(tasks):
    outcomes = list(side_by_side(tasks.napping, [3.0, 0.0, 0.1], n_workers=2))

    # The second process has done two before the first is done.
    assert outcomes == [(1, (1, 0.0)), (2, (1, 0.1)), (0, (0, 3.0))]


def test_a_process_that_dies_loses_its_item_and_another_takes_the_rest(tasks):
    items = [HARMLESS, signal.SIGABRT, HARMLESS, HARMLESS]

    outcomes = dict(side_by_side(tasks.raising_signals, items, n_workers=1))

    died = Lost("the process died with signal 6 (SIGABRT)")
    assert outcomes == {0: None, 1: died, 2: None, 3: None}


def test_an_item_that_raises_is_lost_and_its_process_goes_on(tasks):
    outcomes = dict(side_by_side(tasks.taking_roots, [4.0, -1.0, 9.0], n_workers=2))

    assert outcomes == {0: 2.0, 1: Lost("ValueError: math domain error"), 2: 3.0}


def test_a_task_that_cannot_be_opened_is_an_error(tasks):
    with pytest.raises(ValueError, match="there is no such thing"):
        list(side_by_side(tasks.unopenable, [1, 2], n_workers=2))


def test_what_must_stop_leaves_out_what_is_not_done(tasks):
    done = []

    for position, _ in side_by_side(
        tasks.napping, [0.0, 600.0, 600.0], n_workers=2, must_stop=lambda: bool(done)
    ):
        done.append(position)

    assert done == [0]


def test_no_item_is_no_process(tasks):
    assert list(side_by_side(tasks.unopenable, [], n_workers=2)) == []
