"""Call foreign code in another process, which may die or hang without taking this one along."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, Generic, NamedTuple, TypeVar

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
# Seconds between two looks at whether to stop.
_POLL = 0.5


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
        sender.send(_outcome(task, item))


class Crew(Generic[Item, Outcome]):
    """Processes that call a task for one item after the other, side by side.

    Parameters
    ----------
    open_task
        A function of a module, or a partial one: each process calls it with its number, from 0 on,
        for the task that it then calls. It, the items and what the task returns are pickled.
    n_workers
        Processes at a time, at most.
    """

    def __init__(
        self, open_task: Callable[[int], Callable[[Item], Outcome]], n_workers: int
    ) -> None:
        self.open_task, self.n_workers = open_task, n_workers
        self._busy: list[_Worker] = []
        self._idle: list[_Worker] = []

    def outcomes(
        self, items: Sequence[Item], must_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, Outcome | Lost]]:
        """Call the task for each item.

        Parameters
        ----------
        items
            What to call it with.
        must_stop
            Asked twice a second, and whenever an item is done; what is not done then is left out.

        Yields
        ------
        tuple
            The position of the item and what the task returned, as they come; :class:`Lost` where
            it raised and where its process died.

        Raises
        ------
        Exception
            What ``open_task`` raised.
        ChildProcessError
            If the process of one died of it.
        """
        waiting = deque(enumerate(items))
        try:
            while (waiting or self._busy) and not must_stop():
                self._hand_out(waiting)
                done = list(self._finished())
                # Nobody waits while these are looked at.
                self._hand_out(waiting)
                yield from done
        finally:
            # What is under way now is wanted no more.
            _end_all(self._busy)

    def close(self) -> None:
        """End the processes."""
        _end_all(self._busy)
        _end_all(self._idle)

    def _hand_out(self, waiting: "deque[tuple[int, Item]]") -> None:
        while waiting and len(self._busy) < self.n_workers:
            position, item = waiting.popleft()
            worker = self._idle.pop() if self._idle else self._start()
            # Where it has died, to hear from it tells.
            with suppress(OSError):
                worker.connection.send(item)
            self._busy.append(worker._replace(position=position))

    def _start(self) -> "_Worker":
        preload()
        taken = {worker.number for worker in (*self._busy, *self._idle)}
        number = min(set(range(self.n_workers)) - taken)
        here, there = CONTEXT.Pipe()
        process = CONTEXT.Process(
            target=_serve_any, args=(self.open_task, number, there), daemon=True
        )
        process.start()
        there.close()
        return _Worker(number, process, here)

    def _finished(self) -> Iterator[tuple[int, Any]]:
        """Wait a while; yield what has been done."""
        ready = wait([worker.connection for worker in self._busy], _POLL)
        for worker in [worker for worker in self._busy if worker.connection in ready]:
            outcome = _receive(worker)
            self._busy.remove(worker)
            if isinstance(outcome, _Opening):
                self._busy.append(worker._replace(is_open=True))
                continue
            if worker.process.is_alive():
                self._idle.append(worker)
            else:
                _end_all([worker])
            yield worker.position, outcome


class _Worker(NamedTuple):
    """A process, whether it has its task, and the position of the item that it has."""

    number: int
    process: ForkServerProcess
    connection: Connection
    is_open: bool = False
    position: int = -1


@dataclass(frozen=True, slots=True)
class _Opening:
    """What a process sends before all else: why it has no task, or nothing."""

    error: Exception | None = None


def _receive(worker: _Worker) -> Any:
    try:
        outcome = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        how = how_it_ended(worker.process.exitcode)
        if worker.is_open:
            return Lost(how)
        raise ChildProcessError(f"{how} before it could begin") from None
    if isinstance(outcome, _Opening) and outcome.error is not None:
        raise outcome.error
    return outcome


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        worker = workers.pop()
        worker.process.kill()
        worker.process.join()
        worker.connection.close()


def _serve_any(
    open_task: Callable[[int], Callable[[Any], Any]], number: int, connection: Connection
) -> None:
    """Send the outcome of each item that comes; runs in the other process."""
    end_with_parent()
    try:
        task = open_task(number)
    except Exception as error:  # foreign code is opened here
        _send_error(connection, error)
        return
    connection.send(_Opening())
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(_outcome(task, item))


def _send_error(connection: Connection, error: Exception) -> None:
    try:
        connection.send(_Opening(error))
    except Exception:  # what others raise need not be fit for another process
        connection.send(_Opening(RuntimeError(f"{type(error).__name__}: {error}")))


def _outcome(task: Callable[[Any], Any], item: Any) -> Any:
    try:
        return task(item)
    except Exception as error:  # whatever foreign code raises is a reason, not a crash
        return Lost(" ".join(f"{type(error).__name__}: {error}".split()))


def end_with_parent() -> None:
    """See to it that this process ends when the one that started it is gone."""
    leave_ending_to_parent()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    """End this process when the one with that sentinel is gone."""
    wait([sentinel])
    os._exit(1)


def leave_ending_to_parent() -> None:
    """Let an alarm end this process, and Ctrl-C, which goes to the whole group, not."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def how_it_ended(exitcode: int | None) -> str:
    """Say how a process ended, by its exit code."""
    if exitcode is not None and exitcode < 0:
        return f"the process died with signal {-exitcode} ({signal.Signals(-exitcode).name})"
    return f"the process ended with exit code {exitcode}"
