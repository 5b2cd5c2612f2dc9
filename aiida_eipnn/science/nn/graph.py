"""Neighbours of atoms: found once for a set of configurations, cut into batches for networks."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from ase.geometry import complete_cell
from torch import Tensor

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations, ragged_rows
from aiida_eipnn.science.eip.potential import symbols_of
from aiida_eipnn.science.neighbour_list import NeighborList
from aiida_eipnn.science.nn.device import ON_CPU
from aiida_eipnn.science.nn.sizes import Sizes

# Fewer configurations than this are not worth a thread.
_MIN_FOR_A_THREAD = 16


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

    @property
    def sizes(self) -> Sizes:
        """What each configuration takes of the memory."""
        counts = np.diff(self.pair_offsets)
        most = np.zeros(len(self), dtype=np.int64)
        filled = np.flatnonzero(self.n_atoms)
        most[filled] = np.maximum.reduceat(counts, self.offsets[filled])
        return Sizes(self.n_atoms, np.maximum(most, 1))


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


class _Found(NamedTuple):
    """Number of pairs of each atom of a configuration, then partner and vector of each pair."""

    counts: IntArray
    partners: IntArray
    vectors: FloatArray


class GraphBatch(NamedTuple):
    """A batch for a trunk that computes everything from the graph."""

    graph: Graph


class GraphTable:
    """All neighbours of a set, where the network is, to cut batches from.

    Parameters
    ----------
    neighbours
        Of the whole set.
    device
        Where the network is.
    """

    def __init__(self, neighbours: Neighbours, device: torch.device = ON_CPU) -> None:
        self.neighbours = neighbours
        self.device = device
        # In the memory of the arrays themselves, on a CPU.
        self._species, self._starts, self._partners, self._vectors, self._volumes = (
            torch.as_tensor(array, device=device)
            for array in (
                neighbours.species,
                neighbours.pair_offsets,
                neighbours.partners,
                neighbours.vectors,
                neighbours.volumes,
            )
        )

    def __len__(self) -> int:
        return len(self.neighbours)

    def batch(self, rows: IntArray) -> Graph:
        """Return the given configurations as one batch."""
        neighbours = self.neighbours
        chosen = ragged_rows(neighbours.offsets, rows)
        counts = neighbours.pair_offsets[chosen + 1] - neighbours.pair_offsets[chosen]
        sizes = neighbours.n_atoms[rows]
        before = np.repeat(np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64), sizes)
        owners = np.repeat(np.arange(len(rows)), sizes)
        # One copy to the device for all that depends on the atoms.
        columns = np.stack([chosen, counts, before, owners])
        atoms, n_pairs, first, owner = torch.as_tensor(columns, device=self.device)
        place = torch.arange(max(1, int(counts.max(initial=0))), device=self.device)
        filled = place < n_pairs[:, None]
        pairs = torch.where(filled, self._starts[atoms][:, None] + place, len(self._partners))
        partners, vectors = self._at(pairs, filled)
        return Graph(
            species=self._species[atoms],
            owner=owner,
            n_atoms=torch.as_tensor(sizes, device=self.device),
            pairs=pairs,
            partners=torch.where(filled, partners + first[:, None], 0),
            vectors=vectors,
            volumes=self._volumes[torch.as_tensor(rows, device=self.device)],
        )

    def _at(self, pairs: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
        """Return partners and vectors of pairs, zero where the place is empty."""
        if not len(self._partners):
            return torch.zeros_like(pairs), self._vectors.new_zeros(*pairs.shape, 3)
        there = torch.where(filled, pairs, 0)
        vectors = torch.where(filled[..., None], self._vectors[there], 0.0)
        return self._partners[there], vectors


class GraphSet:
    """Configurations for a trunk that computes everything from the graph, any batch at a time."""

    def __init__(self, neighbours: Neighbours, device: torch.device = ON_CPU) -> None:
        self.neighbours = neighbours
        self._table = GraphTable(neighbours, device)

    def __len__(self) -> int:
        return len(self.neighbours)

    def batch(self, rows: IntArray) -> GraphBatch:
        """Return the given configurations as one batch."""
        return GraphBatch(self._table.batch(rows))


def find_neighbours(
    configurations: Configurations, elements: Sequence[int], cutoff: float
) -> Neighbours:
    """Find all neighbours closer than ``cutoff`` (in Å).

    As many threads search as torch computes with: for a network on a GPU this is the longest part.

    Raises
    ------
    ValueError
        If an element is not among ``elements``, or if two atoms are in the same place.
    """
    species = species_of(configurations, elements)
    n_threads = min(torch.get_num_threads(), math.ceil(len(configurations) / _MIN_FOR_A_THREAD))
    chunks = np.array_split(np.arange(len(configurations)), max(1, n_threads))
    search = partial(_find_all, configurations, cutoff)
    if n_threads > 1:
        with ThreadPoolExecutor(n_threads) as threads:
            parts = list(chain.from_iterable(threads.map(search, chunks)))
    else:
        parts = search(chunks[0])
    counts = [np.zeros(0, np.int64), *(part.counts for part in parts)]
    return Neighbours(
        species=species,
        offsets=configurations.offsets,
        pair_offsets=np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64),
        partners=np.concatenate([np.zeros(0, np.int64), *(part.partners for part in parts)]),
        vectors=np.concatenate([np.zeros((0, 3)), *(part.vectors for part in parts)]),
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


def _find_all(configurations: Configurations, cutoff: float, rows: IntArray) -> list[_Found]:
    finder = NeighborList(cutoff=cutoff, full_list=True)
    return [_find(finder, configurations, row) for row in rows.tolist()]


def _find(finder: NeighborList, configurations: Configurations, row: int) -> _Found:
    atoms = slice(*configurations.offsets[row : row + 2].tolist())
    first, second, shift, vector = finder.compute(
        points=configurations.positions[atoms],
        # vesin's second name for an ASE cell is "box"; rows are cell vectors there too.
        box=complete_cell(configurations.cells[row]),
        periodic=configurations.pbc[row],
        quantities="ijSD",
    )
    if not vector.any(axis=1).all():
        raise ValueError(
            f"configuration {configurations.ids[row]} has two atoms in the same place; drop it"
        )
    # The order that vesin finds pairs in is its own affair, but sums must not depend on it.
    order = np.lexsort((*shift.T, second, first))
    n_atoms = atoms.stop - atoms.start
    counts = np.bincount(first.astype(np.int64), minlength=n_atoms)
    return _Found(counts, second[order].astype(np.int64), vector[order])
