from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.gate import (
    Verdict,
    check_labels,
    geometry_fault,
    keep_valid,
    overlap,
    refuse_invalid,
)
from aiida_eipnn.science.labels import Labels

HARTREE = 27.211386
BOHR = 0.529177


def lj(scale=1.0):
    return LennardJones(sigma=2.27, epsilon=0.14 * scale, rc=6.0, smooth=True)


def label(frames, calculators):
    configurations = Configurations.from_atoms(frames)
    labels = Labels.missing(configurations, list(calculators))
    energy, forces = labels.energy.copy(), labels.forces.copy()
    for column, calculator in enumerate(calculators.values()):
        for row, atoms in enumerate(frames):
            atoms.calc = calculator
            energy[row, column] = atoms.get_potential_energy()
            part = slice(configurations.offsets[row], configurations.offsets[row + 1])
            forces[column, part] = atoms.get_forces()
    return configurations, replace(
        labels, energy=energy, forces=forces, status=np.zeros_like(labels.status)
    )


@pytest.fixture(scope="module")
def copper():
    """Reference from EMT, and three Lennard-Jones potentials of copper for EIPs."""
    rng = np.random.default_rng(3)
    frames = []
    for number in range(40):
        atoms = bulk("Cu", cubic=number % 2 == 0) * (2, 1, 1 + number % 3)
        atoms.set_cell(atoms.cell * rng.uniform(0.95, 1.08), scale_atoms=True)
        atoms.positions += rng.normal(scale=0.12, size=atoms.positions.shape)
        frames.append(atoms)
    configurations, dft = label(frames, {"dft": EMT()})
    _, eips = label(frames, {"lj-a": lj(), "lj-b": lj(1.2), "lj-c": lj(0.9)})
    return configurations, dft, eips


def test_contacts_are_measured_through_the_boundary_and_by_element():
    through = Atoms("Si2", [[0.2, 5, 5], [9.4, 5, 5]], cell=[10, 10, 10], pbc=True)
    wide = Atoms("Si2", [[0, 0, 0], [1.4, 0, 0]])
    hydrogen = Atoms("H2", [[0, 0, 0], [0.74, 0, 0]])

    assert overlap(through) == pytest.approx(0.8)
    assert overlap(wide) is None
    assert overlap(hydrogen) is None


def test_sound_configurations_pass():
    frames = [bulk("Si"), bulk("Cu"), Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.74]])]

    assert refuse_invalid(Configurations.from_atoms(frames)) == ()


@pytest.mark.parametrize(
    ("atoms", "reason"),
    [
        (Atoms(), "no atoms"),
        (Atoms("Si", positions=[[0, np.inf, 0]]), "position is not a finite"),
        (Atoms("Si", cell=[np.nan, 3, 3], pbc=True), "cell vector is not a finite"),
        (Atoms("Si", cell=[3, 3, 0], pbc=True), "no volume"),
        (Atoms("Si", cell=[[3, 0, 0], [0, 3, 0], [3, 3, 1e-9]], pbc=True), "no volume"),
        (Atoms("Si2", positions=[[0, 0, 0], [0, 0, 1.0]]), "distance 1 Å is below 0.6"),
        (Atoms("Si", cell=[8, 8, 1.2], pbc=True), "overlap"),
        (Atoms("Si", cell=[0.01, 0.01, 0.01], pbc=True), "overlap"),
    ],
)
def test_what_cannot_be_right_is_refused(atoms, reason):
    assert reason in geometry_fault(atoms)


def test_a_slab_without_a_third_vector_is_sound_if_it_is_not_periodic_there():
    assert geometry_fault(Atoms("Si", cell=[3, 3, 0], pbc=[True, True, False])) is None


def test_a_mirrored_cell_is_sound():
    assert geometry_fault(Atoms("Si", cell=[[3, 0, 0], [0, 3, 0], [0, 0, -3]], pbc=True)) is None


def test_overlap_is_seen_through_the_periodic_boundary():
    atoms = Atoms("Si2", positions=[[0, 0, 0.2], [0, 0, 7.7]], cell=[8, 8, 8], pbc=True)

    assert "distance 0.5 Å" in geometry_fault(atoms)


def test_short_dimers_pass_if_they_are_wanted():
    atoms = Atoms("Si2", positions=[[0, 0, 0], [0, 0, 1.0]])

    assert geometry_fault(atoms, min_contact=0.4) is None


def test_the_first_of_equal_geometries_is_kept():
    bad = Atoms("Si2", positions=[[0, 0, 0], [0, 0, 0.1]])
    configurations = Configurations.from_atoms([bulk("Si"), bad, bulk("Si"), bulk("C")])

    kept, failures = keep_valid(configurations)

    assert kept.ids.tolist() == configurations.ids[[0, 3]].tolist()
    assert [failure.reason[:13] for failure in failures] == ["two atoms ove", "it has the sa"]


def test_sound_labels_pass(copper):
    report = check_labels(*copper)

    assert report.verdict is Verdict.PASSED
    assert report.problem is None
    assert report.refused == ()
    assert report.forces_agreement > 0.9
    assert 0.3 < report.forces_ratio < 3


@pytest.mark.parametrize(
    ("energy", "force", "word"),
    [
        (1 / HARTREE, BOHR / HARTREE, "hartree/bohr"),
        (1 / HARTREE, 1 / HARTREE, "hartree/Å"),
        (HARTREE, HARTREE, "taken for hartree/Å"),
        (1, HARTREE / BOHR, "taken for hartree/bohr"),
        (2 / HARTREE, 2 * BOHR / HARTREE, "rydberg/bohr"),
        (1 / HARTREE, 1, "hartree"),
        (1000, 1, "meV"),
    ],
)
def test_wrong_units_are_refused_and_named(copper, energy, force, word):
    configurations, dft, eips = copper
    wrong = replace(dft, energy=dft.energy * energy, forces=dft.forces * force)

    report = check_labels(configurations, wrong, eips)

    assert report.verdict is Verdict.WRONG_UNIT
    assert word in report.problem


def test_a_stored_gradient_is_refused(copper):
    configurations, dft, eips = copper

    report = check_labels(configurations, replace(dft, forces=-dft.forces), eips)

    assert report.verdict is Verdict.WRONG_SIGN
    assert "change the sign of all forces" in report.problem


def test_energies_of_the_wrong_sign_are_refused(copper):
    configurations, dft, eips = copper

    report = check_labels(configurations, replace(dft, energy=-dft.energy), eips)

    assert report.verdict is Verdict.WRONG_SIGN
    assert "energies" in report.problem


def test_energies_per_atom_are_refused(copper):
    configurations, dft, eips = copper
    # EMT counts from the crystal; a DFT energy is far from zero.
    total = dft.energy - 3.5 * dft.n_atoms[:, None]
    wrong = replace(dft, energy=total / dft.n_atoms[:, None])

    assert check_labels(configurations, replace(dft, energy=total), eips).problem is None
    report = check_labels(configurations, wrong, eips)

    assert report.verdict is Verdict.PER_ATOM
    assert "multiply" in report.problem


@pytest.mark.parametrize("shift", [-2.0, 2.0])
def test_a_stray_energy_is_refused_on_either_side(copper, shift):
    configurations, dft, eips = copper
    energy = dft.energy.copy()
    energy[7] += shift * dft.n_atoms[7]

    report = check_labels(configurations, replace(dft, energy=energy), eips)

    assert [failure.id for failure in report.refused] == [dft.ids[7]]
    assert report.problem is None


def test_a_label_that_is_not_finite_is_refused(copper):
    configurations, dft, eips = copper
    forces = dft.forces.copy()
    forces[0, 0, 0] = np.nan

    report = check_labels(configurations, replace(dft, forces=forces), eips)

    assert [failure.id for failure in report.refused] == [dft.ids[0]]
    assert report.verdict is Verdict.PASSED


def test_four_labels_are_too_few_to_judge_and_are_not_refused(copper):
    configurations, dft, eips = copper

    report = check_labels(configurations, replace(dft, forces=-dft.forces).take(range(4)), eips)

    assert report.verdict is Verdict.TOO_FEW
    assert "4 configurations" in report.text
    assert report.problem is None


def test_without_any_eip_label_nothing_is_judged(copper):
    configurations, dft, _ = copper

    report = check_labels(configurations, dft, Labels.missing(configurations, ["lj-a"]))

    assert report.verdict is Verdict.TOO_FEW
    assert report.refused == ()


def test_eips_that_know_nothing_of_the_matter_refuse_nothing(copper):
    configurations, dft, eips = copper
    rng = np.random.default_rng(0)
    noise = replace(
        eips, energy=rng.normal(size=eips.energy.shape), forces=rng.normal(size=eips.forces.shape)
    )

    report = check_labels(configurations, dft, noise)

    assert report.verdict is Verdict.NO_AGREEMENT
    assert report.problem is None
    assert report.refused == ()


def test_zero_levels_of_elements_do_not_matter():
    rng = np.random.default_rng(5)
    frames = []
    for number in range(40):
        atoms = bulk("Cu", cubic=True) * (2, 1, 1)
        atoms.numbers[: number % 5] = 47
        atoms.positions += rng.normal(scale=0.15, size=atoms.positions.shape)
        frames.append(atoms)
    configurations, dft = label(frames, {"dft": EMT()})
    _, eips = label(frames, {"lj-a": lj()})
    silver = np.array([(atoms.numbers == 47).sum() for atoms in frames])

    shifted = replace(dft, energy=dft.energy - 4000.0 * silver[:, None])

    assert check_labels(configurations, shifted, eips).energy_ratio == pytest.approx(
        check_labels(configurations, dft, eips).energy_ratio, rel=1e-3
    )
