"""Foreign code that dies, hangs or raises loses its own outcome only."""

import importlib
import math
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from aiida_eipnn.science.eip.isolation import LEFT_TO_PARENT, Crew, Lost, each_apart

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


@contextmanager
def crew_of(open_task, n_workers):
    crew = Crew(open_task, n_workers)
    try:
        yield crew
    finally:
        crew.close()


def test_items_are_done_side_by_side_as_they_come(tasks):
    with crew_of(tasks.napping, 2) as crew:
        outcomes = list(crew.outcomes([3.0, 0.0, 0.1]))

    # The second process has done two before the first is done.
    assert outcomes == [(1, (1, 0.0)), (2, (1, 0.1)), (0, (0, 3.0))]


def test_processes_live_until_the_crew_ends(tasks):
    with crew_of(tasks.telling_its_process, 2) as crew:
        first = {process for _, process in crew.outcomes(range(4))}
        again = {process for _, process in crew.outcomes(range(4))}

    assert 1 <= len(first) <= 2
    assert again <= first
    assert not any(psutil.pid_exists(process) for process in first)


def test_a_process_that_dies_loses_its_item_and_another_takes_the_rest(tasks):
    items = [HARMLESS, signal.SIGABRT, HARMLESS, HARMLESS]

    with crew_of(tasks.raising_signals, 1) as crew:
        outcomes = dict(crew.outcomes(items))

    died = Lost("the process died with signal 6 (SIGABRT)")
    assert outcomes == {0: None, 1: died, 2: None, 3: None}


def test_an_item_that_raises_is_lost_and_its_process_goes_on(tasks):
    with crew_of(tasks.taking_roots, 2) as crew:
        outcomes = dict(crew.outcomes([4.0, -1.0, 9.0]))

    assert outcomes == {0: 2.0, 1: Lost("ValueError: math domain error"), 2: 3.0}


def test_a_task_that_cannot_be_opened_is_an_error(tasks):
    with (
        crew_of(tasks.unopenable, 2) as crew,
        pytest.raises(RuntimeError, match="there is no such thing"),
    ):
        list(crew.outcomes([1, 2]))


def test_a_task_whose_opening_kills_the_process_is_an_error(tasks):
    with (
        crew_of(tasks.deadly_to_open, 2) as crew,
        pytest.raises(ChildProcessError, match=r"signal 6 \(SIGABRT\) before it could begin"),
    ):
        list(crew.outcomes([1, 2]))


def test_what_must_stop_leaves_out_what_is_not_done_and_the_crew_serves_on(tasks):
    done = []

    with crew_of(tasks.napping, 2) as crew:
        for position, _ in crew.outcomes([0.0, 600.0, 600.0], lambda: bool(done)):
            done.append(position)
        assert done == [0]
        assert [position for position, _ in crew.outcomes([0.0, 0.0, 0.0])]


def test_no_item_is_no_process(tasks):
    with crew_of(tasks.unopenable, 2) as crew:
        assert list(crew.outcomes([])) == []
