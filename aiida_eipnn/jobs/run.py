"""Run the job of a folder and write down how far it came."""

import importlib
import json
import logging
import platform
import time
from pathlib import Path
from typing import Any

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.spec import State
from aiida_eipnn.science.arrays import write_whole
from aiida_eipnn.science.versions import versions_of

PACKAGES = ("numpy", "ase", "vesin", "torch", "kimpy", "numba", "safetensors")

LOGGER = logging.getLogger(__name__)


def run_job(folder: Path) -> State:
    """Run ``folder/job.json``; every outcome, an exception too, ends in ``status.json``.

    Until the job ends the status says ``running``: found after the end, it means that the job
    was killed.
    """
    start = time.monotonic()
    _write_status(folder, State.RUNNING, kind=None, reason="", seconds=0.0)
    kind, reason = None, ""
    try:
        job = spec.read_job(folder / spec.JOB)
        kind = job.kind
        module = importlib.import_module(f"aiida_eipnn.jobs.{kind}")
        state: State = module.run(job, folder)
    except Exception as error:
        # The last station of a job: whatever went wrong must reach the user as data.
        LOGGER.exception("the job failed")
        state, reason = State.FAILED, _reason(error)
    _write_status(folder, state, kind=kind, reason=reason, seconds=time.monotonic() - start)
    return state


def _reason(error: Exception) -> str:
    # A ValueError is our own message to the user; anything else needs its name to make sense.
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _write_status(folder: Path, state: State, **facts: Any) -> None:
    status = {
        "state": str(state),
        "versions": versions_of(PACKAGES),
        "host": platform.node(),
        **facts,
    }
    write_whole(folder / spec.STATUS, json.dumps(status, indent=1, sort_keys=True) + "\n")
