"""Foreign code that dies, hangs or raises loses its own outcome only."""

import math
import signal
import time

from aiida_eipnn.science.eip.isolation import LEFT_TO_PARENT, Lost, each_apart

# Ignored by default.
HARMLESS = signal.SIGCHLD


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
