"""What batches take of the memory, and how they are kept below a bound. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from aiida_eipnn.science.arrays import IntArray
from aiida_eipnn.science.nn.shares import Share

# More than 64 configurations of 64 atoms in a dense metal have within 5 Å: usual batches stay
# whole.
BATCH_EDGES = 250_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of configurations.

    In a batch every atom has as many places for neighbours as the one with most needs, filled or
    not (:class:`aiida_eipnn.science.nn.graph.Graph`). These places are what a bound counts: it is
    the pairs that take the memory, and an atom without any counts like one pair.

    Parameters
    ----------
    n_atoms
        Atoms of each configuration. Shape ``(n,)``.
    n_places
        Places that each of its atoms needs. Shape ``(n,)``.
    """

    n_atoms: IntArray
    n_places: IntArray

    def __len__(self) -> int:
        return len(self.n_atoms)

    def take(self, rows: IntArray) -> "Sizes":
        """Return the sizes of the given configurations."""
        return Sizes(self.n_atoms[rows], self.n_places[rows])

    def batches(self, batch_size: int, batch_edges: int) -> list[IntArray]:
        """Return the rows of all configurations in batches, in order.

        Parameters
        ----------
        batch_size
            Configurations of a batch, at most.
        batch_edges
            Places of a batch, at most; a configuration that has more is a batch of its own.

        Raises
        ------
        ValueError
            If one of them is below 1.
        """
        check_bounds(batch_size, batch_edges)
        starts: list[int] = []
        atoms = places = 0
        for row, (more, needed) in enumerate(
            zip(self.n_atoms.tolist(), self.n_places.tolist(), strict=True)
        ):
            atoms, places = atoms + more, max(places, needed)
            fits = starts and row - starts[-1] < batch_size and atoms * places <= batch_edges
            if not fits:
                starts.append(row)
                atoms, places = more, needed
        return [np.arange(first, last) for first, last in pairwise([*starts, len(self)])]


def check_bounds(batch_size: int, batch_edges: int) -> None:
    """Raise ``ValueError`` where nothing at all may be in a batch."""
    for name, value in (("batch_size", batch_size), ("batch_edges", batch_edges)):
        if value < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, not {value}")


def count_parts(
    sets: Sequence[Sizes], batch_edges: int, *, n_parts: int = 1, n_processes: int = 1
) -> int:
    """Return in how many parts each process computes its share of a batch.

    In the fewest with which none has more than ``batch_edges`` places, unless of one configuration
    of each set: that cannot be divided. It follows from the batch alone, so all processes that
    take a step together say the same; if one did not, as where machines round a distance at the
    cutoff otherwise, its parts would still be those of its share.

    Parameters
    ----------
    sets
        Sizes of all that a step computes: of the batch, and of what is drawn beside it. Each set is
        divided into shares.
    batch_edges
        Most places that are computed at once.
    n_parts
        The least number of parts.
    n_processes
        Processes that take the step together.
    """
    least = sum(np.minimum(item.n_atoms * item.n_places, batch_edges).sum() for item in sets)
    first = max(n_parts, math.ceil(least / batch_edges / n_processes))
    # Then every share is of one configuration, or of none.
    last = max(n_parts, math.ceil(max(map(len, sets)) / n_processes))
    for number in range(first, last):
        if (_places_of_shares(sets, number * n_processes) <= batch_edges).all():
            return number
    return last


def _places_of_shares(sets: Sequence[Sizes], count: int) -> NDArray[np.int64]:
    """Return the places of each of ``count`` shares; 0 where it cannot be divided further."""
    places, most = np.zeros((2, count), dtype=np.int64)
    for item in sets:
        starts = [Share(number, count).bounds(len(item))[0] for number in range(count)]
        bounds = np.array([*starts, len(item)])
        n_rows = np.diff(bounds)
        filled = np.flatnonzero(n_rows)
        atoms = np.add.reduceat(item.n_atoms, bounds[filled])
        places[filled] += atoms * np.maximum.reduceat(item.n_places, bounds[filled])
        most = np.maximum(most, n_rows)
    return np.where(most > 1, places, 0)
