"""When a job has to stop before it is done: its time is up, or a signal asks for it."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from aiida_eipnn.science.eip.isolation import LEFT_TO_PARENT

# What schedulers send some time before they kill: SIGTERM where a job is preempted, cancelled or
# out of time (Slurm, PBS, LSF), the others where users ask for it (``--signal``, ``-notify``).
SIGNALS = LEFT_TO_PARENT

# What starts a job in a script of the shell: the shell must not die of what the job heeds.
HEED_SIGNALS = f"trap : {' '.join(number.name.removeprefix('SIG') for number in SIGNALS)}"

_received: list[int] = []


@dataclass(frozen=True, slots=True)
class Stop:
    """Tells whether this process has to stop.

    Parameters
    ----------
    deadline
        On the clock of :func:`time.monotonic`, which all processes of a node share.
    """

    deadline: float = math.inf

    @classmethod
    def after(cls, seconds: float | None) -> "Stop":
        """Return what asks to stop that many seconds from now; ``None`` is never."""
        return cls() if seconds is None else cls(time.monotonic() + seconds)

    def __call__(self) -> bool:
        """Return whether the time is up, or a signal came."""
        return was_asked() or time.monotonic() >= self.deadline

    @property
    def reason(self) -> str:
        """What asked to stop."""
        return signal.Signals(_received[0]).name if was_asked() else "the time is up"


NEVER = Stop()


def was_asked() -> bool:
    """Return whether a signal asked this process to stop."""
    return bool(_received)


@contextmanager
def heeding_signals() -> Iterator[None]:
    """Let a signal that announces the end ask to stop, and not end this process."""
    _received.clear()
    before = {number: signal.signal(number, _receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _receive(number: int, _: FrameType | None) -> None:
    # Nothing else: it may come in the middle of anything, a write to the log too.
    _received.append(number)
