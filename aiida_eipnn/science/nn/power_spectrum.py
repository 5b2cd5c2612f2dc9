"""The trunk that reads fixed descriptors: the cheapest one, and the best from few labels."""

import torch
from torch import Tensor, nn

from aiida_eipnn.science.nn.descriptor import (
    Basis,
    Described,
    DescribedSet,
    descriptor_tangent,
    descriptors_of,
)
from aiida_eipnn.science.nn.trunk import BatchSet, Trunk, draw

# Spreads below this part of the root mean square of all spreads are noise.
_MIN_RELATIVE_SPREAD = 1e-3
# Half-way between no scaling (0), which hides what varies little, and unit variance (1), which
# makes the wildest functions of the distance as important as the smoothest ones.
_SCALING_POWER = 0.5


class PowerSpectrumTrunk(Trunk[Described]):
    """Standardised power spectrum, then layers that know the element of the central atom.

    Parameters
    ----------
    basis
        What the density of neighbours is expanded in.
    width
        Number of features of an atom.
    depth
        Number of layers.
    dtype
        Precision of the weights.
    """

    def __init__(self, basis: Basis, *, width: int, depth: int, dtype: torch.dtype) -> None:
        super().__init__(width)
        n_inputs = basis.n_descriptors
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("mean", torch.zeros(n_inputs, dtype=dtype))
        self.register_buffer("spread", torch.ones(n_inputs, dtype=dtype))
        self.embedding = nn.Parameter(torch.zeros(basis.n_elements, width, dtype=dtype))
        sizes = [n_inputs, *[width] * (depth - 1)]
        self.layers = nn.ModuleList(nn.Linear(size, width, dtype=dtype) for size in sizes)

    def forward(self, batch: Described) -> Tensor:
        """Return the features of atoms. Shape ``(N, width)``."""
        x = (descriptors_of(batch) - self.mean) / self.spread
        shift = self.embedding[batch.graph.species]
        with self.reduced():
            for layer in self.layers:
                x = nn.functional.silu(layer(x) + shift)
                # The element enters once, with the geometry.
                shift = x.new_zeros(())
        return x.to(self.mean.dtype)

    def slopes(self, batch: Described, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and their change; written out, for it is faster than autograd."""
        change = descriptor_tangent(tangent, batch)
        return self.slopes_by_descriptors(batch.descriptors, change, batch.graph.species)

    def slopes_by_descriptors(
        self, descriptors: Tensor, change: Tensor, species: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the features and their change when the descriptors change by ``change``."""
        x, change = (descriptors - self.mean) / self.spread, change / self.spread
        shift = self.embedding[species]
        with self.reduced():
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                a = layer(x) + shift
                gate = torch.sigmoid(a)
                x = a * gate
                change = nn.functional.linear(change, layer.weight) * (gate + x * (1 - gate))
                shift = x.new_zeros(())
        return x.to(self.mean.dtype), change.to(self.mean.dtype)

    def standardise(self, described: BatchSet) -> None:
        """Let descriptors like these have mean 0 and spreads that differ less than they do."""
        assert isinstance(described, DescribedSet)
        descriptors = described.descriptors()
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
        draw(self.embedding, 0.5, generator)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            draw(layer.weight, layer.in_features**-0.5, generator)
            nn.init.zeros_(layer.bias)
