"""Pseudo-labels with the error to expect of each, and what weight that gives them in training."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from aiida_eipnn.science.arrays import Arrays, FloatArray, IntArray, StrArray
from aiida_eipnn.science.configurations import (
    Configurations,
    check_offsets,
    pick_fields,
    ragged_rows,
    rows_of,
)
from aiida_eipnn.science.eip.selection import Selection
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.reference import fit_alignment

# Errors at which a pseudo-label counts half as much as a DFT label: from residuals of this size on
# the loss of DFT labels is linear. In eV/atom and eV/Å.
HALF_BELIEVED_ENERGY = 0.02
HALF_BELIEVED_FORCES = 0.1


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
        known = np.repeat(np.isfinite(self.forces_error), self.n_atoms)
        energy = self.energy[np.isfinite(self.energy_error)]
        if not (np.isfinite(energy).all() and np.isfinite(self.forces[known]).all()):
            raise ValueError("pseudo-labels must be finite where an error is expected of them")

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


def pseudo_weights(error: FloatArray, half: float) -> FloatArray:
    r"""Return the weight of each pseudo-label, :math:`\sigma_0^2 / (\sigma_0^2 + \sigma^2)`.

    From 0 to 1, relative to a DFT label: labels without a chance of being right weigh nothing,
    however many there are.

    Parameters
    ----------
    error
        Expected error of each pseudo-label, :math:`\sigma`; infinite where it is not known.
        Shape ``(n,)``.
    half
        Error at which it counts half, :math:`\sigma_0`, in the same unit.

    Raises
    ------
    ValueError
        If ``half`` is not above zero.
    """
    if not half > 0:
        raise ValueError(f"the error at which a pseudo-label counts half is {half}, not above 0")
    weights: FloatArray = 1.0 / (1.0 + (error / half) ** 2)
    return weights


def pseudo_labels_of_selection(
    configurations: Configurations, labels: Labels, eip_labels: Labels, selection: Selection
) -> PseudoLabels | None:
    """Return the aligned energies of the chosen EIPs where there is no DFT label.

    They weigh as much as the classifier was sure of them; forces are left out: the EIP that is best
    in energy seldom is in forces. ``None`` where no EIP is believed anywhere.

    Parameters
    ----------
    configurations
        Must contain every labelled configuration.
    labels
        DFT labels.
    eip_labels
        Labels of the EIPs.
    selection
        The EIP chosen for each configuration.

    Raises
    ------
    ValueError
        If the selection is among other EIPs.
    """
    if selection.sources[:-1].tolist() != eip_labels.sources.tolist():
        raise ValueError(
            f"the selection is among {selection.sources[:-1].tolist()}, but the EIP labels "
            f"are of {eip_labels.sources.tolist()}; give the labels that the selection was made of"
        )
    selected = {str(name) for name in selection.ids} - set(map(str, labels.ids))
    free = np.array([str(name) in selected for name in eip_labels.ids], dtype=bool)
    alignment = fit_alignment(configurations, labels, eip_labels)
    aligned = alignment.apply(configurations, eip_labels.take(np.flatnonzero(free)))
    choice = selection.take(aligned.ids)
    energy = np.column_stack([aligned.energy, np.full(len(aligned), np.nan)])
    chosen = energy[np.arange(len(aligned)), choice.choice]
    use = np.flatnonzero(np.isfinite(chosen))
    if not len(use):
        return None
    part = aligned.take(use)
    # The error at which a pseudo-label counts as much as the classifier is sure.
    doubt = 1 / choice.probabilities[use, choice.choice[use]] - 1
    return PseudoLabels(
        ids=part.ids,
        offsets=part.offsets,
        energy=chosen[use],
        energy_error=HALF_BELIEVED_ENERGY * np.sqrt(doubt),
        forces=np.zeros((int(part.offsets[-1]), 3)),
        forces_error=np.full(len(use), np.inf),
    )
