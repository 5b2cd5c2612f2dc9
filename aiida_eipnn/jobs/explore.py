"""Make a pool of configurations out of seeds."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from ase.calculators.calculator import Calculator

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.inputs import digest_of, read_configurations
from aiida_eipnn.jobs.progress import read_progress, remove_checkpoint, write_progress
from aiida_eipnn.jobs.spec import ExploreJob, State
from aiida_eipnn.jobs.stop import NEVER, Stop
from aiida_eipnn.science.arrays import load_arrays, save_arrays
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.dynamics import Trajectory, run_dynamics
from aiida_eipnn.science.eip.isolation import Crew, Lost
from aiida_eipnn.science.eip.potential import EipCalculator, open_potential
from aiida_eipnn.science.pool import Run, Stopped, counts_by_type, make_pool

LOGGER = logging.getLogger(__name__)


def run(job: ExploreJob, folder: Path, stop: Stop = NEVER) -> State:
    """Read the seeds, write ``output/configurations`` and ``output/metrics.json``.

    Runs of molecular dynamics lie in the checkpoint once they are complete: a job that was stopped
    or killed takes them from there. Everything else is made again, which takes no time, and the
    pool is that of a job that nothing interrupted.
    """
    start = time.monotonic()
    seeds = read_configurations(folder)
    trajectories = Trajectories(job, folder, stop)
    driver = trajectories if job.eip or has_committee(folder) else None
    try:
        pool, notes = make_pool(seeds, job.recipes, np.random.default_rng(job.seed), driver, stop)
    except Stopped:
        return State.INTERRUPTED
    finally:
        trajectories.close()
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
    remove_checkpoint(folder / spec.CHECKPOINT)
    return State.DONE


class Trajectories:
    """The trajectories of a pool, several side by side, those that are complete in the checkpoint.

    Parameters
    ----------
    job, folder
        What drives them, and where it lies.
    stop
        Says when to leave the rest to another job.

    Raises
    ------
    ValueError
        If the checkpoint holds those of something else.
    """

    def __init__(self, job: ExploreJob, folder: Path, stop: Stop) -> None:
        self.job, self.folder, self.stop = job, folder, stop
        self.has_uncertainty = has_committee(folder)
        self.mark = fingerprint(job, folder)
        # By number, which is a text in JSON.
        self.faults: dict[str, str] = self._faults()
        self.n_asked = 0
        self.crew: Crew[Run, Trajectory] | None = None

    def _faults(self) -> dict[str, str]:
        faults = read_progress(self._progress, self.mark) or {}
        if isinstance(faults, dict):
            return faults
        # Of an earlier version, which drew other random numbers: nothing of it fits.
        remove_checkpoint(self.folder / spec.CHECKPOINT)
        return {}

    @property
    def _progress(self) -> Path:
        return self.folder / spec.CHECKPOINT / "trajectories.json"

    def _arrays(self, number: int) -> Path:
        return self.folder / spec.CHECKPOINT / f"trajectory_{number:05d}"

    def run(self, runs: Sequence[Run]) -> list[Trajectory]:
        """Return the trajectory of each run, in order.

        Raises
        ------
        Stopped
            If it was time to stop before all were complete.
        ValueError
            If the EIP cannot be opened, or if there is no such device.
        ChildProcessError
            If opening the EIP kills the process.
        """
        numbers = range(self.n_asked, self.n_asked + len(runs))
        self.n_asked += len(runs)
        missing = [number for number in numbers if str(number) not in self.faults]
        lost: dict[int, Trajectory] = {}
        if self.crew is None:
            n_workers = count_processes(self.job, self.folder)
            self.crew = Crew(partial(open_dynamics, self.job, self.folder), n_workers)
        todo = [runs[number - numbers.start] for number in missing]
        for position, outcome in self._outcomes(self.crew, todo):
            number = missing[position]
            if isinstance(outcome, Lost):
                # Not for the checkpoint: it may have been killed together with this job.
                lost[number] = Trajectory([], outcome.reason)
            else:
                self._write(number, outcome)
        if any(number not in lost and str(number) not in self.faults for number in numbers):
            raise Stopped
        return [lost.get(number) or self._read(number) for number in numbers]

    def _outcomes(
        self, crew: Crew[Run, Trajectory], runs: Sequence[Run]
    ) -> Iterator[tuple[int, Trajectory | Lost]]:
        try:
            yield from crew.outcomes(runs, self.stop)
        except ChildProcessError as error:
            raise ChildProcessError(f"{self.job.eip or 'the committee'}: {error}") from None

    def close(self) -> None:
        """End the processes in which they ran."""
        if self.crew is not None:
            self.crew.close()

    def _read(self, number: int) -> Trajectory:
        path, fault = self._arrays(number), self.faults[str(number)]
        if not path.exists():
            return Trajectory([], fault)
        frames = Configurations.from_arrays(load_arrays(path))
        return Trajectory([frames.atoms(row) for row in range(len(frames))], fault)

    def _write(self, number: int, trajectory: Trajectory) -> None:
        frames, fault = trajectory
        self._progress.parent.mkdir(exist_ok=True)
        if frames:
            save_arrays(self._arrays(number), Configurations.from_atoms(frames).arrays())
        self.faults[str(number)] = fault
        # Written last: it says that the arrays are complete.
        write_progress(self._progress, self.mark, self.faults)


def fingerprint(job: ExploreJob, folder: Path) -> str:
    """Return what must be equal for a checkpoint to fit."""
    facts = json.dumps([job.recipes, job.seed, job.eip], sort_keys=True).encode()
    return digest_of(folder, (spec.CONFIGURATIONS, spec.EXCLUDE, spec.COMMITTEE), facts)


def has_committee(folder: Path) -> bool:
    """Return whether a committee drives molecular dynamics."""
    return (folder / spec.COMMITTEE).is_dir()


def count_processes(job: ExploreJob, folder: Path) -> int:
    """Return how many processes run side by side: on GPUs one for each, at most.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    if job.n_workers == 1 or not has_committee(folder):
        return job.n_workers
    import torch

    from aiida_eipnn.science.nn.device import CUDA, choose_device

    on_gpu = choose_device(job.device).type == CUDA
    # A second process on one GPU is refused where the GPU is set to serve one alone.
    return min(job.n_workers, torch.cuda.device_count()) if on_gpu else job.n_workers


def open_dynamics(job: ExploreJob, folder: Path, number: int) -> Callable[[Run], Trajectory]:
    """Return what runs molecular dynamics in the process of that number.

    Raises
    ------
    ValueError
        If the EIP cannot be opened, or if there is no such device.
    """
    if not has_committee(folder):
        return partial(run_with, EipCalculator(open_potential(str(job.eip))))
    # torch takes seconds to load, and an EIP needs none of it.
    import torch

    from aiida_eipnn.science.nn.calculator import CommitteeCalculator
    from aiida_eipnn.science.nn.committee import Committee
    from aiida_eipnn.science.nn.device import choose_device

    torch.set_num_threads(1)
    committee = Committee.load(folder / spec.COMMITTEE)
    device = choose_device(job.device, number)
    return partial(run_with, CommitteeCalculator(committee.to(device)))


def run_with(calculator: Calculator, run: Run) -> Trajectory:
    """Return the trajectory of a run."""
    return run_dynamics(run.start, calculator, run.rng, run.settings)
