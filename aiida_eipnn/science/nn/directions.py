r"""Features of atoms and how they change when all atoms of a configuration move at once.

When the atoms move along a direction :math:`d`, an energy :math:`E = \sum_i w \cdot f_i` changes by
:math:`\sum_i w \cdot \dot f_i = -\sum_i F_i \cdot d_i`. One pass gives :math:`\dot f`, and with it
the force along :math:`d` of *every* head, where derivatives by all positions take one pass back for
each head. For random :math:`d` the mean square of :math:`(F - F') \cdot d` is that of the forces.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations, ragged_rows
from aiida_eipnn.science.nn.descriptor import (
    MAX_KEPT_BYTES,
    Basis,
    describe,
    descriptor_tangent,
)
from aiida_eipnn.science.nn.device import ON_CPU
from aiida_eipnn.science.nn.graph import Graph, GraphTable, find_neighbours
from aiida_eipnn.science.nn.heads import Owners, sum_atoms
from aiida_eipnn.science.nn.network import (
    Network,
    NetworkParameters,
    describe_configurations,
)
from aiida_eipnn.science.nn.power_spectrum import PowerSpectrumTrunk
from aiida_eipnn.science.nn.shares import WHOLE, Share
from aiida_eipnn.science.nn.sizes import BATCH_EDGES, Sizes
from aiida_eipnn.science.nn.trunk import BatchSet

# Directions that are kept of each configuration: a new one in each of as many epochs.
N_DIRECTIONS = 6
# Configurations that are described at once.
_CHUNK = 32
# Places for neighbours that take as much memory as an atom whose descriptors are kept.
_PLACES_OF_KEPT = 8


class Moved(NamedTuple):
    r"""What all heads say about a batch of ``n`` configurations whose atoms move.

    Parameters
    ----------
    energies
        Energies per atom without reference, in eV/atom. Shape ``(n, n_heads)``.
    along
        Forces along the direction, :math:`\sum_i F_i \cdot d_i / \sqrt{3 N}`, in eV/Å: of the
        size of a force component. Shape ``(n, n_heads)``.
    directions
        Shape ``(N, 3)``.
    """

    energies: Tensor
    along: Tensor
    directions: FloatArray


class Pooled(NamedTuple):
    r"""Features of a batch of ``n`` configurations whose atoms move, which heads read linearly.

    Parameters
    ----------
    mean
        Mean over atoms. Shape ``(n, n_features)``.
    change
        Their change along the direction, over :math:`\sqrt{3 N}`, in 1/Å. Shape
        ``(n, n_features)``.
    directions
        Shape ``(N, 3)``.
    """

    mean: Tensor
    change: Tensor
    directions: FloatArray


A = TypeVar("A", Moved, Pooled)


class DirectedSet(Protocol):
    """Configurations of which each batch is moved along a random direction."""

    sizes: Sizes

    def __len__(self) -> int:
        """Return the number of configurations."""
        ...

    def draw(self, rows: IntArray, rng: np.random.Generator) -> object:
        """Draw what these configurations are moved along, as :meth:`move` does."""
        ...

    def move(
        self, network: Network, rows: IntArray, rng: np.random.Generator, share: Share = WHOLE
    ) -> Moved:
        """Return what the heads say about these configurations; differentiable by the weights.

        Of a share of them, moved as all of them would be.
        """
        ...


class KeptDirections:
    """Descriptors and their change along a few directions, computed once: for fixed descriptors.

    Parameters
    ----------
    configurations
        The configurations.
    parameters
        Of a network whose trunk has fixed descriptors.
    elements
        Atomic numbers that the network knows.
    seed
        Draws the directions.
    device
        Where the network is, and what is kept.
    batch_edges
        Places for neighbours that are described at once, at most.
    """

    def __init__(
        self,
        configurations: Configurations,
        parameters: NetworkParameters,
        elements: tuple[int, ...],
        seed: int,
        device: torch.device = ON_CPU,
        batch_edges: int = BATCH_EDGES,
    ) -> None:
        neighbours = find_neighbours(configurations, elements, parameters.cutoff)
        basis = parameters.basis(len(elements))
        n_atoms = len(neighbours.species)
        rng = np.random.default_rng(seed)
        self.offsets = configurations.offsets
        # No neighbours are looked at any more.
        self.sizes = Sizes(
            neighbours.n_atoms, np.full(len(neighbours), _PLACES_OF_KEPT, dtype=np.int64)
        )
        self.device = device
        self.species = torch.as_tensor(neighbours.species, device=device)
        self.directions = rng.normal(size=(N_DIRECTIONS, n_atoms, 3)).astype(np.float32)
        shape = (n_atoms, basis.n_descriptors)
        self.descriptors = torch.empty(shape, dtype=parameters.dtype, device=device)
        self.changes = self.descriptors.new_empty(N_DIRECTIONS, *shape)
        table = GraphTable(neighbours, device)
        for rows in neighbours.sizes.batches(_CHUNK, batch_edges):
            self._describe(table.batch(rows), rows, basis)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @staticmethod
    def fits(
        configurations: Configurations, parameters: NetworkParameters, n_elements: int
    ) -> bool:
        """Return whether all of it may be kept in memory."""
        n_values = len(configurations.numbers) * parameters.basis(n_elements).n_descriptors
        return 8 * n_values * (1 + N_DIRECTIONS) <= MAX_KEPT_BYTES

    def draw(self, rows: IntArray, rng: np.random.Generator) -> int:
        """Return the number of the directions that these configurations are moved along."""
        return int(rng.integers(N_DIRECTIONS))

    def move(
        self, network: Network, rows: IntArray, rng: np.random.Generator, share: Share = WHOLE
    ) -> Moved:
        """Return what the heads say about a share of these configurations."""
        assert isinstance(network.trunk, PowerSpectrumTrunk)
        drawn = self.draw(rows, rng)
        rows = share.of(rows)
        if not len(rows):
            return _read(network, _nothing(network))
        atoms = ragged_rows(self.offsets, rows)
        part = torch.as_tensor(atoms, device=self.device)
        features, slopes = network.trunk.slopes_by_descriptors(
            self.descriptors[part], self.changes[drawn, part], self.species[part]
        )
        n_atoms = np.diff(self.offsets)[rows]
        return _read(network, _pool(features, slopes, n_atoms, self.directions[drawn, atoms]))

    def _describe(self, graph: Graph, rows: IntArray, basis: Basis) -> None:
        atoms = slice(int(self.offsets[rows[0]]), int(self.offsets[rows[-1] + 1]))
        described = describe(graph, basis, self.descriptors.dtype)
        self.descriptors[atoms] = described.descriptors
        for number in range(N_DIRECTIONS):
            directions = self.directions[number, atoms].astype(np.float64)
            tangent = tangent_of(graph, directions)
            self.changes[number, atoms] = descriptor_tangent(tangent, described)


class DrawnDirections:
    """Any trunk, or a set that is too large to keep: a new direction whenever one is asked for.

    Parameters
    ----------
    described
        The configurations, as the trunk wants them.
    batch_edges
        Places for neighbours of each of the :meth:`batches`, at most.
    """

    def __init__(self, described: BatchSet, batch_edges: int = BATCH_EDGES) -> None:
        self.described = described
        self.sizes = described.neighbours.sizes
        self.batch_edges = batch_edges

    def __len__(self) -> int:
        return len(self.described)

    def batches(self, rows: IntArray) -> list[IntArray]:
        """Return the given rows, a few at a time."""
        return [rows[part] for part in self.sizes.take(rows).batches(_CHUNK, self.batch_edges)]

    def draw(self, rows: IntArray, rng: np.random.Generator) -> FloatArray:
        """Return the directions that the atoms of these configurations are moved along."""
        return rng.normal(size=(int(self.sizes.n_atoms[rows].sum()), 3))

    def move(
        self, network: Network, rows: IntArray, rng: np.random.Generator, share: Share = WHOLE
    ) -> Moved:
        """Return what the heads say about a share of these configurations."""
        return _read(network, self.pool(network, rows, rng, share))

    def pool(
        self, network: Network, rows: IntArray, rng: np.random.Generator, share: Share = WHOLE
    ) -> Pooled:
        """Return what heads read of a share of these configurations; differentiable."""
        n_atoms = self.sizes.n_atoms[rows]
        directions = self.draw(rows, rng)
        first, last = share.bounds(len(rows))
        if first == last:
            return _nothing(network)
        directions = directions[n_atoms[:first].sum() : n_atoms[:last].sum()]
        batch = self.described.batch(rows[first:last])
        features, slopes = network.trunk.slopes(batch, tangent_of(batch.graph, directions))
        return _pool(features, slopes, n_atoms[first:last], directions)


def directed_set(
    configurations: Configurations,
    parameters: NetworkParameters,
    elements: tuple[int, ...],
    seed: int,
    device: torch.device = ON_CPU,
    batch_edges: int = BATCH_EDGES,
) -> DirectedSet:
    """Return the configurations ready to be moved, kept in memory where that is possible."""
    if parameters.has_fixed_descriptors and KeptDirections.fits(
        configurations, parameters, len(elements)
    ):
        return KeptDirections(configurations, parameters, elements, seed, device, batch_edges)
    return DrawnDirections(
        describe_configurations(configurations, parameters, elements, keep=False, device=device)
    )


def tangent_of(graph: Graph, directions: FloatArray) -> Tensor:
    """Return how the vectors change when the atoms move. Shape ``(N, K, 3)``.

    Parameters
    ----------
    graph
        The batch.
    directions
        How the atoms move. Shape ``(N, 3)``.
    """
    moves = torch.as_tensor(directions, device=graph.vectors.device)
    filled = graph.vectors.any(dim=-1, keepdim=True)
    return (moves[graph.partners] - moves[:, None]) * filled


def ask_along(
    ask: Callable[[IntArray], A], batches: Iterable[IntArray], forces: FloatArray, n_atoms: IntArray
) -> tuple[list[A], FloatArray]:
    """Ask about configurations, moved along new directions; return answers and true forces.

    Parameters
    ----------
    ask
        Moves the atoms of some configurations and says what comes of it.
    batches
        The configurations; a few at a time, for all of them at once take gigabytes with MACE.
    forces
        Of their labels, in eV/Å. Shape ``(1, N, 3)``.
    n_atoms
        Atoms of each of them.

    Returns
    -------
    tuple
        An answer for each part, and the forces along the directions, in eV/Å, shape ``(n,)``.
    """
    with torch.no_grad():
        answers = [ask(rows) for rows in batches]
    directions = np.concatenate([item.directions for item in answers])
    return answers, forces_along(forces, directions, n_atoms)[:, 0]


def forces_along(
    forces: NDArray[np.floating[Any]], directions: FloatArray, n_atoms: IntArray
) -> FloatArray:
    r"""Return :math:`\sum_i F_i \cdot d_i / \sqrt{3 N}` of each configuration, in eV/Å.

    Parameters
    ----------
    forces
        Of ``m`` sources, in eV/Å. Shape ``(m, N, 3)``.
    directions
        Shape ``(N, 3)``.
    n_atoms
        Atoms of each configuration. Shape ``(n,)``.

    Returns
    -------
    FloatArray
        Shape ``(n, m)``.
    """
    if not len(n_atoms):
        return np.zeros((0, len(forces)))
    work = np.einsum("mac,ac->am", forces, directions)
    starts = np.concatenate([[0], np.cumsum(n_atoms)[:-1]]).astype(np.int64)
    along: FloatArray = np.add.reduceat(work, starts, axis=0) / np.sqrt(3.0 * n_atoms)[:, None]
    return along


def _pool(features: Tensor, slopes: Tensor, n_atoms: IntArray, directions: FloatArray) -> Pooled:
    """Sum over atoms: heads are linear, so what they read of sums is the sum of what they read."""
    device = features.device
    counts = torch.as_tensor(n_atoms, device=device)
    owner = torch.as_tensor(np.repeat(np.arange(len(n_atoms)), n_atoms), device=device)
    graph = Owners(owner, counts)
    size = counts.to(features.dtype)[:, None]
    mean = sum_atoms(features, graph) / size
    return Pooled(mean, sum_atoms(slopes, graph) / torch.sqrt(3 * size), directions)


def _nothing(network: Network) -> Pooled:
    """Return what a share without configurations is: nothing, that no weight has a part in."""
    nothing = network.heads.weight.new_zeros(0, network.trunk.n_features)
    return Pooled(nothing, nothing, np.zeros((0, 3)))


def _read(network: Network, pooled: Pooled) -> Moved:
    heads = network.heads
    scale = heads.scale.to(pooled.mean.dtype)
    return Moved(
        energies=(pooled.mean @ heads.weight.T + heads.bias) * scale,
        along=-(pooled.change @ heads.weight.T) * scale,
        directions=pooled.directions,
    )
