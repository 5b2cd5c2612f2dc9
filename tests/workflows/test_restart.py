"""Jobs that are killed or cut off go on from where they were."""

import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from aiida.engine import run_get_node
from aiida.orm import CalcFunctionNode, CalcJobNode, Dict
from ase.build import bulk

from aiida_eipnn.calculations.upload import UploadCalculation
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.workflows import restart
from aiida_eipnn.workflows.restart import LabelBaseWorkChain, TrainBaseWorkChain

SW = "SW_StillingerWeber_1985_Si__MO_405512056662_005"
EDIP = "EDIP_JustoBazantKaxiras_1998_Si__MO_958932894036_002"
JOB = Path(sys.executable).with_name("eipnn-job")

# Kills the real job, its workers too, as soon as there is a checkpoint, but only the first time.
KILL_ONCE = """#!/bin/bash
if [ -e {mark} ]; then exec {job} "$@"; fi
touch {mark}
setsid {job} "$@" & pid=$!
for _ in $(seq 6000); do
  if [ -n "$(ls checkpoint 2>/dev/null)" ]; then break; fi
  sleep 0.1
done
kill -9 -- -$pid
wait $pid
"""

# The real job, with no more memory than it has after reading torch, and so many MB.
NARROW = """#!{python}
import resource, sys
from pathlib import Path
from aiida_eipnn.jobs import train
from aiida_eipnn.jobs.__main__ import main

(line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if "VmData" in row]
limit = int(line.split()[1]) * 1024 + {megabytes} * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(main())
"""


@pytest.fixture
def narrow_code(aiida_code_installed, tmp_path, job_code):
    """Return a code whose jobs have little memory."""

    def make(megabytes):
        script = tmp_path / f"narrow-{megabytes}"
        script.write_text(NARROW.format(python=sys.executable, megabytes=megabytes))
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
        return aiida_code_installed(
            label=f"narrow-{megabytes}",
            filepath_executable=str(script),
            prepend_text="export OMP_NUM_THREADS=1",
        )

    return make


@pytest.fixture
def fragile_code(aiida_code_installed, tmp_path, job_code):
    script = tmp_path / "fragile-eipnn-job"
    script.write_text(KILL_ONCE.format(mark=tmp_path / "killed", job=JOB))
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    return aiida_code_installed(
        label="fragile", filepath_executable=str(script), prepend_text="export OMP_NUM_THREADS=1"
    )


def labels_of(job_code, pool):
    inputs = {"code": job_code, "configurations": {"pool": pool}, "eips": [SW, EDIP]}
    outputs, node = run_get_node(LabelBaseWorkChain, job=inputs)
    assert node.is_finished_ok, node.exit_message
    return outputs["labels"]


def train_inputs(code, pool, eip_labels):
    return {
        "code": code,
        "configurations": {"pool": pool},
        "eip_labels": {"pool": eip_labels},
        "seeds": [1, 2],
        "network": {"n_radial": 4, "l_max": 2, "width": 8, "depth": 1},
        "training": Dict({"stage": "pretrain", "steps": 1200}),
    }


def test_a_training_that_is_killed_half_way_ends_with_the_weights_of_one_that_was_not(
    kim, torch, job_code, fragile_code, rattled_silicon
):
    pool = ConfigurationsData.from_value(rattled_silicon(30))
    labels = labels_of(job_code, pool)
    whole, _ = run_get_node(TrainBaseWorkChain, job=train_inputs(job_code, pool, labels))
    killed, node = run_get_node(TrainBaseWorkChain, job=train_inputs(fragile_code, pool, labels))
    assert node.is_finished_ok, node.exit_message
    jobs = [child for child in node.called if isinstance(child, CalcJobNode)]
    assert [job.exit_status for job in jobs] == [400, 0]
    # It went on from the checkpoint where that was; what came home only tells how far it is.
    assert jobs[1].inputs.parent_folder.pk == jobs[0].outputs.remote_folder.pk
    marks = jobs[0].outputs.checkpoint["checksums"]
    assert all(name.endswith(".json") for name in marks)
    assert jobs[0].outputs.retrieved.base.repository.list_object_names() == [
        "_scheduler-stderr.txt",
        "_scheduler-stdout.txt",
        "eipnn-job.log",
        "status.json",
    ]
    weights = [
        outputs["committee"].base.repository.get_object_content("weights.safetensors", mode="rb")
        for outputs in (whole, killed)
    ]
    assert weights[0] == weights[1]


def test_inputs_that_are_gone_from_the_computer_are_sent_with_the_job(
    kim, torch, job_code, rattled_silicon
):
    pool = ConfigurationsData.from_value(rattled_silicon(10)).store()
    inputs = train_inputs(job_code, pool, labels_of(job_code, pool))
    inputs["training"] = Dict({"stage": "pretrain", "steps": 2})
    _, upload = run_get_node(UploadCalculation, node=pool, metadata={"computer": job_code.computer})
    inputs["uploaded"] = {"pool": upload.outputs.remote_folder.uuid}
    _, node = run_get_node(TrainBaseWorkChain, job=inputs)
    assert [job.exit_status for job in node.called] == [0]

    (Path(upload.get_remote_workdir()) / "positions.npy").unlink()
    _, node = run_get_node(TrainBaseWorkChain, job=inputs)
    assert [job.exit_status for job in node.called] == [403, 0]
    assert "configurations/pool/positions.npy was" in node.called[0].exit_message
    # What the work chain was not asked to remove is there.
    assert all(Path(job.get_remote_workdir()).exists() for job in node.called)


@pytest.mark.parametrize("eip", [SW, "python:nowhere:make"])
def test_folders_are_removed_where_that_is_asked_for_and_all_went_well(
    kim, job_code, rattled_silicon, eip
):
    inputs = {
        "code": job_code,
        "configurations": {"pool": ConfigurationsData.from_value(rattled_silicon(3))},
        "eips": [eip],
    }
    _, node = run_get_node(LabelBaseWorkChain, job=inputs, clean_workdir=True)
    assert node.is_finished_ok == (eip == SW)
    for job in node.called:
        assert Path(job.get_remote_workdir()).exists() != node.is_finished_ok


def large_batch_inputs(code):
    """Return a training whose step takes some 600 MB: sixteen configurations of 64 atoms."""
    from small_trainings import SOFT
    from small_trainings import labels_of as analytic_labels

    rng, frames = np.random.default_rng(0), []
    for _ in range(16):
        atoms = bulk("Si", cubic=True) * (2, 2, 2)
        atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
        frames.append(atoms)
    pool = Configurations.from_atoms(frames, "rattled")
    labels = LabelsData.from_value(analytic_labels(pool, {"soft": SOFT}))
    return train_inputs(code, ConfigurationsData.from_value(pool), labels) | {
        "seeds": [1],
        "network": {"trunk": "schnet", "width": 64, "depth": 3, "n_radial": 20, "l_max": 0},
        "training": Dict({"stage": "pretrain", "steps": 2, "batch_size": 16}),
    }


def weights_of(committee, tmp_path):
    from aiida_eipnn.science.nn.committee import Committee

    committee.save(tmp_path / committee.uuid)
    (member,) = Committee.load(tmp_path / committee.uuid).members
    return dict(member.named_parameters())


@pytest.mark.slow
def test_a_training_without_the_memory_for_its_batch_computes_it_in_parts(
    torch, job_code, narrow_code, tmp_path
):
    inputs = large_batch_inputs(job_code)
    whole, _ = run_get_node(TrainBaseWorkChain, job=inputs)
    parts, node = run_get_node(TrainBaseWorkChain, job=inputs | {"code": narrow_code(560)})

    assert node.is_finished_ok, node.exit_message
    jobs = [child for child in node.called if isinstance(child, CalcJobNode)]
    statuses = [job.exit_status for job in jobs]
    assert statuses == [402] * (len(jobs) - 1) + [0]
    assert len(jobs) > 1
    assert "allocate memory" in jobs[0].exit_message
    # What is changed is an input of the next job, made of that of the one before.
    halved = [child for child in node.called if isinstance(child, CalcFunctionNode)]
    for before, change, after in zip(jobs[:-1], halved, jobs[1:], strict=True):
        assert change.inputs.parameters.pk == before.inputs.parameters.pk
        assert change.outputs.result.pk == after.inputs.parameters.pk
    assert jobs[-1].inputs.parameters.get_dict() == {"batch_parts": 2 ** len(halved)}
    first, second = (weights_of(outputs["committee"], tmp_path) for outputs in (whole, parts))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_a_training_that_no_part_of_a_batch_helps_is_one_clear_error(
    torch, narrow_code, monkeypatch
):
    monkeypatch.setattr(restart, "MAX_BATCH_PARTS", 2)
    inputs = large_batch_inputs(narrow_code(150))
    _, node = run_get_node(TrainBaseWorkChain, job=inputs)

    assert node.exit_status == 430
    assert "batches are computed in 2 parts: ask the scheduler for more" in node.exit_message
    jobs = [child for child in node.called if isinstance(child, CalcJobNode)]
    assert [job.exit_status for job in jobs] == [402, 402]


def test_a_training_without_labels_is_one_clear_error(torch, job_code, rattled_silicon):
    pool = ConfigurationsData.from_value(rattled_silicon(3))
    inputs = train_inputs(job_code, pool, None)
    del inputs["eip_labels"]
    _, node = run_get_node(TrainBaseWorkChain, job=inputs)
    assert not node.is_finished_ok
    (job,) = node.called
    assert job.exit_status == 310
    assert "label" in job.exit_message


def test_a_job_that_cannot_start_says_where_to_look(
    aiida_code_installed, job_code, rattled_silicon
):
    broken = aiida_code_installed(label="broken", filepath_executable="/bin/false")
    pool = ConfigurationsData.from_value(rattled_silicon(3))
    _, node = run_get_node(
        LabelBaseWorkChain,
        job={"code": broken, "configurations": {"pool": pool}, "eips": [SW]},
    )
    # It may have been killed before it wrote anything: two more tries.
    assert [child.exit_status for child in node.called] == [300, 300, 300]
    assert "whether eipnn-job starts" in node.called[0].exit_message
