from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.engine import label_with_eips
from aiida_eipnn.science.gate import (
    GateVerdict,
    check_labels,
    geometry_fault,
    keep_valid,
    overlap,
    refuse_invalid,
    refuse_labels,
    surely_valid,
)
from aiida_eipnn.science.labels import Labels

HARTREE = 27.211386
BOHR = 0.529177
SILICON = (
    "SW_StillingerWeber_1985_Si__MO_405512056662_005",
    "EDIP_JustoBazantKaxiras_1998_Si__MO_958932894036_002",
    "Tersoff_LAMMPS_Tersoff_1988T3_Si__MO_186459956893_003",
    "MEAM_LAMMPS_LenoskySadighAlonso_2000_Si__MO_533426548156_000",
    "ThreeBodyBondOrder_PPM_PurjaPunMishin_2017_Si__MO_566683736730_000",
)


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


def odd_pool():
    """Return sound and unsound cells of 1 to 8 atoms, some of them thin, slanted or collapsed."""
    rng = np.random.default_rng(0)
    frames = []
    for number in range(300):
        atoms = bulk("SiC", "zincblende", a=4.36).repeat((1 + number % 4, 1, 1))
        strain = np.eye(3) + rng.normal(0, 0.25, (3, 3))
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        atoms.positions += rng.normal(0, 0.25, atoms.positions.shape)
        # Atoms outside their cell are sound.
        atoms.positions += rng.integers(-2, 3, 3) @ atoms.cell.array
        frames.append(atoms)
    frames[0].positions[0] = np.nan
    frames[1].cell[2] = 0.0
    frames[2].cell[2] = np.inf
    frames[3].pbc = [True, True, False]
    frames[4].set_cell(0.2 * frames[4].cell.array, scale_atoms=True)
    return Configurations.from_atoms([*frames, Atoms()])


def test_a_pool_is_judged_at_once_as_one_by_one():
    pool = odd_pool()
    sure = surely_valid(pool)
    sound = [geometry_fault(pool.atoms(row)) is None for row in range(len(pool))]

    assert not sure[np.logical_not(sound)].any()
    assert sure.sum() > 0.8 * np.sum(sound)
    assert {failure.id for failure in refuse_invalid(pool)} == set(pool.ids[np.logical_not(sound)])


def test_the_first_of_equal_geometries_is_kept():
    bad = Atoms("Si2", positions=[[0, 0, 0], [0, 0, 0.1]])
    configurations = Configurations.from_atoms([bulk("Si"), bad, bulk("Si"), bulk("C")])

    kept, failures = keep_valid(configurations)

    assert kept.ids.tolist() == configurations.ids[[0, 3]].tolist()
    assert [failure.reason[:13] for failure in failures] == ["two atoms ove", "it has the sa"]


def test_sound_labels_pass(copper):
    report = check_labels(*copper)

    assert report.verdict is GateVerdict.PASSED
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

    assert report.verdict is GateVerdict.WRONG_UNIT
    assert word in report.problem


def test_a_stored_gradient_is_refused(copper):
    configurations, dft, eips = copper

    report = check_labels(configurations, replace(dft, forces=-dft.forces), eips)

    assert report.verdict is GateVerdict.WRONG_SIGN
    assert "change the sign of all forces" in report.problem


def test_energies_of_the_wrong_sign_are_refused(copper):
    configurations, dft, eips = copper

    report = check_labels(configurations, replace(dft, energy=-dft.energy), eips)

    assert report.verdict is GateVerdict.WRONG_SIGN
    assert "energies" in report.problem


def test_energies_per_atom_are_refused(copper):
    configurations, dft, eips = copper
    # EMT counts from the crystal; a DFT energy is far from zero.
    total = dft.energy - 3.5 * dft.n_atoms[:, None]
    wrong = replace(dft, energy=total / dft.n_atoms[:, None])

    assert check_labels(configurations, replace(dft, energy=total), eips).problem is None
    report = check_labels(configurations, wrong, eips)

    assert report.verdict is GateVerdict.PER_ATOM
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
    assert report.verdict is GateVerdict.PASSED


def test_four_labels_are_too_few_to_judge_and_are_not_refused(copper):
    configurations, dft, eips = copper

    report = check_labels(configurations, replace(dft, forces=-dft.forces).take(range(4)), eips)

    assert report.verdict is GateVerdict.TOO_FEW
    assert "4 configurations" in report.text
    assert report.problem is None


def test_without_any_eip_label_nothing_is_judged(copper):
    configurations, dft, _ = copper

    report = check_labels(configurations, dft, Labels.missing(configurations, ["lj-a"]))

    assert report.verdict is GateVerdict.TOO_FEW
    assert report.refused == ()


def test_eips_that_know_nothing_of_the_matter_refuse_nothing(copper):
    configurations, dft, eips = copper
    rng = np.random.default_rng(0)
    noise = replace(
        eips, energy=rng.normal(size=eips.energy.shape), forces=rng.normal(size=eips.forces.shape)
    )

    report = check_labels(configurations, dft, noise)

    assert report.verdict is GateVerdict.NO_AGREEMENT
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


def test_the_gate_keeps_sound_labels_as_they_came(copper):
    configurations, dft, eips = copper

    kept, report = refuse_labels(configurations, dft, eips)

    assert report.verdict is GateVerdict.PASSED
    assert report.summary == "no label refused"
    assert kept.ok.all()
    assert np.array_equal(kept.energy, dft.energy)


def test_the_gate_works_without_eips(copper):
    configurations, dft, _ = copper

    kept, report = refuse_labels(configurations, dft)

    assert report.verdict is GateVerdict.TOO_FEW
    assert kept.ok.all()


def test_each_refused_label_is_a_row_with_its_reason(copper):
    configurations, _, eips = copper
    overlapping = bulk("Cu", cubic=True)
    overlapping.positions[1] = overlapping.positions[0] + [0.4, 0, 0]
    frames = [configurations.atoms(row) for row in range(len(configurations))]
    frames[3] = overlapping
    configurations, more = label(frames, {"dft": EMT()})
    energy, forces = more.energy.copy(), more.forces.copy()
    energy[7] += 30 * more.n_atoms[7]
    energy[8] -= 30 * more.n_atoms[8]
    forces[0, more.offsets[9]] = np.nan
    forces[0, more.offsets[10]] = [0, 300, 0]
    changed = replace(more, energy=energy, forces=forces)

    kept, report = refuse_labels(configurations, changed, eips, force_limit=200.0)

    reasons = {failure.id: failure.reason for failure in report.refused}
    assert np.flatnonzero(~kept.ok[:, 0]).tolist() == [3, 7, 8, 9, 10]
    assert "overlap" in reasons[kept.ids[3]]
    assert "energy is +" in reasons[kept.ids[7]]
    assert "energy is -" in reasons[kept.ids[8]]
    assert "not finite" in reasons[kept.ids[9]]
    assert "above 200" in reasons[kept.ids[10]]
    assert report.summary.startswith("5 labels refused (2 stray energies")


def test_a_twin_is_refused_and_a_conflict_is_named(copper):
    configurations, dft, eips = copper
    frames = [configurations.atoms(row) for row in range(len(configurations))]
    for row in (0, 1):
        twin = frames[row].copy()
        twin.rotate(90, "z", rotate_cell=True)
        frames.append(twin)
    configurations, dft = label(frames, {"dft": EMT()})
    energy = dft.energy.copy()
    energy[-1] += 0.01 * dft.n_atoms[-1]

    kept, report = refuse_labels(configurations, replace(dft, energy=energy), eips)

    same, conflict = report.refused
    assert np.flatnonzero(~kept.ok[:, 0]).tolist() == [40, 41]
    assert dft.ids[0] in same.reason
    assert "conflict" not in same.reason
    assert "conflicts with it: the energies differ by 0.01 eV/atom" in conflict.reason
    assert "1 duplicates" in report.summary


def test_several_sources_are_judged_apart(copper):
    configurations, _, eips = copper
    energy = eips.energy.copy()
    energy[4, 1] = np.nan

    kept, report = refuse_labels(configurations, replace(eips, energy=energy))

    assert np.argwhere(~kept.ok).tolist() == [[4, 1]]
    assert report.refused[0].source == "lj-b"


@pytest.fixture(scope="module")
def silicon(kim):
    """Silicon of mixed kinds and sizes, SW for DFT and four other models for EIPs."""
    rng = np.random.default_rng(11)
    frames = []
    for number in range(48):
        atoms = bulk("Si", cubic=True) * (1, 1, 1 + number % 3)
        atoms.set_cell(atoms.cell * rng.uniform(0.94, 1.07), scale_atoms=True)
        atoms.positions += rng.normal(scale=(0.05, 0.12, 0.2)[number % 3], size=(len(atoms), 3))
        frames.append(atoms if number % 4 else atoms[1:])
    configurations = Configurations.from_atoms(frames)
    dft = label_with_eips(configurations, SILICON[:1])
    # As pseudopotential codes count: from free ions and electrons.
    energy = dft.energy - 103.0 * configurations.n_atoms[:, None]
    dft = replace(dft, sources=np.array(["dft"]), energy=energy)
    return configurations, dft, label_with_eips(configurations, SILICON[1:])


MISTAKES = {
    "hartree": (1 / HARTREE, 1 / HARTREE, "hartree/Å (multiply by 27.21)"),
    "taken for hartree": (HARTREE, HARTREE, "eV/Å taken for hartree/Å (divide by 27.21)"),
    "hartree, hartree/bohr": (1 / HARTREE, BOHR / HARTREE, "hartree/bohr (multiply by 51.42)"),
    "forces in hartree/bohr": (1, BOHR / HARTREE, "hartree/bohr"),
    "rydberg, rydberg/bohr": (2 / HARTREE, 2 * BOHR / HARTREE, "rydberg/bohr (multiply by 25.71)"),
    "energies in rydberg": (2 / HARTREE, 1, "rydberg (multiply by 13.61)"),
    "energies in hartree": (1 / HARTREE, 1, "hartree (multiply by 27.21)"),
    "kcal/mol": (23.0605, 23.0605, "kcal/mol/Å (divide by 23.06)"),
    "energies in kcal/mol": (23.0605, 1, "kcal/mol (divide by 23.06)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_unit_is_named_with_its_cure(silicon, mistake):
    configurations, dft, eips = silicon
    energy, forces, words = MISTAKES[mistake]
    wrong = replace(dft, energy=dft.energy * energy, forces=dft.forces * forces)

    _, report = refuse_labels(configurations, wrong, eips)

    assert report.verdict is GateVerdict.WRONG_UNIT
    assert words in report.problem


def test_one_eip_is_enough_to_tell_that_energies_and_forces_differ_in_unit(silicon):
    configurations, dft, eips = silicon
    one = replace(
        eips,
        sources=eips.sources[:1],
        energy=eips.energy[:, :1],
        forces=eips.forces[:1],
        stress=eips.stress[:, :1],
        status=eips.status[:, :1],
    )

    _, report = refuse_labels(configurations, replace(dft, energy=dft.energy / 13.6057), one)

    assert report.verdict is GateVerdict.WRONG_UNIT
    assert "the energies" in report.problem


def test_a_gradient_and_energies_per_atom_are_named_with_their_cure(silicon):
    configurations, dft, eips = silicon
    gradient = replace(dft, forces=-dft.forces)
    per_atom = replace(dft, energy=dft.energy / dft.n_atoms[:, None])

    assert (
        "change the sign of all forces" in refuse_labels(configurations, gradient, eips)[1].problem
    )
    assert "multiply each by its number" in refuse_labels(configurations, per_atom, eips)[1].problem


def test_energies_per_atom_are_told_where_all_configurations_have_one_size(silicon):
    configurations, dft, eips = silicon
    rows = np.flatnonzero(dft.n_atoms == 24)
    per_atom = replace(dft, energy=dft.energy / dft.n_atoms[:, None]).take(rows)

    assert check_labels(configurations, per_atom, eips).verdict is GateVerdict.PER_ATOM
    assert check_labels(configurations, dft.take(rows), eips).verdict is GateVerdict.PASSED


@pytest.mark.parametrize("number", range(8))
def test_no_small_part_of_a_sound_set_is_refused(silicon, number):
    configurations, dft, eips = silicon
    rng = np.random.default_rng(number)
    rows = rng.permutation(len(dft))[: 5 + 5 * number]

    kept, report = refuse_labels(configurations, dft.take(rows), eips)

    assert report.problem is None
    assert kept.ok.all()
