"""MACE [1]_: equivariant messages of high body order. The only import of mace.

References
----------
.. [1] Batatia et al., MACE, arXiv:2206.07697.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from aiida_eipnn.science.nn.graph import GraphBatch
from aiida_eipnn.science.nn.trunk import BatchSet, Trunk, draw, mean_neighbours

try:
    # What they warn of, such as how e3nn reads its own constants, nobody here can change.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Before e3nn, because it lets torch read these constants.
        from mace import modules  # isort: skip
        from e3nn import o3
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the trunk 'mace' needs the package mace-torch, and there is no {error.name}: "
        "pip install aiida-eipnn[mace]",
        name=error.name,
    ) from error

# Atoms that a message of one atom joins, less one: the published choice.
_CORRELATION = 3
# The envelope is zero at the cutoff together with its first two derivatives.
_ENVELOPE_POWER = 5
# Configurations that the standardisation is fitted on.
_MAX_FOR_STATISTICS = 50
# Spreads of features below this are rounding errors.
_MIN_SPREAD = 1e-6


class MaceTrunk(Trunk[GraphBatch]):
    """Scalar features of all layers of a MACE network, side by side.

    Parameters
    ----------
    n_elements
        Number of elements.
    cutoff
        Distance up to which an atom sees its neighbours, in Å.
    n_radial
        Number of Bessel functions.
    l_max
        Highest degree of the spherical harmonics of the edges.
    width
        Number of channels; there are ``width * depth`` features.
    depth
        Number of interactions.
    dtype
        Precision of the weights.
    """

    def __init__(
        self,
        n_elements: int,
        *,
        cutoff: float,
        n_radial: int,
        l_max: int,
        width: int,
        depth: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(width * depth)
        self.n_elements, self.depth, self.dtype = n_elements, depth, dtype
        with _building(dtype):
            self.mace = modules.MACE(
                r_max=cutoff,
                num_bessel=n_radial,
                num_polynomial_cutoff=_ENVELOPE_POWER,
                max_ell=l_max,
                interaction_cls_first=modules.RealAgnosticInteractionBlock,
                interaction_cls=modules.RealAgnosticResidualInteractionBlock,
                num_interactions=depth,
                num_elements=n_elements,
                hidden_irreps=o3.Irreps(f"{width}x0e"),
                MLP_irreps=o3.Irreps("1x0e"),
                atomic_energies=np.zeros(n_elements),
                avg_num_neighbors=1.0,
                atomic_numbers=list(range(n_elements)),
                correlation=_CORRELATION,
                gate=torch.nn.functional.silu,
            )
        # Our heads read the features: its own energies would be weights that nothing trains.
        self.mace.readouts = nn.ModuleList()
        self.n_neighbours: Tensor
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("n_neighbours", torch.ones((), dtype=dtype))
        self.register_buffer("mean", torch.zeros(n_elements, self.n_features, dtype=dtype))
        self.register_buffer("spread", torch.ones(self.n_features, dtype=dtype))

    def forward(self, batch: GraphBatch) -> Tensor:
        """Return the features of atoms. Shape ``(N, width * depth)``."""
        return (self._node_features(batch) - self.mean[batch.graph.species]) / self.spread

    def standardise(self, described: BatchSet) -> None:
        """Fit the mean number of neighbours; let features have mean 0 and spread 1.

        The mean is that of each element, the spread that of each layer: the features of new
        weights are a hundred times smaller than what the heads are made for.
        """
        self.n_neighbours.fill_(mean_neighbours(described.neighbours))
        rows = np.unique(np.linspace(0, len(described) - 1, _MAX_FOR_STATISTICS).astype(np.int64))
        batches = [described.batch(rows[i : i + 1]) for i in range(len(rows))]
        with torch.no_grad():
            features = torch.cat([self._node_features(batch) for batch in batches])
        species = torch.cat([batch.graph.species for batch in batches])
        self.mean.copy_(features.mean(dim=0))
        for element in torch.unique(species):
            self.mean[element] = features[species == element].mean(dim=0)
        layers = (features - self.mean[species]).reshape(len(features), self.depth, -1)
        spread = layers.square().mean(dim=(0, 2)).sqrt()
        # Equal atoms differ in nothing: leave their features as they are.
        spread = torch.where(spread > _MIN_SPREAD, spread, 1.0)
        self.spread.copy_(spread.repeat_interleave(layers.shape[2]))

    def initialise(self, generator: torch.Generator) -> None:
        """Draw new weights, with the spreads that MACE gives them."""
        for name, weight in self.mace.named_parameters():
            # Shape (elements, paths, channels); e3nn scales all others when it uses them.
            spread = 1 / weight.shape[1] if ".symmetric_contractions." in name else 1.0
            draw(weight, spread, generator)

    def _node_features(self, batch: GraphBatch) -> Tensor:
        graph, n_atoms = batch.graph, len(batch.graph.species)
        atom, place = torch.nonzero(graph.vectors.detach().any(dim=-1), as_tuple=True)
        # Towards the atom that receives the message.
        vectors = -graph.vectors[atom, place].to(self.dtype)
        for interaction in self.mace.interactions:
            # A plain number there, which state_dict does not know.
            interaction.avg_num_neighbors = float(self.n_neighbours)
        output = self.mace(
            {
                "node_attrs": nn.functional.one_hot(graph.species, self.n_elements).to(self.dtype),
                # All atoms in one place, and vectors as shifts: whatever the cell is.
                "positions": vectors.new_zeros(n_atoms, 3),
                "shifts": vectors,
                "edge_index": torch.stack([graph.partners[atom, place], atom]),
                "cell": vectors.new_zeros(3 * len(graph.n_atoms), 3),
                "batch": graph.owner,
                "ptr": nn.functional.pad(graph.n_atoms.cumsum(0), (1, 0)),
            },
            compute_force=False,
        )
        features: Tensor = output["node_feats"]
        return features


@contextmanager
def _building(dtype: torch.dtype) -> Iterator[None]:
    """Let e3nn compute its coefficients in the precision that they are used in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings():
            # e3nn compiles with torch.jit, which newer versions of torch warn of at length.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)
