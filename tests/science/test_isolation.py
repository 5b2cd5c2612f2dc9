"""Foreign code that dies, hangs or raises loses its own outcome only."""

import math
import signal
import time

from aiida_eipnn.science.eip.isolation import Lost, each_apart

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
