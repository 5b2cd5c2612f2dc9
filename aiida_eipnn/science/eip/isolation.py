"""Call foreign code in another process, which may die or hang without taking this one along."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

CONTEXT = multiprocessing.get_context("forkserver")
# The processes are forked from one that has these modules, so that each starts in a moment.
PRELOADED = ["aiida_eipnn.science.eip.engine", "aiida_eipnn.science.eip.kim"]
# Schedulers announce the end of a job to all of its processes: what dies of it would look like the
# fault of an EIP.
LEFT_TO_PARENT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# The other process ends itself this much later than it would be ended: should this one be killed,
# nobody else does it.
_GRACE = 5.0


@dataclass(frozen=True, slots=True)
class Lost:
    """What is there instead of an outcome.

    Parameters
    ----------
    reason
        Why there is none, in one line.
    """

    reason: str


def preload() -> None:
    """Load what processes need before the first of them is started."""
    CONTEXT.set_forkserver_preload(PRELOADED)
    # It lets SIGTERM through once it has started.
    resource_tracker.ensure_running()
    # A process hands on to those it starts which signals do not reach it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_PARENT)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def each_apart(
    task: Callable[[Item], Outcome], items: Sequence[Item], *, seconds: float
) -> Iterator[tuple[Item, Outcome | Lost]]:
    """Call ``task`` for each item, in order, in another process.

    One process serves all items as long as it lives; the next item gets a new one.

    Parameters
    ----------
    task
        A function of a module. It, the items and what it returns are pickled.
    items
        What to call it with.
    seconds
        How long one call may take.

    Yields
    ------
    tuple
        The item, and what ``task`` returned; :class:`Lost` where it raised, where its process died
        and where it took too long.
    """
    preload()
    waiting = list(items)
    while waiting:
        done = 0
        for outcome in _outcomes_of_one_process(task, waiting, seconds):
            yield waiting[done], outcome
            done += 1
        waiting = waiting[done:]


def _outcomes_of_one_process(
    task: Callable[[Any], Any], items: Sequence[Any], seconds: float
) -> Iterator[Any]:
    """Yield the outcomes until the items or the process end; at least one."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_serve, args=(task, items, sender, seconds), daemon=True)
    process.start()
    sender.close()
    try:
        for _ in items:
            if not receiver.poll(seconds):
                yield Lost(f"not done within {seconds:g} s")
                return
            try:
                yield receiver.recv()
            except EOFError:
                process.join()
                yield Lost(how_it_ended(process.exitcode))
                return
    finally:
        process.kill()
        process.join()
        receiver.close()


def _serve(
    task: Callable[[Any], Any], items: Sequence[Any], sender: Connection, seconds: float
) -> None:
    """Send the outcome of each item; runs in the other process."""
    leave_ending_to_parent()
    for item in items:
        signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE)
        try:
            outcome: Any = task(item)
        except Exception as error:  # whatever foreign code raises is a reason, not a crash
            outcome = Lost(" ".join(f"{type(error).__name__}: {error}".split()))
        sender.send(outcome)


def leave_ending_to_parent() -> None:
    """Let an alarm end this process, and Ctrl-C, which goes to the whole group, not."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def how_it_ended(exitcode: int | None) -> str:
    """Say how a process ended, by its exit code."""
    if exitcode is not None and exitcode < 0:
        return f"the process died with signal {-exitcode} ({signal.Signals(-exitcode).name})"
    return f"the process ended with exit code {exitcode}"
