"""Make a pool of configurations out of seeds."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.inputs import digest_of, read_configurations
from aiida_eipnn.jobs.progress import read_progress, remove_checkpoint, write_progress
from aiida_eipnn.jobs.spec import ExploreJob, State
from aiida_eipnn.jobs.stop import NEVER, Stop
from aiida_eipnn.science.arrays import load_arrays, save_arrays
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.dynamics import Stopped, Trajectory, run_dynamics
from aiida_eipnn.science.eip.potential import EipCalculator, open_potential
from aiida_eipnn.science.pool import MD, counts_by_type, make_pool

LOGGER = logging.getLogger(__name__)


def run(job: ExploreJob, folder: Path, stop: Stop = NEVER) -> State:
    """Read the seeds, write ``output/configurations`` and ``output/metrics.json``.

    Runs of molecular dynamics lie in the checkpoint once they are complete: a job that was stopped
    or killed takes them from there. Everything else is made again, which takes no time, and the
    pool is that of a job that nothing interrupted.
    """
    start = time.monotonic()
    seeds = read_configurations(folder)
    trajectories = Trajectories(folder / spec.CHECKPOINT, fingerprint(job, folder))
    try:
        pool, notes = make_pool(
            seeds,
            job.recipes,
            np.random.default_rng(job.seed),
            driver(job, folder),
            stop,
            trajectories.run,
        )
    except Stopped:
        return State.INTERRUPTED
    for note in notes:
        LOGGER.warning("%s", note)
    counts = counts_by_type(pool)
    LOGGER.info("made %d configurations: %s", len(pool), counts)
    output = folder / spec.OUTPUT
    save_arrays(output / spec.CONFIGURATIONS, pool.arrays())
    metrics = {
        "n_configurations": len(pool),
        "counts": counts,
        "notes": list(notes),
        "seconds": time.monotonic() - start,
    }
    (output / spec.METRICS).write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    # What it was for is in the output now.
    remove_checkpoint(trajectories.folder)
    return State.DONE


class Trajectories:
    """The trajectories of a pool, one after the other, those that are complete in the checkpoint.

    Parameters
    ----------
    folder
        The checkpoint of the job.
    mark
        Digest of what they depend on.

    Raises
    ------
    ValueError
        If the checkpoint holds those of something else.
    """

    def __init__(self, folder: Path, mark: str) -> None:
        self.folder, self.mark = folder, mark
        self.records: list[dict[str, Any]] = read_progress(self._progress, mark) or []
        self.n_asked = 0

    @property
    def _progress(self) -> Path:
        return self.folder / "trajectories.json"

    def _arrays(self, number: int) -> Path:
        return self.folder / f"trajectory_{number:05d}"

    def run(self, atoms: Atoms, *, rng: np.random.Generator, **more: Any) -> Trajectory:
        """Return the next trajectory, and leave ``rng`` as the run leaves it."""
        number, self.n_asked = self.n_asked, self.n_asked + 1
        if number < len(self.records):
            return self._read(number, rng)
        trajectory = run_dynamics(atoms, rng=rng, **more)
        self._write(number, trajectory, rng)
        return trajectory

    def _read(self, number: int, rng: np.random.Generator) -> Trajectory:
        record = self.records[number]
        rng.bit_generator.state = record["rng"]
        if not record["n_frames"]:
            return Trajectory([], record["fault"])
        frames = Configurations.from_arrays(load_arrays(self._arrays(number)))
        return Trajectory([frames.atoms(row) for row in range(len(frames))], record["fault"])

    def _write(self, number: int, trajectory: Trajectory, rng: np.random.Generator) -> None:
        frames, fault = trajectory
        self.folder.mkdir(exist_ok=True)
        if frames:
            save_arrays(self._arrays(number), Configurations.from_atoms(frames).arrays())
        self.records.append(
            {"n_frames": len(frames), "fault": fault, "rng": rng.bit_generator.state}
        )
        # Written last: it says that the arrays are complete.
        write_progress(self._progress, self.mark, self.records)


def fingerprint(job: ExploreJob, folder: Path) -> str:
    """Return what must be equal for a checkpoint to fit."""
    facts = json.dumps([job.recipes, job.seed, job.eip], sort_keys=True).encode()
    return digest_of(folder, (spec.CONFIGURATIONS, spec.EXCLUDE, spec.COMMITTEE), facts)


def driver(job: ExploreJob, folder: Path) -> Calculator | None:
    """Return what drives molecular dynamics, where a recipe asks for it: the committee, or the EIP.

    Raises
    ------
    ValueError
        If the EIP cannot be opened, or if there is no such device.
    """
    if not any(recipe.get("config_type") == MD for recipe in job.recipes):
        return None
    if (folder / spec.COMMITTEE).is_dir():
        # torch takes seconds to load, and an EIP needs none of it.
        from aiida_eipnn.science.nn.calculator import CommitteeCalculator
        from aiida_eipnn.science.nn.committee import Committee
        from aiida_eipnn.science.nn.device import choose_device

        committee = Committee.load(folder / spec.COMMITTEE)
        return CommitteeCalculator(committee.to(choose_device(job.device)))
    return EipCalculator(open_potential(job.eip)) if job.eip else None
