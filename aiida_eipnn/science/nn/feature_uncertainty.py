"""How unsure a network is by its features alone: heads that its labels allow, and strange atoms."""

import torch
from torch import Tensor, nn

from aiida_eipnn.science.nn.device import ON_CPU


class FeatureUncertainty(nn.Module):
    r"""What labels leave open of the last layer of a network, and where their atoms are.

    The weights of the head of DFT have the covariance :math:`R R^T`, from which further heads are
    drawn (:mod:`aiida_eipnn.science.nn.last_layer`); the features of labelled atoms of element
    :math:`Z` have the mean :math:`\mu_Z`, and all of them the covariance :math:`S` about it.
    Nothing of it is trained: it is fitted after the training.

    Parameters
    ----------
    n_features
        Width of the trunk.
    n_elements
        Number of elements.
    n_heads
        Heads that are drawn; 0 for none.
    dtype
        Precision.
    """

    def __init__(self, n_features: int, n_elements: int, n_heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.last_layer: Tensor
        self.heads: Tensor
        self.centres: Tensor
        self.density: Tensor
        for name, shape in (
            ("last_layer", (n_features, n_features)),
            ("heads", (n_heads, n_features)),
            ("centres", (n_elements, n_features)),
            ("density", (n_features, n_features)),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=ON_CPU))

    def spreads(self, features: Tensor) -> Tensor:
        r"""Return the spread of the readout of each atom, :math:`\lVert R f_i \rVert`.

        In units of the scale of the heads; shape ``(N,)``.
        """
        spread: Tensor = torch.linalg.vector_norm(features @ self.last_layer, dim=1)
        return spread

    def distances(self, features: Tensor, species: Tensor) -> Tensor:
        r"""Return how far each atom is from those that are labelled. Shape ``(N,)``.

        The Mahalanobis distance :math:`\sqrt{(f_i - \mu_Z)^T S^{-1} (f_i - \mu_Z)}`, which has no
        unit.

        Parameters
        ----------
        features
            Of the atoms. Shape ``(N, n_features)``.
        species
            Numbers of their elements. Shape ``(N,)``.
        """
        away = features - self.centres[species]
        distance: Tensor = torch.linalg.vector_norm(away @ self.density, dim=1)
        return distance
