import json

import numpy as np
import pytest
from ase.build import bulk

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.explore import run
from aiida_eipnn.jobs.spec import ExploreJob, State
from aiida_eipnn.science.arrays import load_arrays, save_arrays
from aiida_eipnn.science.configurations import Configurations

RATTLED = {"config_type": "rattled", "count": 4}
LJ = "lennard-jones[epsilon=0.4,sigma=2.3,cutoff=5]"


@pytest.fixture
def folder(tmp_path):
    for name, atoms in (("one", bulk("Cu", cubic=True)), ("two", bulk("Cu"))):
        seeds = Configurations.from_atoms([atoms])
        save_arrays(tmp_path / spec.CONFIGURATIONS / name, seeds.arrays())
    return tmp_path


def results(folder):
    output = folder / spec.OUTPUT
    pool = Configurations.from_arrays(load_arrays(output / spec.CONFIGURATIONS))
    return pool, json.loads((output / spec.METRICS).read_text())


def test_the_job_writes_the_pool_and_what_is_in_it(folder):
    recipes = (RATTLED, {"config_type": "md", "count": 3, "spacing": 2, "n_atoms": 4})

    state = run(ExploreJob(recipes=recipes, seed=1, eip=LJ), folder)
    pool, metrics = results(folder)

    assert state is State.DONE
    assert metrics["counts"] == {"md": 3, "rattled": 4}
    assert metrics["n_configurations"] == len(pool) == 7
    assert metrics["seconds"] > 0
    assert set(pool.n_atoms[:4]) == {1, 4}


def test_the_same_seed_writes_the_same_pool(folder):
    job = ExploreJob(recipes=(RATTLED,), seed=7)

    run(job, folder)
    first, _ = results(folder)
    run(job, folder)
    again, _ = results(folder)

    np.testing.assert_array_equal(first.ids, again.ids)


def test_a_job_whose_time_is_up_is_done_with_what_there_is_and_says_so(folder):
    state = run(ExploreJob(recipes=(RATTLED,), seed=1, max_seconds=1e-9), folder)
    pool, metrics = results(folder)

    assert state is State.DONE
    assert len(pool) == 1
    assert metrics["notes"] == [
        "rattled: 1 of 4 were made",
        "the time was up: 1 of 4 were made",
    ]


def test_a_pool_that_is_short_for_another_reason_does_not_blame_the_time(folder):
    still = RATTLED | {"amplitude": [0.0, 0.0]}

    state = run(ExploreJob(recipes=(still,), seed=1, max_seconds=600), folder)
    _, metrics = results(folder)

    assert state is State.DONE
    (note,) = metrics["notes"]
    assert note.startswith("rattled: 2 of 4 were made: ")


def test_dynamics_without_an_eip_is_refused(folder):
    with pytest.raises(ValueError, match="needs an EIP"):
        run(ExploreJob(recipes=({"config_type": "md", "count": 1},), seed=1), folder)


def test_no_seeds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        run(ExploreJob(recipes=(RATTLED,), seed=1), tmp_path)
