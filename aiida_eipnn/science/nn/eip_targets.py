"""What the heads of the EIPs learn: their labels, each on its own zero, and the median of them."""

import warnings
from typing import NamedTuple

import numpy as np

from aiida_eipnn.science.arrays import BoolArray, FloatArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.nn.stage import energy_scale
from aiida_eipnn.science.reference import MAD_TO_SIGMA, count_elements, fit_reference_energies

# EIP energies beyond this many robust standard deviations are not learnt.
OUTLIER_SIGMA = 8.0


class EipTargets(NamedTuple):
    """What the heads of ``m`` EIPs and of their consensus learn.

    Parameters
    ----------
    configurations
        Those with at least one label, ``n`` of them.
    sources
        The EIPs.
    reference
        Reference energies in eV; zero for the consensus. Shape ``(m + 1, n_elements)``.
    scale
        Robust spread of the energies per atom, in eV.
    energy_spread
        The same for each source, in eV/atom. Shape ``(m + 1,)``.
    forces_spread
        Mean size of the force components of each source, in eV/Å. Shape ``(m + 1,)``.
    energy
        Energies less the references, in eV; NaN where there is none. Shape ``(n, m + 1)``.
    forces
        In eV/Å. Shape ``(m + 1, N, 3)``.
    known
        Where there is a label. Shape ``(n, m + 1)``.
    """

    configurations: Configurations
    sources: tuple[str, ...]
    reference: FloatArray
    scale: float
    energy_spread: FloatArray
    forces_spread: FloatArray
    energy: FloatArray
    forces: FloatArray
    known: BoolArray


def eip_targets(
    configurations: Configurations,
    labels: Labels,
    elements: tuple[int, ...],
    reference: FloatArray | None = None,
) -> EipTargets:
    """Return what is learnt from EIP labels: each EIP on its own zero, and their median.

    Parameters
    ----------
    configurations
        Must contain every configuration of ``labels``.
    labels
        Labels of the EIPs.
    elements
        Atomic numbers that the network knows.
    reference
        Reference energies of the EIPs, where they are known already, in eV. Shape
        ``(m, n_elements)``.

    Raises
    ------
    ValueError
        If there is not one label.
    """
    part = configurations.take(configurations.rows_of(labels.ids))
    known, fitted = usable_labels(part, labels, elements)
    reference = fitted if reference is None else reference
    rows = np.flatnonzero(known.any(axis=1))
    if not len(rows):
        raise ValueError(
            f"not one of {len(labels)} configurations has a usable label of "
            f"{', '.join(map(str, labels.sources))}; see why in the labels"
        )
    part, labels, known = part.take(rows), labels.take(rows), known[rows]
    counts = count_elements(part, np.array(elements))
    energy = np.where(known, labels.energy - counts @ reference.T, np.nan)
    per_atom = np.repeat(known, part.n_atoms, axis=0).T[:, :, None]
    forces = np.where(per_atom, labels.forces, np.nan)
    # Every configuration has a label left, so no median is empty.
    consensus, pull = np.nanmedian(energy, axis=1), np.nanmedian(forces, axis=0)
    energy, forces = np.column_stack([energy, consensus]), np.concatenate([forces, pull[None]])
    energy_spread, forces_spread = spreads(energy / part.n_atoms[:, None], forces)
    return EipTargets(
        configurations=part,
        sources=tuple(map(str, labels.sources)),
        reference=np.concatenate([reference, np.zeros((1, len(elements)))]),
        scale=energy_scale((energy[:, :-1] / part.n_atoms[:, None])[known]),
        energy_spread=energy_spread,
        forces_spread=forces_spread,
        energy=energy,
        forces=forces,
        known=np.column_stack([known, np.ones(len(rows), bool)]),
    )


def spreads(per_atom: FloatArray, forces: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return robust spread of energies per atom and size of forces, for each source.

    A source without spread, such as one with a single label, gets that of the others.
    """
    with warnings.catch_warnings():
        # A source without any label has no spread, which is filled in below.
        warnings.simplefilter("ignore", RuntimeWarning)
        deviation = np.abs(per_atom - np.nanmedian(per_atom, axis=0))
        energy = MAD_TO_SIGMA * np.nanmedian(deviation, axis=0)
        # The mean, not its square: a few strong forces must not set the scale for all others.
        size = np.nanmean(np.abs(forces), axis=(1, 2))
    return _filled(energy), _filled(size)


def _filled(values: FloatArray) -> FloatArray:
    """Replace what is zero, or not a number, by the median of the others, or by 1."""
    good = np.isfinite(values) & (values > 1e-9)
    return np.where(good, values, np.median(values[good]) if good.any() else 1.0)


def usable_labels(
    configurations: Configurations, labels: Labels, elements: tuple[int, ...]
) -> tuple[BoolArray, FloatArray]:
    """Return which EIP labels are learnt, shape ``(n, m)``, and the references of the EIPs.

    An energy far off on either side is left out: one atom too close to another one would outweigh
    all others. References have shape ``(m, n_elements)``, in eV.
    """
    finite = np.isfinite(np.abs(labels.forces).sum(axis=2)).astype(np.int64)
    n_finite = np.add.reduceat(finite, labels.offsets[:-1], axis=1).T
    known = labels.ok & np.isfinite(labels.energy) & (n_finite == labels.n_atoms[:, None])
    reference = np.zeros((len(labels.sources), len(elements)))
    counts = count_elements(configurations, np.array(elements))
    for column in range(len(labels.sources)):
        for _ in range(5):
            rows = np.flatnonzero(known[:, column])
            if not len(rows):
                break
            fitted = fit_reference_energies(configurations.take(rows), labels.energy[rows, column])
            reference[column] = [fitted.get(element, 0.0) for element in elements]
            residual = labels.energy[rows, column] - counts[rows] @ reference[column]
            far = outliers(residual / configurations.n_atoms[rows])
            if not far.any():
                break
            known[rows[far], column] = False
    return known, reference


def outliers(values: FloatArray) -> BoolArray:
    """Return which values are beyond ``OUTLIER_SIGMA`` robust standard deviations."""
    deviation = np.abs(values - np.median(values))
    # The floor, in eV/atom, matters where more than half of the values are equal.
    spread = max(MAD_TO_SIGMA * float(np.median(deviation)), 1e-3)
    return np.asarray(deviation > OUTLIER_SIGMA * spread)
