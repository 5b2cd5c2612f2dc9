"""Tasks for processes that run side by side: these have to find them in a module."""

import math
import os
import signal
import time
from collections.abc import Callable
from functools import partial


def nap(number: int, seconds: float) -> tuple[int, float]:
    time.sleep(seconds)
    return number, seconds


def napping(number: int) -> Callable[[float], tuple[int, float]]:
    return partial(nap, number)


def raising_signals(number: int) -> Callable[[int], None]:
    return signal.raise_signal


def taking_roots(number: int) -> Callable[[float], float]:
    return math.sqrt


def telling_its_process(number: int) -> Callable[[int], int]:
    return lambda _: os.getpid()


def unopenable(number: int) -> Callable[[int], None]:
    raise RuntimeError("there is no such thing")


def deadly_to_open(number: int) -> Callable[[int], None]:
    os.abort()
