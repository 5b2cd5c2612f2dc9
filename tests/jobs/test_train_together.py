"""One training in two processes, on CPUs by Gloo: as torchrun, or mpirun, starts them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from small_trainings import HARD, SOFT, labels_of, pool_of  # noqa: E402

from aiida_eipnn.jobs import spec  # noqa: E402
from aiida_eipnn.jobs.place import ALONE, Place, place_of  # noqa: E402
from aiida_eipnn.jobs.run import run_job  # noqa: E402
from aiida_eipnn.jobs.spec import EvaluateJob, Stage, State, TrainJob  # noqa: E402
from aiida_eipnn.science.arrays import save_arrays  # noqa: E402
from aiida_eipnn.science.nn.committee import Committee  # noqa: E402
from aiida_eipnn.science.nn.sizes import BATCH_EDGES  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch")

SMALL = {"n_radial": 4, "l_max": 1, "width": 8, "cutoff": 4.0}
# Sums are added up in another order, and errors grow a little with every step.
TOLERANCE = {"rtol": 1e-7, "atol": 1e-9}

# The job, with what a test changes in one of its processes.
RUN = """
import os, sys
from pathlib import Path
from aiida_eipnn.jobs import train
from aiida_eipnn.jobs.__main__ import main
from aiida_eipnn.science.nn import processes, training
{changes}
if __name__ == "__main__":
    sys.exit(main([str(Path(sys.argv[1], "job.json"))]))
"""


@pytest.fixture(scope="module")
def pool():
    return pool_of(9)


@pytest.fixture
def write(tmp_path, pool):
    """Write a folder with a training of one stage."""

    def make(
        name,
        stage,
        trunk="power_spectrum",
        *,
        seeds=(1, 2),
        start=None,
        batch_edges=BATCH_EDGES,
        **training,
    ):
        job = TrainJob(
            stage=stage,
            seeds=seeds,
            network={**SMALL, "trunk": trunk},
            training={"steps": 6, "min_epochs": 3, **training},
            pseudo_labels={} if stage is Stage.FINETUNE else None,
            device="cpu",
            batch_edges=batch_edges,
        )
        folder = tmp_path / name
        parts = {
            spec.CONFIGURATIONS: pool,
            spec.EIP_LABELS: labels_of(pool, {"soft": SOFT, "hard": HARD}),
        }
        if stage is Stage.FINETUNE:
            parts[spec.LABELS] = labels_of(pool.take(range(6)), {"dft": SOFT}, shift=-10.0)
        for kind, part in parts.items():
            save_arrays(folder / kind / "set", part.arrays())
        if start is not None:
            shutil.copytree(start / spec.OUTPUT / spec.COMMITTEE, folder / spec.COMMITTEE)
        spec.write_job(folder / spec.JOB, job)
        return folder

    return make


def environment(**more):
    # Whatever started the tests, these processes are none of its own.
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def torchrun(*arguments):
    """Run a program in two processes, to the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=environment(),
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )


def start_two(tmp_path, folder, changes=""):
    """Start two processes that nobody looks after."""
    script = tmp_path / "run.py"
    script.write_text(RUN.format(changes=changes))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, script, folder],
            env=environment(
                RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in (0, 1)
    ]


def ends_of(processes, seconds=120.0):
    """Return the exit codes of processes, none of which may go on for ever."""
    try:
        return [process.wait(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def state_of(folder):
    return json.loads((folder / spec.STATUS).read_text())["state"]


def reason_of(folder):
    return json.loads((folder / spec.STATUS).read_text())["reason"]


def metrics_of(folder):
    return json.loads((folder / spec.OUTPUT / spec.METRICS).read_text())


def assert_same_networks(one, other):
    networks = [
        Committee.load(folder / spec.OUTPUT / spec.COMMITTEE).members for folder in (one, other)
    ]
    for first, second in zip(*networks, strict=True):
        theirs = dict(second.named_parameters())
        for name, weight in first.named_parameters():
            torch.testing.assert_close(theirs[name], weight, **TOLERANCE)
    epochs = [
        [row for member in metrics_of(folder)["members"] for row in member["epochs"]]
        for folder in (one, other)
    ]
    for first, second in zip(*epochs, strict=True):
        assert {**second, "seconds": 0} == pytest.approx({**first, "seconds": 0}, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["power_spectrum", "schnet"])
def test_two_processes_train_the_networks_that_one_trains(write, trunk):
    settings = {"batch_size": 4, "seeds": (1,)}
    one = write("one", Stage.PRETRAIN, trunk, **settings)
    two = write("two", Stage.PRETRAIN, trunk, **settings)
    assert run_job(one) is State.DONE
    done = torchrun("-m", "aiida_eipnn.jobs", two / spec.JOB)
    assert done.returncode == 0, done.stderr
    assert (metrics_of(one)["n_processes"], metrics_of(two)["n_processes"]) == (1, 2)
    assert_same_networks(one, two)

    # Batches of 3 and 1 of 4 labels: one process has no part in the second one.
    settings = {"batch_size": 3, "seeds": (1, 2), "validation_fraction": 0.3, "start": one}
    settings |= {"stress_weight": 1.0, "n_heads": 3}
    one = write("one-tuned", Stage.FINETUNE, trunk, **settings)
    # Cells of 8 atoms, of which two do not fit: as many parts as there are configurations.
    two = write("two-tuned", Stage.FINETUNE, trunk, batch_edges=100, **settings)
    assert run_job(one) is State.DONE
    done = torchrun("-m", "aiida_eipnn.jobs", two / spec.JOB)
    assert done.returncode == 0, done.stderr
    assert_same_networks(one, two)
    lines = (two / spec.PROGRESS).read_text().splitlines()
    assert len(lines) == len((one / spec.PROGRESS).read_text().splitlines())


@pytest.mark.slow
def test_a_deadline_of_one_process_stops_both_and_any_number_of_them_goes_on(tmp_path, write):
    whole, pieces = (write(name, Stage.PRETRAIN, batch_size=4) for name in ("whole", "pieces"))
    assert run_job(whole) is State.DONE
    # Only the second process finds that it is late, in the third step and then for the next member.
    late = """
from aiida_eipnn.jobs.stop import Stop
count = iter(range(1000))
Stop.__call__ = lambda _: os.environ["RANK"] == "1" and next(count) in (2, 3)
"""
    assert ends_of(start_two(tmp_path, pieces, late)) == [0, 0]
    assert state_of(pieces) == State.INTERRUPTED
    assert not (pieces / spec.OUTPUT).exists()
    soon = replace(spec.read_job(pieces / spec.JOB), max_seconds=0.0)
    spec.write_job(pieces / spec.JOB, soon)
    assert run_job(pieces) is State.INTERRUPTED
    spec.write_job(pieces / spec.JOB, replace(soon, max_seconds=None))
    assert run_job(pieces) is State.DONE
    assert_same_networks(whole, pieces)


def begun(folder):
    """Wait until the training has left a checkpoint."""
    end = time.monotonic() + 120
    while not list((folder / spec.CHECKPOINT).glob("member_*")):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_killed_ends_the_other(tmp_path, write, lost):
    # More than anyone waits for: what ends here was ended.
    folder = write("folder", Stage.PRETRAIN, steps=10**8)
    pair = start_two(tmp_path, folder, "training.CHECKPOINT_SECONDS = 0.1")
    begun(folder)
    pair[lost].send_signal(signal.SIGKILL)
    codes = ends_of(pair)
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 1
    if lost:
        assert state_of(folder) == State.KILLED
        assert "a process of this training was lost" in reason_of(folder)
    else:
        # As a job of one process leaves it.
        assert state_of(folder) == State.RUNNING


@pytest.mark.slow
def test_a_process_that_is_not_heard_of_ends_the_other(tmp_path, write):
    folder = write("folder", Stage.PRETRAIN, steps=10**8)
    changes = """
from datetime import timedelta
training.CHECKPOINT_SECONDS = 0.1
processes.TIMEOUT = timedelta(seconds=20)
"""
    pair = start_two(tmp_path, folder, changes)
    begun(folder)
    pair[1].send_signal(signal.SIGSTOP)
    assert pair[0].wait(timeout=100) == 1
    assert state_of(folder) == State.KILLED
    pair[1].kill()
    pair[1].wait()


@pytest.mark.slow
def test_the_reason_why_any_process_failed_reaches_the_user(tmp_path, write):
    folder = write("folder", Stage.PRETRAIN)
    changes = """
def broken(*_):
    raise RuntimeError("the second process has no luck")
if os.environ["RANK"] == "1":
    train.train_member = broken
"""
    assert ends_of(start_two(tmp_path, folder, changes)) == [1, 1]
    assert state_of(folder) == State.FAILED
    assert reason_of(folder) == "RuntimeError: the second process has no luck"


def test_other_jobs_are_those_of_the_first_process(tmp_path):
    spec.write_job(tmp_path / spec.JOB, EvaluateJob())
    before = sorted(tmp_path.iterdir())
    assert run_job(tmp_path, Place(number=1, count=2)) is State.DONE
    assert sorted(tmp_path.iterdir()) == before


def test_processes_must_know_where_to_meet(tmp_path, write, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    folder = write("folder", Stage.PRETRAIN)
    assert run_job(folder, Place(number=0, count=2)) is State.FAILED
    assert "export MASTER_ADDR (the first node)" in reason_of(folder)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, ALONE),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(3, 8, 1)),
        # torchrun started by srun: its own numbers count.
        (
            {
                "RANK": "3",
                "WORLD_SIZE": "8",
                "LOCAL_RANK": "1",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            Place(3, 8, 1),
        ),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, Place(1, 2, 0)),
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"},
            Place(5, 6, 2),
        ),
        # A batch script that asked for four tasks and starts one program.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ALONE),
    ],
)
def test_a_process_knows_its_place(variables, place):
    assert place_of(variables) == place
