"""ASE calculators by name: their own numbers, their gaps as NaN, their faults as reasons."""

import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.engine import label_with_eips
from aiida_eipnn.science.eip.names import split_names
from aiida_eipnn.science.eip.potential import (
    EmpiricalPotential,
    describe_potential,
    open_potential,
)

EMT_NAME = "ase:ase.calculators.emt:EMT"
SPRING = "ase:odd_calculators:Stressless"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop("odd_calculators", None)


def metal(symbol: str, seed: int, n_atoms: int = 4) -> Atoms:
    atoms = bulk(symbol, cubic=True) * (2, 1, 1)
    atoms.positions += 0.1 * np.random.default_rng(seed).normal(size=atoms.positions.shape)
    return atoms[:n_atoms]


def assert_emt(label, atoms: Atoms) -> None:
    """Hold a label against a calculator made for it alone."""
    fresh = atoms.copy()
    fresh.calc = EMT()
    assert label.energy == pytest.approx(fresh.get_potential_energy(), abs=1e-12)
    np.testing.assert_allclose(label.forces, fresh.get_forces(), atol=1e-12)
    np.testing.assert_allclose(label.stress, fresh.get_stress(), atol=1e-13)


def test_one_calculator_labels_one_configuration_after_the_other():
    potential = open_potential(EMT_NAME)
    pool = [metal("Al", 0), metal("Cu", 1), metal("Cu", 2, 8), metal("Al", 3, 3), metal("Al", 0)]

    labels = [potential.label(atoms) for atoms in pool]

    assert isinstance(potential, EmpiricalPotential)
    # All labels are held first: none may be an array that the next configuration fills.
    for label, atoms in zip(labels, pool, strict=True):
        assert_emt(label, atoms)


def test_nothing_is_left_of_a_configuration_that_failed():
    potential = open_potential("ase:odd_calculators:Raising")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="did not converge"):
            potential.label(metal("Cu", 0, 3))

    assert_emt(potential.label(metal("Cu", 0)), metal("Cu", 0))


def test_a_configuration_comes_back_as_it_was_and_a_constraint_hides_no_force():
    atoms = metal("Cu", 0)
    atoms.set_constraint(FixAtoms([0]))

    label = open_potential(EMT_NAME).label(atoms)

    assert atoms.calc is None
    assert np.linalg.norm(label.forces[0]) > 0.01


@pytest.mark.parametrize("name", [EMT_NAME, SPRING])
def test_stress_is_missing_where_there_is_none(name):
    cluster = metal("Cu", 0)
    cluster.pbc = False
    potential = open_potential(name)

    assert np.isnan(potential.label(cluster).stress).all()
    assert np.isfinite(potential.label(metal("Cu", 0)).stress).all() == (name == EMT_NAME)


def test_settings_are_python_values_or_text():
    potential = open_potential(f"{SPRING}[stiffness=2.5,word=GFN2-xTB,sizes=(1, 2)]")

    made = potential.calculator
    assert (made.stiffness, made.word, made.sizes) == (2.5, "GFN2-xTB", (1, 2))


def test_elements_are_those_that_the_calculator_tells():
    assert {13, 29} < open_potential(EMT_NAME).elements
    assert 14 not in open_potential(EMT_NAME).elements
    assert open_potential("ase:odd_calculators:make_for_copper").elements == {29}
    assert open_potential(SPRING).elements == set(range(1, 119))
    with pytest.raises(ValueError, match=r"does not know Si; .*it knows H, C"):
        open_potential(EMT_NAME).label(bulk("Si"))


def test_a_calculator_is_described_without_being_made():
    emt, failing = describe_potential(EMT_NAME), describe_potential("ase:odd_calculators:fails")

    assert (emt.name, emt.family) == (EMT_NAME, "EMT")
    assert {"Al", "Cu"} < set(emt.species)
    assert emt == open_potential(EMT_NAME).description
    assert (failing.family, failing.species) == ("fails", ())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ase:nowhere:EMT", "No module named 'nowhere'; write ase:module:callable"),
        ("ase:ase.calculators.emt:EMTT", "EMTT"),
        ("ase:ase.calculators.emt", "write ase:module:callable"),
        ("ase:odd_calculators:fails", "FileNotFoundError: no model.pt"),
        ("ase:odd_calculators:Stressless[wide=1]", "TypeError: .*wide"),
        ("ase:odd_calculators:Stressless[soft]", "what is 'soft' set to"),
        ("ase:decimal:Decimal", "made a Decimal, which is no ASE calculator"),
    ],
)
def test_what_cannot_be_opened_is_refused_with_the_reason(name, words):
    with pytest.raises(ValueError, match=words):
        open_potential(name)


def test_forces_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"gave forces of shape \(3, 3\), not \(4, 3\)"):
        open_potential("ase:odd_calculators:Misshapen").label(metal("Cu", 0))


def test_in_a_process_of_its_own_every_fault_is_a_reason():
    frames = [metal("Cu", 0), metal("Al", 1), metal("Cu", 2, 3), bulk("Si")]
    names = [EMT_NAME, "ase:odd_calculators:Raising", "ase:odd_calculators:fails"]

    labels = label_with_eips(Configurations.from_atoms(frames), names)

    assert labels.ok.T.tolist() == [
        [True, True, True, False],
        [True, True, False, False],
        [False] * 4,
    ]
    reasons = {(failure.source, failure.reason) for failure in labels.failures()}
    assert (names[1], "RuntimeError: it did not converge") in reasons
    assert any(name == names[0] and "does not know Si" in why for name, why in reasons)
    assert any(name == names[2] and "no model.pt" in why for name, why in reasons)
    fresh = metal("Al", 1)
    fresh.calc = EMT()
    assert labels.energy[1, 0] == pytest.approx(fresh.get_potential_energy(), abs=1e-12)


def test_a_list_of_names_is_cut_only_at_commas_outside_of_brackets():
    text = "lennard-jones[sigma=2,cutoff=4], stillinger-weber,ase:m:C[a=(1,2),b='x,]',c=[3]]"

    assert split_names(text) == [
        "lennard-jones[sigma=2,cutoff=4]",
        "stillinger-weber",
        "ase:m:C[a=(1,2),b='x,]',c=[3]]",
    ]
