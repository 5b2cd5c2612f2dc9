"""Jobs that a scheduler asks to stop: a signal to all of their processes, before it kills them."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk
from watched import SLOW, wait_for

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.run import run_job
from aiida_eipnn.jobs.spec import EvaluateJob, ExploreJob, LabelJob, Stage, State, TrainJob
from aiida_eipnn.jobs.stop import HEED_SIGNALS, NEVER, SIGNALS, Stop, heeding_signals
from aiida_eipnn.science.arrays import load_arrays, save_arrays
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.analytic import LennardJones
from aiida_eipnn.science.eip.engine import label_with_eips
from aiida_eipnn.science.labels import Labels

pytestmark = pytest.mark.usefixtures("torch")

LJ = "lennard-jones[epsilon=0.4,sigma=2.3,cutoff=5]"
# A minute of work, with a record every half second.
STEPS = 40_000
NETWORK = {"n_radial": 4, "l_max": 1, "width": 8}


def pool_of(n):
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(n):
        atoms = bulk("Si")
        atoms.positions += rng.normal(0, 0.1, (2, 3))
        frames.append(atoms)
    return Configurations.from_atoms(frames, "rattled")


def write(folder, job, pool):
    save_arrays(folder / spec.CONFIGURATIONS / "pool", pool.arrays())
    spec.write_job(folder / spec.JOB, job)
    return folder


def write_labelling(folder):
    (folder / "slow_potential.py").write_text(SLOW)
    eips = ("python:slow_potential:Slow", "lennard-jones")
    return write(folder, LabelJob(eips=eips, n_workers=2), pool_of(40))


def write_training(folder, **changes):
    pool = pool_of(8)
    save_arrays(
        folder / spec.EIP_LABELS / "pool", label_with_eips(pool, ["lennard-jones"]).arrays()
    )
    job = TrainJob(
        stage=Stage.PRETRAIN,
        seeds=(1, 2),
        network=NETWORK,
        training={"steps": STEPS},
        n_workers=2,
        device="cpu",
    )
    return write(folder, replace(job, **changes), pool)


def write_exploration(folder):
    recipe = {"config_type": "md", "count": 10_000, "spacing": 2, "snapshots_per_run": 4}
    return write(folder, ExploreJob(recipes=(recipe,), seed=1, eip=LJ), pool_of(1))


def write_evaluation(folder):
    from aiida_eipnn.science.nn.committee import Committee
    from aiida_eipnn.science.nn.network import Network, NetworkParameters

    network = Network(NetworkParameters(**NETWORK), (14,), ("dft",))
    network.initialise(1)
    Committee(members=(network,), stage="finetune", seeds=(1,)).save(folder / spec.COMMITTEE)
    return write(folder, EvaluateJob(batch_size=2), pool_of(4_000))


def has_labels(folder):
    states = list((folder / spec.CHECKPOINT).glob("*/state.npy"))
    return any((np.load(path) != 0).any() for path in states)


def has_learnt(folder):
    return (folder / spec.PROGRESS).exists()


def has_trajectories(folder):
    return (folder / spec.CHECKPOINT / "trajectories.json").exists()


def has_predictions(folder):
    return any((folder / spec.CHECKPOINT / spec.PREDICTIONS).glob(".*.npy"))


def start(folder):
    """Run a job as a scheduler does: a script of the shell, whose processes are a group."""
    script = folder / "script.sh"
    script.write_text(f"{HEED_SIGNALS}\n{sys.executable} -m aiida_eipnn.jobs {folder / spec.JOB}\n")
    paths = os.pathsep.join([str(folder), *sys.path])
    return subprocess.Popen(
        ["/bin/bash", script], start_new_session=True, env=os.environ | {"PYTHONPATH": paths}
    )


def status_of(folder):
    return json.loads((folder / spec.STATUS).read_text())


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_stop_and_is_forgotten_after_the_job(number):
    before = signal.getsignal(number)

    with heeding_signals():
        assert not NEVER()
        signal.raise_signal(number)
        assert NEVER()
        assert NEVER.reason == number.name

    assert signal.getsignal(number) is before
    with heeding_signals():
        assert not NEVER()


def test_the_time_asks_to_stop():
    assert Stop.after(0.0)()
    assert Stop.after(0.0).reason == "the time is up"
    assert not Stop.after(60.0)()
    assert not Stop.after(None)()


@pytest.mark.parametrize(
    ("write_job", "has_begun"),
    [
        (write_labelling, has_labels),
        (write_training, has_learnt),
        (write_exploration, has_trajectories),
        (write_evaluation, has_predictions),
    ],
)
def test_a_job_that_is_asked_to_stop_leaves_a_checkpoint_to_go_on_from(
    tmp_path, write_job, has_begun
):
    folder = write_job(tmp_path)
    process = start(folder)
    try:
        wait_for(lambda: has_begun(folder))
        os.killpg(process.pid, signal.SIGTERM)

        assert process.wait(timeout=30) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    status = status_of(folder)
    assert (status["state"], status["reason"]) == (State.INTERRUPTED, "SIGTERM")
    assert any((folder / spec.CHECKPOINT).iterdir())


def test_a_training_hands_the_signal_on_to_its_processes(tmp_path):
    folder = write_training(tmp_path)
    process = subprocess.Popen([sys.executable, "-m", "aiida_eipnn.jobs", folder / spec.JOB])
    try:
        wait_for(lambda: has_learnt(folder))
        # Before the first one is due.
        assert not list((folder / spec.CHECKPOINT).glob("member_*"))
        process.send_signal(signal.SIGUSR1)

        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    assert status_of(folder)["reason"] == "SIGUSR1"
    assert list((folder / spec.CHECKPOINT).glob("member_*"))


def test_no_label_fails_because_of_a_signal_and_none_is_lost(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = write_labelling(tmp_path)
    process = start(folder)
    wait_for(lambda: has_labels(folder))
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    before = [np.load(path) for path in sorted((folder / spec.CHECKPOINT).glob("*/state.npy"))]

    assert run_job(folder) is State.DONE

    n_before = sum(int((state != 0).sum()) for state in before)
    labels = Labels.from_arrays(load_arrays(folder / spec.OUTPUT / spec.LABELS))
    assert 0 < n_before < labels.ok.size
    assert labels.ok.all(), labels.reasons
    expected = [LennardJones().label(pool_of(40).atoms(row)).energy for row in range(40)]
    np.testing.assert_allclose(labels.energy, np.array([expected, expected]).T, rtol=1e-12)
