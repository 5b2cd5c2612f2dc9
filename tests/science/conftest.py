"""Finite differences of potentials, for every file that checks forces and stress by them."""

from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms


def _displaced(atoms: Atoms, atom: int, axis: int, by: float) -> Atoms:
    moved = atoms.copy()
    moved.positions[atom, axis] += by
    return moved


def _strained(atoms: Atoms, i: int, j: int, by: float) -> Atoms:
    strain = np.eye(3)
    strain[i, j] += by / 2
    strain[j, i] += by / 2
    moved = atoms.copy()
    moved.set_cell(atoms.cell @ strain, scale_atoms=True)
    return moved


def _derivative(potential, moved: Callable[[float], Atoms], step: float) -> float:
    """Central difference of fourth order."""
    energies = [potential.label(moved(n * step)).energy for n in (-2, -1, 1, 2)]
    return float(np.dot(energies, [1, -8, 8, -1]) / (12 * step))


@pytest.fixture
def slope_by_place():
    """The derivative of the energy by a coordinate of an atom, in eV/Å."""
    return lambda potential, atoms, atom, axis, step=1e-4: _derivative(
        potential, lambda by: _displaced(atoms, atom, axis, by), step
    )


@pytest.fixture
def slope_by_strain():
    """The derivative of the energy by a component of symmetric strain, in eV."""
    return lambda potential, atoms, i, j, step=1e-4: _derivative(
        potential, lambda by: _strained(atoms, i, j, by), step
    )
