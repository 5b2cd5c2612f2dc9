"""Descriptors see structure: no orientation, no order, no size of the cell."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.descriptors import describe_structures


def rattled(symbols="SiC", seed=0):
    rng = np.random.default_rng(seed)
    atoms = bulk(symbols, "zincblende" if symbols == "SiC" else None, a=4.6, cubic=True)
    atoms.positions += 0.1 * rng.normal(size=(len(atoms), 3))
    return atoms


def describe(*frames):
    return describe_structures(Configurations.from_atoms(list(frames)))


def rotation():
    return np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]


def test_structure_does_not_depend_on_orientation_order_or_supercell():
    atoms, turned = rattled(), rattled()
    turned.set_cell(atoms.cell.array @ rotation().T, scale_atoms=True)
    order = np.random.default_rng(1).permutation(len(atoms))

    found = describe(atoms, turned, atoms[order], atoms.repeat((2, 1, 1))).structure

    for row in found[1:]:
        np.testing.assert_allclose(row, found[0], atol=1e-8)


def test_structure_tells_crystals_apart():
    frames = [bulk("Si"), bulk("Si", "fcc", a=3.9), bulk("Si", "bcc", a=3.1)]

    found = describe(*frames).structure

    assert len(np.unique(found.round(3), axis=0)) == 3


def test_pair_forces_turn_with_the_atoms_and_cancel():
    atoms, turned, q = rattled(), rattled(), rotation()
    turned.set_cell(atoms.cell.array @ q.T, scale_atoms=True)

    forces = describe(atoms, turned).pair_forces

    first, second = forces[: len(atoms)], forces[len(atoms) :]
    np.testing.assert_allclose(second, np.einsum("xy,nyk->nxk", q, first), atol=1e-8)
    np.testing.assert_allclose(first.sum(axis=0), 0, atol=1e-8)


def test_a_positive_coefficient_repels():
    forces = describe(Atoms("Si2", [[0, 0, 0], [2.3, 0, 0]])).pair_forces

    assert (forces[0, 0] <= 0).all()
    assert (forces[1, 0] >= 0).all()
    assert forces[1, 0].max() > 0


@pytest.mark.parametrize("n_elements", [2, 5])
def test_many_elements_are_described_too(n_elements):
    rng = np.random.default_rng(2)
    symbols = ["W", "Mo", "Ta", "Nb", "V"][:n_elements]
    frames = [
        Atoms(rng.choice(symbols, 6), 2.5 * rng.normal(size=(6, 3)), cell=[9] * 3, pbc=True)
        for _ in range(4)
    ]

    found = describe(*frames)

    assert np.isfinite(found.structure).all()
    assert found.pair_forces.shape[0] == 24


def test_an_atom_alone_is_described():
    found = describe(Atoms("Si"), Atoms("Si", cell=[20] * 3, pbc=True))

    assert np.isfinite(found.structure).all()
    assert not found.pair_forces.any()
