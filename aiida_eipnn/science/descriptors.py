"""What a configuration looks like in numbers, without any potential: for baselines to beat.

Distances are in units of the sum of the two covalent radii, so that one basis serves all elements.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from ase.data import covalent_radii

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.neighbour_list import NeighborList

# Sums of covalent radii: 4.9 Å for silicon, three shells; 7.1 Å for tungsten, five.
CUTOFF = 2.2
CENTRES = np.linspace(0.6, 2.1, 10)
WIDTH = 0.17
# Angles are between bonds, and these end before the second shell of diamond (1.63) counts much.
BOND = 1.7
# Bond vectors enter as their outer powers 1 to 3 summed over the neighbours: the squared norms of
# the sums are what all pairs of bonds have as powers of the cosine between them.
POWERS = 3

# Beyond this many elements, neighbours are not told apart: the basis grows as the square.
MAX_ELEMENTS = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Descriptors:
    """Descriptors of ``n`` configurations with ``N`` atoms in all.

    Parameters
    ----------
    structure
        Mean and spread over the atoms of pair-distance histograms and bond angles, and the
        logarithm of the volume per atom; without unit. Shape ``(n, d)``.
    pair_forces
        Forces on each atom of a basis of pair potentials, without unit. Shape ``(N, 3, p)``.
    """

    structure: FloatArray
    pair_forces: FloatArray


def describe_structures(configurations: Configurations) -> Descriptors:
    """Describe each configuration by distances and angles alone."""
    elements = np.array(configurations.elements, dtype=np.int64)
    kinds = _kinds_of_pairs(elements)
    parts = [_describe(configurations, row, elements, kinds) for row in range(len(configurations))]
    n_kinds = int(kinds.max(initial=0)) + 1
    empty = np.zeros((0, 3, n_kinds * len(CENTRES)))
    return Descriptors(
        structure=np.array([structure for structure, _ in parts]).reshape(len(parts), -1),
        pair_forces=np.concatenate([forces for _, forces in parts] or [empty]),
    )


def _kinds_of_pairs(elements: IntArray) -> IntArray:
    """Return the number of the kind of pair that two elements make. Shape ``(k, k)``."""
    kinds = np.zeros((len(elements), len(elements)), dtype=np.int64)
    if len(elements) <= MAX_ELEMENTS:
        pairs = combinations_with_replacement(range(len(elements)), 2)
        for kind, (first, second) in enumerate(pairs):
            kinds[first, second] = kinds[second, first] = kind
    return kinds


def _describe(
    configurations: Configurations, row: int, elements: IntArray, kinds: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Return the structure and the pair forces of one configuration."""
    part = slice(int(configurations.offsets[row]), int(configurations.offsets[row + 1]))
    numbers, n = configurations.numbers[part], int(configurations.n_atoms[row])
    atom, other, length, direction = _neighbours(configurations, row, numbers)
    species = np.searchsorted(elements, numbers)
    kind, n_kinds = kinds[species[atom], species[other]], int(kinds.max(initial=0)) + 1
    basis = _envelope(length / CUTOFF)[:, None] * np.exp(
        -0.5 * ((length[:, None] - CENTRES) / WIDTH) ** 2
    )
    place = atom * n_kinds + kind
    histogram = _sum_by(place, basis, n * n_kinds).reshape(n, -1)
    # From the neighbour to the atom, so that a positive coefficient repels.
    push = -direction[:, :, None] * basis[:, None, :]
    forces = _sum_by(place, push.reshape(len(push), 3 * len(CENTRES)), n * n_kinds)
    forces = forces.reshape(n, n_kinds, 3, len(CENTRES)).transpose(0, 2, 1, 3).reshape(n, 3, -1)
    per_atom = np.hstack([histogram, _bond_angles(atom, length, direction, n)])
    # A molecule has no volume.
    periodic = configurations.pbc[row].all()
    size = np.log(abs(np.linalg.det(configurations.cells[row])) / n) if periodic else 0.0
    return np.concatenate([per_atom.mean(axis=0), per_atom.std(axis=0), [size]]), forces


def _neighbours(
    configurations: Configurations, row: int, numbers: IntArray
) -> tuple[IntArray, IntArray, FloatArray, FloatArray]:
    """Return atom, neighbour, distance in radii, and direction towards the neighbour."""
    atoms = configurations.atoms(row)
    radii = covalent_radii[numbers]
    first, second, distance, vector = NeighborList(
        cutoff=float(2 * CUTOFF * radii.max()), full_list=True
    ).compute(
        points=atoms.positions,
        box=np.asarray(atoms.cell.complete()),
        periodic=atoms.pbc,
        quantities="ijdD",
    )
    first, second = first.astype(np.int64), second.astype(np.int64)
    length = distance / (radii[first] + radii[second])
    near = (length < CUTOFF) & (distance > 0)
    return first[near], second[near], length[near], vector[near] / distance[near, None]


def _bond_angles(
    atom: IntArray, length: FloatArray, direction: FloatArray, n_atoms: int
) -> FloatArray:
    """Return number of bonds and norms of their summed outer powers. Shape ``(n_atoms, 4)``."""
    weight = _envelope(length / BOND)
    power = np.ones((len(atom), 1))
    columns = [_sum_by(atom, weight[:, None], n_atoms)]
    for _ in range(POWERS):
        power = (power[:, :, None] * direction[:, None, :]).reshape(len(atom), power.shape[1] * 3)
        summed = _sum_by(atom, weight[:, None] * power, n_atoms)
        columns.append(np.sqrt((summed**2).sum(axis=1, keepdims=True)))
    return np.hstack(columns)


def _envelope(share: FloatArray) -> FloatArray:
    """Return what falls smoothly from 1 to 0 at a share of 1 of the cutoff."""
    return np.where(share < 1, 0.5 * (1 + np.cos(np.pi * np.minimum(share, 1.0))), 0.0)


def _sum_by(place: IntArray, values: FloatArray, n: int) -> FloatArray:
    """Sum the rows of ``values`` that have the same place. Shape ``(n, columns)``."""
    summed = np.zeros((n, values.shape[1]))
    np.add.at(summed, place, values)
    return summed
