"""What a DFT run costs, relative to others of the same set-up."""

import numpy as np

from aiida_eipnn.science.arrays import FloatArray
from aiida_eipnn.science.configurations import Configurations


def estimate_cost(configurations: Configurations) -> FloatArray:
    """Return the relative DFT cost of each configuration. Shape ``(n,)``.

    Plane waves grow with the volume, bands with the atoms, and k-points with one over the volume.
    """
    volumes = np.abs(np.linalg.det(configurations.cells))
    size = np.maximum(volumes / volumes.mean(), 1e-3)
    cost: FloatArray = configurations.n_atoms.astype(float) ** 2 * size
    return cost
