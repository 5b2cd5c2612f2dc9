"""A training in several processes, started by AiiDA as users would have it."""

import sys
from pathlib import Path

import pytest
from aiida.engine import run_get_node
from aiida.orm import Dict

from aiida_eipnn.calculations.train import TrainCalculation
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node={num_mpiprocs_per_machine}"


@pytest.mark.slow
def test_a_code_with_mpi_trains_in_as_many_processes_as_it_is_given(
    torch, aiida_computer_local, aiida_code_installed
):
    from small_trainings import SOFT, labels_of, pool_of

    # A computer of its own: where pw.x runs, the command is that of MPI.
    computer = aiida_computer_local(label="torchrun")
    computer.set_mpirun_command([sys.executable, *TORCHRUN.split()])
    code = aiida_code_installed(
        label="together",
        computer=computer,
        filepath_executable=str(Path(sys.executable).with_name("eipnn-job")),
        with_mpi=True,
        prepend_text="export OMP_NUM_THREADS=1",
    )
    pool = pool_of(4)
    inputs = {
        "code": code,
        "configurations": {"pool": ConfigurationsData.from_value(pool)},
        "eip_labels": {"pool": LabelsData.from_value(labels_of(pool, {"soft": SOFT}))},
        "seeds": [1],
        "network": {"n_radial": 4, "l_max": 1, "width": 4},
        "training": Dict({"stage": "pretrain", "steps": 2}),
        "metadata": {"options": {"resources": {"num_machines": 1, "num_mpiprocs_per_machine": 2}}},
    }
    outputs, node = run_get_node(TrainCalculation, **inputs)
    assert node.is_finished_ok, node.exit_message
    assert outputs["metrics"]["n_processes"] == 2
