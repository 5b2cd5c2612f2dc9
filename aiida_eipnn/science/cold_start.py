"""The first DFT points, before there is any: where EIPs disagree, and what is typical there."""

from collections.abc import Callable

import numpy as np

from aiida_eipnn.science.acquisition import standardise
from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.batch_selection import representative_points
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.descriptors import describe_structures
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.reference import element_fractions, fit_robust_shifts

# EIPs that labelled less than this part of the pool are not asked.
MIN_LABELLED = 0.5
# Describing takes a millisecond each.
MAX_DISPUTED = 2000


def eip_disagreement(configurations: Configurations, eip_labels: Labels) -> FloatArray:
    """Return how far EIPs are from one another, in eV/atom. Shape ``(n,)``.

    The standard deviation of the energies of the better half of the EIPs, each on its own zero
    (one energy per element, fitted robustly to the pool). Without any DFT label, the better half
    is that closer to the median of all. NaN where fewer than two of them have a label.

    Parameters
    ----------
    configurations
        ``n`` configurations.
    eip_labels
        Labels of the EIPs on the same configurations, in the same order.

    Raises
    ------
    ValueError
        If fewer than two EIPs labelled half of the configurations.
    """
    known = eip_labels.ok & np.isfinite(eip_labels.energy)
    used = np.flatnonzero(known.mean(axis=0) >= MIN_LABELLED)
    if len(used) < 2:
        raise ValueError(
            f"{len(used)} of {len(eip_labels.sources)} EIPs labelled half of the configurations; "
            "two at least are needed to disagree"
        )
    fractions = element_fractions(configurations, np.array(configurations.elements))
    aligned = np.full((len(configurations), len(used)), np.nan)
    for place, column in enumerate(used):
        rows = np.flatnonzero(known[:, column])
        per_atom = eip_labels.energy[rows, column] / configurations.n_atoms[rows]
        aligned[rows, place] = per_atom - fractions[rows] @ fit_robust_shifts(
            fractions[rows], per_atom
        )
    return _spread(aligned[:, _better_half(aligned)])


def first_points(configurations: Configurations, eip_labels: Labels, n: int) -> IntArray:
    """Return ``n`` rows to label first, without any DFT label.

    Parameters
    ----------
    configurations
        Candidates.
    eip_labels
        What EIPs say of them, in the same order.
    n
        How many to choose.

    Raises
    ------
    ValueError
        If fewer than two EIPs labelled half of the candidates, or fewer than ``n`` candidates have
        two labels.
    """

    def describe(rows: IntArray) -> FloatArray:
        return standardise(describe_structures(configurations.take(rows)).structure)

    return pick_disputed(eip_disagreement(configurations, eip_labels), describe, n)


def pick_disputed(
    disagreement: FloatArray,
    describe: Callable[[IntArray], FloatArray],
    n: int,
    top_fraction: float = 0.5,
) -> IntArray:
    """Choose ``n`` rows that represent those that EIPs disagree about.

    Farthest points among them are outliers, and with few labels a network learns little from
    outliers: see docs/topics/active-learning-results.md.

    Parameters
    ----------
    disagreement
        From :func:`eip_disagreement`; what is not a number is no candidate. Shape ``(n_rows,)``.
    describe
        Returns standardised features of rows, of shape ``(n_rows, n_features)``; it is asked about
        the disputed ones only, and they are ``MAX_DISPUTED`` at most.
    n
        How many to choose.
    top_fraction
        Share of the candidates that counts as disputed, the most disputed ones; never fewer than
        ``n``.

    Raises
    ------
    ValueError
        If there are fewer candidates than to choose.
    """
    candidates = np.flatnonzero(np.isfinite(disagreement))
    order = candidates[np.argsort(-disagreement[candidates], kind="stable")]
    part = min(int(np.ceil(top_fraction * len(order))), MAX_DISPUTED)
    disputed = order[: max(n, part)]
    return disputed[representative_points(describe(disputed), n)]


def _better_half(aligned: FloatArray) -> IntArray:
    """Return the columns that are closer to the median of all."""
    middle = _median(aligned)
    distance = np.array([_median_of(np.abs(column - middle)) for column in aligned.T])
    n_better = max(2, -(-aligned.shape[1] // 2))
    return np.argsort(distance, kind="stable")[:n_better]


def _median(values: FloatArray) -> FloatArray:
    return np.array([_median_of(row) for row in values])


def _median_of(values: FloatArray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _spread(values: FloatArray) -> FloatArray:
    return np.array(
        [
            float(np.std(row[np.isfinite(row)])) if np.isfinite(row).sum() > 1 else np.nan
            for row in values
        ]
    )
