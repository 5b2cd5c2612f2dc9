"""Where the atoms of labelled configurations are among the features: what is far off is strange."""

import numpy as np
import torch

from aiida_eipnn.science.arrays import FloatArray
from aiida_eipnn.science.nn.device import array_of
from aiida_eipnn.science.nn.last_layer import symmetric_root
from aiida_eipnn.science.nn.network import Network, batches_of
from aiida_eipnn.science.nn.sizes import BATCH_EDGES
from aiida_eipnn.science.nn.trunk import BatchSet

# Of the covariance towards a sphere. Atoms are many: less than that of whole configurations ranks
# errors of forces better (0.77 against 0.73 on mvl_W, 0.0 against -0.2 on pyxtal_Si).
SHRINKAGE = 1e-3
# Of features, relative to their mean square: less is a rounding error.
MIN_VARIANCE = 1e-6


def fit_density(
    network: Network, described: BatchSet, batch_edges: int = BATCH_EDGES
) -> tuple[FloatArray, FloatArray]:
    """Return the mean feature of each element, and the root of the inverse of the covariance.

    The covariance is that about the mean of an atom's element, the same for all, and shrunk
    towards a sphere. An element that no labelled configuration contains has the mean of all atoms.

    Parameters
    ----------
    network
        The network.
    described
        The labelled configurations; a batch of them at a time is in memory.
    batch_edges
        Places for neighbours of a batch, at most.

    Returns
    -------
    tuple
        Shapes ``(n_elements, n_features)`` and ``(n_features, n_features)``.
    """
    n_elements, width = len(network.elements), network.trunk.n_features
    counts, sums = np.zeros(n_elements), np.zeros((n_elements, width))
    squares = np.zeros((width, width))
    with torch.no_grad():
        for batch in batches_of(described, batch_edges):
            features = array_of(network.trunk(batch).double())
            species = array_of(batch.graph.species).astype(np.int64)
            counts += np.bincount(species, minlength=n_elements)
            np.add.at(sums, species, features)
            squares += features.T @ features
    n_atoms = counts.sum()
    overall = sums.sum(axis=0) / n_atoms
    centres = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], overall)
    covariance = squares / n_atoms - (centres.T * counts) @ centres / n_atoms
    # Atoms of one small cell may all be equal: then any other one is far off, but not infinitely.
    least = MIN_VARIANCE * float(np.trace(squares)) / n_atoms
    sphere = max(float(np.trace(covariance)), least, MIN_VARIANCE) / width
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * sphere * np.eye(width)
    return centres, symmetric_root(shrunk)
