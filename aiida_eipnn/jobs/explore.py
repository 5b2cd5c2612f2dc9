"""Make a pool of configurations out of seeds."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ase.calculators.calculator import Calculator

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.inputs import read_configurations
from aiida_eipnn.jobs.spec import ExploreJob, State
from aiida_eipnn.science.arrays import save_arrays
from aiida_eipnn.science.eip.potential import EipCalculator, open_potential
from aiida_eipnn.science.pool import MD, counts_by_type, make_pool

LOGGER = logging.getLogger(__name__)


def run(job: ExploreJob, folder: Path) -> State:
    """Read the seeds, write ``output/configurations`` and ``output/metrics.json``.

    Where the time is up before the pool is complete, what there is is the pool, and a note says so:
    there is nothing to go on from.
    """
    start = time.monotonic()
    in_time = _deadline(start, job.max_seconds)
    seeds = read_configurations(folder)
    pool, notes = make_pool(
        seeds, job.recipes, np.random.default_rng(job.seed), driver(job, folder), in_time
    )
    n_asked = sum(int(recipe["count"]) for recipe in job.recipes)
    if len(pool) < n_asked and not in_time():
        notes = (*notes, f"the time was up: {len(pool)} of {n_asked} were made")
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
    return State.DONE


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


def _deadline(start: float, max_seconds: float | None) -> Callable[[], bool]:
    if max_seconds is None:
        return lambda: True
    return lambda: time.monotonic() - start < max_seconds
