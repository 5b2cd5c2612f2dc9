from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.calculators.emt import EMT

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.duplicates import (
    find_duplicates,
    find_known,
    find_twins,
    say_the_same,
)
from aiida_eipnn.science.labels import Labels


def rattled(seed=0, repeat=1):
    atoms = bulk("SiC", "zincblende", a=4.36, cubic=True) * (repeat, 1, 1)
    atoms.positions += np.random.default_rng(seed).normal(scale=0.1, size=atoms.positions.shape)
    return atoms


def turned(atoms):
    atoms = atoms.copy()
    atoms.rotate(37, (1, 2, 3), rotate_cell=True)
    return atoms


def mirrored(atoms):
    return Atoms(
        atoms.numbers, atoms.positions * [1, 1, -1], cell=atoms.cell * [1, 1, -1], pbc=True
    )


def moved(atoms):
    atoms = atoms.copy()
    atoms.translate([0.3, -1.2, 0.7])
    if atoms.pbc.all():
        atoms.wrap()
    return atoms


def first_rows(*frames):
    return find_duplicates(Configurations.from_atoms(list(frames))).tolist()


@pytest.mark.parametrize(
    "again",
    [
        turned,
        mirrored,
        moved,
        lambda atoms: atoms[::-1],
        lambda atoms: atoms * (1, 2, 1),
        lambda atoms: make_supercell(atoms, [[1, 1, 0], [0, 1, 0], [0, 0, 1]]),
    ],
    ids=["turned", "mirrored", "moved", "reordered", "repeated", "in another cell"],
)
def test_the_same_crystal_is_found_however_it_is_written(again):
    assert first_rows(rattled(1), rattled(), again(rattled())) == [0, 1, 1]


def known_rows(frames, known):
    return find_known(Configurations.from_atoms(frames), Configurations.from_atoms(known)).tolist()


def test_what_another_set_has_is_found_however_it_is_written():
    known = [rattled(seed) for seed in range(4)]
    frames = [rattled(7), turned(rattled(2)), rattled(1), rattled(3) * (1, 2, 1), rattled(8)]

    assert known_rows(frames, known) == [-1, 2, 1, 3, -1]


def test_other_compositions_and_densities_are_not_compared(monkeypatch):
    compared = []

    def spy(configurations):
        compared.append(len(configurations))
        return find_duplicates(configurations)

    monkeypatch.setattr("aiida_eipnn.science.duplicates.find_duplicates", spy)
    denser, other = rattled(1), rattled(1)
    denser.set_cell(denser.cell * 0.99, scale_atoms=True)
    other.numbers[0] = 32
    cluster = Atoms("Si2", [[0, 0, 0], [2.3, 0, 0]])

    known = [rattled(), cluster]
    assert known_rows([denser, other, turned(rattled()), moved(cluster)], known) == [-1, -1, 0, 1]
    assert compared == [2, 2]


def test_a_set_without_configurations_is_known_to_none():
    frames = Configurations.from_atoms([rattled()])
    assert find_known(frames, frames.take([])).tolist() == [-1]
    assert find_known(frames.take([]), frames).tolist() == []
    assert find_known(frames.take([]), frames.take([])).tolist() == []


def test_the_first_of_three_is_named():
    atoms = rattled()

    assert first_rows(turned(atoms), rattled(1), atoms, moved(atoms)) == [0, 1, 0, 0]


def test_one_displaced_atom_of_many_makes_another_geometry():
    """Finite displacements for phonons are no duplicates of the crystal."""
    crystal = bulk("Si", cubic=True) * (2, 2, 2)
    displaced = crystal.copy()
    displaced.positions[0, 0] += 0.01

    assert first_rows(crystal, displaced) == [0, 1]


def test_a_small_strain_makes_another_geometry():
    atoms = bulk("W", cubic=True)
    strained = atoms.copy()
    strained.set_cell(atoms.cell * [1.001, 1, 1], scale_atoms=True)

    assert first_rows(atoms, strained) == [0, 1]


def test_exchanged_elements_make_another_geometry():
    atoms = rattled()
    exchanged = atoms.copy()
    exchanged.numbers = np.where(atoms.numbers == 6, 14, 6)

    assert first_rows(atoms, exchanged) == [0, 1]


def test_strains_that_a_rotation_maps_on_one_another_are_found():
    frames = []
    for axis in range(3):
        atoms = bulk("Si", cubic=True)
        stretch = np.ones(3)
        stretch[axis] = 1.02
        atoms.set_cell(atoms.cell * stretch, scale_atoms=True)
        frames.append(atoms)

    assert first_rows(*frames) == [0, 0, 0]


def test_no_configuration_has_no_duplicate():
    assert first_rows() == []


def twins_of(frames, energies):
    """Return the first rows, where EIPs give these energies per atom; NaN is none."""
    configurations = Configurations.from_atoms(frames)
    missing = Labels.missing(configurations, [f"eip{column}" for column in range(len(energies[0]))])
    energy = np.array(energies) * configurations.n_atoms[:, None]
    status = np.where(np.isfinite(energy), 0, missing.status)
    labels = replace(missing, energy=energy, status=status.astype(missing.status.dtype))
    # In another order, and without the last one.
    return find_twins(configurations, labels.take(np.arange(len(frames) - 1)[::-1])).tolist()


def test_twins_are_looked_for_where_eips_agree():
    one, other, nan = rattled(), rattled(1), np.nan
    frames = [one, other, turned(one), moved(one), moved(other), mirrored(one)]
    energies = [[1.0, 2.0], [1.0, 3.0], [1.0, 2.0 + 1e-9], [1.0, nan], [1.0, 3.0], [1.0, 2.0]]

    # The fourth has other labels, and the last has none.
    assert twins_of(frames, energies) == [0, 1, 0, 3, 1, 5]
    assert find_duplicates(Configurations.from_atoms(frames)).tolist() == [0, 1, 0, 0, 1, 0]


def test_geometries_that_an_eip_does_not_tell_apart_are_no_twins():
    far, farther = (Atoms("Si2", [[0, 0, 0], [0, 0, d]], cell=[20] * 3) for d in (4.0, 4.5))

    assert twins_of([far, farther, rattled()], [[0.0], [0.0], [1.0]]) == [0, 1, 2]


def test_where_no_eip_says_anything_nothing_is_a_twin():
    assert twins_of([rattled(), turned(rattled()), rattled(1)], [[np.nan]] * 3) == [0, 1, 2]


def labels_of(*frames):
    """Return labels by an ASE calculator."""
    configurations = Configurations.from_atoms(list(frames))
    labels = Labels.missing(configurations, ["dft"])
    energy, forces, stress = [], [], []
    for atoms in frames:
        atoms = atoms.copy()
        atoms.calc = EMT()
        energy.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
        stress.append(atoms.get_stress())
    return replace(
        labels,
        energy=np.array(energy)[:, None],
        forces=np.concatenate(forces)[None],
        stress=np.array(stress)[:, None],
        status=np.zeros_like(labels.status),
        reasons=np.array([], dtype="<U1"),
    )


def copper(seed=0):
    atoms = bulk("Cu", cubic=True)
    atoms.positions += np.random.default_rng(seed).normal(scale=0.1, size=(4, 3))
    return atoms


def test_labels_of_copies_say_the_same_and_others_do_not():
    frames = [copper(), copper(), copper(), copper(2)]
    copies = [turned(copper()), mirrored(copper()), copper() * (1, 2, 1), copper(3)]

    assert say_the_same(labels_of(*frames), labels_of(*copies)).tolist() == [True] * 3 + [False]


@pytest.mark.parametrize("name", ["energy", "forces", "stress"])
def test_one_number_that_differs_is_enough_and_one_that_is_not_told_is_none(name):
    labels = labels_of(copper())
    values = getattr(labels, name)
    other = replace(labels, **{name: values + 0.1 * np.abs(values).max()})
    assert say_the_same(labels, other).tolist() == [False]
    silent = replace(labels, stress=np.full_like(labels.stress, np.nan))
    assert say_the_same(silent, labels).tolist() == [True]


def test_what_a_fingerprint_cannot_tell_apart_its_label_does():
    crystal = bulk("Cu", cubic=True) * (4, 4, 4)
    moved_one = crystal.copy()
    moved_one.positions[0, 0] += 0.01
    assert known_rows([moved_one], [crystal]) == [0]
    assert say_the_same(labels_of(crystal), labels_of(moved_one)).tolist() == [False]
