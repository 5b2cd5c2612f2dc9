"""Analytic potentials against KIM, finite differences, symmetry and what was published."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from aiida_eipnn.science.eip.analytic import PUBLISHED, LennardJones, StillingerWeber
from aiida_eipnn.science.eip.potential import (
    EmpiricalPotential,
    describe_potential,
    open_potential,
)

KIM_MODELS = {
    "stillinger-weber": "SW_StillingerWeber_1985_Si__MO_405512056662_005",
    "stillinger-weber[balamane-1992]": "SW_BalamaneHaliciogluTiller_1992_Si__MO_113686039439_004",
    "stillinger-weber[hauch-1999]": "SW_HauchHollandMarder_1999Brittle_Si__MO_119167353542_004",
    "stillinger-weber[lee-2012-lda]": "SW_LeeHwang_2012LDA_Si__MO_517338295712_000",
    "stillinger-weber[lee-2012-gga]": "SW_LeeHwang_2012GGA_Si__MO_040570764911_000",
    "stillinger-weber[balamane-1992,lambda=97.2299958,A=16.3197220762994]": (
        "SW_BalamaneHauchShi_2017Brittle_Si__MO_381114941873_002"
    ),
}
NAMES = ["lennard-jones", "stillinger-weber", "stillinger-weber[lambda=60,gamma=2]"]


def rattled(seed: int, size: float = 0.1) -> Atoms:
    rng = np.random.default_rng(seed)
    atoms = bulk("Si", cubic=True)
    atoms.set_cell(atoms.cell @ (np.eye(3) + 0.04 * rng.normal(size=(3, 3))), scale_atoms=True)
    atoms.positions += size * rng.normal(size=atoms.positions.shape)
    return atoms


def cluster(n_atoms: int, seed: int) -> Atoms:
    atoms = rattled(seed) * (2, 1, 1)
    return Atoms(atoms.numbers[:n_atoms], atoms.positions[:n_atoms])


@pytest.mark.usefixtures("kim")
@pytest.mark.parametrize("name", KIM_MODELS)
def test_stillinger_weber_is_the_kim_model_with_the_same_numbers(name):
    ours, kim = open_potential(name), open_potential(KIM_MODELS[name])
    pool = [rattled(seed, size) for seed, size in enumerate((0.02, 0.1, 0.3))]
    pool += [rattled(5) * (1, 2, 1), cluster(11, seed=6), Atoms("Si2", [[0, 0, 0], [2.3, 0, 0]])]

    for atoms in pool:
        one, two = ours.label(atoms), kim.label(atoms)
        assert abs(one.energy - two.energy) / len(atoms) < 1e-12
        np.testing.assert_allclose(one.forces, two.forces, atol=1e-11)
        np.testing.assert_allclose(one.stress, two.stress, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("atoms", [rattled(1), cluster(9, seed=2)], ids=["bulk", "cluster"])
def test_forces_are_minus_the_derivative_of_the_energy(name, atoms, slope_by_place):
    potential = open_potential(name)
    forces = potential.label(atoms).forces

    for atom, axis in ((0, 0), (3, 1), (7, 2)):
        slope = slope_by_place(potential, atoms, atom, axis, step=1e-3)
        assert forces[atom, axis] == pytest.approx(-slope, abs=1e-8)
    np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_stress_is_the_derivative_of_the_energy_by_strain(name, slope_by_strain):
    potential, atoms = open_potential(name), rattled(3)
    stress = potential.label(atoms).stress

    for voigt, (i, j) in enumerate(((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))):
        slope = slope_by_strain(potential, atoms, i, j, step=1e-3)
        assert stress[voigt] == pytest.approx(slope / atoms.cell.volume, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_rotation_turns_the_forces_and_keeps_the_energy(name):
    potential, atoms = open_potential(name), rattled(4)
    turn, _ = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ turn)
    turned.positions = atoms.positions @ turn

    one, two = potential.label(atoms), potential.label(turned)

    assert two.energy == pytest.approx(one.energy, abs=1e-11)
    np.testing.assert_allclose(two.forces, one.forces @ turn, atol=1e-11)
    np.testing.assert_allclose(matrix(two.stress), turn.T @ matrix(one.stress) @ turn, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_atoms_does_not_matter(name):
    potential, atoms = open_potential(name), rattled(5)
    order = np.random.default_rng(5).permutation(len(atoms))

    one, two = potential.label(atoms), potential.label(atoms[order])

    assert two.energy == pytest.approx(one.energy, abs=1e-11)
    np.testing.assert_allclose(two.forces, one.forces[order], atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_a_supercell_has_the_same_label_per_atom(name):
    potential, atoms = open_potential(name), rattled(6)

    one, two = potential.label(atoms), potential.label(atoms * (2, 1, 3))

    assert two.energy == pytest.approx(6 * one.energy, rel=1e-12)
    np.testing.assert_allclose(two.forces, np.tile(one.forces, (6, 1)), atol=1e-10)
    np.testing.assert_allclose(two.stress, one.stress, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_cluster_needs_no_cell_and_has_no_stress(name):
    potential, alone = open_potential(name), cluster(10, seed=7)
    in_a_box = alone.copy()
    in_a_box.set_cell([40, 40, 40])
    in_a_box.pbc = True

    one, two = potential.label(alone), potential.label(in_a_box)

    assert one.energy == pytest.approx(two.energy, abs=1e-11)
    np.testing.assert_allclose(one.forces, two.forces, atol=1e-11)
    assert np.isnan(one.stress).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_lone_atom_and_a_pair_at_the_cutoff_feel_nothing(name):
    potential = open_potential(name)
    apart = Atoms("Si2", [[0, 0, 0], [potential.cutoff, 0, 0]])

    for atoms in (Atoms("Si"), apart):
        label = potential.label(atoms)
        assert label.energy == 0.0
        np.testing.assert_array_equal(label.forces, np.zeros((len(atoms), 3)))


def test_diamond_has_the_published_cohesive_energy():
    """Twice epsilon, where the lattice constant is that of the reduced units."""
    potential, cohesive = open_potential("stillinger-weber"), -4.3364
    diamond = bulk(potential.element, "diamond", a=2.5925 * potential.sigma)

    label = potential.label(diamond)

    assert label.energy / 2 == pytest.approx(cohesive, abs=1e-4)
    # The published strengths, divided by epsilon, are what the paper has for silicon.
    assert 2 * potential.A / -cohesive == pytest.approx(7.049556277, rel=1e-4)


@pytest.mark.parametrize("published", PUBLISHED)
def test_a_published_set_is_opened_by_its_name_and_says_where_it_comes_from(published):
    described = describe_potential(f"stillinger-weber[{published}]")

    assert described.name == f"stillinger-weber[{published}]"
    assert described.family == "SW"
    assert described.doi.startswith("10.1103/Phys")
    assert str(described.year) in published
    assert described.citation.endswith(f"({described.year})")
    assert not described.kim_id


def test_numbers_of_ones_own_have_no_publication():
    described = describe_potential("stillinger-weber[lambda=60]")

    assert described.citation == described.doi == ""
    assert described.species == ("Si",)


def test_settings_replace_numbers_of_the_published_set():
    opened = open_potential("stillinger-weber[hauch-1999, A=16, element=C]")

    assert opened == StillingerWeber(A=16.0, lambda_=91.0644, element="C")


@pytest.mark.parametrize(
    "potential",
    [
        LennardJones(epsilon=1 / 3, cutoff=4.5),
        StillingerWeber(lambda_=10 / 3, element="Ge"),
        *(potential for potential, _ in PUBLISHED.values()),
    ],
)
def test_the_name_opens_the_very_same_potential(potential):
    assert isinstance(potential, EmpiricalPotential)
    assert open_potential(potential.name) == potential


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stillinger-weber[hauch]", "one of the published sets stillinger-1985, balamane-1992"),
        ("stillinger-weber[hauch-1999,balamane-1992]", "one of the published sets"),
        ("stillinger-weber-1985", "one of the published sets"),
        ("stillinger-weber[strength=2]", r"\['strength'\] are no settings; it has only"),
        ("stillinger-weber[lambda=much]", "lambda=much is no number"),
        ("stillinger-weber[lambda=nan]", "lambda=nan is no number"),
        ("stillinger-weber[cutoff=-1]", "must be positive"),
        ("stillinger-weber[element=Xx]", "'Xx' is no element"),
        ("stillinger-weber[A=1,A=2]", "A is set twice"),
        ("stillinger-weber[A=1", "cannot read"),
        ("lennard-jones[wide]", "cannot read"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_what_would(name, words):
    with pytest.raises(ValueError, match=words):
        open_potential(name)


def test_an_element_it_is_not_for_is_named():
    with pytest.raises(ValueError, match=r"does not know C; .*\(it knows Si\)"):
        open_potential("stillinger-weber").label(bulk("SiC", "zincblende", a=4.36))


def matrix(stress: np.ndarray) -> np.ndarray:
    return stress[[[0, 5, 4], [5, 1, 3], [4, 3, 2]]]
