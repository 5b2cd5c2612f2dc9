import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.explore import count_processes, run
from aiida_eipnn.jobs.spec import ExploreJob, State
from aiida_eipnn.science.arrays import load_arrays, save_arrays
from aiida_eipnn.science.configurations import Configurations

# A module with an EIP that takes its process along.
DEADLY = """
import os
import signal
from aiida_eipnn.science.eip.analytic import LennardJones


class Deadly(LennardJones):
    def label(self, atoms):
        if len(atoms) > 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().label(atoms)
"""

# A module with a slow EIP that writes down which process it is in.
MARKING = """
import os
import time
from pathlib import Path
from aiida_eipnn.science.eip.analytic import LennardJones


class Marking(LennardJones):
    def label(self, atoms):
        with Path(__file__).with_name("calls").open("a") as calls:
            calls.write(f"{os.getpid()}\\n")
        time.sleep(0.05)
        return super().label(atoms)
"""

# A module with an EIP that cannot even be opened without that.
DEADLY_TO_OPEN = """
import os
from aiida_eipnn.science.eip.analytic import LennardJones


class DeadlyToOpen(LennardJones):
    def __init__(self):
        os.abort()
"""

RATTLED = {"config_type": "rattled", "count": 4}
LJ = "lennard-jones[epsilon=0.4,sigma=2.3,cutoff=5]"


@pytest.fixture
def folder(tmp_path):
    for name, atoms in (("one", bulk("Cu", cubic=True)), ("two", bulk("Cu"))):
        seeds = Configurations.from_atoms([atoms])
        save_arrays(tmp_path / spec.CONFIGURATIONS / name, seeds.arrays())
    return tmp_path


def open_module(monkeypatch, folder, name, code):
    """Let processes import ``code``; return the file of its calls."""
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    return folder / "calls"


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


def complete_in(folder):
    """Return how many trajectories the checkpoint holds."""
    path = folder / spec.CHECKPOINT / "trajectories.json"
    return len(json.loads(path.read_text())["progress"]) if path.exists() else 0


@pytest.mark.parametrize("n_workers", [1, 3])
def test_a_job_that_was_interrupted_makes_the_pool_of_one_that_was_not(folder, tmp_path, n_workers):
    recipes = (RATTLED, HEATED, HOT, RATTLED | {"amplitude": [0.1, 0.2]})
    job = ExploreJob(recipes=recipes, seed=1, eip=LJ, n_workers=n_workers)
    other = tmp_path / "undisturbed"
    shutil.copytree(folder / spec.CONFIGURATIONS, other / spec.CONFIGURATIONS)

    n_done = [0]
    for _ in range(3):
        state = run(job, folder, stop=lambda: complete_in(folder) > n_done[-1])
        assert state is State.INTERRUPTED
        n_done.append(complete_in(folder))
    assert run(job, folder) is State.DONE
    assert run(replace(job, n_workers=2), other) is State.DONE

    (pool, metrics), (expected, undisturbed) = results(folder), results(other)
    np.testing.assert_array_equal(pool.positions, expected.positions)
    np.testing.assert_array_equal(pool.ids, expected.ids)
    assert metrics["notes"] == undisturbed["notes"]
    assert not (folder / spec.CHECKPOINT).exists()


def test_a_checkpoint_of_an_earlier_version_is_begun_anew(folder):
    job = ExploreJob(recipes=(HEATED,), seed=1, eip=LJ)
    run(job, folder, stop=lambda: complete_in(folder) >= 1)
    progress = folder / spec.CHECKPOINT / "trajectories.json"
    content = json.loads(progress.read_text())
    progress.write_text(json.dumps(content | {"progress": [{"n_frames": 2, "fault": ""}]}))

    assert run(job, folder) is State.DONE
    pool, _ = results(folder)
    assert len(pool) == 8


def test_what_is_in_the_checkpoint_is_not_run_again(folder):
    job = ExploreJob(recipes=(HEATED,), seed=1, eip=LJ)
    run(job, folder, stop=lambda: complete_in(folder) >= 2)
    kept = {path: path.stat().st_mtime_ns for path in (folder / spec.CHECKPOINT).rglob("*.npy")}

    run(job, folder, stop=lambda: complete_in(folder) >= 3)

    assert kept
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_runs_go_side_by_side_and_end_with_the_job(folder, monkeypatch):
    calls = open_module(monkeypatch, folder, "marking_eip", MARKING)
    recipe = HEATED | {"count": 2, "spacing": 20, "snapshots_per_run": 1}
    job = ExploreJob(recipes=(recipe,), seed=1, eip="python:marking_eip:Marking", n_workers=2)

    def processes():
        return set(calls.read_text().split()) if calls.exists() else set()

    # One after the other would come to the end before there are two.
    assert run(job, folder, stop=lambda: len(processes()) > 1) is State.INTERRUPTED

    left = calls.read_text()
    time.sleep(0.5)
    assert calls.read_text() == left


def test_a_checkpoint_of_another_exploration_is_refused(folder):
    job = ExploreJob(recipes=(HEATED,), seed=1, eip=LJ)
    run(job, folder, stop=lambda: complete_in(folder) >= 1)
    assert (folder / spec.CHECKPOINT).is_dir()

    with pytest.raises(ValueError, match="the checkpoint is that of another job"):
        run(replace(job, seed=2), folder)


def test_an_eip_that_cannot_be_opened_is_an_error(folder):
    job = ExploreJob(recipes=(HEATED,), seed=1, eip="python:nowhere:Nothing")

    with pytest.raises(ValueError, match="cannot open python:nowhere:Nothing"):
        run(job, folder)


def test_an_eip_that_kills_the_process_that_opens_it_is_an_error(folder, monkeypatch):
    open_module(monkeypatch, folder, "deadly_eip", DEADLY_TO_OPEN)
    eip = "python:deadly_eip:DeadlyToOpen"

    with pytest.raises(ChildProcessError, match=rf"{eip}: .*SIGABRT\) before it could begin"):
        run(ExploreJob(recipes=(RATTLED, HEATED), seed=1, eip=eip), folder)


def test_an_eip_that_kills_its_process_costs_its_run_only(folder, monkeypatch):
    open_module(monkeypatch, folder, "deadly_eip", DEADLY)
    recipe = HEATED | {"count": 4, "n_atoms": None}
    job = ExploreJob(recipes=(recipe,), seed=1, eip="python:deadly_eip:Deadly", n_workers=2)

    assert run(job, folder) is State.DONE
    pool, metrics = results(folder)

    # It dies of cells of more than one atom.
    assert set(pool.n_atoms) == {1}
    assert len(pool) == 4
    assert "4 atoms: the process died with signal 11 (SIGSEGV)" in metrics["notes"][0]


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


def test_of_a_committee_on_gpus_one_process_runs_on_each(folder, torch, monkeypatch):
    job = ExploreJob(recipes=(HEATED,), seed=1, eip=LJ, n_workers=3, device="auto")
    assert count_processes(job, folder) == 3
    (folder / spec.COMMITTEE).mkdir()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for kind, n_processes in (("cpu", 3), ("cuda", 2)):
        monkeypatch.setattr(
            "aiida_eipnn.science.nn.device.choose_device", lambda _, kind=kind: torch.device(kind)
        )
        assert count_processes(job, folder) == n_processes


def test_no_seeds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        run(ExploreJob(recipes=(RATTLED,), seed=1), tmp_path)
