"""Which EIP to believe for each configuration, or none of them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from aiida_eipnn.science.arrays import Arrays, FloatArray, IntArray, StrArray
from aiida_eipnn.science.configurations import pick_fields, rows_of
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.settings import build

NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionParameters:
    """When an EIP is to be believed.

    Parameters
    ----------
    tolerance
        Largest error of the aligned energy per atom, in eV/atom, of an EIP that is right.
    """

    # Shui et al. take 0.1 without aligning the energies; aligned ones are twice as good.
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"the tolerance must be above 0 eV/atom, not {self.tolerance}")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build from plain values; ``ValueError`` names an unknown key."""
        return build(cls, content, "classes")


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


def class_labels(reference: Labels, aligned: Labels, parameters: SelectionParameters) -> IntArray:
    r"""Return the class of each configuration of ``reference``: the best EIP, or none of them.

    The best EIP has the smallest :math:`|E' - E| / N`; where even that is above the tolerance, or
    where no EIP has a label, the class is the last one, ``none``.

    Parameters
    ----------
    reference
        Labels of one source, ``dft``.
    aligned
        Labels of the EIPs on the reference's zero; must contain every configuration of
        ``reference``.
    parameters
        The tolerance.
    """
    part = aligned.take(aligned.rows_of(reference.ids))
    error = np.abs(part.energy - reference.energy[:, :1]) / part.n_atoms[:, None]
    # A missing label is infinitely wrong; left as NaN it would be taken for the smallest.
    error = np.where(part.ok & np.isfinite(error), error, np.inf)
    return np.where(
        error.min(axis=1) <= parameters.tolerance, error.argmin(axis=1), len(part.sources)
    ).astype(np.int64)


def select(probabilities: FloatArray, labels: Labels) -> Selection:
    """Return the choice that these probabilities make among EIPs that have a label.

    Parameters
    ----------
    probabilities
        Of each EIP and of none, for each configuration of ``labels``. Shape ``(n, m + 1)``.
    labels
        Labels of the EIPs.
    """
    has_label = labels.ok & np.isfinite(labels.energy)
    possible = np.column_stack([has_label, np.ones(len(labels), bool)])
    left = np.where(possible, probabilities, 0.0)
    total = left.sum(axis=1, keepdims=True)
    # All of the probability may have been on EIPs without a label.
    nothing = np.arange(left.shape[1]) == left.shape[1] - 1
    left = np.where(total > 0, left / np.where(total > 0, total, 1.0), nothing)
    return Selection(
        ids=labels.ids,
        sources=np.append(labels.sources, NONE),
        probabilities=left,
        choice=left.argmax(axis=1).astype(np.int64),
    )
