"""The network: a trunk that turns neighbourhoods into features, and heads that read them."""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.nn.descriptor import Basis, DescribedSet
from aiida_eipnn.science.nn.device import ON_CPU, located
from aiida_eipnn.science.nn.feature_uncertainty import FeatureUncertainty
from aiida_eipnn.science.nn.graph import Graph, GraphSet, find_neighbours
from aiida_eipnn.science.nn.heads import ClassifierHead, EnergyHeads, pool_features, sum_atoms
from aiida_eipnn.science.nn.power_spectrum import PowerSpectrumTrunk
from aiida_eipnn.science.nn.schnet import SchNetTrunk
from aiida_eipnn.science.nn.sizes import BATCH_EDGES
from aiida_eipnn.science.nn.trunk import B, Batch, BatchSet, Trunk, draw
from aiida_eipnn.science.settings import build

POWER_SPECTRUM, SCHNET, MACE = "power_spectrum", "schnet", "mace"
# What differs from the defaults of NetworkParameters, where a trunk has others.
DEFAULTS: Mapping[str, Mapping[str, int]] = {
    POWER_SPECTRUM: {},
    SCHNET: {"n_radial": 20, "l_max": 0, "width": 64, "depth": 3},
    MACE: {"n_radial": 8, "l_max": 3, "width": 32, "depth": 2},
}
# Trunks whose layers may compute in bfloat16.
REDUCIBLE = (POWER_SPECTRUM, SCHNET)
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}

# Spreads below this part of the root mean square of all spreads are noise.
_MIN_RELATIVE_SPREAD = 1e-3
# Configurations of a set that are looked at at once.
_BATCH = 32
_VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkParameters:
    """Architecture of a network.

    The defaults are those of ``power_spectrum``; :meth:`from_dict` knows those of each trunk.

    Parameters
    ----------
    trunk
        Name of the trunk: ``power_spectrum`` (fixed descriptors, then layers), ``schnet``
        (messages that depend on distances) or ``mace`` (equivariant messages; needs the extra
        ``mace``).
    cutoff
        Distance up to which an atom sees its neighbours, in Å.
    n_radial
        Number of radial functions: Bessel functions, Gaussians for ``schnet``.
    l_max
        Highest degree of the spherical harmonics; ``schnet`` has none.
    width
        Number of features of an atom; ``mace`` has as many in each layer.
    depth
        Number of layers; of interactions, for ``schnet`` and ``mace``.
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
        if self.trunk not in DEFAULTS:
            raise ValueError(f"there is no trunk {self.trunk!r}, only {sorted(DEFAULTS)}")
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
        """Build from plain values, what is missing being the default of the trunk.

        Raises
        ------
        ValueError
            If a key is unknown or a value cannot be used.
        """
        defaults = DEFAULTS.get(str(content.get("trunk", POWER_SPECTRUM)), {})
        return build(cls, {**defaults, **content}, "network")

    @property
    def has_fixed_descriptors(self) -> bool:
        """Whether all that is trained comes after descriptors of the geometry."""
        return self.trunk == POWER_SPECTRUM

    @property
    def has_reducible_layers(self) -> bool:
        """Whether layers may compute in bfloat16."""
        return self.trunk in REDUCIBLE

    @property
    def dtype(self) -> torch.dtype:
        """Precision as torch knows it."""
        return PRECISIONS[self.precision]

    def basis(self, n_elements: int) -> Basis:
        """Return the basis of the descriptors of ``power_spectrum``."""
        return Basis(
            cutoff=self.cutoff, n_radial=self.n_radial, l_max=self.l_max, n_elements=n_elements
        )


class Derivatives(NamedTuple):
    """Forces in eV/Å, shape ``(N, 3)``, and derivative by strain in eV, shape ``(n, 6)``.

    The latter is the stress times the volume, with ASE's sign and order.
    """

    forces: Tensor
    virial: Tensor


def build_trunk(parameters: NetworkParameters, n_elements: int) -> Trunk[Any]:
    """Return the trunk that the parameters name, with weights of no meaning.

    Raises
    ------
    ModuleNotFoundError
        If the package of the trunk is not installed.
    """
    size: dict[str, Any] = {
        "width": parameters.width,
        "depth": parameters.depth,
        "dtype": parameters.dtype,
    }
    if parameters.trunk == POWER_SPECTRUM:
        return PowerSpectrumTrunk(parameters.basis(n_elements), **size)
    size |= {"cutoff": parameters.cutoff, "n_radial": parameters.n_radial}
    if parameters.trunk == SCHNET:
        return SchNetTrunk(n_elements, **size)
    # A package of its own, which takes seconds to load.
    from aiida_eipnn.science.nn.mace import MaceTrunk

    return MaceTrunk(n_elements, l_max=parameters.l_max, **size)


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
    n_drawn
        Heads that are drawn about that of DFT once it is trained; ``None`` where the network says
        nothing of how unsure its features make it.
    """

    def __init__(
        self,
        parameters: NetworkParameters,
        elements: Sequence[int],
        heads: Sequence[str],
        classes: Sequence[str] = (),
        n_drawn: int | None = None,
    ) -> None:
        super().__init__()
        dtype = parameters.dtype
        self.settings = parameters
        self.elements = tuple(elements)
        self.trunk = build_trunk(parameters, len(elements))
        width = self.trunk.n_features
        self.heads = EnergyHeads(heads, width, len(elements), dtype)
        self.classifier = ClassifierHead(classes, width, dtype) if classes else None
        self.feature_uncertainty = (
            None if n_drawn is None else FeatureUncertainty(width, len(elements), n_drawn, dtype)
        )
        self.pooled_mean: Tensor
        self.pooled_spread: Tensor
        self.register_buffer("pooled_mean", torch.zeros(2 * width, dtype=dtype))
        self.register_buffer("pooled_spread", torch.ones(2 * width, dtype=dtype))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.pooled_mean.device

    def on(self, device: torch.device) -> Self:
        """Return the network on a device: itself where it is there, else a copy."""
        if self.device == located(device):
            return self
        with warnings.catch_warnings():
            # Parts of MACE are compiled with torch.jit, which copies them and warns of itself.
            warnings.simplefilter("ignore")
            return copy.deepcopy(self).to(device)

    @property
    def n_drawn(self) -> int:
        """Number of heads that were drawn about the one of DFT."""
        return 0 if self.feature_uncertainty is None else len(self.feature_uncertainty.heads)

    def initialise(self, seed: int) -> None:
        """Draw new weights for the trunk and the heads."""
        generator = torch.Generator().manual_seed(seed)
        self.trunk.initialise(generator)
        for head in (self.heads, self.classifier):
            if head is not None:
                # Small, so that training starts from the reference energies.
                draw(head.weight, 0.1 * self.trunk.n_features**-0.5, generator)

    def pooled(self, features: Tensor, graph: Graph) -> Tensor:
        """Return standardised mean and spread of features. Shape ``(n, 2 n_features)``."""
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
    device: torch.device = ON_CPU,
    batch_edges: int = BATCH_EDGES,
) -> BatchSet:
    """Return configurations as the trunk reads them.

    Parameters
    ----------
    configurations
        Any number of them.
    parameters
        Architecture of the network.
    elements
        Atomic numbers that it knows, ascending.
    keep
        Whether to compute beforehand what can be, for a set that is read again and again.
    device
        Where the network is.
    batch_edges
        Places for neighbours that are computed at once, at most.

    Raises
    ------
    ValueError
        If a configuration contains an element that is not among ``elements``.
    """
    neighbours = find_neighbours(configurations, elements, parameters.cutoff)
    if parameters.trunk != POWER_SPECTRUM:
        return GraphSet(neighbours, device)
    basis = parameters.basis(len(elements))
    return DescribedSet(
        neighbours, basis, parameters.dtype, keep=keep, device=device, batch_edges=batch_edges
    )


def with_gradient(batch: B) -> B:
    """Return the batch with vectors that gradients are taken by."""
    vectors = batch.graph.vectors.clone().requires_grad_()
    return batch._replace(graph=batch.graph._replace(vectors=vectors))


def derivatives(energy: Tensor, batch: Batch, *, trainable: bool) -> Derivatives:
    """Return forces and virial.

    Parameters
    ----------
    energy
        One energy of each configuration, in eV. Shape ``(n,)``.
    batch
        The batch, from :func:`with_gradient`.
    trainable
        Whether they will be differentiated by the weights.
    """
    graph = batch.graph
    (slope,) = torch.autograd.grad(
        energy.sum(), graph.vectors, create_graph=trainable, retain_graph=True
    )
    # A vector points from its atom to the neighbour, so its slope pulls the atom along.
    reaction = slope.new_zeros(len(graph.species), 3)
    reaction = reaction.index_add(0, graph.partners.flatten(), slope.reshape(-1, 3))
    strain = sum_atoms(torch.einsum("nka,nkb->nab", slope, graph.vectors.detach()), graph)
    symmetric = (strain + strain.transpose(1, 2)) / 2
    voigt = torch.stack([symmetric[:, a, b] for a, b in _VOIGT], dim=-1)
    return Derivatives(slope.sum(dim=1) - reaction, voigt)


def fit_pooling(network: Network, described: BatchSet, batch_edges: int = BATCH_EDGES) -> None:
    """Fit the standardisation of the pooled features on a set."""
    with torch.no_grad():
        pooled = torch.cat(
            [
                pool_features(network.trunk(batch), batch.graph)
                for batch in batches_of(described, batch_edges)
            ]
        )
    spread = pooled.std(dim=0, correction=0)
    floor = _MIN_RELATIVE_SPREAD * pooled.square().mean().sqrt() + 1e-12
    network.pooled_mean.copy_(pooled.mean(dim=0))
    network.pooled_spread.copy_(torch.clamp(spread, min=floor))


def batches_of(described: BatchSet, batch_edges: int = BATCH_EDGES) -> Iterator[Any]:
    """Yield all configurations in batches with so many places for neighbours at most, in order."""
    return map(described.batch, described.neighbours.sizes.batches(_BATCH, batch_edges))
