"""Energies and forces that stick out of their set, on either side."""

from dataclasses import replace

import numpy as np

from aiida_eipnn.science.arrays import BoolArray, FloatArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.reference import MAD_TO_SIGMA, element_fractions

# Robust standard deviations.
SIGMA = 6.0
# More, in eV/atom, than any element gains when its atoms form a crystal (tungsten: 8.9), so a free
# atom or a dimer among crystals is never refused for its energy.
COHESION = 10.0
# Where at least three EIPs can be compared, one that is alone may be refused from here on, in
# eV/atom: EIPs in regular use differ by less than that on what is not torn apart.
ALONE = 1.0
MIN_EIPS = 3
MIN_CONFIGURATIONS = 20
# Configurations whose forces are looked at together: bounds the memory.
BLOCK = 4096

NOT_FINITE = "energy or forces are not finite"


def refuse_outliers(
    configurations: Configurations, labels: Labels, force_limit: float = 50.0
) -> Labels:
    """Return EIP labels without those that stick out: missing, with the reason.

    Refused are energies and forces that are not finite, forces above the limit, and energies that
    :func:`stray_energies` finds.

    Parameters
    ----------
    configurations
        Those of ``labels``, in the same order.
    labels
        Of any number of EIPs. The forces may lie in a file, in any precision: they are read in
        blocks and passed on as they came, also where a label is refused.
    force_limit
        In eV/Å.

    Raises
    ------
    ValueError
        If the configurations are not those of the labels.
    """
    if not np.array_equal(configurations.ids, labels.ids):
        raise ValueError(
            f"the {len(configurations)} configurations are not those of the {len(labels)} labels; "
            "take the configurations of the labels, in their order"
        )
    strongest = strongest_forces(labels)
    finite = np.isfinite(labels.energy) & np.isfinite(strongest)
    strong = finite & (strongest > force_limit)
    stray = stray_energies(configurations, labels.energy, labels.ok & finite & ~strong)
    return mark_refused(
        labels,
        [
            (~finite, NOT_FINITE),
            (strong, too_strong(force_limit)),
            (stray < 0, "the energy per atom is far below what the pool and other EIPs let expect"),
            (stray > 0, "the energy per atom is far above what the pool and other EIPs let expect"),
        ],
    )


def too_strong(limit: float) -> str:
    """Return the reason to refuse forces above a limit in eV/Å."""
    return f"a force is above {limit:g} eV/Å"


def mark_refused(labels: Labels, faults: list[tuple[BoolArray, str]]) -> Labels:
    """Return the labels without those at fault, of shape ``(n, m)``; the first fault counts."""
    status, reasons = labels.status.copy(), list(map(str, labels.reasons))
    for refused, reason in faults:
        now = refused & (status == 0)
        if not now.any():
            continue
        if reason not in reasons:
            reasons.append(reason)
        status[now] = reasons.index(reason) + 1
    missing = status > 0
    return replace(
        labels,
        energy=np.where(missing, np.nan, labels.energy),
        stress=np.where(missing[:, :, None], np.nan, labels.stress),
        status=status,
        reasons=np.array(reasons, dtype=np.str_),
    )


def strongest_forces(labels: Labels) -> FloatArray:
    """Return the longest force of each label, in eV/Å; NaN where one is no number.

    Shape ``(n, m)``.
    """
    n, m = labels.energy.shape
    strongest = np.zeros((n, m))
    for start in range(0, n, BLOCK):
        offsets = labels.offsets[start : start + BLOCK + 1]
        filled = np.flatnonzero(np.diff(offsets))
        for source in range(m):
            block = np.asarray(labels.forces[source, offsets[0] : offsets[-1]], dtype=np.float64)
            if len(filled):
                length = np.sqrt((block**2).sum(axis=1))
                starts = offsets[:-1][filled] - offsets[0]
                # maximum.reduceat hands NaN on.
                strongest[start + filled, source] = np.maximum.reduceat(length, starts)
    return strongest


def stray_energies(configurations: Configurations, energy: FloatArray, ok: BoolArray) -> FloatArray:
    """Return by how much energies per atom stick out, in eV; 0 where they do not.

    An energy sticks out of the set of its own source if it is more than six robust standard
    deviations of its side, and more than ``COHESION``, from what the composition lets expect. Where
    at least ``MIN_EIPS`` sources have a label, one that differs by more than six robust standard
    deviations of its usual difference, and more than ``ALONE``, from their median is refused if it
    also is six of its own deviations out. Fewer than ``MIN_CONFIGURATIONS`` are not judged.

    Parameters
    ----------
    configurations
        ``n`` configurations.
    energy
        Total energies, in eV. Shape ``(n, m)``.
    ok
        Which count. Shape ``(n, m)``.

    Returns
    -------
    FloatArray
        Shape ``(n, m)``.
    """
    n_atoms = np.maximum(configurations.n_atoms, 1)[:, None]
    fractions = element_fractions(configurations, np.array(configurations.elements, dtype=np.int64))
    rest = np.full(energy.shape, np.nan)
    per_atom = energy / n_atoms
    for source in range(energy.shape[1]):
        used = ok[:, source]
        if used.sum() >= max(MIN_CONFIGURATIONS, 5 * fractions.shape[1]):
            rest[used, source] = residual(fractions[used], per_atom[used, source])
    out = np.stack([_beyond(column) for column in rest.T], axis=1)
    stray = out & (np.abs(rest) > COHESION)
    if energy.shape[1] >= MIN_EIPS:
        counts = np.isfinite(rest).sum(axis=1)
        enough = counts >= MIN_EIPS
        apart = np.full(energy.shape, np.nan)
        apart[enough] = rest[enough] - np.nanmedian(rest[enough], axis=1)[:, None]
        alone = np.stack([_beyond(column) for column in apart.T], axis=1)
        stray = np.where(enough[:, None], out & alone & (np.abs(apart) > ALONE), stray)
    return np.where(stray, rest, 0.0)


def residual(design: FloatArray, values: FloatArray) -> FloatArray:
    """Return ``values`` less their least-absolute-deviation fit: half of them may be stray."""
    if design.shape[1] == 1 and np.ptp(design) == 0:
        return np.asarray(values - np.median(values))
    weights = np.ones(len(values))
    rest = values
    for _ in range(30):
        fit = np.linalg.lstsq(design * weights[:, None], values * weights, rcond=None)[0]
        rest = values - design @ fit
        floor = 1e-9 + 1e-3 * spread(rest)
        weights = 1 / np.sqrt(np.maximum(np.abs(rest), floor))
    return rest


def spread(values: FloatArray) -> float:
    """Return the median absolute deviation."""
    return float(np.median(np.abs(values - np.median(values))))


def _beyond(values: FloatArray) -> BoolArray:
    """Return what is more than six robust standard deviations of its side from the median."""
    finite = np.isfinite(values)
    beyond = np.zeros(len(values), dtype=bool)
    if not finite.any():
        return beyond
    centred = values - np.median(values[finite])
    for side in (1, -1):
        # Each side has a spread of its own: energies rise steeply and never fall far.
        here = finite & (side * centred > 0)
        if here.any():
            sigma = MAD_TO_SIGMA * np.median(np.abs(centred[here]))
            beyond |= here & (np.abs(centred) > SIGMA * sigma)
    return beyond
