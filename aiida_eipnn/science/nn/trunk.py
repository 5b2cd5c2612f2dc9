"""What every trunk offers: features of atoms, and how they change when neighbours move."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from aiida_eipnn.science.arrays import IntArray
from aiida_eipnn.science.nn.graph import Graph, Neighbours


class Batch(Protocol):
    """Some configurations at once: the graph, and what a trunk computed beforehand."""

    @property
    def graph(self) -> Graph:
        """The graph; derivatives are taken with respect to ``graph.vectors``."""
        ...

    def _replace(self, *, graph: Graph = ...) -> Self: ...


class BatchSet(Protocol):
    """Configurations ready for a trunk, any batch at a time."""

    neighbours: Neighbours

    def __len__(self) -> int:
        """Return the number of configurations."""
        ...

    def batch(self, rows: IntArray) -> Any:
        """Return the given configurations as one batch of the kind that the trunk reads."""
        ...


B = TypeVar("B", bound=Batch)


class Trunk(nn.Module, ABC, Generic[B]):
    """Turns the neighbourhoods of atoms into features; differentiable by ``graph.vectors``.

    A trunk writes :meth:`forward`, which may use nothing of the geometry but ``graph.vectors`` and
    what was computed from them beforehand, :meth:`initialise`, and, where something is fitted to
    the data before the training, :meth:`standardise`.

    Parameters
    ----------
    n_features
        Number of features of an atom.
    """

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.n_features = n_features
        # Set while a training asks for it; see device.mixed_precision.
        self.reduced_dtype: torch.dtype | None = None

    def reduced(self) -> AbstractContextManager[Any]:
        """Return a context in which layers compute less exactly, where that is asked for."""
        if self.reduced_dtype is None:
            return nullcontext()
        return torch.autocast(next(self.parameters()).device.type, dtype=self.reduced_dtype)

    @abstractmethod
    def forward(self, batch: B) -> Tensor:
        """Return the features of the atoms of a batch. Shape ``(N, n_features)``."""

    @abstractmethod
    def initialise(self, generator: torch.Generator) -> None:
        """Draw new weights."""

    def standardise(self, described: BatchSet) -> None:
        """Fit what is not trained on a set; nothing here."""

    def slopes(self, batch: B, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and their change, both differentiable by the weights.

        One pass gives the derivative of everything that is linear in the features, for example of
        the energies of all heads, along one direction.

        Parameters
        ----------
        batch
            The batch.
        tangent
            Change of ``graph.vectors`` when atoms move or the cell is strained, so that the two
            directions of a pair change oppositely: a trunk may read one of them only. Of no
            account in empty places. Shape ``(N, K, 3)``.

        Returns
        -------
        tuple
            Shape ``(N, n_features)`` each.
        """
        vectors = batch.graph.vectors.detach().requires_grad_()
        with torch.enable_grad():
            features: Tensor = self(batch._replace(graph=batch.graph._replace(vectors=vectors)))
            # The gradient of a weighted sum of features is linear in the weights: its transpose
            # is what is asked for. Forward mode is no faster for MACE, and not all of torch has it.
            weights = torch.zeros_like(features, requires_grad=True)
            (gradient,) = torch.autograd.grad(features, vectors, weights, create_graph=True)
            (change,) = torch.autograd.grad(gradient, weights, tangent, create_graph=True)
        return features, change


def mean_neighbours(neighbours: Neighbours) -> float:
    """Return the mean number of neighbours of an atom, 1 at least."""
    return max(1.0, len(neighbours.partners) / max(1, len(neighbours.species)))


def draw(weight: Tensor, spread: float, generator: torch.Generator) -> None:
    """Fill ``weight`` with normal random numbers of the given spread."""
    # Drawn in double precision, so that both precisions start from the same weights.
    # And on the CPU, where the generator is, so that all devices do.
    drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        weight.copy_(spread * drawn)
