"""The network: a trunk that turns neighbourhoods into features, and heads that read them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.nn.descriptor import (
    Basis,
    Described,
    DescribedSet,
    change_of_descriptors,
    descriptors_of,
)
from aiida_eipnn.science.nn.graph import Graph, find_neighbours
from aiida_eipnn.science.nn.heads import ClassifierHead, EnergyHeads, pool_features, sum_atoms
from aiida_eipnn.science.settings import build

POWER_SPECTRUM = "power_spectrum"
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}

# Spreads below this part of the root mean square of all spreads are noise.
_MIN_RELATIVE_SPREAD = 1e-3
# Half-way between no scaling (0), which hides what varies little, and unit variance (1), which
# makes the wildest functions of the distance as important as the smoothest ones.
_SCALING_POWER = 0.5
_VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkParameters:
    """Architecture of a network.

    Parameters
    ----------
    trunk
        Name of the trunk: ``power_spectrum``.
    cutoff
        Distance up to which an atom sees its neighbours, in Å.
    n_radial
        Number of radial functions.
    l_max
        Highest degree of the spherical harmonics.
    width
        Number of features of an atom.
    depth
        Number of layers.
    precision
        ``float64`` or ``float32``; positions and total energies are always ``float64``.
    """

    trunk: str = POWER_SPECTRUM
    cutoff: float = 5.0
    n_radial: int = 8
    l_max: int = 4
    width: int = 128
    depth: int = 2
    precision: str = "float64"

    def __post_init__(self) -> None:
        if self.trunk != POWER_SPECTRUM:
            raise ValueError(f"there is no trunk {self.trunk!r}, only {POWER_SPECTRUM!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {sorted(PRECISIONS)}: {self.precision!r}")
        if not 0 < self.cutoff < math.inf:
            raise ValueError(f"the cutoff must be above 0 Å, not {self.cutoff}")
        for name, least in (("n_radial", 1), ("l_max", 0), ("width", 1), ("depth", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number from {least} on, not {value!r}")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build from plain values; ``ValueError`` names an unknown key."""
        return build(cls, content, "network")

    @property
    def has_fixed_descriptors(self) -> bool:
        """Whether all that is trained comes after descriptors of the geometry."""
        return self.trunk == POWER_SPECTRUM

    @property
    def dtype(self) -> torch.dtype:
        """Precision as torch knows it."""
        return PRECISIONS[self.precision]

    def basis(self, n_elements: int) -> Basis:
        """Return the basis of the descriptors."""
        return Basis(
            cutoff=self.cutoff, n_radial=self.n_radial, l_max=self.l_max, n_elements=n_elements
        )


class Trunk(Protocol):
    """What turns the neighbourhoods of atoms into features; differentiable by ``graph.vectors``."""

    def __call__(self, described: Described) -> Tensor:
        """Return the features of the atoms of a batch. Shape ``(N, width)``."""
        ...

    def parameters(self) -> Any:
        """Iterate over what is trained."""
        ...


class Derivatives(NamedTuple):
    """Forces in eV/Å, shape ``(N, 3)``, and derivative by strain in eV, shape ``(n, 6)``.

    The latter is the stress times the volume, with ASE's sign and order.
    """

    forces: Tensor
    virial: Tensor


class PowerSpectrumTrunk(nn.Module):
    """Standardised power spectrum, then layers that know the element of the central atom.

    Parameters
    ----------
    parameters
        Architecture.
    n_elements
        Number of elements.
    """

    def __init__(self, parameters: NetworkParameters, n_elements: int) -> None:
        super().__init__()
        dtype, width = parameters.dtype, parameters.width
        n_inputs = parameters.basis(n_elements).n_descriptors
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("mean", torch.zeros(n_inputs, dtype=dtype))
        self.register_buffer("spread", torch.ones(n_inputs, dtype=dtype))
        self.embedding = nn.Parameter(torch.zeros(n_elements, width, dtype=dtype))
        sizes = [n_inputs, *[width] * (parameters.depth - 1)]
        self.layers = nn.ModuleList(nn.Linear(size, width, dtype=dtype) for size in sizes)

    def forward(self, described: Described) -> Tensor:
        """Return the features of atoms. Shape ``(N, width)``."""
        x = (descriptors_of(described) - self.mean) / self.spread
        shift = self.embedding[described.graph.species]
        for layer in self.layers:
            x = nn.functional.silu(layer(x) + shift)
            # The element enters once, with the geometry.
            shift = torch.zeros((), dtype=x.dtype)
        return x

    def slopes(self, described: Described, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and their change when the vectors change by ``tangent``.

        Shapes ``(N, width)``; differentiable by the weights.
        """
        change = change_of_descriptors(tangent, described)
        return self.slopes_by_descriptors(described.descriptors, change, described.graph.species)

    def slopes_by_descriptors(
        self, descriptors: Tensor, change: Tensor, species: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the features and their change when the descriptors change by ``change``."""
        x, dx = (descriptors - self.mean) / self.spread, change / self.spread
        shift = self.embedding[species]
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            before = layer(x) + shift
            gate = torch.sigmoid(before)
            x = before * gate
            dx = (dx @ layer.weight.T) * (gate + x * (1 - gate))
            shift = torch.zeros((), dtype=x.dtype)
        return x, dx

    def standardise(self, descriptors: Tensor) -> None:
        """Let descriptors like these have mean 0 and spreads that differ less than they do."""
        spread = descriptors.std(dim=0, correction=0)
        typical = spread.square().mean().sqrt()
        self.mean.copy_(descriptors.mean(dim=0))
        if typical == 0:
            # A single atom, or equal ones, vary in nothing: leave the descriptors as they are.
            self.spread.fill_(1.0)
            return
        relative = torch.clamp(spread / typical, min=_MIN_RELATIVE_SPREAD)
        self.spread.copy_(typical * relative**_SCALING_POWER)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw new weights."""
        _draw(self.embedding, 0.5, generator)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            _draw(layer.weight, layer.in_features**-0.5, generator)
            nn.init.zeros_(layer.bias)


class Network(nn.Module):
    """One member of a committee.

    Parameters
    ----------
    parameters
        Architecture.
    elements
        Atomic numbers that it knows, ascending.
    heads
        Names of the energy heads.
    classes
        Names of the classes of the classifier; empty for none.
    """

    def __init__(
        self,
        parameters: NetworkParameters,
        elements: Sequence[int],
        heads: Sequence[str],
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        dtype, width = parameters.dtype, parameters.width
        self.settings = parameters
        self.elements = tuple(elements)
        self.trunk = PowerSpectrumTrunk(parameters, len(elements))
        self.heads = EnergyHeads(heads, width, len(elements), dtype)
        self.classifier = ClassifierHead(classes, width, dtype) if classes else None
        self.pooled_mean: Tensor
        self.pooled_spread: Tensor
        self.register_buffer("pooled_mean", torch.zeros(2 * width, dtype=dtype))
        self.register_buffer("pooled_spread", torch.ones(2 * width, dtype=dtype))

    def initialise(self, seed: int) -> None:
        """Draw new weights for the trunk and the heads."""
        generator = torch.Generator().manual_seed(seed)
        self.trunk.initialise(generator)
        for head in (self.heads, self.classifier):
            if head is not None:
                # Small, so that training starts from the reference energies.
                _draw(head.weight, 0.1 * self.settings.width**-0.5, generator)

    def pooled(self, features: Tensor, graph: Graph) -> Tensor:
        """Return standardised mean and spread of the features. Shape ``(n, 2 width)``."""
        return (pool_features(features, graph) - self.pooled_mean) / self.pooled_spread

    def energies(self, features: Tensor, graph: Graph) -> Tensor:
        """Return energies without reference, in eV. Shape ``(n, n_heads)``."""
        return sum_atoms(self.heads(features), graph)

    def logits(self, features: Tensor, graph: Graph) -> Tensor:
        """Return the logits of the classes. Shape ``(n, n_classes)``.

        Raises
        ------
        ValueError
            If the network has no classifier.
        """
        if self.classifier is None:
            raise ValueError("this network has no classifier of EIPs; train it in stage classify")
        logits: Tensor = self.classifier(self.pooled(features, graph))
        return logits


def describe_configurations(
    configurations: Configurations,
    parameters: NetworkParameters,
    elements: Sequence[int],
    *,
    keep: bool = True,
) -> DescribedSet:
    """Return the descriptors of all configurations; ``keep`` for a set that is read repeatedly.

    Raises
    ------
    ValueError
        If a configuration contains an element that is not among ``elements``.
    """
    neighbours = find_neighbours(configurations, elements, parameters.cutoff)
    basis = parameters.basis(len(elements))
    return DescribedSet(neighbours, basis, parameters.dtype, keep=keep)


def with_gradient(described: Described) -> Described:
    """Return the batch with vectors that gradients are taken by."""
    vectors = described.graph.vectors.clone().requires_grad_()
    return described._replace(graph=described.graph._replace(vectors=vectors))


def derivatives(energy: Tensor, described: Described, *, trainable: bool) -> Derivatives:
    """Return forces and virial.

    Parameters
    ----------
    energy
        One energy of each configuration, in eV. Shape ``(n,)``.
    described
        The batch, from :func:`with_gradient`.
    trainable
        Whether they will be differentiated by the weights.
    """
    graph = described.graph
    (slope,) = torch.autograd.grad(
        energy.sum(), graph.vectors, create_graph=trainable, retain_graph=True
    )
    # A vector points from its atom to the neighbour, so its slope pulls the atom along.
    reaction = torch.zeros(len(graph.species), 3, dtype=slope.dtype)
    reaction = reaction.index_add(0, graph.partners.flatten(), slope.reshape(-1, 3))
    strain = sum_atoms(torch.einsum("nka,nkb->nab", slope, graph.vectors.detach()), graph)
    symmetric = (strain + strain.transpose(1, 2)) / 2
    voigt = torch.stack([symmetric[:, a, b] for a, b in _VOIGT], dim=-1)
    return Derivatives(slope.sum(dim=1) - reaction, voigt)


def fit_standardisation(trunk: PowerSpectrumTrunk, described: DescribedSet) -> None:
    """Fit the standardisation of the descriptors on a set."""
    with torch.no_grad():
        trunk.standardise(torch.cat([batch.descriptors for batch in batches_of(described)]))


def fit_pooling(network: Network, described: DescribedSet) -> None:
    """Fit the standardisation of the pooled features on a set."""
    with torch.no_grad():
        pooled = torch.cat(
            [pool_features(network.trunk(batch), batch.graph) for batch in batches_of(described)]
        )
    spread = pooled.std(dim=0, correction=0)
    floor = _MIN_RELATIVE_SPREAD * pooled.square().mean().sqrt() + 1e-12
    network.pooled_mean.copy_(pooled.mean(dim=0))
    network.pooled_spread.copy_(torch.clamp(spread, min=floor))


def batches_of(described: DescribedSet, batch_size: int = 32) -> Iterator[Described]:
    """Yield all configurations in batches, in order."""
    for start in range(0, len(described), batch_size):
        yield described.batch(np.arange(start, min(start + batch_size, len(described))))


def _draw(weight: Tensor, spread: float, generator: torch.Generator) -> None:
    # Drawn in double precision, so that both precisions start from the same weights.
    drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        weight.copy_(spread * drawn)
