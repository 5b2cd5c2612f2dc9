r"""SchNet: continuous-filter convolutions [1]_ on a periodic graph.

In each interaction an atom collects what its neighbours say, filtered by the distance,

.. math::

    x_i \leftarrow x_i + o\Big(\frac{1}{\nu} \sum_j n(x_j) \circ W(r_{ij})\, f(r_{ij})\Big),

where :math:`n` is a linear layer, :math:`W` and :math:`o` are two layers with shifted softplus,
:math:`\nu` is the mean number of neighbours and :math:`f` is zero at the cutoff together with its
first two derivatives. Neighbours are the atoms themselves, reached by the vector to their image,
so that energies are extensive at any depth.

Plain torch, because the SchNet of graph-pes needs pytorch-lightning and e3nn and is slower.

References
----------
.. [1] Schütt et al., SchNet, arXiv:1706.08566.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aiida_eipnn.science.nn.descriptor import envelope, envelope_slope
from aiida_eipnn.science.nn.graph import Graph, GraphBatch
from aiida_eipnn.science.nn.trunk import BatchSet, Trunk, draw, mean_neighbours

_LN_2 = math.log(2.0)
# Sum of the squares of all Gaussians at any distance, where they overlap as they do by default.
_GAUSSIANS_AT_ONCE = math.sqrt(math.pi)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchNetVariant:
    r"""Where published networks of this name differ.

    That of Shui et al. (arXiv:2210.08047) has ``residual``, ``envelope`` and ``averaged`` off and
    ``gamma`` 128 over the cutoff, in a trunk of 120 elements, 128 Gaussians, width 128, depth 5.

    Parameters
    ----------
    residual
        Whether an interaction adds to the features; if not, it replaces them.
    envelope
        Whether filters go to zero at the cutoff; if not, energies jump there.
    averaged
        Whether sums over neighbours are divided by their mean number in the data.
    gamma
        Sharpness of the Gaussians :math:`e^{-\gamma (r - \mu)^2}`, in 1/Å². ``None``: so that
        one standard deviation is the distance of two centres.
    """

    residual: bool = True
    envelope: bool = True
    averaged: bool = True
    gamma: float | None = None


class Moving(NamedTuple):
    """A tensor, and how it changes along the direction that is asked for, if one is.

    Written out, because torch's forward mode takes 1.5 times as long here.
    """

    value: Tensor
    change: Tensor | None = None


class Bonds(NamedTuple):
    """The ``E`` pairs of a batch, each in one direction only, since filters have none.

    Parameters
    ----------
    first, second
        Rows of the two atoms. Shape ``(E,)`` each.
    gaussians
        Shape ``(E, n_radial)``.
    envelope
        ``None`` where filters have none. Shape ``(E, 1)``.
    """

    first: Tensor
    second: Tensor
    gaussians: Moving
    envelope: Moving | None


class SchNetTrunk(Trunk[GraphBatch]):
    """Embedding of the elements, then interactions.

    Parameters
    ----------
    n_elements
        Number of elements: rows of the embedding.
    cutoff
        Distance up to which an atom sees its neighbours, in Å.
    n_radial
        Number of Gaussians, with centres from 0 to the cutoff.
    width
        Number of features of an atom, and width of the filters.
    depth
        Number of interactions.
    dtype
        Precision of the weights.
    variant
        What else may differ.
    """

    def __init__(
        self,
        n_elements: int,
        *,
        cutoff: float,
        n_radial: int,
        width: int,
        depth: int,
        dtype: torch.dtype,
        variant: SchNetVariant | None = None,
    ) -> None:
        super().__init__(width)
        self.variant = variant or SchNetVariant()
        self.cutoff = cutoff
        self.embedding = nn.Parameter(torch.zeros(n_elements, width, dtype=dtype))
        self.interactions = nn.ModuleList(Interaction(n_radial, width, dtype) for _ in range(depth))
        spacing = cutoff / max(1, n_radial - 1)
        self.gamma = self.variant.gamma or 0.5 / spacing**2
        self.centres: Tensor
        self.n_neighbours: Tensor
        # Follows from the settings, so it is not among the weights.
        self.register_buffer(
            "centres", torch.linspace(0, cutoff, n_radial, dtype=dtype), persistent=False
        )
        self.register_buffer("n_neighbours", torch.ones((), dtype=dtype))

    def forward(self, batch: GraphBatch) -> Tensor:
        """Return the features of atoms. Shape ``(N, width)``."""
        return self._features(batch.graph, None).value

    def slopes(self, batch: GraphBatch, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and their change."""
        value, change = self._features(batch.graph, tangent)
        return value, torch.zeros_like(value) if change is None else change

    def standardise(self, described: BatchSet) -> None:
        """Fit the mean number of neighbours."""
        if self.variant.averaged:
            self.n_neighbours.fill_(mean_neighbours(described.neighbours))

    def initialise(self, generator: torch.Generator) -> None:
        """Draw new weights."""
        draw(self.embedding, 1.0, generator)
        for interaction in self.interactions:
            for name, layer in interaction.named_children():
                assert isinstance(layer, nn.Linear)
                n_inputs = _GAUSSIANS_AT_ONCE if name == "filter_in" else layer.in_features
                # The activation halves what is small; only these two see what is not activated.
                gain = 1.0 if name in ("filter_in", "node") else 2.0
                draw(layer.weight, gain * n_inputs**-0.5, generator)
                nn.init.zeros_(layer.bias)

    def _features(self, graph: Graph, tangent: Tensor | None) -> Moving:
        bonds = self._bonds(graph, tangent)
        # Selected, not indexed: on a CPU its gradient is the same however many threads sum it.
        x = Moving(self.embedding.index_select(0, graph.species))
        with self.reduced():
            for interaction in self.interactions:
                update = interaction(x, bonds, 1 / self.n_neighbours)
                x = _plus(x, update) if self.variant.residual else update
        return _map(lambda rows: rows.to(self.centres.dtype), x)

    def _bonds(self, graph: Graph, tangent: Tensor | None) -> Bonds:
        place = torch.nonzero(_one_of_two(graph).flatten())[:, 0]
        r = self._distances(graph, tangent, place)
        return Bonds(
            first=torch.div(place, graph.partners.shape[1], rounding_mode="floor"),
            second=graph.partners.flatten()[place],
            gaussians=self._gaussians(r),
            envelope=self._envelope(r) if self.variant.envelope else None,
        )

    def _distances(self, graph: Graph, tangent: Tensor | None, place: Tensor) -> Moving:
        """Return the length of the vectors in the given places. Shape ``(E, 1)``."""
        dtype = self.centres.dtype
        vectors = graph.vectors.reshape(-1, 3).index_select(0, place)
        r = vectors.norm(dim=-1, keepdim=True)
        if tangent is None:
            return Moving(r.to(dtype))
        along = (vectors * tangent.reshape(-1, 3).index_select(0, place)).sum(dim=-1, keepdim=True)
        return Moving(r.to(dtype), (along / r).to(dtype))

    def _gaussians(self, r: Moving) -> Moving:
        off = r.value - self.centres
        value = torch.exp(-self.gamma * off**2)
        if r.change is None:
            return Moving(value)
        return Moving(value, -2 * self.gamma * off * value * r.change)

    def _envelope(self, r: Moving) -> Moving:
        x = r.value / self.cutoff
        if r.change is None:
            return Moving(envelope(x))
        return Moving(envelope(x), envelope_slope(x) * r.change / self.cutoff)


class Interaction(nn.Module):
    """One continuous-filter convolution."""

    def __init__(self, n_radial: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.filter_in = nn.Linear(n_radial, width, dtype=dtype)
        self.filter_out = nn.Linear(width, width, dtype=dtype)
        self.node = nn.Linear(width, width, dtype=dtype)
        self.update_in = nn.Linear(width, width, dtype=dtype)
        self.update_out = nn.Linear(width, width, dtype=dtype)

    def forward(self, x: Moving, bonds: Bonds, scale: Tensor) -> Moving:
        """Return what each atom learns from its neighbours. Shape ``(N, width)``."""
        filters = _activate(_linear(self.filter_in, bonds.gaussians))
        filters = _activate(_linear(self.filter_out, filters))
        if bonds.envelope is not None:
            filters = _times(filters, bonds.envelope)
        said = _linear(self.node, x)
        collected = _plus(
            _collect(said, filters, bonds.first, bonds.second),
            _collect(said, filters, bonds.second, bonds.first),
        )
        scaled = _map(lambda rows: rows * scale, collected)
        return _linear(self.update_out, _activate(_linear(self.update_in, scaled)))


def shifted_softplus(x: Tensor) -> Tensor:
    """Return ln(1 + exp(x)) - ln 2, which is 0 at 0."""
    return nn.functional.softplus(x) - _LN_2


def _map(function: Callable[[Tensor], Tensor], x: Moving) -> Moving:
    """Apply a linear function."""
    return Moving(function(x.value), None if x.change is None else function(x.change))


def _linear(layer: nn.Linear, x: Moving) -> Moving:
    change = None if x.change is None else nn.functional.linear(x.change, layer.weight)
    return Moving(layer(x.value), change)


def _activate(x: Moving) -> Moving:
    change = None if x.change is None else torch.sigmoid(x.value) * x.change
    return Moving(shifted_softplus(x.value), change)


def _plus(x: Moving, y: Moving) -> Moving:
    return Moving(x.value + y.value, _sum(x.change, y.change))


def _times(x: Moving, y: Moving) -> Moving:
    return Moving(
        x.value * y.value,
        _sum(
            None if x.change is None else x.change * y.value,
            None if y.change is None else x.value * y.change,
        ),
    )


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Add what is there."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _collect(said: Moving, filters: Moving, to: Tensor, of: Tensor) -> Moving:
    """Sum over the neighbours ``of`` each atom ``to``. Shape ``(N, width)``."""
    # Sums of many, here and in the gradient, are not rounded further than their parts.
    dtype = torch.promote_types(said.value.dtype, torch.float32)
    said = _map(lambda rows: rows.to(dtype), said)
    messages = _times(_map(lambda rows: rows.index_select(0, of), said), filters)
    zeros = torch.zeros_like(said.value)
    return _map(lambda rows: zeros.index_add(0, to, rows), messages)


def _one_of_two(graph: Graph) -> Tensor:
    """Mark one direction of each pair. Shape ``(N, K)``."""
    x, y, z = graph.vectors.detach().unbind(dim=-1)
    # An atom and its own image: the two vectors are opposite, so one of them is positive.
    positive = (x > 0) | ((x == 0) & ((y > 0) | ((y == 0) & (z > 0))))
    filled = (x != 0) | (y != 0) | (z != 0)
    atom = torch.arange(len(graph.partners), device=graph.partners.device)[:, None]
    return filled & ((graph.partners > atom) | ((graph.partners == atom) & positive))
