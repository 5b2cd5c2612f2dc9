"""Readouts: energies on the scale of each source, and the class of the EIP to believe."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aiida_eipnn.science.nn.graph import Graph

# The head of what the EIPs say in the median, and the head of DFT.
CONSENSUS = "consensus"
DFT_HEAD = "dft"


class Owners(NamedTuple):
    """The part of a graph that sums over atoms need; see :class:`~.graph.Graph`."""

    owner: Tensor
    n_atoms: Tensor


class EnergyHeads(nn.Module):
    r"""Energies of atoms, one for each source; a linear readout of the trunk's features.

    :math:`E_h = \sum_i \left[ b_h(Z_i) + s\, (w_h \cdot f_i + c_h) \right]`, with reference
    energies :math:`b_h` (in eV) of each element and one scale :math:`s` (in eV) for all heads, so
    that a head can be copied into another one. Neither is trained.

    Parameters
    ----------
    names
        One name for each head.
    n_features
        Width of the trunk.
    n_elements
        Number of elements.
    dtype
        Precision of the weights.
    """

    def __init__(
        self, names: Sequence[str], n_features: int, n_elements: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.weight = nn.Parameter(torch.zeros(len(names), n_features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(len(names), dtype=dtype))
        self.reference: Tensor
        self.scale: Tensor
        zeros = torch.zeros(len(names), n_elements, dtype=torch.float64)
        self.register_buffer("reference", zeros)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        """Return energies of atoms without reference, in eV. Shape ``(N, n_heads)``."""
        readout = nn.functional.linear(features, self.weight, self.bias)
        return readout.to(torch.float64) * self.scale

    def references(self, graph: Graph) -> Tensor:
        """Return the reference energy of each configuration, in eV. Shape ``(n, n_heads)``."""
        return sum_atoms(self.reference.T[graph.species], graph)

    def row(self, name: str) -> int:
        """Return the row of a head.

        Raises
        ------
        ValueError
            If there is no such head.
        """
        if name not in self.names:
            raise ValueError(f"there is no head {name!r}, only {list(self.names)}")
        return self.names.index(name)


class ClassifierHead(nn.Module):
    """Logits of the classes of a configuration, from mean and spread of its atoms' features.

    Mean and spread, not the sum: the class of a cell is that of its supercell.

    Parameters
    ----------
    names
        One name for each class.
    n_features
        Width of the trunk.
    dtype
        Precision of the weights.
    """

    def __init__(self, names: Sequence[str], n_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.names = tuple(names)
        self.weight = nn.Parameter(torch.zeros(len(names), 2 * n_features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(len(names), dtype=dtype))

    def forward(self, pooled: Tensor) -> Tensor:
        """Return logits. Shape ``(n, n_classes)``."""
        return nn.functional.linear(pooled, self.weight, self.bias)


def pool_features(features: Tensor, graph: Graph) -> Tensor:
    """Return mean and standard deviation over atoms, side by side. Shape ``(n, 2 n_features)``."""
    n_atoms = graph.n_atoms[:, None].to(features.dtype)
    mean = sum_atoms(features, graph) / n_atoms
    variance = sum_atoms((features - mean[graph.owner]) ** 2, graph) / n_atoms
    # Equal atoms have no spread, and the root has no slope there: keep away from it.
    return torch.cat([mean, torch.sqrt(variance + 1e-12)], dim=-1)


def sum_atoms(values: Tensor, graph: Graph | Owners) -> Tensor:
    """Sum rows of atoms into rows of configurations."""
    total = values.new_zeros(len(graph.n_atoms), *values.shape[1:])
    return total.index_add(0, graph.owner, values)
