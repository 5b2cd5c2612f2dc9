"""Which EIP to believe for each configuration, or none of them."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from aiida_eipnn.science.arrays import Arrays, FloatArray, IntArray, StrArray
from aiida_eipnn.science.configurations import pick_fields, rows_of

NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """The EIP chosen for each of ``n`` configurations out of ``m`` EIPs.

    Parameters
    ----------
    ids
        The configurations, by geometry hash. Shape ``(n,)``.
    sources
        The classes: the names of the EIPs, then ``none``. Shape ``(m + 1,)``.
    probabilities
        Probability of each class; zero where an EIP has no label. Shape ``(n, m + 1)``.
    choice
        Column of the class that is chosen. Shape ``(n,)``.
    """

    ids: StrArray
    sources: StrArray
    probabilities: FloatArray
    choice: IntArray

    def __post_init__(self) -> None:
        if self.sources[-1] != NONE:
            raise ValueError(f"the last class must be {NONE!r}, not {self.sources[-1]!r}")
        if self.probabilities.shape != (len(self.ids), len(self.sources)):
            raise ValueError(
                f"probabilities have shape {self.probabilities.shape}, not "
                f"{(len(self.ids), len(self.sources))}"
            )

    @property
    def counts(self) -> dict[str, int]:
        """How often each class is chosen."""
        counts = np.bincount(self.choice, minlength=len(self.sources))
        return {str(name): int(count) for name, count in zip(self.sources, counts, strict=True)}

    def take(self, ids: Iterable[str]) -> Self:
        """Return the rows of the given ids, in the given order."""
        rows = rows_of(self.ids, ids)
        return type(self)(
            ids=self.ids[rows],
            sources=self.sources,
            probabilities=self.probabilities[rows],
            choice=self.choice[rows],
        )

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Build from :meth:`arrays`."""
        return cls(**pick_fields(cls, arrays))

    def arrays(self) -> Arrays:
        """Return every field by name, ready for :func:`~.arrays.save_arrays`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
