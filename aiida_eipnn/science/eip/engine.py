"""Label configurations with many EIPs, in processes that they may take down.

A potential may raise, hang, return nonsense, eat the memory or abort the interpreter. Whatever it
does, its labels become *missing with a reason*; what it had labelled before is kept, and the other
EIPs go on.

The pool is cut into chunks (:mod:`~.store`). One process labels a chunk with all EIPs, so that they
share their neighbour lists. Where it dies, the EIP at work gets processes of its own from then on,
and labels that chunk one configuration at a time, so that only the one that it dies of is lost.
"""

import ctypes
import resource
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from aiida_eipnn.science.arrays import FloatArray, IntArray, load_arrays
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.batch import Batch, BatchLabels, Reach, cut_batches, reason_of
from aiida_eipnn.science.eip.isolation import CONTEXT, end_with_parent, how_it_ended, preload
from aiida_eipnn.science.eip.potential import EmpiricalPotential, open_potential
from aiida_eipnn.science.eip.store import (
    LABELLED,
    MISSING,
    REFUSED,
    ChunkArrays,
    Plan,
    Progress,
    Store,
    open_chunk,
)
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.outliers import NOT_FINITE, too_strong

# Configurations beyond this, or with closer atoms than MIN_CONTACT, are outside what EIPs were made
# for, and a DFT run of them seldom converges: such labels would only teach nonsense. SW silicon
# reaches 50 eV/Å in a dimer of 1.45 Å, Tersoff T3 at 1.5 Å; MIN_CONTACT is 1.33 Å there.
FORCE_LIMIT = 50.0

STRONG_FORCE = too_strong(FORCE_LIMIT)
MAX_DEATHS = 4

# Configurations that share neighbour lists: these fit into the cache of a core.
BATCH_ROWS = 100
BATCH_ATOMS = 4000

# What a process needs beside its models: the interpreter and the compiled lists.
DEFAULT_MEMORY = 4096.0

# Options of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 32 * 2**20

_NOBODY, _OPENING = -1, -1


@runtime_checkable
class BatchPotential(Protocol):
    """A potential that labels many configurations at once, on neighbour lists it shares."""

    @property
    def reach(self) -> Reach | None:
        """What it needs to know about the surroundings of an atom."""

    def label_batch(
        self, batch: Batch, rows: Iterable[int] | None = None, *, atomic_energies: bool = False
    ) -> BatchLabels:
        """Return what it says about these rows of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an EIP may take.

    Parameters
    ----------
    timeout
        Seconds for one configuration.
    memory
        MB for the process that it labels in.
    """

    timeout: float = 60.0
    memory: float = DEFAULT_MEMORY

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.memory <= 0:
            raise ValueError(
                f"an EIP needs time and memory: timeout (s) and memory (MB) must be above 0, not "
                f"{self.timeout:g} and {self.memory:g}"
            )


def label_with_eips(
    configurations: Configurations,
    eips: Sequence[str],
    *,
    n_workers: int = 1,
    limits: Limits | None = None,
    atomic_energies: bool = False,
) -> Labels:
    """Label every configuration with every EIP, and return all labels in memory.

    Parameters
    ----------
    configurations
        What to label.
    eips
        Names for :func:`~.potential.open_potential`; the sources of the labels, in this order.
    n_workers
        Processes that work side by side.
    limits
        What an EIP may take.
    atomic_energies
        Also keep the energy of each atom, where an EIP tells it.

    Returns
    -------
    Labels
        As :func:`label_into` makes them.

    Raises
    ------
    ValueError
        If there is no EIP, or one twice, or less than one worker.
    """
    with tempfile.TemporaryDirectory(prefix="eipnn-labels-") as scratch:
        folder = Path(scratch)
        store = label_into(
            folder / "chunks",
            configurations,
            eips,
            n_workers=n_workers,
            limits=limits,
            atomic_energies=atomic_energies,
        )
        store.write_labels(folder / "labels")
        return Labels.from_arrays(load_arrays(folder / "labels"))


def label_into(
    folder: Path,
    configurations: Configurations,
    eips: Sequence[str],
    *,
    n_workers: int = 1,
    limits: Limits | None = None,
    atomic_energies: bool = False,
    must_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] | None = None,
    progress_interval: float = 10.0,
) -> Store:
    """Label every configuration with every EIP, in memory that does not grow with the pool.

    The labels do not depend on ``n_workers``, on the order of the configurations, or on whether a
    run was interrupted and continued.

    Parameters
    ----------
    folder
        Where labels are kept while they are made. What an interrupted run left here is not made
        again.
    configurations, eips, n_workers, limits, atomic_energies
        As for :func:`label_with_eips`.
    must_stop
        Asked twice a second; once it says so the rest stays ``not run``.
    on_progress
        Called about every ``progress_interval`` seconds, and at the end.

    Returns
    -------
    Store
        A label is missing, with its reason, where the EIP raises, dies, takes too long or too much
        memory (it goes on after that configuration, up to ``MAX_DEATHS`` times), cannot be opened
        or lacks an element; where energy or forces are not finite; where a force exceeds
        ``FORCE_LIMIT``; and for every EIP where atoms overlap (``MIN_CONTACT``), and where a
        position is no number or a periodic cell has no volume.

    Raises
    ------
    ValueError
        If there is no EIP, or one twice, or less than one worker, or other labels in ``folder``.
    """
    _check(eips, n_workers)
    preload()
    plan = Plan.of(configurations, eips, n_workers, atomic_energies=atomic_energies)
    store = Store.open(folder, plan, configurations)
    crew = _Crew(store, n_workers, limits or Limits())
    reported = time.monotonic()
    try:
        while crew.work(must_stop):
            if on_progress and time.monotonic() - reported > progress_interval:
                on_progress(store.progress())
                reported = time.monotonic()
    finally:
        crew.stop()
    if on_progress:
        on_progress(store.progress())
    return store


class _Crew:
    """The processes that label a pool, and what they have to do."""

    def __init__(self, store: Store, n_workers: int, limits: Limits) -> None:
        self.store, self.n_workers, self.limits = store, n_workers, limits
        self.chunks = deque(range(store.n_chunks))
        self.waiting: deque[_Task] = deque()
        self.running: list[_Task] = []
        # EIPs that have died once do so alone the next time, and some may do no more.
        self.loners: set[int] = set()
        self.given_up: dict[int, str] = {}
        self.deaths = dict.fromkeys(range(len(store.plan.eips)), 0)
        self.accidents = 0

    def work(self, must_stop: Callable[[], bool]) -> bool:
        """Go on until something happens; return whether there is more to do."""
        while len(self.running) < self.n_workers and self._find_task():
            self.running.append(self.waiting.popleft())
            self.running[-1].start()
        if not self.running or must_stop():
            return False
        _wait_for(self.running)
        for task in [task for task in self.running if task.step()]:
            self.running.remove(task)
            self._follow_up(task)
        return True

    def stop(self) -> None:
        """End all processes; what they have labelled stays."""
        for task in self.running:
            task.end()

    def _find_task(self) -> bool:
        """Open chunks until there is something to do; return whether there is."""
        while not self.waiting and self.chunks:
            chunk = self.chunks.popleft()
            arrays = self.store.begin(chunk)
            for column, reason in self.given_up.items():
                self.store.fail_rest(arrays, column, reason)
            columns = [
                column
                for column in range(len(self.store.plan.eips))
                if (arrays.state[column] == MISSING).any()
            ]
            together = [column for column in columns if column not in self.loners]
            groups = [together, *([column] for column in columns if column in self.loners)]
            self.waiting += [self._task(chunk, group) for group in groups if group]
        return bool(self.waiting)

    def _task(self, chunk: int, columns: list[int], *, one_by_one: bool = False) -> "_Task":
        return _Task(self.store, chunk, tuple(columns), self.limits, one_by_one=one_by_one)

    def _follow_up(self, task: "_Task") -> None:
        """See to what a process has left undone."""
        arrays = self.store.arrays(task.chunk, mode="r+")
        undone = [column for column in task.columns if (arrays.state[column] == MISSING).any()]
        culprit = task.now.column
        if not undone:
            return
        if culprit == _NOBODY:
            self._handle_accident(task, arrays, undone)
            return
        if others := [column for column in undone if column != culprit]:
            self.waiting.appendleft(self._task(task.chunk, others))
        if culprit in undone:
            self._handle_death(task, arrays, culprit)

    def _handle_accident(self, task: "_Task", arrays: ChunkArrays, undone: list[int]) -> None:
        """Go on where a process died with no EIP at work: lists too long for the memory, say."""
        reason = f"{task.how_it_ended} before an EIP was asked"
        if task.now.place < 0:
            self.accidents += 1
        elif task.now.n_rows == 1:
            for column in undone:
                self.store.fail(arrays, column, task.now.place, reason)
        for column in undone if self.accidents >= MAX_DEATHS else []:
            self._give_up(arrays, column, reason)
        if left := [column for column in undone if (arrays.state[column] == MISSING).any()]:
            self.waiting.appendleft(self._task(task.chunk, left, one_by_one=task.now.place >= 0))

    def _handle_death(self, task: "_Task", arrays: ChunkArrays, culprit: int) -> None:
        """Find out which configuration an EIP died of, and go on after it."""
        self.loners.add(culprit)
        if task.now.place == _OPENING:
            self._give_up(arrays, culprit, f"{task.how_it_ended} while it opened the potential")
            return
        # In company it may have been another EIP that spoilt the memory.
        if len(task.columns) == 1 and task.now.n_rows == 1:
            self.store.fail(
                arrays, culprit, task.now.place, f"{task.how_it_ended} on this configuration"
            )
            self.deaths[culprit] += 1
        if (n := self.deaths[culprit]) >= MAX_DEATHS:
            self._give_up(arrays, culprit, f"given up: it ended its process on {n} configurations")
        elif (arrays.state[culprit] == MISSING).any():
            self.waiting.appendleft(self._task(task.chunk, [culprit], one_by_one=True))

    def _give_up(self, arrays: ChunkArrays, column: int, reason: str) -> None:
        self.given_up[column] = reason
        self.store.fail_rest(arrays, column, reason)


class _Task:
    """Some EIPs at work on a chunk, in a process of their own."""

    def __init__(
        self,
        store: Store,
        chunk: int,
        columns: tuple[int, ...],
        limits: Limits,
        *,
        one_by_one: bool,
    ) -> None:
        self.store, self.chunk, self.columns = store, chunk, columns
        self.limits, self.one_by_one = limits, one_by_one
        self.how_it_ended = ""

    def start(self) -> None:
        """Start the process."""
        self.arrays = self.store.arrays(self.chunk, mode="r+")
        self.now = _Now.empty()
        self.reports, sender = CONTEXT.Pipe(duplex=False)
        order = _Order(
            folder=self.store.path(self.chunk),
            configurations=self.store.part(self.chunk),
            eips={column: self.store.plan.eips[column] for column in self.columns},
            limits=self.limits,
            one_by_one=self.one_by_one,
            atomic_energies=self.store.plan.atomic_energies,
        )
        self.process = CONTEXT.Process(
            target=_work, args=(order, self.now.memory, sender), daemon=True
        )
        self.process.start()
        sender.close()

    @property
    def time_left(self) -> float:
        """Seconds until the EIP at work has taken too long."""
        since = self.now.since
        return self.limits.timeout - (time.monotonic() - since if since else 0.0)

    def step(self) -> bool:
        """Take in what there is; return whether the process has ended, or end it."""
        self._read_reports()
        if self.process.exitcode is None:
            if self.time_left <= 0:
                self.how_it_ended = f"it gave no label within {self.limits.timeout:g} s"
            elif (used := _memory_of(self.process.pid)) > self.limits.memory:
                self.how_it_ended = f"it took {used:.0f} MB, more than {self.limits.memory:g} MB,"
            else:
                return False
        self.end()
        return True

    def end(self) -> None:
        """End the process and take in what it left."""
        if not self.how_it_ended:
            self.process.join(0.0)
            self.how_it_ended = how_it_ended(self.process.exitcode)
        # Ended already, or killed now: in both cases nothing more will be written.
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.join()
        self._read_reports()
        self.reports.close()

    def _read_reports(self) -> None:
        with suppress(EOFError, OSError):
            while self.reports.poll():
                column, place, reason = self.reports.recv()
                if place is None:
                    self.store.fail_rest(self.arrays, column, reason)
                else:
                    self.store.fail(self.arrays, column, place, reason)


@dataclass(slots=True)
class _Now:
    """What a process is doing right now, in memory that outlives it."""

    memory: Any

    @classmethod
    def empty(cls) -> "_Now":
        now = cls(CONTEXT.RawArray("d", 4))
        now.memory[0] = now.memory[1] = -1.0
        return now

    def begin(self, column: int, place: int, n_rows: int) -> None:
        """Write down which EIP begins with which configurations."""
        self.memory[0], self.memory[1], self.memory[2] = column, place, n_rows
        self.memory[3] = time.monotonic()

    @property
    def column(self) -> int:
        return int(self.memory[0])

    @property
    def place(self) -> int:
        return int(self.memory[1])

    @property
    def n_rows(self) -> int:
        return int(self.memory[2])

    @property
    def since(self) -> float:
        return float(self.memory[3])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What a process has to do."""

    folder: Path
    configurations: Configurations
    eips: Mapping[int, str]
    limits: Limits
    one_by_one: bool
    atomic_energies: bool


@dataclass(slots=True)
class _Worker:
    """What a process works with."""

    order: _Order
    now: _Now
    reports: Connection
    arrays: ChunkArrays
    potentials: dict[int, EmpiricalPotential] = field(default_factory=dict)

    def open_potentials(self) -> None:
        """Open the EIPs; whatever one raises is a reason, not a crash."""
        for column, name in self.order.eips.items():
            self._begin(column, _OPENING, 0)
            try:
                self.potentials[column] = open_potential(name)
            except Exception as error:
                self.reports.send((column, None, reason_of(error)))

    def label(self, rows: slice) -> None:
        """Label some configurations with every EIP."""
        part = self.order.configurations.take(range(rows.start, rows.stop))
        # What goes wrong before an EIP is at work is nobody's fault.
        self._begin(_NOBODY, rows.start, len(part))
        batch = Batch(part, filter(None, map(_reach_of, self.potentials.values())))
        faults = batch.faults()
        for column, potential in self.potentials.items():
            missing = np.flatnonzero(self.arrays.state[column, rows] == MISSING)
            for row in missing:
                if int(row) in faults:
                    self._refuse(column, rows.start + int(row), faults[int(row)])
            todo = np.array([row for row in missing if int(row) not in faults], dtype=np.int64)
            if len(todo):
                self._label_with(column, potential, batch, todo, rows.start)

    def _label_with(
        self,
        column: int,
        potential: EmpiricalPotential,
        batch: Batch,
        todo: IntArray,
        start: int,
    ) -> None:
        """Label with one EIP; one by one if it can do no other, or must."""
        together = isinstance(potential, BatchPotential) and not self.order.one_by_one
        for rows in [todo] if together else todo[:, None]:
            self._begin(column, start + int(rows[0]), len(rows))
            began = time.perf_counter()
            if isinstance(potential, BatchPotential):
                labels = potential.label_batch(
                    batch, rows, atomic_energies=self.order.atomic_energies
                )
            else:
                labels = BatchLabels.empty(batch.configurations)
                labels.ask(potential.label, batch.configurations, int(rows[0]))
            self._take_in(column, labels, batch.configurations, rows, start)
            self.arrays.seconds[column] += time.perf_counter() - began

    def _take_in(
        self, column: int, labels: BatchLabels, part: Configurations, rows: IntArray, start: int
    ) -> None:
        """Write down labels, or why there are none."""
        reasons = _why_not(labels, part, rows) | labels.errors
        first = self._first_atom(start)
        for row in map(int, rows):
            if row in reasons:
                self._refuse(column, start + row, reasons[row])
                continue
            atoms = slice(part.offsets[row], part.offsets[row + 1])
            place = slice(first + atoms.start, first + atoms.stop)
            self.arrays.energy[column, start + row] = labels.energy[row]
            self.arrays.stress[column, start + row] = labels.stress[row]
            self.arrays.forces[column, place] = labels.forces[atoms]
            if self.order.atomic_energies:
                self.arrays.atomic_energy[column, place] = labels.atomic_energy[atoms]
            self.arrays.state[column, start + row] = LABELLED

    def _first_atom(self, start: int) -> int:
        return int(self.order.configurations.offsets[start])

    def _refuse(self, column: int, place: int, reason: str) -> None:
        self.arrays.state[column, place] = REFUSED
        self.reports.send((column, place, reason))

    def _begin(self, column: int, place: int, n_rows: int) -> None:
        """Say who is at work, and see to it that this process ends even if nobody ends it."""
        self.now.begin(column, place, n_rows)
        # A few seconds later than the other process would end it, for when that one was killed.
        signal.setitimer(signal.ITIMER_REAL, self.order.limits.timeout + 5.0)


def _work(order: _Order, memory: Any, reports: Connection) -> None:
    """Label what is missing of a chunk; runs in a process of its own."""
    end_with_parent()
    _limit_memory(order.limits.memory)
    keep_freed_memory()
    worker = _Worker(order, _Now(memory), reports, open_chunk(order.folder, "r+"))
    worker.open_potentials()
    rows, atoms = (1, 1) if order.one_by_one else (BATCH_ROWS, BATCH_ATOMS)
    for part in cut_batches(order.configurations.offsets, rows, atoms):
        worker.label(part)


def _why_not(labels: BatchLabels, part: Configurations, rows: IntArray) -> dict[int, str]:
    """Return the rows whose labels must not be used, with the reason."""
    with np.errstate(over="ignore"):
        strength = np.linalg.norm(labels.forces, axis=1)
    reasons = {}
    for row in map(int, rows):
        strongest = _largest(strength[part.offsets[row] : part.offsets[row + 1]])
        if not (np.isfinite(labels.energy[row]) and np.isfinite(strongest)):
            reasons[row] = NOT_FINITE
        elif strongest > FORCE_LIMIT:
            reasons[row] = STRONG_FORCE
    return reasons


def _largest(values: FloatArray) -> float:
    """Return the largest value, NaN if one of them is."""
    return float(values.max(initial=0.0))


def _reach_of(potential: EmpiricalPotential) -> Any:
    return potential.reach if isinstance(potential, BatchPotential) else None


def keep_freed_memory() -> None:
    """Keep freed memory for the next batch: to get it anew takes as long as some models need.

    Where the C library is not glibc, nothing happens.
    """
    with suppress(OSError, AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            set_option(option, _KEPT_BYTES)


def _limit_memory(megabytes: float) -> None:
    """Refuse this process more memory, where the system can: it may take it faster than is seen."""
    with suppress(ValueError, OSError):
        size = int(megabytes * 2**20)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def _memory_of(pid: int | None) -> float:
    """Return the resident memory of a process, in MB; 0 where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    return 0.0


def _wait_for(running: Sequence[_Task]) -> None:
    """Sleep until a process reports or ends, or something is due."""
    due = [0.5, *(task.time_left for task in running)]
    # A process that has much to report waits until somebody reads it.
    wakers = [waker for task in running for waker in (task.process.sentinel, task.reports)]
    wait(wakers, max(min(due), 0.0))


def _check(eips: Sequence[str], n_workers: int) -> None:
    if not eips:
        raise ValueError("no EIP to label with: give the name of at least one")
    if twice := sorted({name for name in eips if list(eips).count(name) > 1}):
        raise ValueError(f"each EIP labels once, but these are given twice: {twice}")
    if n_workers < 1:
        raise ValueError(f"labelling needs at least one worker, not {n_workers}")
