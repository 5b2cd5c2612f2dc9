r"""Power spectrum of the neighbour density, with its derivatives.

The density around an atom is expanded in radial functions and real spherical harmonics,

.. math:: A_{clm} = \sum_j w_c(Z_j)\, R_c(r_j)\, Y_{lm}(\hat r_j),

where a channel :math:`c` is a pair of a radial function and a weight of the neighbour's element.
Descriptors are :math:`A_{c00}` and :math:`p_{cc'l} = \sum_m A_{clm} A_{c'lm}` for
:math:`c \le c'`: they do not change under rotation, and under permutation of equal atoms.

Nothing here is trained. Everything that depends on the geometry alone is computed once for a set
of configurations (:func:`describe`); the derivative of a descriptor with respect to the positions
is then a fixed linear map, of which autograd gets both directions (:class:`_Descriptors`), so that
training on forces differentiates nothing but the network behind.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aiida_eipnn.science.arrays import IntArray
from aiida_eipnn.science.configurations import ragged_rows
from aiida_eipnn.science.nn.device import ON_CPU
from aiida_eipnn.science.nn.graph import Graph, GraphTable, Neighbours
from aiida_eipnn.science.nn.sizes import BATCH_EDGES

# Elements up to which each one has weights of its own; more are mixed into as many channels.
MAX_ELEMENT_CHANNELS = 4
# A set whose kept arrays are larger than this, in bytes, is described batch by batch.
MAX_KEPT_BYTES = 1_000_000_000
# Configurations that are described at once.
_CHUNK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """Functions that the neighbour density is expanded in.

    Parameters
    ----------
    cutoff
        Distance at which a neighbour ceases to count, in Å.
    n_radial
        Number of radial functions.
    l_max
        Highest degree of the spherical harmonics.
    n_elements
        Number of elements.
    """

    cutoff: float
    n_radial: int
    l_max: int
    n_elements: int

    @property
    def n_channels(self) -> int:
        """Number of radial functions times weights of elements."""
        return self.n_radial * min(self.n_elements, MAX_ELEMENT_CHANNELS)

    @property
    def n_harmonics(self) -> int:
        """Number of spherical harmonics."""
        return (self.l_max + 1) ** 2

    @property
    def n_descriptors(self) -> int:
        """Number of descriptors of an atom."""
        return self.n_channels + (self.l_max + 1) * self.n_channels * (self.n_channels + 1) // 2

    @property
    def widths(self) -> list[int]:
        """Columns of the parts of :attr:`Kept.pairs`."""
        return [self.n_channels, self.n_channels, self.n_harmonics, 3 * self.n_harmonics, 3]


class Kept(NamedTuple):
    """What is kept of the geometry of ``N`` atoms with ``E`` pairs.

    Parameters
    ----------
    pairs
        For each pair side by side: radial functions, their slopes, harmonics, their slopes, the
        unit vector. The last row is zero, for empty places. Shape ``(E + 1, width)``.
    density
        Shape ``(N, n_channels, n_harmonics)``.
    descriptors
        Shape ``(N, n_descriptors)``.
    """

    pairs: Tensor
    density: Tensor
    descriptors: Tensor


class Described(NamedTuple):
    """A batch with its descriptors and with what their derivatives need.

    Parameters
    ----------
    graph
        The batch. Derivatives are taken with respect to ``graph.vectors``.
    basis
        What the density was expanded in.
    pairs
        Rows of :attr:`Kept.pairs` by atom and place. Shape ``(N, K, width)``.
    density
        Shape ``(N, n_channels, n_harmonics)``.
    descriptors
        Shape ``(N, n_descriptors)``.
    """

    graph: Graph
    basis: Basis
    pairs: Tensor
    density: Tensor
    descriptors: Tensor


class DescribedSet:
    """Configurations ready for the network, any batch at a time.

    Parameters
    ----------
    neighbours
        Neighbours of all atoms.
    basis
        What to expand the density in.
    dtype
        Precision of all that is kept.
    keep
        Whether to compute everything now, for a set that is read again and again, and not too
        large for that.
    device
        Where everything that is kept, and every batch, is.
    batch_edges
        Places for neighbours that are described at once, at most.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        basis: Basis,
        dtype: torch.dtype,
        *,
        keep: bool = True,
        device: torch.device = ON_CPU,
        batch_edges: int = BATCH_EDGES,
    ) -> None:
        self.neighbours = neighbours
        self.device = device
        self._table = GraphTable(neighbours, device)
        self.basis = basis
        self.dtype = dtype
        self._batch_edges = batch_edges
        small = 0 < self._bytes() <= MAX_KEPT_BYTES
        self._kept = self._keep() if keep and small else None

    def __len__(self) -> int:
        return len(self.neighbours)

    def batch(self, rows: IntArray) -> Described:
        """Return the given configurations as one batch."""
        graph = self._table.batch(rows)
        if self._kept is None:
            return describe(graph, self.basis, self.dtype)
        atoms = torch.as_tensor(ragged_rows(self.neighbours.offsets, rows), device=self.device)
        pairs = self._kept.pairs[graph.pairs.flatten()]
        return Described(
            graph=graph,
            basis=self.basis,
            pairs=pairs.reshape(*graph.pairs.shape, -1),
            density=self._kept.density[atoms],
            descriptors=self._kept.descriptors[atoms],
        )

    def descriptors(self) -> Tensor:
        """Return the descriptors of all atoms. Shape ``(N, n_descriptors)``."""
        if self._kept is not None:
            return self._kept.descriptors
        parts = [self.batch(rows).descriptors for rows in self._chunks()]
        none = torch.zeros(0, self.basis.n_descriptors, dtype=self.dtype, device=self.device)
        return torch.cat([none, *parts])

    def _chunks(self) -> list[IntArray]:
        return self.neighbours.sizes.batches(_CHUNK, self._batch_edges)

    def _bytes(self) -> int:
        n_pairs, n_atoms = len(self.neighbours.partners), len(self.neighbours.species)
        basis = self.basis
        per_atom = basis.n_channels * basis.n_harmonics + basis.n_descriptors
        return 8 * (n_pairs * sum(basis.widths) + n_atoms * per_atom)

    def _keep(self) -> Kept:
        n_pairs = len(self.neighbours.partners)
        shape = (n_pairs + 1, sum(self.basis.widths))
        pairs = torch.zeros(shape, dtype=self.dtype, device=self.device)
        density, descriptors = [], []
        for rows in self._chunks():
            graph = self._table.batch(rows)
            part = describe(graph, self.basis, self.dtype)
            filled = graph.pairs < n_pairs
            pairs[graph.pairs[filled]] = part.pairs[filled]
            density.append(part.density)
            descriptors.append(part.descriptors)
        return Kept(pairs, torch.cat(density), torch.cat(descriptors))


def describe(graph: Graph, basis: Basis, dtype: torch.dtype) -> Described:
    """Compute the descriptors of a batch, and what their derivatives need."""
    vectors = graph.vectors
    distance = vectors.norm(dim=-1)
    # An empty place has distance 0: any other number there keeps the division harmless.
    filled = distance > 0
    unit = vectors / torch.where(filled, distance, 1.0)[..., None]
    safe = torch.where(filled, distance, basis.cutoff)
    radial, slope = radial_functions(safe, basis.cutoff, basis.n_radial)
    by_element = element_weights(basis.n_elements).to(vectors.device)
    weights = by_element[graph.species[graph.partners]] * filled[..., None]
    harmonics, slopes = spherical_harmonics(unit, safe, basis.l_max)
    parts = (
        (radial[..., :, None] * weights[..., None, :]).flatten(-2),
        (slope[..., :, None] * weights[..., None, :]).flatten(-2),
        harmonics,
        slopes.flatten(-2),
        unit,
    )
    pairs = torch.cat(parts, dim=-1) * filled[..., None]
    density = parts[0].transpose(1, 2) @ harmonics
    descriptors = torch.cat([density[..., 0], _power_spectrum(density, density, basis) / 2], dim=-1)
    return Described(graph, basis, pairs.to(dtype), density.to(dtype), descriptors.to(dtype))


def descriptors_of(described: Described) -> Tensor:
    """Return the descriptors as a differentiable function of ``graph.vectors``."""
    result: Tensor = _Descriptors.apply(described.graph.vectors, described)  # type: ignore[no-untyped-call]
    return result


def descriptor_tangent(tangent: Tensor, described: Described) -> Tensor:
    """Return how the descriptors change when ``graph.vectors`` change by ``tangent``."""
    basis, tangent = described.basis, tangent.to(described.pairs.dtype)
    radial, slope, harmonics, slopes, unit = torch.split(described.pairs, basis.widths, dim=-1)
    stretch = slope * (unit * tangent).sum(dim=-1, keepdim=True)
    turn = (_by_direction(slopes) * tangent[..., None]).sum(dim=-2)
    moved = stretch.transpose(1, 2) @ harmonics + radial.transpose(1, 2) @ turn
    pairs = _power_spectrum(moved, described.density, basis)
    return torch.cat([moved[..., 0], pairs], dim=-1)


def radial_functions(r: Tensor, cutoff: float, n_radial: int) -> tuple[Tensor, Tensor]:
    r"""Return radial functions of the distance and their slopes.

    :math:`R_n(r) = \sqrt{2 / r_c}\, \sin(n \pi r / r_c) / r \cdot f(r / r_c)`, with an envelope
    :math:`f` that is zero at the cutoff together with its first two derivatives [1]_.

    Parameters
    ----------
    r
        Distances, in Å, above zero. Any shape ``s``.
    cutoff
        In Å.
    n_radial
        Number of functions.

    Returns
    -------
    tuple
        Values and derivatives with respect to ``r``. Shape ``(*s, n_radial)`` each.

    References
    ----------
    .. [1] Gasteiger, Groß, Günnemann, Directional message passing, arXiv:2003.03123.
    """
    k = math.pi / cutoff * torch.arange(1, n_radial + 1, dtype=r.dtype, device=r.device)
    x = r[..., None]
    bessel = math.sqrt(2 / cutoff) * torch.sin(k * x) / x
    bessel_slope = (math.sqrt(2 / cutoff) * k * torch.cos(k * x) - bessel) / x
    y = x / cutoff
    smooth, smooth_slope = envelope(y), envelope_slope(y)
    inside = (x < cutoff).to(r.dtype)
    value = bessel * smooth * inside
    return value, inside * (bessel_slope * smooth + bessel * smooth_slope / cutoff)


def envelope(x: Tensor) -> Tensor:
    """Return 1 - 28 x^6 + 48 x^7 - 21 x^8: 1 at 0, and 0 at 1 with two derivatives."""
    return 1 - x**6 * (28 - 48 * x + 21 * x**2)


def envelope_slope(x: Tensor) -> Tensor:
    """Return the derivative of :func:`envelope`."""
    return -168 * x**5 * (1 - x) ** 2


def spherical_harmonics(unit: Tensor, r: Tensor, l_max: int) -> tuple[Tensor, Tensor]:
    r"""Return real spherical harmonics and their gradients with respect to the vector.

    Ordered by degree, then by order from ``-l`` to ``l``; normalised to
    :math:`\sum_m Y_{lm}(u) Y_{lm}(v) = P_l(u \cdot v)`.

    Parameters
    ----------
    unit
        Unit vectors. Shape ``(*s, 3)``.
    r
        Lengths of the vectors, in Å. Shape ``s``.
    l_max
        Highest degree.

    Returns
    -------
    tuple
        Values of shape ``(*s, (l_max + 1)**2)``, gradients in 1/Å of shape
        ``(*s, 3, (l_max + 1)**2)``.
    """
    legendre = _legendre(unit[..., 2], l_max)
    cosine, sine = _azimuth(unit[..., 0], unit[..., 1], l_max)
    values, gradients = [], []
    for degree in range(l_max + 1):
        for order in range(-degree, degree + 1):
            m = abs(order)
            scale = math.sqrt(
                (2.0 if m else 1.0) * math.factorial(degree - m) / math.factorial(degree + m)
            )
            wave = cosine if order >= 0 else sine
            q, dq = scale * legendre[degree][m], scale * legendre[degree][m + 1]
            values.append(q * wave[m])
            gradients.append(_gradient(q, dq, cosine, sine, order))
    value, gradient = torch.stack(values, dim=-1), torch.stack(gradients, dim=-1)
    # A polynomial in x, y, z equals a harmonic only on the sphere: keep the part along it.
    radial = (unit[..., None] * gradient).sum(dim=-2, keepdim=True)
    return value, (gradient - unit[..., None] * radial) / r[..., None, None]


def element_weights(n_elements: int) -> Tensor:
    """Return the weight of each element in each channel. Shape ``(n_elements, n_channels)``.

    Each element has a channel of its own up to ``MAX_ELEMENT_CHANNELS``; more are mixed by a fixed
    random matrix.
    """
    if n_elements <= MAX_ELEMENT_CHANNELS:
        return torch.eye(n_elements, dtype=torch.float64)
    # Part of the definition of the descriptor, hence a constant seed.
    mixed = np.random.default_rng(0).normal(size=(n_elements, MAX_ELEMENT_CHANNELS))
    return torch.from_numpy(mixed / np.linalg.norm(mixed, axis=1, keepdims=True))


class _Descriptors(torch.autograd.Function):
    """Descriptors as a function of the vectors between neighbours."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, described: Described) -> Tensor:
        ctx.described = described
        return described.descriptors.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient: Tensor = _VectorGradient.apply(gradients[0], ctx.described)  # type: ignore[no-untyped-call]
        return gradient, None


class _VectorGradient(torch.autograd.Function):
    """From the gradient by descriptors to the gradient by vectors: linear, with its transpose.

    The dependence of this map on the vectors is left out: it would be needed for second
    derivatives with respect to positions only.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, described: Described) -> Tensor:
        ctx.described = described
        return _vector_gradient(gradient, described)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Tensor, None]:
        return descriptor_tangent(tangents[0], ctx.described), None


def _vector_gradient(gradient: Tensor, described: Described) -> Tensor:
    """Return the gradient by ``vectors``, given that by the descriptors."""
    basis = described.basis
    radial, slope, harmonics, slopes, unit = torch.split(described.pairs, basis.widths, dim=-1)
    by_density = _density_gradient(gradient, described.density, basis)
    by_harmonics = radial @ by_density
    along = ((slope @ by_density) * harmonics).sum(dim=-1, keepdim=True)
    across = (by_harmonics[..., None, :] * _by_direction(slopes)).sum(dim=-1)
    gradient_by_vectors: Tensor = along * unit + across
    return gradient_by_vectors.to(described.graph.vectors.dtype)


def _power_spectrum(a: Tensor, b: Tensor, basis: Basis) -> Tensor:
    r"""Return :math:`\sum_m a_{clm} b_{c'lm} + b_{clm} a_{c'lm}` for :math:`c \le c'`."""
    upper = _upper(basis.n_channels, a.device)
    parts = []
    for degree in range(basis.l_max + 1):
        part = slice(degree**2, (degree + 1) ** 2)
        product = a[..., part] @ b[..., part].transpose(1, 2)
        parts.append((product + product.transpose(1, 2)).flatten(1)[:, upper])
    return torch.cat(parts, dim=-1)


def _density_gradient(gradient: Tensor, density: Tensor, basis: Basis) -> Tensor:
    """Return the gradient by the density, given that by the descriptors."""
    n = basis.n_channels
    linear, pairs = gradient[:, :n], gradient[:, n:].reshape(len(gradient), basis.l_max + 1, -1)
    # p_cc is quadratic in A_c, so it counts twice.
    twice = 1 + torch.eye(n, dtype=gradient.dtype, device=gradient.device)
    place = _place_of_pair(n, gradient.device)
    matrices = pairs[:, :, place].reshape(len(gradient), basis.l_max + 1, n, n) * twice
    parts = [
        matrices[:, degree] @ density[..., degree**2 : (degree + 1) ** 2]
        for degree in range(basis.l_max + 1)
    ]
    parts[0] = parts[0] + linear[..., None]
    return torch.cat(parts, dim=-1)


@functools.cache
def _upper(n: int, device: torch.device) -> Tensor:
    """Return where the upper triangle is in a flat ``n`` by ``n`` matrix."""
    c, d = torch.triu_indices(n, n, device=device)
    place: Tensor = c * n + d
    return place


@functools.cache
def _place_of_pair(n: int, device: torch.device) -> Tensor:
    """Return where each entry of a flat symmetric matrix is in its upper triangle."""
    c, d = torch.triu_indices(n, n, device=device)
    place = torch.zeros(n, n, dtype=torch.int64, device=device)
    place[c, d] = place[d, c] = torch.arange(len(c), device=device)
    return place.flatten()


def _by_direction(slopes: Tensor) -> Tensor:
    """Return slopes of shape ``(N, K, 3, n_harmonics)``."""
    return slopes.reshape(*slopes.shape[:2], 3, -1)


def _legendre(z: Tensor, l_max: int) -> list[list[Tensor]]:
    r"""Return :math:`d^m P_l / dz^m` as ``[l][m]`` for ``m`` up to ``l + 1``."""
    table = [[torch.zeros_like(z)] * (l_max + 2) for _ in range(l_max + 1)]
    for m in range(l_max + 1):
        table[m][m] = torch.full_like(z, float(math.prod(range(1, 2 * m, 2))))
        for degree in range(m + 1, l_max + 1):
            below = table[degree - 2][m] if degree >= m + 2 else torch.zeros_like(z)
            table[degree][m] = (
                (2 * degree - 1) * z * table[degree - 1][m] - (degree + m - 1) * below
            ) / (degree - m)
    return table


def _azimuth(x: Tensor, y: Tensor, l_max: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return real and imaginary part of ``(x + iy)**m`` for ``m`` up to ``l_max``."""
    cosine, sine = [torch.ones_like(x)], [torch.zeros_like(x)]
    for _ in range(l_max):
        real, imaginary = cosine[-1], sine[-1]
        cosine.append(x * real - y * imaginary)
        sine.append(x * imaginary + y * real)
    return cosine, sine


def _gradient(
    q: Tensor, dq: Tensor, cosine: list[Tensor], sine: list[Tensor], order: int
) -> Tensor:
    """Return the gradient of ``q(z) cos(m phi)``, or of the sine for a negative order."""
    m = abs(order)
    wave = cosine if order >= 0 else sine
    if m == 0:
        zero = torch.zeros_like(q)
        return torch.stack([zero, zero, dq], dim=-1)
    by_x, by_y = (cosine, sine) if order > 0 else (sine, cosine)
    sign = -1 if order > 0 else 1
    return torch.stack([m * q * by_x[m - 1], sign * m * q * by_y[m - 1], dq * wave[m]], dim=-1)
