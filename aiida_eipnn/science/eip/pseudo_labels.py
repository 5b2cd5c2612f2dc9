"""Pseudo-labels with the error to expect of each, and what weight that gives them in training."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from aiida_eipnn.science.arrays import Arrays, FloatArray, IntArray, StrArray
from aiida_eipnn.science.configurations import (
    check_offsets,
    pick_fields,
    ragged_rows,
    rows_of,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PseudoLabels:
    """Labels of ``n`` configurations with ``N`` atoms that nobody calculated.

    Parameters
    ----------
    ids
        The configurations, by geometry hash. Shape ``(n,)``.
    offsets
        The atoms of configuration ``i`` are rows ``offsets[i]`` to ``offsets[i + 1]``.
        Shape ``(n + 1,)``.
    energy
        Total energy on the zero of the DFT labels, in eV. Shape ``(n,)``.
    energy_error
        Absolute error of the energy per atom to expect, in eV/atom; infinite where no EIP has a
        label, or where an element is in none of the DFT labels. Shape ``(n,)``.
    forces
        Forces, in eV/Å; not the gradient of ``energy``. Shape ``(N, 3)``.
    forces_error
        Mean absolute error of a force component to expect, in eV/Å; infinite as ``energy_error``
        is. Shape ``(n,)``.
    """

    ids: StrArray
    offsets: IntArray
    energy: FloatArray
    energy_error: FloatArray
    forces: FloatArray
    forces_error: FloatArray

    def __post_init__(self) -> None:
        n = len(self.ids)
        check_offsets(self.offsets, len(self.forces))
        for name in ("energy", "energy_error", "forces_error"):
            if getattr(self, name).shape != (n,):
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, not {(n,)}")
        if self.forces.shape != (len(self.forces), 3) or len(self.offsets) != n + 1:
            raise ValueError(
                f"forces {self.forces.shape} and offsets {self.offsets.shape} do not fit {n} "
                "configurations"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_atoms(self) -> IntArray:
        """Number of atoms of each configuration. Shape ``(n,)``."""
        return np.diff(self.offsets)

    def take(self, ids: Iterable[str]) -> Self:
        """Return the rows of the given ids, in the given order."""
        rows = rows_of(self.ids, ids)
        return type(self)(
            ids=self.ids[rows],
            offsets=np.concatenate([[0], np.cumsum(self.n_atoms[rows])]).astype(np.int64),
            energy=self.energy[rows],
            energy_error=self.energy_error[rows],
            forces=self.forces[ragged_rows(self.offsets, rows)],
            forces_error=self.forces_error[rows],
        )

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Build from :meth:`arrays`."""
        return cls(**pick_fields(cls, arrays))

    def arrays(self) -> Arrays:
        """Return every field by name, ready for :func:`~.arrays.save_arrays`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def pseudo_weights(
    error: FloatArray, own_error: float | None = None, floor: float = 0.0
) -> FloatArray:
    r"""Return the weight of each pseudo-label, :math:`1 / (\sigma^2 + \sigma_0^2)`.

    The mean over those that are used is 1. A pseudo-label that should be worse than what the
    network itself says teaches it nothing: its weight is zero.

    Parameters
    ----------
    error
        Expected error of each pseudo-label, :math:`\sigma`. Shape ``(n,)``.
    own_error
        Error of the network on its validation set, in the same unit; ``None`` uses all.
    floor
        :math:`\sigma_0`, in the same unit: below it, no label is better than another.

    Raises
    ------
    ValueError
        If an expected error is not above zero and there is no floor.
    """
    if not (error**2 + floor**2 > 0).all():
        raise ValueError(
            "expected errors must be above 0 (infinite where unknown), or the floor must be; "
            f"got a smallest error of {np.min(error)} and a floor of {floor}"
        )
    used = np.isfinite(error) & (own_error is None or error <= own_error)
    weights = np.where(used, 1.0 / (error**2 + floor**2), 0.0)
    return np.asarray(weights / weights[used].mean() if used.any() else weights, dtype=np.float64)
