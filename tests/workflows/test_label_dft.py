"""DFT labels in lanes, with the real pw.x."""

import numpy as np
import pytest
from aiida.common.links import LinkType
from aiida.engine import run_get_node
from aiida.orm import Bool, CalcJobNode, Dict, Float, StructureData, WorkChainNode
from aiida_quantumespresso.calculations.functions.create_kpoints_from_distance import (
    create_kpoints_from_distance,
)
from ase.build import bulk, molecule

from aiida_eipnn.calculations.dft import deal, mesh_of, prepare_runs, same_level
from aiida_eipnn.data.choice import Choice, ChoiceData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.reports.points import read_points
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.workflows import builder
from aiida_eipnn.workflows.continuation import finished_runs
from aiida_eipnn.workflows.label_dft import DftLabelWorkChain, DftLaneWorkChain, slots_needed

INPUTS = {
    "protocol": "fast",
    "stringency": "low",
    "n_lanes": 2,
    "min_success_fraction": 0.5,
    "scaling": {"bands_factor": 1.25, "extra_bands": 4, "conv_thr_per_atom": 1e-7},
    "pw_base": {"kpoints_distance": 0.9, "max_iterations": 2},
}

# One run serves the tests that only look at it.
FINISHED: dict[str, WorkChainNode] = {}


@pytest.fixture
def dft_inputs(pw_code, pseudo_family):
    def make(configurations: Configurations, **changes):
        inputs = {**INPUTS, **changes}
        inputs["pw_base"] = {"pseudo_family": pseudo_family, **inputs["pw_base"]}
        node = ConfigurationsData.from_value(configurations)
        return {
            "configurations": node,
            "choice": ChoiceData.from_value(Choice.from_ids(configurations.ids), strategy="given"),
            **builder.dft_inputs(inputs, pw_code, ["Si"], {}),
        }

    return make


def overlapping() -> Configurations:
    atoms = bulk("Si")
    atoms.positions[1] = atoms.positions[0]
    return Configurations.from_atoms([atoms], "broken")


def test_labels_of_pw_agree_with_finite_differences_of_its_energy(dft_inputs, rattled_silicon):
    step = 0.02
    moved = []
    base = rattled_silicon(1).atoms(0)
    for shift in (0.0, step, -step):
        atoms = base.copy()
        atoms.positions[0, 0] += shift
        moved.append(atoms)
    outputs, node = run_get_node(
        DftLabelWorkChain, **dft_inputs(Configurations.from_atoms(moved, "x"))
    )
    assert node.is_finished_ok, node.exit_message
    labels = outputs["labels"].value()
    rows = labels.rows_of(Configurations.from_atoms(moved).ids)
    middle, up, down = (labels.energy[row, 0] for row in rows)
    assert labels.forces_of(rows[0])[0, 0] == pytest.approx(-(up - down) / (2 * step), abs=0.03)
    assert labels.sources.tolist() == ["dft"]
    assert outputs["labels"].level["ecutwfc"] == 20.0
    assert all(labels.origins)
    assert middle < 0


def test_stress_of_pw_has_the_sign_and_unit_of_ase(dft_inputs):
    strained = []
    for factor in (0.95, 0.96, 0.94):
        atoms = bulk("Si")
        atoms.set_cell(atoms.cell * factor, scale_atoms=True)
        strained.append(atoms)
    configurations = Configurations.from_atoms(strained, "compressed")
    outputs, _ = run_get_node(DftLabelWorkChain, **dft_inputs(configurations))
    labels = outputs["labels"].value()
    volumes = [atoms.get_volume() for atoms in strained]
    energies = labels.energy[labels.rows_of(configurations.ids), 0]
    slope = (energies[1] - energies[2]) / (volumes[1] - volumes[2])
    stress = labels.stress[labels.rows_of(configurations.ids)[0], 0]
    assert stress[:3].mean() < 0  # compressed
    assert stress[:3].mean() == pytest.approx(slope, rel=0.2)


@pytest.fixture
def mixed(dft_inputs, rattled_silicon):
    """Labels of two configurations, and of one between them on which pw.x fails."""
    if "mixed" not in FINISHED:
        good, bad = rattled_silicon(2), overlapping()
        together = Configurations.from_atoms([good.atoms(0), bad.atoms(0), good.atoms(1)], "mixed")
        _, FINISHED["mixed"] = run_get_node(DftLabelWorkChain, **dft_inputs(together))
    assert FINISHED["mixed"].is_finished_ok
    return FINISHED["mixed"]


def test_a_run_that_its_walltime_cuts_into_slices_goes_on_until_it_is_done(dft_inputs):
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.05, seed=1)
    inputs = dft_inputs(
        Configurations.from_atoms([atoms], "rattled"),
        pw_base={"kpoints_distance": 0.3, "max_iterations": 1},
    )
    inputs["pw_base"]["pw"]["metadata"]["options"]["max_wallclock_seconds"] = 8
    outputs, node = run_get_node(DftLabelWorkChain, **inputs)
    assert node.is_finished_ok, node.exit_message
    runs = [child for child in node.called_descendants if isinstance(child, CalcJobNode)]
    ends = [run.exit_status for run in sorted(runs, key=lambda run: run.pk)]
    # More slices than attempts: 400 is out of walltime.
    assert len(ends) > 1
    assert ends == [400] * (len(ends) - 1) + [0]
    labels = outputs["labels"].value()
    assert labels.ok.all()
    assert labels.energy[0, 0] == pytest.approx(4 * -215.4, rel=0.01)


def test_a_failed_run_is_a_row_with_a_reason_and_the_rest_is_labelled(mixed):
    bad = overlapping()
    labels = mixed.outputs.labels.value()
    assert labels.ok.sum() == 2
    (failure,) = labels.failures()
    assert failure.id == str(bad.ids[0])
    assert failure.reason
    assert np.isnan(labels.energy[labels.rows_of(bad.ids)]).all()


def test_a_lane_that_breaks_keeps_what_pw_had_finished(dft_inputs, rattled_silicon, monkeypatch):
    mesh = DftLaneWorkChain.mesh

    def fail_after_two(lane, structure):
        if len(lane.ctx.children) == 2:
            raise RuntimeError("disk full")
        return mesh(lane, structure)

    monkeypatch.setattr(DftLaneWorkChain, "mesh", fail_after_two)
    pool = rattled_silicon(3, seed=5)
    outputs, node = run_get_node(DftLabelWorkChain, **dft_inputs(pool, n_lanes=1))

    (lane,) = (child for child in node.called if child.process_label == "DftLaneWorkChain")
    assert lane.is_excepted
    assert node.is_finished_ok, node.exit_message
    labels = outputs["labels"].value()
    links = lane.base.links.get_outgoing(link_type=LinkType.CALL_WORK).all_link_labels()
    assert len(links) == 2
    assert {f"dft_{name}" for name in labels.labelled().ids} == set(links)


def test_runs_that_are_there_are_taken_with_their_failures_and_only_the_rest_runs(mixed):
    runs = dict(finished_runs(mixed))
    first, bad, second = (str(name) for name in mixed.inputs.choice.ids())
    assert set(runs) == {f"labelled_{first}", f"failed_{bad}", f"labelled_{second}"}
    del runs[f"labelled_{second}"]

    inputs = mixed.get_builder_restart()
    inputs.runs = runs
    outputs, node = run_get_node(inputs)

    assert node.is_finished_ok, node.exit_message
    (lane,) = (child for child in node.called if child.process_label == "DftLaneWorkChain")
    assert lane.inputs.choice.ids().tolist() == [second]
    again, before = outputs["labels"].value(), mixed.outputs.labels.value()
    rows = again.rows_of(before.ids)
    np.testing.assert_allclose(again.energy[rows], before.energy, atol=1e-5)
    assert {item.reason for item in again.failures()} == {item.reason for item in before.failures()}
    points = read_points(node.pk, "initial")
    assert [point.state for point in points] == ["done", "failed", "done"]
    assert all(point.pw_pk for point in points)
    # What was spent is spent, whoever spent it.
    assert outputs["labels"].core_seconds > 0.5 * mixed.outputs.labels.core_seconds > 0


def test_no_label_at_all_is_an_error_that_quotes_the_reason(dft_inputs):
    outputs, node = run_get_node(DftLabelWorkChain, **dft_inputs(overlapping()))
    assert node.exit_status == 411
    assert "pw.x" in node.exit_message
    assert outputs["labels"].base.attributes.get("n_labels") == 0


def test_a_second_run_takes_every_pw_calculation_from_the_cache(dft_inputs, rattled_silicon):
    from aiida.manage.caching import enable_caching

    configurations = rattled_silicon(2, seed=7)
    first, _ = run_get_node(DftLabelWorkChain, **dft_inputs(configurations))
    with enable_caching():
        second, node = run_get_node(DftLabelWorkChain, **dft_inputs(configurations))
    runs = [child for child in node.called_descendants if isinstance(child, CalcJobNode)]
    assert len(runs) == 2
    assert all(run.base.caching.is_created_from_cache for run in runs)
    assert first["labels"].value().energy.tolist() == second["labels"].value().energy.tolist()


def test_an_element_without_pseudopotential_is_refused_before_anything_runs(dft_inputs):
    inputs = dft_inputs(Configurations.from_atoms([bulk("Si")], "x"))
    inputs["configurations"] = ConfigurationsData.from_value(
        Configurations.from_atoms([bulk("Al")], "x")
    )
    with pytest.raises(ValueError, match=r"no pseudopotential for \['Al'\]"):
        run_get_node(DftLabelWorkChain, **inputs)


def test_a_family_that_lacks_an_element_is_named(pw_code, pseudo_family):
    inputs = {**INPUTS, "pw_base": {"pseudo_family": pseudo_family, **INPUTS["pw_base"]}}
    with pytest.raises(ValueError, match=r"tests/LDA.*install it"):
        builder.dft_inputs(inputs, pw_code, ["Al"], {})


def test_occupations_must_be_explicit(dft_inputs, rattled_silicon):
    inputs = dft_inputs(rattled_silicon(1))
    parameters = inputs["pw_base"]["pw"]["parameters"].get_dict()
    del parameters["SYSTEM"]["occupations"]
    inputs["pw_base"]["pw"]["parameters"] = Dict(parameters)
    with pytest.raises(ValueError, match="occupations must be set"):
        run_get_node(DftLabelWorkChain, **inputs)


def test_a_threshold_that_yaml_read_as_text_is_refused(dft_inputs, rattled_silicon):
    inputs = dft_inputs(rattled_silicon(1))
    inputs["scaling"] = Dict({**INPUTS["scaling"], "conv_thr_per_atom": "1e-6"})
    with pytest.raises(ValueError, match="conv_thr_per_atom must be a number"):
        run_get_node(DftLabelWorkChain, **inputs)


def test_lanes_get_equal_cost_and_never_too_many_configurations():
    cost = np.array([8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    lanes = deal(cost, 2, 50)
    assert sorted(len(lane) for lane in lanes) == [1, 8]
    assert max(len(lane) for lane in deal(np.ones(120), 2, 50)) <= 50
    assert sorted(row for lane in deal(np.ones(120), 2, 50) for row in lane) == list(range(120))


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize(
    "atoms", [bulk("Si"), bulk("Si", cubic=True) * (2, 1, 1), molecule("Si2H6", vacuum=3.0)]
)
def test_meshes_are_those_of_the_work_chain_of_quantum_espresso(aiida_profile, atoms, parity):
    structure = StructureData(ase=atoms)
    theirs = create_kpoints_from_distance(structure, Float(0.31), Bool(parity))
    assert mesh_of(structure, 0.31, parity) == theirs.get_kpoints_mesh()[0]


def test_configurations_with_one_mesh_and_composition_share_their_nodes(
    dft_inputs, rattled_silicon
):
    inputs = dft_inputs(rattled_silicon(3, seed=8))
    pw = inputs["pw_base"]["pw"]
    outputs = prepare_runs(
        inputs["configurations"],
        inputs["choice"],
        pw["parameters"],
        inputs["scaling"],
        Float(0.31),
        Bool(False),
        **pw["pseudos"],
    )
    kinds = [name.split("_")[0] for name in outputs]
    assert sorted(kinds) == ["mesh", "parameters", *["structure"] * 3]


def test_three_slots_a_lane_and_a_few_for_the_parents():
    assert slots_needed(20) == 64


def test_labels_of_different_levels_are_not_mixed():
    labels = Labels.missing(Configurations.from_atoms([bulk("Si")]), ["dft"])
    low = LabelsData.from_value(labels, level={"ecutwfc": 20.0})
    high = LabelsData.from_value(labels, level={"ecutwfc": 60.0})
    with pytest.raises(ValueError, match=r"different levels of theory.*ecutwfc"):
        same_level([low, high])


def runs_of(node):
    return [child for child in node.called_descendants if isinstance(child, CalcJobNode)]


def test_stored_labels_are_not_made_again_and_the_rest_is_run(dft_inputs, rattled_silicon):
    configurations = rattled_silicon(3, seed=11)
    first, _ = run_get_node(DftLabelWorkChain, **dft_inputs(configurations.take([0, 2])))
    outputs, node = run_get_node(
        DftLabelWorkChain, **dft_inputs(configurations), stored=first["labels"]
    )
    assert node.is_finished_ok, node.exit_message
    assert len(runs_of(node)) == 1
    labels, before = outputs["labels"].value(), first["labels"].value()
    assert labels.ok.all()
    assert set(labels.ids) == set(configurations.ids)
    for name in before.ids:
        old, new = before.rows_of([name])[0], labels.rows_of([name])[0]
        assert labels.energy[new] == before.energy[old]
        # Still traced to the run that made it.
        assert labels.origins[new] == before.origins[old]


def test_stored_labels_of_another_level_are_refused_before_anything_runs(
    dft_inputs, rattled_silicon
):
    configurations = rattled_silicon(2, seed=12)
    level = {"ecutwfc": 99.0}
    stored = LabelsData.from_value(labels_of_zero(configurations), level=level)
    _, node = run_get_node(DftLabelWorkChain, **dft_inputs(configurations), stored=stored)
    assert node.exit_status == 409
    assert "ecutwfc" in node.exit_message
    assert not runs_of(node)


def labels_of_zero(configurations):
    empty = Labels.missing(configurations, ["dft"])
    return Labels.from_arrays(
        {
            **empty.arrays(),
            "energy": np.zeros((len(configurations), 1)),
            "forces": np.zeros_like(empty.forces),
            "status": np.zeros_like(empty.status),
        }
    )


def test_without_pw_labels_are_looked_up_and_what_has_none_says_so(rattled_silicon):
    configurations = rattled_silicon(4, seed=13)
    inputs = {
        "configurations": ConfigurationsData.from_value(configurations),
        "choice": ChoiceData.from_value(Choice.from_ids(configurations.ids), strategy="given"),
    }
    stored = LabelsData.from_value(labels_of_zero(configurations.take([0, 1, 3])))
    outputs, node = run_get_node(DftLabelWorkChain, **inputs, stored=stored)
    assert node.is_finished_ok, node.exit_message
    assert not runs_of(node)
    labels = outputs["labels"].value()
    assert labels.ok.sum() == 3
    (failure,) = labels.failures()
    assert failure.id == str(configurations.ids[2])
    assert failure.reason == "no stored DFT label is of this configuration"


def test_nothing_to_label_with_is_refused_at_once(rattled_silicon):
    configurations = rattled_silicon(1)
    with pytest.raises(ValueError, match=r"give `pw_base` to run pw\.x, or `stored` labels"):
        run_get_node(
            DftLabelWorkChain,
            configurations=ConfigurationsData.from_value(configurations),
            choice=ChoiceData.from_value(Choice.from_ids(configurations.ids), strategy="given"),
        )
