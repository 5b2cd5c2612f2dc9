"""What a DFT run costs, relative to others of the same set-up."""

import numpy as np

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations

# Electrons up to each noble gas: pseudopotentials have no electrons of their own for these.
CORES = np.array([0, 2, 10, 18, 36, 54, 86])
# Beyond an element, up to a noble gas, a filled shell of so many electrons is no part of these.
FILLED = ((30, 36, 10), (48, 54, 10), (71, 86, 14), (80, 86, 10))
# Where nobody says how far k-points may be apart, in 1/Å.
KPOINTS_DISTANCE = 0.2


def estimate_cost(
    configurations: Configurations, kpoints_distance: float = KPOINTS_DISTANCE
) -> FloatArray:
    """Return the DFT cost of each configuration relative to their mean. Shape ``(n,)``.

    Valence electrons squared (bands are made orthogonal to one another) times the volume (plane
    waves) times the number of k-points.

    Parameters
    ----------
    configurations
        The configurations.
    kpoints_distance
        How far k-points are apart at most, in 1/Å.
    """
    if not len(configurations):
        return np.empty(0)
    valence = valence_electrons(configurations.numbers).astype(float)
    electrons = np.add.reduceat(valence, configurations.offsets[:-1])
    cost = cost_units(electrons, configurations.cells)
    cost *= count_kpoints(configurations.cells, kpoints_distance)
    relative: FloatArray = cost / cost.mean()
    return relative


def valence_electrons(numbers: IntArray) -> IntArray:
    """Return how many electrons of these elements a pseudopotential leaves, about. Shape ``(N,)``.

    Those outside the last noble gas, without filled d and f shells below s and p electrons.
    """
    core = CORES[np.maximum(np.searchsorted(CORES, numbers) - 1, 0)]
    for last, noble, shell in FILLED:
        core = core + np.where((numbers > last) & (numbers <= noble), shell, 0)
    valence: IntArray = numbers - core
    return valence


def count_kpoints(cells: FloatArray, distance: float) -> FloatArray:
    """Return how many k-points a mesh has whose points are no further apart. Shape ``(n,)``.

    Of two that are opposite one is computed; a vector of length zero is no period.
    """
    lengths = np.linalg.norm(cells, axis=2)
    volumes = np.abs(np.linalg.det(cells))
    areas = np.stack(
        [np.linalg.norm(np.cross(cells[:, i - 2], cells[:, i - 1]), axis=1) for i in range(3)],
        axis=1,
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        reciprocal = 2 * np.pi * areas / volumes[:, None]
    periodic = (lengths > 0) & np.isfinite(reciprocal)
    mesh = np.where(periodic, np.ceil(np.where(periodic, reciprocal, 0.0) / distance), 1.0)
    total: FloatArray = np.maximum(mesh, 1.0).prod(axis=1)
    return np.ceil(total / 2)


def cost_units(size: FloatArray | IntArray, cells: FloatArray) -> FloatArray:
    """Return what the time of a run grows with: atoms, or electrons, squared times volume, in Å³.

    Shapes ``(n,)`` and ``(n, 3, 3)``; what is not periodic counts as next to nothing.
    """
    volumes = np.abs(np.linalg.det(cells))
    least = 1e-3 * float(volumes.mean()) or 1.0
    units: FloatArray = size.astype(float) ** 2 * np.maximum(volumes, least)
    return units
