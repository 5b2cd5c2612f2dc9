"""`eipnn.label` and `eipnn.explore` through AiiDA, with real KIM models."""

import pytest
from aiida.engine import run_get_node

from aiida_eipnn.calculations.explore import ExploreCalculation
from aiida_eipnn.calculations.label import LabelCalculation
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


def test_a_job_without_walltime_left_goes_on_from_its_checkpoint(kim, job_code, rattled_silicon):
    pool = ConfigurationsData.from_value(rattled_silicon(40))
    outputs, node = run_get_node(
        LabelBaseWorkChain,
        job={"code": job_code, "configurations": {"pool": pool}, "eips": [SW]},
    )
    assert node.is_finished_ok, node.exit_message
    assert outputs["labels"].base.attributes.get("n_labels") == 40


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
