import json
import shutil

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


HEATED = {"config_type": "md", "count": 8, "spacing": 2, "snapshots_per_run": 2, "n_atoms": 4}
# Atoms this close fly apart.
HOT = HEATED | {"amplitude": [0.6, 0.8], "count": 3}


def test_a_job_that_was_interrupted_makes_the_pool_of_one_that_was_not(folder, tmp_path):
    recipes = (RATTLED, HEATED, HOT, RATTLED | {"amplitude": [0.1, 0.2]})
    job = ExploreJob(recipes=recipes, seed=1, eip=LJ)
    other = tmp_path / "undisturbed"
    shutil.copytree(folder / spec.CONFIGURATIONS, other / spec.CONFIGURATIONS)
    states, n_done = [], []
    for n_answers in range(7, 30):
        answers = iter([False] * n_answers)
        states.append(run(job, folder, stop=lambda answers=answers: next(answers, True)))
        if states[-1] is State.DONE:
            break
        facts = json.loads((folder / spec.CHECKPOINT / "trajectories.json").read_text())
        n_done.append(len(facts["progress"]))

    assert run(job, other) is State.DONE

    assert states[-1] is State.DONE
    assert n_done == [1, 2, 3, 3, 4, 13]
    (pool, metrics), (expected, undisturbed) = results(folder), results(other)
    np.testing.assert_array_equal(pool.positions, expected.positions)
    np.testing.assert_array_equal(pool.ids, expected.ids)
    assert metrics["notes"] == undisturbed["notes"]
    assert not (folder / spec.CHECKPOINT).exists()


def test_a_checkpoint_of_another_exploration_is_refused(folder):
    run(
        ExploreJob(recipes=(HEATED,), seed=1, eip=LJ),
        folder,
        stop=iter([False] * 6 + [True]).__next__,
    )
    assert (folder / spec.CHECKPOINT).is_dir()

    with pytest.raises(ValueError, match="the checkpoint is that of another job"):
        run(ExploreJob(recipes=(HEATED,), seed=2, eip=LJ), folder)


def test_a_pool_that_is_short_says_why(folder):
    still = RATTLED | {"amplitude": [0.0, 0.0]}

    state = run(ExploreJob(recipes=(still,), seed=1), folder)
    _, metrics = results(folder)

    assert state is State.DONE
    (note,) = metrics["notes"]
    assert note.startswith("rattled: 2 of 4 were made: ")


def test_dynamics_without_an_eip_is_refused(folder):
    with pytest.raises(ValueError, match="needs an EIP"):
        run(ExploreJob(recipes=({"config_type": "md", "count": 1},), seed=1), folder)


def test_an_eip_has_no_doubts(folder):
    recipe = {"config_type": "md", "count": 3, "max_uncertainty": 0.1}
    with pytest.raises(ValueError, match="max_uncertainty is what a committee has"):
        run(ExploreJob(recipes=(recipe,), seed=1, eip=LJ), folder)


def test_a_committee_drives_dynamics_until_it_is_unsure(folder, torch):
    from aiida_eipnn.science.nn.committee import Committee
    from aiida_eipnn.science.nn.network import Network, NetworkParameters

    members = []
    for seed in (1, 2):
        network = Network(NetworkParameters(n_radial=4, l_max=1, width=8), (29,), ("dft",))
        network.initialise(seed)
        members.append(network)
    Committee(members=tuple(members), stage="finetune", seeds=(1, 2)).save(folder / spec.COMMITTEE)
    recipe = {"config_type": "md", "count": 4, "snapshots_per_run": 2, "spacing": 3, "n_atoms": 4}

    run(ExploreJob(recipes=(recipe,), seed=1), folder)
    pool, metrics = results(folder)
    assert metrics["counts"] == {"md": 4}
    assert metrics["notes"] == []
    free = pool.positions

    run(ExploreJob(recipes=(recipe | {"max_uncertainty": 1e-6},), seed=1), folder)
    pool, metrics = results(folder)
    # Each run ends in its first step.
    assert metrics["counts"] == {"md": 4}
    assert len(metrics["notes"]) == 4
    assert "the committee is unsure" in metrics["notes"][0]
    assert np.abs(pool.positions - free).max() > 1e-3


def test_no_seeds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        run(ExploreJob(recipes=(RATTLED,), seed=1), tmp_path)
