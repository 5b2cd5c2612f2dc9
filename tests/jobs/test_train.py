"""The train job on a folder, without AiiDA."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ase.build import bulk
from watched import wait_for, watch_neighbours

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.run import run_job
from aiida_eipnn.jobs.spec import Stage, State, TrainJob
from aiida_eipnn.jobs.stop import Stop
from aiida_eipnn.science.arrays import load_arrays, save_arrays
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.analytic import LennardJones
from aiida_eipnn.science.eip.selection import NONE, Selection
from aiida_eipnn.science.labels import Labels

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402

from aiida_eipnn.jobs import train  # noqa: E402
from aiida_eipnn.science.nn.committee import Committee  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch")

EIPS = {
    "soft": LennardJones(epsilon=0.4, sigma=2.1),
    "hard": LennardJones(epsilon=0.6, sigma=2.15),
}
DFT = {"dft": LennardJones(epsilon=0.5, sigma=2.12)}
NETWORK = {"n_radial": 4, "l_max": 1, "width": 8}
WEIGHTS = Path(spec.OUTPUT, spec.COMMITTEE, "weights.safetensors")

RUN = """
import sys
from pathlib import Path
from aiida_eipnn.jobs.run import run_job
from aiida_eipnn.science.nn import training

training.CHECKPOINT_SECONDS = 0.1

if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
"""


def pool_of(n, seed=0):
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n):
        atoms = bulk("Si")
        atoms.set_cell(atoms.cell * rng.uniform(0.95, 1.05), scale_atoms=True)
        atoms.positions += rng.normal(0, 0.1, (2, 3))
        frames.append(atoms)
    return Configurations.from_atoms(frames, "rattled")


def labels_of(configurations, potentials, shift=0.0):
    frames = [configurations.atoms(row) for row in range(len(configurations))]
    results = [[potential.label(atoms) for atoms in frames] for potential in potentials.values()]
    missing = Labels.missing(configurations, list(potentials))
    energy = np.array([[label.energy for label in row] for row in results]).T
    return replace(
        missing,
        energy=energy + shift * configurations.n_atoms[:, None],
        forces=np.array([np.concatenate([label.forces for label in row]) for row in results]),
        stress=np.array([[label.stress for label in row] for row in results]).transpose(1, 0, 2),
        status=np.zeros_like(missing.status),
    )


def job_for(stage, *, seeds=(1, 2), network=NETWORK, n_workers=1, **training):
    return TrainJob(
        stage=stage,
        seeds=seeds,
        network=network,
        training={"steps": 6, "min_epochs": 3, **training},
        n_workers=n_workers,
    )


def write(folder, job, *, configurations, labels=None, eip_labels=None, committee=None):
    for name, parts in ((spec.CONFIGURATIONS, configurations), (spec.LABELS, labels)):
        for key, part in (parts or {}).items():
            save_arrays(folder / name / key, part.arrays())
    if eip_labels is not None:
        save_arrays(folder / spec.EIP_LABELS / "pool", eip_labels.arrays())
    if committee is not None:
        shutil.copytree(committee / spec.OUTPUT / spec.COMMITTEE, folder / spec.COMMITTEE)
    spec.write_job(folder / spec.JOB, job)
    return folder


def metrics_of(folder):
    return json.loads((folder / spec.OUTPUT / spec.METRICS).read_text())


def reason_of(folder):
    status = json.loads((folder / spec.STATUS).read_text())
    assert status["state"] == State.FAILED
    return status["reason"]


@pytest.fixture(scope="module")
def pool():
    return pool_of(12)


@pytest.fixture
def pretraining(tmp_path, pool):
    """A folder in which a committee can be pre-trained."""

    def make(name="pretrain", **settings):
        return write(
            tmp_path / name,
            job_for(Stage.PRETRAIN, **settings),
            configurations={"pool": pool},
            eip_labels=labels_of(pool, EIPS),
        )

    return make


def test_the_three_stages_build_on_each_other(tmp_path, pool, pretraining):
    first, more = pool.take(range(4)), pool.take(range(4, 7))
    dft = {"initial": labels_of(first, DFT, -100.0), "i001": labels_of(more, DFT, -100.0)}
    eip_labels = labels_of(pool, EIPS)
    pretrain = pretraining()

    assert run_job(pretrain) is State.DONE
    classify = write(
        tmp_path / "classify",
        job_for(Stage.CLASSIFY),
        configurations={"pool": pool},
        labels=dft,
        eip_labels=eip_labels,
        committee=pretrain,
    )
    assert run_job(classify) is State.DONE
    finetune = write(
        tmp_path / "finetune",
        job_for(Stage.FINETUNE),
        configurations={"pool": pool},
        labels=dft,
        eip_labels=eip_labels,
        committee=pretrain,
    )
    shutil.copytree(classify / spec.OUTPUT / spec.SELECTION, finetune / spec.SELECTION)
    assert run_job(finetune) is State.DONE

    committees = [
        Committee.load(folder / spec.OUTPUT / spec.COMMITTEE)
        for folder in (pretrain, classify, finetune)
    ]
    assert [committee.stage for committee in committees] == ["pretrain", "classify", "finetune"]
    assert {committee.eips for committee in committees} == {("soft", "hard")}
    assert {committee.seeds for committee in committees} == {(1, 2)}
    assert committees[2].members[0].heads.names == ("dft", "soft", "hard", "consensus")
    per_atom = committees[2].predict(pool).energy / 2
    assert (np.abs(per_atom + 100) < 3).all()

    selection = Selection.from_arrays(load_arrays(classify / spec.OUTPUT / spec.SELECTION))
    assert selection.ids.tolist() == pool.ids.tolist()
    assert selection.sources.tolist() == ["soft", "hard", NONE]

    metrics = metrics_of(finetune)
    assert metrics["n_labels"] == metrics["n_trained_on"] == 7
    # Two members, three epochs, seven labels in batches of four.
    assert metrics["n_steps"] == 2 * 3 * 2
    member = metrics["members"][1]
    assert member["seed"] == 2
    assert [epoch["epoch"] for epoch in member["epochs"]] == [1, 2, 3]
    assert set(member["epochs"][0]) == {"epoch", "loss", "energy_mae", "forces_mae", "seconds"}
    lines = (finetune / spec.PROGRESS).read_text().splitlines()
    progress = [json.loads(line) for line in lines]
    assert [(row["member"], row["epoch"]) for row in progress] == [
        (member, epoch) for member in (0, 1) for epoch in (1, 2, 3)
    ]
    assert sum(metrics_of(classify)["classes"].values()) == 7
    assert sum(metrics_of(classify)["choices"].values()) == 12
    assert not (finetune / spec.CHECKPOINT).exists()


def test_a_fine_tuning_says_what_a_verdict_rests_on(tmp_path, pool, pretraining):
    pretrain = pretraining()
    assert run_job(pretrain) is State.DONE
    folder = write(
        tmp_path / "finetune",
        job_for(Stage.FINETUNE, validation_fraction=0.3),
        configurations={"pool": pool},
        labels={"all": labels_of(pool.take(range(6)), DFT)},
        eip_labels=labels_of(pool, EIPS),
        committee=pretrain,
    )
    assert run_job(folder) is State.DONE
    metrics = metrics_of(folder)
    # Two members, each held out two others.
    assert metrics["n_held_out"] == 4
    best = [min(row["validation_score"] for row in item["epochs"]) for item in metrics["members"]]
    assert metrics["validation_score"] == pytest.approx(sum(best) / 2)
    # The potentials differ in depth and in size, so their forces point the same way mostly.
    assert 0.9 < metrics["eip_agreement"] <= 1


def test_labels_that_a_committee_asked_for_do_not_judge(tmp_path, pool):
    first, asked = pool.take(range(4)), pool.take(range(4, 10))
    job = replace(
        job_for(Stage.FINETUNE, seeds=(1, 2, 3), validation_fraction=0.5), judges=("initial",)
    )
    labels = {"initial": labels_of(first, DFT), "i001": labels_of(asked, DFT)}
    folder = write(tmp_path / "one", job, configurations={"pool": pool}, labels=labels)
    inputs, settings = train.read_inputs(job, folder), train.read_settings(job)
    stage = train.prepare("finetune", inputs, settings)
    held = [stage.for_member(member).held_out for member in range(3)]
    # Half of the four, in turn.
    assert [len(rows) for rows in held] == [2, 2, 2]
    judged = {str(inputs.labels.ids[row]) for rows in held for row in rows}
    assert judged == set(first.ids.tolist())
    assert len(stage.for_member(0).learnt) == 8

    assert run_job(folder) is State.DONE
    assert metrics_of(folder)["n_held_out"] == 4
    nobody = replace(job, judges=("known",))
    stage = train.prepare("finetune", train.read_inputs(nobody, folder), settings)
    assert len(stage.held_out) == 5
    assert train.fingerprint(job, folder) != train.fingerprint(nobody, folder)


def test_what_is_held_out_is_not_learnt(tmp_path, pool):
    folder = write(
        tmp_path,
        job_for(Stage.FINETUNE),
        configurations={"pool": pool},
        labels={"all": labels_of(pool, DFT)},
    )
    save_arrays(folder / spec.EXCLUDE / "test", {"ids": pool.ids[:5]})

    assert run_job(folder) is State.DONE

    assert metrics_of(folder)["n_labels"] == metrics_of(folder)["n_configurations"] == 7


def test_configurations_that_dft_could_not_label_are_left_out(tmp_path, pool):
    labels = labels_of(pool, DFT)
    labels.status[3] = 1
    labels.energy[3] = np.nan
    folder = write(
        tmp_path,
        job_for(Stage.FINETUNE),
        configurations={"pool": pool},
        labels={"all": labels},
    )

    assert run_job(folder) is State.DONE

    assert metrics_of(folder)["n_labels"] == 11


def test_side_by_side_gives_what_one_after_the_other_gives(pretraining):
    one, two = pretraining("one"), pretraining("two", n_workers=2)

    assert run_job(one) is run_job(two) is State.DONE

    assert (one / WEIGHTS).read_bytes() == (two / WEIGHTS).read_bytes()


def test_an_interrupted_job_goes_on_elsewhere_and_ends_the_same(pretraining, monkeypatch):
    whole = pretraining("whole", batch_size=5)
    assert run_job(whole) is State.DONE

    # Time is up at every third question: in the middle of an epoch, and between members.
    count = iter(range(1000))
    monkeypatch.setattr(Stop, "__call__", lambda _: next(count) % 3 == 2)
    states, previous = [], None
    while State.DONE not in states and len(states) < 30:
        folder = pretraining(f"piece{len(states)}", batch_size=5)
        if previous:
            shutil.copytree(previous / spec.CHECKPOINT, folder / spec.CHECKPOINT)
        states.append(run_job(folder))
        previous = folder

    assert states[:-1] == [State.INTERRUPTED] * (len(states) - 1)
    assert len(states) > 3
    assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_heads_are_drawn_alike_whether_a_job_was_interrupted_or_not(tmp_path, pool, monkeypatch):
    def finetuning(name, **settings):
        return write(
            tmp_path / name,
            job_for(Stage.FINETUNE, n_heads=4, validation_fraction=0.5, **settings),
            configurations={"pool": pool},
            labels={"initial": labels_of(pool, DFT)},
        )

    whole, side_by_side = finetuning("whole"), finetuning("side", n_workers=2)
    assert run_job(whole) is run_job(side_by_side) is State.DONE
    count = iter(range(1000))
    monkeypatch.setattr(Stop, "__call__", lambda _: next(count) % 3 == 2)
    pieces = finetuning("pieces")
    states = []
    while State.DONE not in states and len(states) < 30:
        states.append(run_job(pieces))

    assert len(states) > 3
    for folder in (side_by_side, pieces):
        assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    committee = Committee.load(whole / spec.OUTPUT / spec.COMMITTEE)
    assert (len(committee), committee.n_heads) == (2, 8)
    assert not np.array_equal(*(item.feature_uncertainty.heads for item in committee.members))


def test_heads_of_a_pretraining_are_refused(pretraining):
    folder = pretraining(n_heads=4)

    assert run_job(folder) is State.FAILED

    assert "set it in stage finetune" in reason_of(folder)


def test_a_job_without_time_is_interrupted_with_a_checkpoint(pretraining):
    folder = pretraining()
    job = replace(spec.read_job(folder / spec.JOB), max_seconds=0.0)
    spec.write_job(folder / spec.JOB, job)

    assert run_job(folder) is State.INTERRUPTED

    assert len(list((folder / spec.CHECKPOINT).glob("member_*.safetensors"))) == 2
    assert not (folder / spec.OUTPUT).exists()


def test_a_killed_job_leaves_no_worker_behind_and_loses_little(tmp_path, pretraining):
    # More than anyone waits for: what ends here was ended.
    folder = pretraining(steps=10**8, n_workers=2)
    # On one GPU the members would learn one after the other.
    spec.write_job(folder / spec.JOB, replace(spec.read_job(folder / spec.JOB), device="cpu"))
    script = tmp_path / "run.py"
    script.write_text(RUN)
    process = subprocess.Popen([sys.executable, script, folder])
    checkpoints = [folder / spec.CHECKPOINT / f"member_00{n}.safetensors" for n in (0, 1)]
    wait_for(lambda: all(path.exists() for path in checkpoints))
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()

    assert len(workers) >= 2
    try:
        wait_for(lambda: not any(is_alive(pid) for pid in workers))
    finally:
        for pid in filter(is_alive, workers):
            os.kill(pid, signal.SIGKILL)
    assert json.loads((folder / spec.STATUS).read_text())["state"] == State.RUNNING
    before = [steps_of(path) for path in checkpoints]
    assert min(before) > 0
    job = replace(spec.read_job(folder / spec.JOB), max_seconds=0.0, n_workers=1)
    spec.write_job(folder / spec.JOB, job)
    assert run_job(folder) is State.INTERRUPTED
    assert [steps_of(path) for path in checkpoints] == before


def test_a_checkpoint_of_another_job_is_refused(pretraining):
    first, second = pretraining("first"), pretraining("second", learning_rate=1e-4)
    job = replace(spec.read_job(first / spec.JOB), max_seconds=0.0)
    spec.write_job(first / spec.JOB, job)
    run_job(first)
    shutil.copytree(first / spec.CHECKPOINT, second / spec.CHECKPOINT)

    assert run_job(second) is State.FAILED

    assert "other settings or data; start without it" in reason_of(second)


def test_a_member_that_diverges_twice_is_named(pretraining):
    folder = pretraining(learning_rate=1e200, n_workers=2)

    assert run_job(folder) is State.FAILED

    # Which of two that work side by side says it first is a matter of luck.
    assert re.search(r"\(seed [12]\) diverged, also at 0\.3 of the learning", reason_of(folder))
    assert "lower `learning_rate`" in reason_of(folder)


def test_a_member_that_diverges_once_is_tried_at_a_lower_rate(pretraining, monkeypatch):
    monkeypatch.setattr(train, "RATE_FACTORS", (1e203, 1.0))
    folder = pretraining()

    assert run_job(folder) is State.DONE

    assert [member["rate_factor"] for member in metrics_of(folder)["members"]] == [1.0, 1.0]


def test_labels_of_unknown_configurations_are_refused(tmp_path, pool):
    folder = write(
        tmp_path,
        job_for(Stage.FINETUNE),
        configurations={"pool": pool.take(range(6))},
        labels={"all": labels_of(pool, DFT)},
    )

    assert run_job(folder) is State.FAILED

    assert "6 of 12 DFT labels are of configurations that are not in the sets" in reason_of(folder)


@pytest.mark.parametrize("stage", [Stage.FINETUNE, Stage.CLASSIFY])
def test_a_stage_without_dft_labels_is_refused(tmp_path, pool, stage):
    folder = write(
        tmp_path,
        job_for(stage),
        configurations={"pool": pool},
        eip_labels=labels_of(pool, EIPS),
        labels={"failed": Labels.missing(pool, ["dft"])},
    )

    assert run_job(folder) is State.FAILED

    assert "needs DFT labels, and there is not one" in reason_of(folder)


def test_an_unknown_setting_is_refused(pretraining):
    folder = pretraining(epoch=3)

    assert run_job(folder) is State.FAILED

    assert "training: no setting ['epoch'], only" in reason_of(folder)


def test_a_job_says_where_it_computed_and_refuses_a_gpu_that_is_not_there(pretraining, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    folder = pretraining()
    assert run_job(folder) is State.DONE
    assert metrics_of(folder)["device"] == "cpu"

    folder = pretraining("asks")
    job = replace(spec.read_job(folder / spec.JOB), device="cuda")
    spec.write_job(folder / spec.JOB, job)
    assert run_job(folder) is State.FAILED
    assert "torch sees no GPU here" in reason_of(folder)


def test_members_share_no_gpu(pretraining, monkeypatch):
    folder = pretraining(seeds=(1, 2, 3, 4), n_workers=3)
    job = spec.read_job(folder / spec.JOB)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [train.count_processes(job, device) for device in (gpu, cpu)] == [1, 3]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert train.count_processes(job, gpu) == 3
    assert train.count_processes(replace(job, stage=Stage.CLASSIFY), gpu) == 1


def test_a_worker_says_what_torch_says(pretraining, monkeypatch):
    def busy(*_):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    folder = pretraining()
    (folder / spec.CHECKPOINT).mkdir()
    monkeypatch.setattr(train, "prepare", busy)
    with pytest.raises(SystemExit):
        train.work(spec.read_job(folder / spec.JOB), folder, range(1), None)
    (reason,) = (folder / spec.CHECKPOINT).glob("reason_*")
    assert reason.read_text().startswith("RuntimeError: CUDA error: all CUDA-capable")


def test_a_job_without_memory_says_so_whichever_process_lacked_it(pretraining, monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB")

    folder = pretraining()
    (folder / spec.CHECKPOINT).mkdir()
    monkeypatch.setattr(train, "prepare", full)
    with pytest.raises(SystemExit) as ended:
        train.work(spec.read_job(folder / spec.JOB), folder, range(1), None)
    # The worker itself, and one that the system killed.
    for code, reason in ((ended.value.code, "tried to allocate 9 TB"), (-9, "system killed it")):
        with pytest.raises(MemoryError, match=reason):
            train._check_exit(folder, range(1), SimpleNamespace(exitcode=code))

    assert run_job(folder) is State.OUT_OF_MEMORY
    status = json.loads((folder / spec.STATUS).read_text())
    assert status["state"] == "out_of_memory"
    assert "tried to allocate 9 TB" in status["reason"]


def test_a_checkpoint_serves_on_another_device(pretraining):
    folder = pretraining()
    job = spec.read_job(folder / spec.JOB)
    here, there = (
        train.fingerprint(replace(job, device=device), folder) for device in ("cpu", "cuda")
    )
    assert here == there
    exact = replace(job, training=job.training | {"mixed_precision": "tf32"})
    assert train.fingerprint(exact, folder) != here


def test_a_checkpoint_serves_with_parts_of_another_size(pretraining):
    folder = pretraining()
    job = spec.read_job(folder / spec.JOB)
    smaller = replace(job, batch_parts=2, batch_edges=100)
    assert train.fingerprint(smaller, folder) == train.fingerprint(job, folder)


def test_no_part_of_a_training_has_more_neighbours_than_the_job_allows(pretraining, monkeypatch):
    folder = pretraining(network=NETWORK | {"trunk": "schnet"}, batch_size=6)
    made = watch_neighbours(monkeypatch)
    assert run_job(folder) is State.DONE
    whole = max(made)
    for parts in (1, 2):
        made.clear()
        smaller = replace(spec.read_job(folder / spec.JOB), batch_edges=300, batch_parts=parts)
        spec.write_job(folder / spec.JOB, smaller)

        assert run_job(folder) is State.DONE

        assert 100 < max(made) <= 300 / parts < whole


@pytest.mark.parametrize("name", ["batch_parts", "batch_edges"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "many", None])
def test_bounds_of_batches_are_whole_numbers(name, value):
    wrong = re.escape(f"{name} must be a whole number from 1 on, not {value!r}")
    with pytest.raises(ValueError, match=wrong):
        TrainJob(stage=Stage.PRETRAIN, seeds=(1,), **{name: value})


def steps_of(path):
    with safe_open(path, "np") as content:
        return json.loads(content.metadata()["facts"])["n_steps"]


def children_of(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # What is dead but not yet buried by its parent still has a number.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
