r"""SchNet and SOAPNet as Shui et al. used them, on configurations of any periodicity.

The energy is a sum over atoms of what a head of two layers reads from 128 features. There are no
reference energies, and neither SchNet's filters nor its sum end smoothly at the cutoff: this is
the baseline as published (NeurIPS 2022, arXiv:2210.08047), not what one would build today.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations, ragged_rows
from aiida_eipnn.science.neighbour_list import NeighborList
from aiida_eipnn.science.nn.descriptor import Basis, Described, DescribedSet, descriptors_of
from aiida_eipnn.science.nn.graph import (
    Graph,
    GraphTable,
    Neighbours,
    find_neighbours,
    species_of,
)
from aiida_eipnn.science.nn.paper_parameters import LEGACY, SCHNET, SOAPNET, PaperParameters
from aiida_eipnn.science.nn.schnet import SchNetTrunk, SchNetVariant, shifted_softplus

WIDTH = 128
# Rows of SchNet's embedding: one for each atomic number.
N_SPECIES = 120
# The power spectrum of 8 radial functions up to degree 6 has 8 * 9 / 2 * 7 = 252 parts.
SOAP_RADIAL, SOAP_L_MAX, SOAP_LAYERS = 8, 6, 5
N_SOAP = SOAP_RADIAL * (SOAP_RADIAL + 1) // 2 * (SOAP_L_MAX + 1)


class PaperBatch(NamedTuple):
    """A batch of ``n`` configurations with ``N`` atoms, as ``M`` nodes.

    Parameters
    ----------
    graph
        Nodes and their neighbours. Derivatives are taken with respect to ``graph.vectors``.
    atoms
        Row, among the atoms of the batch, of the atom that a node is or copies. Shape ``(M,)``.
    contributes
        1 for an atom, 0 for a copy. Shape ``(M, 1)``.
    described
        The same nodes with their power spectrum, for SOAPNet.
    """

    graph: Graph
    atoms: Tensor
    contributes: Tensor
    described: Described | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PaperSet:
    """Configurations ready for the network, any batch at a time.

    Parameters
    ----------
    neighbours
        Neighbours of all nodes: of the atoms of a configuration, then of their copies, if any.
    n_atoms
        Atoms of each configuration. Shape ``(n,)``.
    images
        The atom of its configuration that each node is or copies. Shape ``(M,)``.
    described
        Power spectra, for SOAPNet.
    """

    neighbours: Neighbours
    n_atoms: IntArray
    images: IntArray
    described: DescribedSet | None

    def __len__(self) -> int:
        return len(self.n_atoms)

    def batch(self, rows: IntArray) -> PaperBatch:
        """Return the given configurations as one batch."""
        described = None if self.described is None else self.described.batch(rows)
        graph = GraphTable(self.neighbours).batch(rows) if described is None else described.graph
        offsets = self.neighbours.offsets
        n_nodes, n_atoms = np.diff(offsets)[rows], self.n_atoms[rows]
        place = np.arange(n_nodes.sum()) - np.repeat(np.cumsum(n_nodes) - n_nodes, n_nodes)
        first = np.repeat(np.cumsum(n_atoms) - n_atoms, n_nodes)
        return PaperBatch(
            graph=graph,
            atoms=torch.from_numpy(first + self.images[ragged_rows(offsets, rows)]),
            contributes=torch.from_numpy(place < np.repeat(n_atoms, n_nodes))[:, None],
            described=described,
        )


def paper_set(
    configurations: Configurations, parameters: PaperParameters, elements: Sequence[int]
) -> PaperSet:
    """Find the neighbours of all configurations, and for SOAPNet their power spectra.

    Raises
    ------
    ValueError
        If a configuration contains an element that is not among ``elements``.
    """
    if parameters.padding == LEGACY:
        neighbours, images = pad_with_images(configurations, elements, parameters.cutoff)
        return PaperSet(
            neighbours=_by_number(neighbours, elements),
            n_atoms=configurations.n_atoms,
            images=images,
            described=None,
        )
    neighbours = find_neighbours(configurations, elements, parameters.cutoff)
    described = None
    if parameters.network == SOAPNET:
        described = DescribedSet(neighbours, soap_basis(parameters.cutoff), parameters.dtype)
    else:
        neighbours = _by_number(neighbours, elements)
    n_atoms = configurations.n_atoms
    images = np.arange(n_atoms.sum()) - np.repeat(np.cumsum(n_atoms) - n_atoms, n_atoms)
    return PaperSet(neighbours=neighbours, n_atoms=n_atoms, images=images, described=described)


def _by_number(neighbours: Neighbours, elements: Sequence[int]) -> Neighbours:
    """Let species be atomic numbers, the rows of SchNet's embedding."""
    return replace(neighbours, species=np.array(elements)[neighbours.species])


def soap_basis(cutoff: float) -> Basis:
    """Return the functions behind the power spectrum of SOAPNet."""
    return Basis(cutoff=cutoff, n_radial=SOAP_RADIAL, l_max=SOAP_L_MAX, n_elements=1)


def pad_with_images(
    configurations: Configurations, elements: Sequence[int], cutoff: float
) -> tuple[Neighbours, IntArray]:
    """Return neighbours in which periodic images are nodes of their own, as published.

    Edges start at atoms and go both ways, so an image sees the atoms of the cell, but none of the
    other neighbours of the atom that it copies. Beyond one interaction this is wrong; it is here
    to show how much.

    Returns
    -------
    tuple
        Neighbours of the nodes, then the atom of its configuration that each node is or copies.
    """
    species = species_of(configurations, elements)
    finder = NeighborList(cutoff=cutoff, full_list=True)
    parts = [_pad(finder, configurations, row) for row in range(len(configurations))]
    images = np.concatenate([np.zeros(0, np.int64), *(part.images for part in parts)])
    counts = np.concatenate([np.zeros(0, np.int64), *(part.counts for part in parts)])
    n_nodes = np.array([len(part.images) for part in parts], dtype=np.int64)
    first = np.repeat(configurations.offsets[:-1], n_nodes)
    neighbours = Neighbours(
        species=species[first + images],
        offsets=np.concatenate([[0], np.cumsum(n_nodes)]).astype(np.int64),
        pair_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        partners=np.concatenate([np.zeros(0, np.int64), *(part.partners for part in parts)]),
        vectors=np.concatenate([np.zeros((0, 3)), *(part.vectors for part in parts)]),
        volumes=np.full(len(configurations), np.nan),
    )
    return neighbours, images


class _Padded(NamedTuple):
    """Nodes of one configuration: which atom each is, and its pairs as in ``Neighbours``."""

    images: IntArray
    counts: IntArray
    partners: IntArray
    vectors: FloatArray


def _pad(finder: NeighborList, configurations: Configurations, row: int) -> _Padded:
    atoms = configurations.atoms(row)
    first, second, shift, vector = finder.compute(
        points=atoms.positions,
        box=atoms.cell.complete().array,
        periodic=atoms.pbc,
        quantities="ijSD",
    )
    first, node = first.astype(np.int64), second.astype(np.int64)
    outside = shift.any(axis=1)
    copies, which = np.unique(
        np.column_stack([node[outside], shift[outside]]).astype(np.int64),
        axis=0,
        return_inverse=True,
    )
    node[outside] = len(atoms) + which.reshape(-1)
    # Pairs within the cell are there in both directions already.
    tail = np.concatenate([first, node[outside]])
    head = np.concatenate([node, first[outside]])
    vectors = np.concatenate([vector, -vector[outside]])
    order = np.lexsort((*vectors.T, head, tail))
    n_nodes = len(atoms) + len(copies)
    return _Padded(
        images=np.concatenate([np.arange(len(atoms)), copies[:, 0]]),
        counts=np.bincount(tail, minlength=n_nodes),
        partners=head[order],
        vectors=vectors[order],
    )


class _ShiftedSoftplus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Return the activation."""
        return shifted_softplus(x)


def published_schnet(parameters: PaperParameters) -> SchNetTrunk:
    r"""Return SchNet without residuals and without envelope, one row of its embedding an element.

    Distances are expanded in 128 Gaussians :math:`e^{-\gamma (r - \mu)^2}` with centres from 0 to
    the cutoff and :math:`\gamma = 128 / r_c`.
    """
    return SchNetTrunk(
        N_SPECIES,
        cutoff=parameters.cutoff,
        n_radial=WIDTH,
        width=WIDTH,
        depth=parameters.n_interactions,
        dtype=parameters.dtype,
        variant=SchNetVariant(
            residual=False, envelope=False, averaged=False, gamma=WIDTH / parameters.cutoff
        ),
    )


class SoapTrunk(nn.Module):
    """Five layers on the power spectrum, which is not standardised.

    The paper takes DScribe's SOAP with 8 radial functions and degrees up to 6; here it is our own
    power spectrum with as many, which has derivatives, and needs no periodic cell.
    """

    def __init__(self, parameters: PaperParameters) -> None:
        super().__init__()
        sizes = [N_SOAP, *[WIDTH] * SOAP_LAYERS]
        self.layers = nn.ModuleList(
            nn.Linear(a, b, dtype=parameters.dtype) for a, b in itertools.pairwise(sizes)
        )

    def forward(self, batch: PaperBatch) -> Tensor:
        """Return the features of atoms. Shape ``(M, 128)``."""
        assert batch.described is not None
        # The first ones are linear in the density, and no part of SOAP.
        x = descriptors_of(batch.described)[:, SOAP_RADIAL:]
        for layer in self.layers[:-1]:
            x = shifted_softplus(layer(x))
        result: Tensor = self.layers[-1](x)
        return result


class EnergyHead(nn.Module):
    """Total energies: two layers for each atom, then the sum over atoms."""

    def __init__(self, n_outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = _layers(WIDTH, n_outputs, dtype)

    def forward(self, features: Tensor, batch: PaperBatch) -> Tensor:
        """Return energies, in eV. Shape ``(n, n_outputs)``."""
        return _sum_nodes(self.layers(features) * batch.contributes, batch)


class ClassHead(nn.Module):
    """Logits of classes: the sum over nodes, copies included, then two layers."""

    def __init__(self, n_outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, dtype=dtype)
        self.layers = _layers(WIDTH, n_outputs, dtype)

    def forward(self, features: Tensor, batch: PaperBatch) -> Tensor:
        """Return logits. Shape ``(n, n_outputs)``."""
        logits: Tensor = self.layers(self.norm(_sum_nodes(features, batch)))
        return logits


class PaperNetwork(nn.Module):
    """A trunk with one head.

    Parameters
    ----------
    parameters
        Architecture.
    elements
        Atomic numbers that it knows, ascending.
    outputs
        What each output is: ``dft``, or the EIPs, or the EIPs and ``none``.
    classifies
        Whether the outputs are logits of classes of the configuration, not energies.
    seed
        Seed of the weights.

    Raises
    ------
    ValueError
        If SOAPNet is to know more than one element.
    """

    def __init__(
        self,
        parameters: PaperParameters,
        elements: Sequence[int],
        outputs: Sequence[str],
        *,
        classifies: bool = False,
        seed: int,
    ) -> None:
        super().__init__()
        if parameters.network == SOAPNET and len(elements) != 1:
            raise ValueError(
                f"{SOAPNET} is for one element, as published, not for {list(elements)}; "
                f"take {SCHNET}"
            )
        self.settings = parameters
        self.elements = tuple(elements)
        self.outputs = tuple(outputs)
        self.trunk = (
            SoapTrunk(parameters) if parameters.network == SOAPNET else published_schnet(parameters)
        )
        head = ClassHead if classifies else EnergyHead
        self.head = head(len(outputs), parameters.dtype)
        _initialise(self, torch.Generator().manual_seed(seed))

    @property
    def classifies(self) -> bool:
        """Whether the outputs are logits."""
        return isinstance(self.head, ClassHead)

    def forward(self, batch: PaperBatch) -> Tensor:
        """Return energies in eV, or logits. Shape ``(n, n_outputs)``."""
        outputs: Tensor = self.head(self.trunk(batch), batch)
        return outputs


def forces_of(energy: Tensor, batch: PaperBatch) -> Tensor:
    """Return forces, in eV/Å. Shape ``(N, 3)``.

    Parameters
    ----------
    energy
        One energy of each configuration, in eV; ``batch.graph.vectors`` require gradients.
        Shape ``(n,)``.
    batch
        The batch.
    """
    vectors = batch.graph.vectors
    (slope,) = torch.autograd.grad(energy.sum(), vectors)
    # A vector points from its node to the neighbour, so its slope pulls the node along. A copy
    # moves with its atom, so what pulls at it pulls at the atom.
    n_atoms = int(batch.contributes.sum())
    forces = torch.zeros(n_atoms, 3, dtype=slope.dtype).index_add(0, batch.atoms, slope.sum(dim=1))
    partners = batch.atoms[batch.graph.partners.flatten()]
    return forces.index_add(0, partners, -slope.reshape(-1, 3))


def with_vector_gradient(batch: PaperBatch) -> PaperBatch:
    """Return the batch with vectors that gradients are taken by."""
    graph = batch.graph._replace(vectors=batch.graph.vectors.clone().requires_grad_())
    described = None if batch.described is None else batch.described._replace(graph=graph)
    return batch._replace(graph=graph, described=described)


def _layers(n_inputs: int, n_outputs: int, dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_inputs, WIDTH, dtype=dtype),
        _ShiftedSoftplus(),
        nn.Linear(WIDTH, n_outputs, dtype=dtype),
    )


def _sum_nodes(values: Tensor, batch: PaperBatch) -> Tensor:
    graph = batch.graph
    total = torch.zeros(len(graph.n_atoms), values.shape[1], dtype=values.dtype)
    return total.index_add(0, graph.owner, values)


def _initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Draw weights as torch does by default, but from a generator of one's own."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, SchNetTrunk):
            nn.init.normal_(module.embedding, generator=generator)
