"""Neighbours of atoms: found once for a set of configurations, cut into batches for networks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from vesin import NeighborList

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations, ragged_rows
from aiida_eipnn.science.eip.potential import symbols_of
from aiida_eipnn.science.nn.device import ON_CPU


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Neighbours:
    """Neighbours of the ``N`` atoms of ``n`` configurations: ``E`` pairs, each in both directions.

    Parameters
    ----------
    species
        Index of each atom's element among those of the network. Shape ``(N,)``.
    offsets
        The atoms of configuration ``i`` are rows ``offsets[i]`` to ``offsets[i + 1]``.
        Shape ``(n + 1,)``.
    pair_offsets
        The pairs of atom ``a`` are rows ``pair_offsets[a]`` to ``pair_offsets[a + 1]``.
        Shape ``(N + 1,)``.
    partners
        Row of the neighbour, counted from the first atom of its configuration. Shape ``(E,)``.
    vectors
        From the atom to its neighbour, or to the periodic image of it that is meant, in Å.
        Shape ``(E, 3)``.
    volumes
        Of the cells, in Å³; NaN where a configuration is not periodic in all directions.
        Shape ``(n,)``.
    """

    species: IntArray
    offsets: IntArray
    pair_offsets: IntArray
    partners: IntArray
    vectors: FloatArray
    volumes: FloatArray

    def __len__(self) -> int:
        return len(self.volumes)

    @property
    def n_atoms(self) -> IntArray:
        """Number of atoms of each configuration. Shape ``(n,)``."""
        return np.diff(self.offsets)


class Graph(NamedTuple):
    """A batch of ``n`` configurations with ``N`` atoms, each with ``K`` places for neighbours.

    Parameters
    ----------
    species
        Index of each atom's element. Shape ``(N,)``.
    owner
        Configuration of each atom. Shape ``(N,)``.
    n_atoms
        Shape ``(n,)``.
    pairs
        Row in the flat list of pairs of what is in each place; the number of pairs where the place
        is empty. Shape ``(N, K)``.
    partners
        Row of the neighbour among the atoms of the batch; 0 where the place is empty.
        Shape ``(N, K)``.
    vectors
        From the atom to its neighbour, in Å; zero where the place is empty. Shape ``(N, K, 3)``.
    volumes
        In Å³; NaN where a configuration is not periodic in all directions. Shape ``(n,)``.
    """

    species: Tensor
    owner: Tensor
    n_atoms: Tensor
    pairs: Tensor
    partners: Tensor
    vectors: Tensor
    volumes: Tensor


class GraphBatch(NamedTuple):
    """A batch for a trunk that computes everything from the graph."""

    graph: Graph


class GraphSet:
    """Configurations for a trunk that computes everything from the graph, any batch at a time."""

    def __init__(self, neighbours: Neighbours, device: torch.device = ON_CPU) -> None:
        self.neighbours = neighbours
        self.device = device

    def __len__(self) -> int:
        return len(self.neighbours)

    def batch(self, rows: IntArray) -> GraphBatch:
        """Return the given configurations as one batch."""
        return GraphBatch(batch_graph(self.neighbours, rows, self.device))


def find_neighbours(
    configurations: Configurations, elements: Sequence[int], cutoff: float
) -> Neighbours:
    """Find all neighbours closer than ``cutoff`` (in Å).

    Raises
    ------
    ValueError
        If an element is not among ``elements``, or if two atoms are in the same place.
    """
    species = species_of(configurations, elements)
    finder = NeighborList(cutoff=cutoff, full_list=True)
    parts = [_find(finder, configurations, row) for row in range(len(configurations))]
    counts = [np.zeros(0, np.int64), *(part[0] for part in parts)]
    return Neighbours(
        species=species,
        offsets=configurations.offsets,
        pair_offsets=np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64),
        partners=np.concatenate([np.zeros(0, np.int64), *(part[1] for part in parts)]),
        vectors=np.concatenate([np.zeros((0, 3)), *(part[2] for part in parts)]),
        volumes=np.where(
            configurations.pbc.all(axis=1), np.abs(np.linalg.det(configurations.cells)), np.nan
        ),
    )


def species_of(configurations: Configurations, elements: Sequence[int]) -> IntArray:
    """Return the index among ``elements`` (ascending) of each atom. Shape ``(N,)``.

    Raises
    ------
    ValueError
        If an element is not there.
    """
    known = np.array(elements, dtype=np.int64)
    if unknown := sorted(set(configurations.elements) - set(known.tolist())):
        raise ValueError(
            f"the network does not know {symbols_of(unknown)}, only {symbols_of(known)}; drop the "
            "configurations that contain it, or train on configurations with that element"
        )
    return np.searchsorted(known, configurations.numbers).astype(np.int64)


def batch_graph(neighbours: Neighbours, rows: IntArray, device: torch.device = ON_CPU) -> Graph:
    """Return the given configurations as one batch, on a device."""
    atoms = ragged_rows(neighbours.offsets, rows)
    n_atoms = neighbours.n_atoms[rows]
    owner = np.repeat(np.arange(len(rows)), n_atoms)
    starts = np.concatenate([[0], np.cumsum(n_atoms)[:-1]]).astype(np.int64)
    pairs = _places(neighbours.pair_offsets, atoms, n_pairs=len(neighbours.partners))
    filled = pairs < len(neighbours.partners)
    partners = np.zeros(pairs.shape, dtype=np.int64)
    vectors = np.zeros((*pairs.shape, 3))
    there = pairs[filled]
    partners[filled] = neighbours.partners[there]
    vectors[filled] = neighbours.vectors[there]
    partners = np.where(filled, partners + starts[owner][:, None], 0)
    # In the order of the fields.
    arrays = (
        neighbours.species[atoms],
        owner,
        n_atoms,
        pairs,
        partners,
        vectors,
        neighbours.volumes[rows],
    )
    return Graph(*(torch.as_tensor(array, device=device) for array in arrays))


def _places(pair_offsets: IntArray, atoms: IntArray, *, n_pairs: int) -> IntArray:
    """Return the pairs of each atom, filled up to the same number with ``n_pairs``."""
    counts = pair_offsets[atoms + 1] - pair_offsets[atoms]
    place = np.arange(max(1, int(counts.max(initial=0))))
    return np.where(place < counts[:, None], pair_offsets[atoms][:, None] + place, n_pairs)


def _find(
    finder: NeighborList, configurations: Configurations, row: int
) -> tuple[IntArray, IntArray, FloatArray]:
    """Return number of pairs of each atom, then partner and vector of each pair."""
    atoms = configurations.atoms(row)
    first, second, shift, vector = finder.compute(
        points=atoms.positions,
        # vesin's second name for an ASE cell is "box"; rows are cell vectors there too.
        box=atoms.cell.complete().array,
        periodic=atoms.pbc,
        quantities="ijSD",
    )
    if not vector.any(axis=1).all():
        raise ValueError(
            f"configuration {configurations.ids[row]} has two atoms in the same place; drop it"
        )
    # The order that vesin finds pairs in is its own affair, but sums must not depend on it.
    order = np.lexsort((*shift.T, second, first))
    counts = np.bincount(first.astype(np.int64), minlength=len(atoms))
    return counts, second[order].astype(np.int64), vector[order]
