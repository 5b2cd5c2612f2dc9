"""Jobs that are killed or cut off go on from where they were."""

import stat
import sys
from pathlib import Path

import pytest
from aiida.engine import run_get_node
from aiida.orm import CalcJobNode, Dict

from aiida_eipnn.data.configurations import ConfigurationsData
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
    assert "checkpoint" in jobs[1].inputs
    weights = [
        outputs["committee"].base.repository.get_object_content("weights.safetensors", mode="rb")
        for outputs in (whole, killed)
    ]
    assert weights[0] == weights[1]


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
