"""What a DFT run costs, relative to others of the same set-up."""

import numpy as np

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations


def estimate_cost(configurations: Configurations) -> FloatArray:
    """Return the relative DFT cost of each configuration. Shape ``(n,)``.

    Plane waves grow with the volume, bands with the atoms, and k-points with one over the volume.
    """
    units = cost_units(configurations.n_atoms, configurations.cells)
    cost: FloatArray = units / np.abs(np.linalg.det(configurations.cells)).mean()
    return cost


def cost_units(n_atoms: IntArray, cells: FloatArray) -> FloatArray:
    """Return what the time of a DFT run grows with: atoms squared times volume, in Å³.

    Shapes ``(n,)`` and ``(n, 3, 3)``; what is not periodic counts as next to nothing.
    """
    volumes = np.abs(np.linalg.det(cells))
    units: FloatArray = n_atoms.astype(float) ** 2 * np.maximum(volumes, 1e-3 * volumes.mean())
    return units
