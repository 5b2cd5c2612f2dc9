"""Pairs of atoms by vesin, or by SciPy where vesin is not installed: the only import of vesin.

:class:`TreeNeighborList` finds the same pairs, vectors and distances, to the last bit, in another
order: what is summed over pairs in the order in which they were found differs by rounding.
"""

import sys
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiida_eipnn.science.arrays import BoolArray, FloatArray, IntArray

__all__ = ("NeighborList", "TreeNeighborList")

# The tree looks a little further: what is within the cutoff is decided on the vectors, as vesin
# does.
_MARGIN = 1e-6


class TreeNeighborList:
    """What this package uses of ``vesin.NeighborList``.

    ASE, which brings SciPy, has a neighbour list too: for two atoms it takes a hundred times as
    long as vesin.

    Parameters
    ----------
    cutoff
        In Å.
    full_list
        Whether each pair is there in both directions, or once.
    """

    def __init__(self, *, cutoff: float, full_list: bool) -> None:
        self.cutoff = float(cutoff)
        self.full_list = full_list

    def compute(
        self, points: ArrayLike, box: ArrayLike, periodic: ArrayLike, quantities: str
    ) -> list[NDArray[Any]]:
        """Find all pairs closer than the cutoff.

        Parameters
        ----------
        points
            Positions in Å. Shape ``(N, 3)``.
        box
            Cell vectors in rows, in Å, linearly independent. Shape ``(3, 3)``.
        periodic
            Shape ``(3,)``.
        quantities
            What to return of each pair, in this order: the points ``i`` and ``j``, the shift ``S``
            of ``j`` in cells, the distance ``d`` and the vector ``D`` from ``i`` to ``j`` in Å.
        """
        positions, cell = np.asarray(points, dtype=float), np.asarray(box, dtype=float)
        first, second, shift = _candidates(
            positions, cell, np.asarray(periodic, dtype=bool), self.cutoff + _MARGIN
        )
        # Term by term, as vesin adds them: a product of matrices may round otherwise.
        moved = shift[:, :1] * cell[0] + shift[:, 1:2] * cell[1] + shift[:, 2:] * cell[2]
        vector = positions[second] - positions[first] + moved
        squared = vector[:, 0] ** 2 + vector[:, 1] ** 2 + vector[:, 2] ** 2
        kept = squared < self.cutoff**2
        kept &= _is_forward(first, second, shift) | (
            self.full_list & ((first != second) | shift.any(axis=1))
        )
        found = {"i": first, "j": second, "S": shift, "d": np.sqrt(squared), "D": vector}
        return [found[name][kept] for name in quantities]


def _candidates(
    positions: FloatArray, cell: FloatArray, periodic: BoolArray, reach: float
) -> tuple[IntArray, IntArray, IntArray]:
    """Return points and shift of all pairs within ``reach``, those of a point with itself too."""
    # Slow to import, and where vesin is there, for nothing.
    from scipy.spatial import cKDTree

    if not len(positions):
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.int64)
    inverse = np.linalg.inv(cell)
    home = np.where(periodic, np.floor(positions @ inverse), 0.0)
    wrapped = positions - home @ cell
    # A plane of the lattice is the inverse length of a reciprocal vector away from the next.
    n_cells = np.where(periodic, np.ceil(reach * np.linalg.norm(inverse, axis=0)), 0).astype(int)
    shifts = np.stack(
        np.meshgrid(*(np.arange(-n, n + 1) for n in n_cells), indexing="ij"), axis=-1
    ).reshape(-1, 3)
    images = (wrapped[None, :, :] + (shifts @ cell)[:, None, :]).reshape(-1, 3)
    low, high = wrapped.min(axis=0) - reach, wrapped.max(axis=0) + reach
    near = np.flatnonzero(((images >= low) & (images <= high)).all(axis=1))
    pairs = cKDTree(wrapped).sparse_distance_matrix(
        cKDTree(images[near]), reach, output_type="ndarray"
    )
    image = near[pairs["j"]]
    first, second = pairs["i"].astype(np.int64), image % len(positions)
    shift = shifts[image // len(positions)] + (home[first] - home[second]).astype(np.int64)
    return first, second, shift


def _is_forward(first: IntArray, second: IntArray, shift: IntArray) -> BoolArray:
    """Return which of the two directions of a pair comes first. Shape ``(E,)``."""
    x, y, z = shift.T
    ahead = (x > 0) | ((x == 0) & ((y > 0) | ((y == 0) & (z > 0))))
    forward: BoolArray = (first < second) | ((first == second) & ahead)
    return forward


def _vesin() -> Any:
    """Return the neighbour list of vesin, or ours where it is not installed.

    Whoever imports vesin loads torch, if that is there: two seconds and 180 MB in each process that
    labels or reads a dataset, for tensors that nobody gives it here. What is imported here takes
    arrays only; whoever needs more gets vesin as it is.
    """
    is_private = sys.modules.keys().isdisjoint(("torch", "vesin"))
    if is_private:
        # To Python that is a module that cannot be found.
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from vesin import NeighborList
    except ModuleNotFoundError:
        return TreeNeighborList
    finally:
        if is_private:
            for name in [name for name in sys.modules if name.split(".")[0] in ("torch", "vesin")]:
                del sys.modules[name]
    return NeighborList


NeighborList = _vesin()
