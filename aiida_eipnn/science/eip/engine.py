"""Label configurations with many EIPs, one process each: none can take the others down.

A potential may raise, hang, return nonsense or abort the interpreter. Whatever it does, its labels
become *missing with a reason*; what it had labelled before is kept, and the other EIPs go on.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations, ragged_rows
from aiida_eipnn.science.eip.potential import Label, open_potential
from aiida_eipnn.science.gate import MIN_CONTACT, geometry_fault, overlap
from aiida_eipnn.science.labels import NOT_RUN, Labels

# Configurations beyond this, or with closer atoms than MIN_CONTACT, are outside what EIPs were made
# for, and a DFT run of them seldom converges: such labels would only teach nonsense. SW silicon
# reaches 50 eV/Å in a dimer of 1.45 Å, Tersoff T3 at 1.5 Å; MIN_CONTACT is 1.33 Å there.
FORCE_LIMIT = 50.0

OVERLAP = f"two atoms are closer than {MIN_CONTACT:g} of the sum of their covalent radii"
STRONG_FORCE = f"a force is above {FORCE_LIMIT:g} eV/Å"
NOT_FINITE = "energy or forces are not finite"
MAX_RESTARTS = 3

_MISSING, _OK, _FAILED = 0, 1, 2
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a labelling came.

    Parameters
    ----------
    labels
        All labels, ``not run`` where an EIP has not got to the configuration.
    seconds
        Wall time each EIP has taken so far, by name.
    """

    labels: Labels
    seconds: dict[str, float]


def label_with_eips(
    configurations: Configurations,
    eips: Sequence[str],
    *,
    n_workers: int = 1,
    timeout: float = 3600.0,
    deadline: float | None = None,
    previous: Labels | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    progress_interval: float = 10.0,
) -> Labels:
    """Label every configuration with every EIP.

    The labels do not depend on ``n_workers``, on the order of the configurations, or on whether a
    run was interrupted and continued.

    Parameters
    ----------
    configurations
        What to label.
    eips
        Names for :func:`~.potential.open_potential`; the sources of the labels, in this order.
    n_workers
        EIPs that work side by side, each in a process of its own.
    timeout
        Seconds that one EIP may take for the whole set.
    deadline
        Stop by then, on the clock of :func:`time.monotonic`; the rest stays ``not run``.
    previous
        Labels of an interrupted run: only what is ``not run`` there, or not there, is computed.
    on_progress
        Called about every ``progress_interval`` seconds, and at the end.

    Returns
    -------
    Labels
        A label is missing, with its reason, where the EIP raises, dies (it goes on after that
        configuration, at most ``MAX_RESTARTS`` times), runs out of time, cannot be opened or lacks
        an element; where energy or forces are not finite; where a force exceeds ``FORCE_LIMIT``;
        and for every EIP where atoms overlap (``MIN_CONTACT``), and where
        a position is no number or a periodic cell has no volume.

    Raises
    ------
    ValueError
        If there is no EIP, or one twice, or less than one worker.
    """
    _check(eips, n_workers)
    # The processes are forked from one that has these modules, so that each starts in a moment.
    _CONTEXT.set_forkserver_preload([__name__, "aiida_eipnn.science.eip.kim"])
    board = _Board(configurations, eips, previous)
    board.refuse(_faults(configurations))
    waiting = deque(
        _Task(board, column, name, timeout)
        for column, name in enumerate(eips)
        if len(board.not_run(column))
    )
    running: list[_Task] = []
    reported = time.monotonic()
    try:
        while (waiting or running) and not _is_past(deadline):
            while waiting and len(running) < n_workers:
                running.append(waiting.popleft())
                running[-1].start()
            _wait_for(running, deadline)
            running = [task for task in running if not task.step()]
            if on_progress and time.monotonic() - reported > progress_interval:
                on_progress(board.progress(running))
                reported = time.monotonic()
    finally:
        for task in running:
            task.stop()
    if on_progress:
        on_progress(board.progress())
    return board.labels()


def _faults(configurations: Configurations) -> dict[int, str]:
    """Return the rows that no EIP is asked about, with the reason."""
    faults = {}
    for row in range(len(configurations)):
        atoms = configurations.atoms(row)
        if fault := geometry_fault(atoms, min_contact=0.0):
            faults[row] = fault
        elif overlap(atoms) is not None:
            # Without the distance, so that equal faults are counted together.
            faults[row] = OVERLAP
    return faults


class _Board:
    """The labels while they are being made."""

    def __init__(
        self, configurations: Configurations, eips: Sequence[str], previous: Labels | None
    ) -> None:
        empty = Labels.missing(configurations, eips)
        self.configurations = configurations
        self.sources, self.origins = empty.sources, empty.origins
        self.energy, self.forces, self.stress = empty.energy, empty.forces, empty.stress
        self.status = empty.status
        # Reasons are only ever appended, also over a restart, so that labels written to disk
        # before and after stay readable together.
        self.reasons = [NOT_RUN]
        self.seconds = dict.fromkeys(map(str, eips), 0.0)
        if previous is not None:
            self._take_over(previous)

    def _take_over(self, previous: Labels) -> None:
        """Copy what an earlier run labelled."""
        self.reasons = list(dict.fromkeys([*map(str, previous.reasons), NOT_RUN]))
        self.status[:] = self.reasons.index(NOT_RUN) + 1
        known = {str(name): row for row, name in enumerate(previous.ids)}
        both = [(row, known[name]) for row, name in enumerate(self._ids()) if name in known]
        new, old = np.array(both, dtype=np.int64).reshape(-1, 2).T
        atoms = ragged_rows(self.configurations.offsets, new)
        old_atoms = ragged_rows(previous.offsets, old)
        columns = {str(name): column for column, name in enumerate(previous.sources)}
        for column, source in enumerate(map(str, self.sources)):
            if source in columns:
                self.energy[new, column] = previous.energy[old, columns[source]]
                self.stress[new, column] = previous.stress[old, columns[source]]
                self.status[new, column] = previous.status[old, columns[source]]
                self.forces[column, atoms] = previous.forces[columns[source], old_atoms]

    def _ids(self) -> list[str]:
        return [str(name) for name in self.configurations.ids]

    def not_run(self, column: int) -> IntArray:
        """Return the rows that this EIP has still to label."""
        return np.flatnonzero(self.status[:, column] == self.reasons.index(NOT_RUN) + 1)

    def refuse(self, faults: Mapping[int, str]) -> None:
        """Give up configurations, by row, for all EIPs."""
        for column in range(len(self.sources)):
            for row in self.not_run(column).tolist():
                if row in faults:
                    self.fail(row, column, faults[row])

    def fail(self, row: int, column: int, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.status[row, column] = self.reasons.index(reason) + 1

    def set(self, row: int, column: int, label: Label) -> None:
        offsets = self.configurations.offsets
        self.energy[row, column], self.stress[row, column] = label.energy, label.stress
        self.forces[column, offsets[row] : offsets[row + 1]] = label.forces
        self.status[row, column] = 0

    def labels(self) -> Labels:
        return Labels(
            ids=self.configurations.ids,
            offsets=self.configurations.offsets,
            sources=self.sources,
            energy=self.energy.copy(),
            forces=self.forces.copy(),
            stress=self.stress.copy(),
            status=self.status.copy(),
            reasons=np.array(self.reasons, dtype=np.str_),
            origins=self.origins,
        )

    def progress(self, running: Sequence["_Task"] = ()) -> Progress:
        for task in running:
            task.harvest()
        return Progress(labels=self.labels(), seconds=dict(self.seconds))


@dataclass(slots=True)
class _Shared:
    """Where the process of one EIP leaves its labels, in memory that outlives it.

    Through a pipe, a process that dies or hangs would take the labels it has not sent with it.
    """

    energy: Any
    forces: Any
    stress: Any
    state: Any
    opened: Any

    @classmethod
    def empty(cls, n: int, n_atoms: int) -> "_Shared":
        return cls(
            energy=_CONTEXT.RawArray("d", n),
            forces=_CONTEXT.RawArray("d", 3 * n_atoms),
            stress=_CONTEXT.RawArray("d", 6 * n),
            state=_CONTEXT.RawArray("b", n),
            opened=_CONTEXT.RawValue("b", 0),
        )

    def views(self) -> tuple[FloatArray, FloatArray, FloatArray, Any]:
        """Return energy, forces, stress and state as arrays."""
        return (
            np.frombuffer(self.energy),
            np.frombuffer(self.forces).reshape(-1, 3),
            np.frombuffer(self.stress).reshape(-1, 6),
            np.frombuffer(self.state, dtype=np.int8),
        )


class _Task:
    """One EIP at work in a process of its own, restarted where the process dies."""

    def __init__(self, board: _Board, column: int, name: str, timeout: float) -> None:
        self.board, self.column, self.name, self.timeout = board, column, name, timeout
        self.rows = board.not_run(column)
        self.deaths = 0

    def start(self) -> None:
        """Start the first process."""
        self.part = self.board.configurations.take(self.rows)
        self.shared = _Shared.empty(len(self.part), len(self.part.numbers))
        self.harvested = np.zeros(len(self.part), dtype=bool)
        self.reasons: dict[int, str] = {}
        self.refused: str | None = None
        self.started = time.monotonic()
        self._launch()

    def _launch(self) -> None:
        self.shared.opened.value = 0
        self.reports, sender = _CONTEXT.Pipe(duplex=False)
        # A few seconds later than this process would end it, for when this one was killed.
        seconds = self.time_left + 5.0
        self.process = _CONTEXT.Process(
            target=_work,
            args=(self.name, self.part, self.shared, sender, max(seconds, 5.0)),
            daemon=True,
        )
        self.process.start()
        sender.close()

    @property
    def time_left(self) -> float:
        return self.timeout - (time.monotonic() - self.started)

    def step(self) -> bool:
        """Take in what there is; return whether this EIP is finished."""
        self._read_reports()
        self.board.seconds[self.name] = time.monotonic() - self.started
        if self.process.exitcode is None and self.time_left > 0:
            return False
        timed_out = self.process.exitcode is None
        self.stop()
        if self.refused is not None:
            self._fail_rest(self.refused)
        elif timed_out:
            self._fail_rest(f"no label within the {self.timeout:g} s this EIP may take")
        elif len(self._missing()):
            return self._handle_death()
        return True

    def stop(self) -> None:
        """End the process and take in what it left."""
        # Ended already, or killed now: in both cases nothing more will be written.
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.join()
        self._read_reports()
        self.harvest()
        self.reports.close()

    def harvest(self) -> None:
        """Put finished labels on the board."""
        energy, forces, stress, state = self.shared.views()
        offsets = self.part.offsets
        for place in np.flatnonzero((state != _MISSING) & ~self.harvested):
            row = int(self.rows[place])
            if state[place] == _OK:
                part = slice(offsets[place], offsets[place + 1])
                self.board.set(
                    row, self.column, Label(float(energy[place]), forces[part], stress[place])
                )
            elif int(place) in self.reasons:
                self.board.fail(row, self.column, self.reasons[int(place)])
            else:
                continue
            self.harvested[place] = True

    def _read_reports(self) -> None:
        with suppress(EOFError, OSError):
            while self.reports.poll():
                place, reason = self.reports.recv()
                if place is None:
                    self.refused = reason
                else:
                    self.reasons[place] = reason

    def _missing(self) -> IntArray:
        return np.flatnonzero(self.shared.views()[3] == _MISSING)

    def _handle_death(self) -> bool:
        """Blame the configuration at work, and go on after it; return whether to give up."""
        reason = _how_it_ended(self.process.exitcode)
        if not self.shared.opened.value:
            self._fail_rest(f"{reason} while it opened the potential")
            return True
        self._fail(int(self._missing()[0]), f"{reason} on this configuration")
        self.deaths += 1
        if self.deaths > MAX_RESTARTS:
            self._fail_rest(f"given up: the process died on {self.deaths} earlier configurations")
        if len(self._missing()) == 0:
            return True
        self._launch()
        return False

    def _fail(self, place: int, reason: str) -> None:
        self.shared.views()[3][place] = _FAILED
        self.harvested[place] = True
        self.board.fail(int(self.rows[place]), self.column, reason)

    def _fail_rest(self, reason: str) -> None:
        for place in self._missing():
            self._fail(int(place), reason)


def _work(
    name: str, part: Configurations, shared: _Shared, reports: Connection, seconds: float
) -> None:
    """Label what is missing; runs in a process of its own."""
    _end_in_time(seconds)
    energy, forces, stress, state = shared.views()
    try:
        potential = open_potential(name)
    except Exception as error:  # whatever a potential raises is a reason, not a crash
        reports.send((None, _reason_of(error)))
        return
    shared.opened.value = 1
    for place in np.flatnonzero(state == _MISSING):
        try:
            label = potential.label(part.atoms(int(place)))
            reason = _why_not(label)
        except Exception as error:
            reason = _reason_of(error)
        if reason:
            reports.send((int(place), reason))
            state[place] = _FAILED
            continue
        energy[place], stress[place] = label.energy, label.stress
        forces[part.offsets[place] : part.offsets[place + 1]] = label.forces
        state[place] = _OK


def _end_in_time(seconds: float) -> None:
    """See to it that this process ends, whatever the potential does and whoever kills the job."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    # Ctrl-C goes to the whole group: the parent decides what becomes of this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    """End this process when the one with that sentinel is gone: nobody will read the labels."""
    wait([sentinel])
    os._exit(1)


def _why_not(label: Label) -> str | None:
    """Return why a label must not be used, ``None`` where it may."""
    if not (np.isfinite(label.energy) and np.isfinite(label.forces).all()):
        return NOT_FINITE
    if np.linalg.norm(label.forces, axis=1).max(initial=0.0) > FORCE_LIMIT:
        return STRONG_FORCE
    return None


def _reason_of(error: Exception) -> str:
    """Return what an exception says, on one line."""
    text = " ".join(str(error).split())
    # A ValueError is how potentials say that they were asked for the wrong thing.
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"the process died with signal {-exitcode} ({signal.Signals(-exitcode).name})"
    return f"the process ended with exit code {exitcode}"


def _wait_for(running: Sequence[_Task], deadline: float | None) -> None:
    """Sleep until a process reports or ends, or something is due."""
    due = [0.5, *(task.time_left for task in running)]
    if deadline is not None:
        due.append(deadline - time.monotonic())
    # A process that has much to report waits until somebody reads it.
    wakers = [waker for task in running for waker in (task.process.sentinel, task.reports)]
    wait(wakers, max(min(due), 0.0))


def _is_past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _check(eips: Sequence[str], n_workers: int) -> None:
    if not eips:
        raise ValueError("no EIP to label with: give the name of at least one")
    if twice := sorted({name for name in eips if list(eips).count(name) > 1}):
        raise ValueError(f"each EIP labels once, but these are given twice: {twice}")
    if n_workers < 1:
        raise ValueError(f"labelling needs at least one worker, not {n_workers}")
