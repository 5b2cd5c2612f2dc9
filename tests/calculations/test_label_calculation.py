"""`eipnn.label` and `eipnn.explore` through AiiDA, with real KIM models."""

import pytest
from aiida.engine import run_get_node

from aiida_eipnn.calculations.explore import ExploreCalculation
from aiida_eipnn.calculations.label import LabelCalculation
from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.workflows.restart import LabelBaseWorkChain

SW = "SW_StillingerWeber_1985_Si__MO_405512056662_005"
EDIP = "EDIP_JustoBazantKaxiras_1998_Si__MO_958932894036_002"
MISSING = "SW_NobodyWroteThis_1985_Si__MO_000000000000_000"


@pytest.fixture
def pool(rattled_silicon):
    return ConfigurationsData.from_value(rattled_silicon(6))


def test_all_eips_label_all_configurations_in_one_job(kim, job_code, pool):
    outputs, node = run_get_node(
        LabelCalculation, code=job_code, configurations={"pool": pool}, eips=[SW, EDIP]
    )
    assert node.is_finished_ok, node.exit_message
    labels = outputs["labels"].value()
    assert labels.sources.tolist() == [SW, EDIP]
    assert labels.ok.all()
    assert labels.ids.tolist() == pool.value().ids.tolist()
    # Stillinger and Weber fitted the cohesive energy of diamond to 4.34 eV/atom.
    assert (labels.energy[:, 0] / 2).min() == pytest.approx(-4.3, abs=0.1)


def test_names_with_settings_arrive_whole_in_every_node(job_code, pool):
    eips = [
        "stillinger-weber",
        "stillinger-weber[hauch-1999,lambda=80.5]",
        "lennard-jones[epsilon=0.4,sigma=2.1]",
        "ase:ase.calculators.emt:EMT[asap_cutoff=True]",
    ]
    outputs, node = run_get_node(
        LabelCalculation, code=job_code, configurations={"pool": pool}, eips=eips
    )

    assert node.is_finished_ok, node.exit_message
    assert node.inputs.eips.get_list() == eips
    assert outputs["labels"].base.attributes.get("sources") == eips
    assert outputs["labels"].value().ok.all(axis=0).tolist() == [True, True, True, False]
    assert list(outputs["metrics"].get_dict()["eips"]) == eips


def test_a_model_that_is_not_installed_is_recorded_and_the_others_go_on(kim, job_code, pool):
    outputs, node = run_get_node(
        LabelCalculation, code=job_code, configurations={"pool": pool}, eips=[SW, MISSING]
    )
    assert node.is_finished_ok
    labels = outputs["labels"].value()
    assert labels.ok[:, 0].all()
    assert not labels.ok[:, 1].any()
    assert {failure.source for failure in labels.failures()} == {MISSING}
    assert "not installed" in labels.failures()[0].reason


def test_an_element_that_no_eip_knows_is_one_clear_error(kim, job_code):
    from ase.build import bulk

    argon = ConfigurationsData.from_value(
        Configurations.from_atoms([bulk("Xe", "fcc", a=6.2)], "crystal")
    )
    _, node = run_get_node(
        LabelCalculation, code=job_code, configurations={"pool": argon}, eips=[SW]
    )
    assert node.exit_status == 310
    assert "Xe" in node.exit_message
    assert "Si" in node.exit_message


def test_an_empty_pool_is_one_clear_error(job_code):
    empty = ConfigurationsData.from_value(Configurations.from_atoms([], []))
    _, node = run_get_node(
        LabelCalculation, code=job_code, configurations={"pool": empty}, eips=[SW]
    )
    assert node.exit_status == 310
    assert "empty" in node.exit_message


def test_the_same_eip_twice_is_refused(job_code, pool):
    with pytest.raises(ValueError, match="may occur once"):
        run_get_node(LabelCalculation, code=job_code, configurations={"pool": pool}, eips=[SW, SW])


SLOW = """
import time

from aiida_eipnn.science.eip.analytic import LennardJones


class Slow(LennardJones):
    def label(self, atoms):
        time.sleep(1.0)
        return super().label(atoms)


def make():
    return Slow(epsilon=0.1, sigma=2.0, cutoff=5.0)
"""


def test_a_job_that_runs_out_of_walltime_goes_on_from_its_checkpoint(
    aiida_code_installed, job_code, rattled_silicon, tmp_path
):
    (tmp_path / "slow_lennard_jones.py").write_text(SLOW)
    code = aiida_code_installed(
        label="slow",
        filepath_executable=str(job_code.filepath_executable),
        prepend_text=f"export PYTHONPATH={tmp_path}",
    )
    pool = ConfigurationsData.from_value(rattled_silicon(18))
    options = {
        "resources": {"num_machines": 1, "num_mpiprocs_per_machine": 1},
        "max_wallclock_seconds": 30,
    }
    outputs, node = run_get_node(
        LabelBaseWorkChain,
        job={
            "code": code,
            "configurations": {"pool": pool},
            "eips": ["python:slow_lennard_jones:make"],
            "metadata": {"options": options},
        },
    )
    assert node.is_finished_ok, node.exit_message
    statuses = [job.exit_status for job in node.called]
    assert statuses[0] == 400
    assert statuses[-1] == 0
    assert outputs["labels"].base.attributes.get("n_labels") == 18


def test_the_same_seed_makes_the_same_pool(kim, job_code, rattled_silicon):
    seeds = ConfigurationsData.from_value(rattled_silicon(1))
    inputs = {
        "code": job_code,
        "configurations": {"seeds": seeds},
        "recipes": [{"config_type": "rattled", "count": 4}, {"config_type": "md", "count": 3}],
        "eip": SW,
    }
    first, node = run_get_node(ExploreCalculation, seed=1, **inputs)
    again, _ = run_get_node(ExploreCalculation, seed=1, **inputs)
    other, _ = run_get_node(ExploreCalculation, seed=2, **inputs)
    assert node.is_finished_ok, node.exit_message
    assert first["pool"].value().ids.tolist() == again["pool"].value().ids.tolist()
    assert first["pool"].value().ids.tolist() != other["pool"].value().ids.tolist()
    assert first["pool"].base.attributes.get("config_types") == {"md": 3, "rattled": 4}


def test_a_committee_explores_until_it_is_unsure(torch, job_code, rattled_silicon, tmp_path):
    from aiida_eipnn.science.nn.committee import Committee
    from aiida_eipnn.science.nn.network import Network, NetworkParameters

    members = []
    for seed in (1, 2):
        network = Network(NetworkParameters(n_radial=4, l_max=1, width=8), (14,), ("dft",))
        network.initialise(seed)
        members.append(network)
    Committee(members=tuple(members), stage="finetune", seeds=(1, 2)).save(tmp_path)
    outputs, node = run_get_node(
        ExploreCalculation,
        seed=1,
        code=job_code,
        configurations={"seeds": ConfigurationsData.from_value(rattled_silicon(1))},
        recipes=[{"config_type": "md", "count": 2, "spacing": 2, "max_uncertainty": 1e-6}],
        committee=CommitteeData.from_folder(tmp_path),
        parameters={"device": "cpu"},
    )
    assert node.is_finished_ok, node.exit_message
    assert len(outputs["pool"]) == 2
    assert "the committee is unsure" in outputs["metrics"]["notes"][0]
