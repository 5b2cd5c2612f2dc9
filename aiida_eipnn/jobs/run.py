"""Run the job of a folder and write down how far it came."""

import importlib
import json
import logging
import platform
import time
from pathlib import Path
from typing import Any

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.failures import InputsGoneError, is_out_of_memory, reason_of
from aiida_eipnn.jobs.place import ALONE, Place
from aiida_eipnn.jobs.spec import State, TrainJob
from aiida_eipnn.jobs.stop import Stop, heeding_signals
from aiida_eipnn.science.arrays import write_whole
from aiida_eipnn.science.versions import versions_of

PACKAGES = ("numpy", "ase", "vesin", "torch", "kimpy", "numba", "safetensors")

# What any of several processes may say of the job.
_FAILURES = (State.FAILED, State.OUT_OF_MEMORY, State.INPUTS_GONE)

LOGGER = logging.getLogger(__name__)


def run_job(folder: Path, place: Place = ALONE) -> State:
    """Run ``folder/job.json``; every outcome, an exception too, ends in ``status.json``.

    Until the job ends the status says ``running``: found after the end, it means that the job
    was killed. Of several processes the first one says how it ended, and any other that it failed.

    A job whose time is up stops by itself, and so does one that gets a signal of
    :data:`~aiida_eipnn.jobs.stop.SIGNALS`: ``interrupted``, with a checkpoint to go on from.

    Parameters
    ----------
    folder
        Of the job.
    place
        Of this process among those that run it.
    """
    start = time.monotonic()
    with heeding_signals():
        if place.is_first:
            _write_status(folder, State.RUNNING, kind=None, reason="", seconds=0.0)
        state, facts = _run(folder, place)
    if place.is_first or state in _FAILURES:
        _end(folder, state, place, **facts, seconds=time.monotonic() - start)
    return state


def _run(folder: Path, place: Place) -> tuple[State, dict[str, Any]]:
    kind, reason = None, ""
    try:
        job = spec.read_job(folder / spec.JOB)
        kind = job.kind
        require_inputs(folder)
        module = importlib.import_module(f"aiida_eipnn.jobs.{kind}")
        stop = Stop.after(job.max_seconds)
        state = State.DONE
        if isinstance(job, TrainJob):
            state = module.run(job, folder, stop, place)
        elif place.is_first:
            # It does it all.
            state = module.run(job, folder, stop)
        if state is State.INTERRUPTED:
            reason = stop.reason
            LOGGER.info("stopped before the end: %s", reason)
    except Exception as error:
        # The last station of a job: whatever went wrong must reach the user as data.
        LOGGER.exception("the job failed")
        state, reason = _state_of(error, place), reason_of(error)
    return state, {"kind": kind, "reason": reason}


def require_inputs(folder: Path) -> None:
    """Raise ``InputsGoneError`` if inputs that the job shares with others are gone."""
    links = (path for path in sorted(folder.glob("*/**/*")) if path.is_symlink())
    if gone := [path for path in links if not path.exists()]:
        first = gone[0].relative_to(folder).as_posix()
        raise InputsGoneError(f"{first} was {gone[0].readlink()}, and {len(gone) - 1} more files")


def _state_of(error: Exception, place: Place) -> State:
    if isinstance(error, InputsGoneError):
        return State.INPUTS_GONE
    lost_another = place.count > 1 and isinstance(error, ConnectionError)
    if lost_another:
        return State.KILLED
    return State.OUT_OF_MEMORY if is_out_of_memory(error) else State.FAILED


def _end(folder: Path, state: State, place: Place, **facts: Any) -> None:
    """Write how the job ended, unless another process said so before: it ended this one."""
    if place.count > 1 and _state_now(folder) is not State.RUNNING:
        return
    _write_status(folder, state, **facts)


def _state_now(folder: Path) -> State:
    path = folder / spec.STATUS
    # The first process may not even have begun.
    return State(json.loads(path.read_text())["state"]) if path.exists() else State.RUNNING


def _write_status(folder: Path, state: State, **facts: Any) -> None:
    status = {
        "state": str(state),
        "versions": versions_of(PACKAGES),
        "host": platform.node(),
        **facts,
    }
    write_whole(folder / spec.STATUS, json.dumps(status, indent=1, sort_keys=True) + "\n")
