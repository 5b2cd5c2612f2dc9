"""Which candidates to label with DFT: acquisition, and the stratified split that comes first."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from aiida_eipnn.science.arrays import FloatArray, IntArray, StrArray
from aiida_eipnn.science.batch_selection import (
    farthest_points,
    largest_cluster_points,
    most_informative_points,
    representative_points,
)
from aiida_eipnn.science.feature_uncertainty import last_layer_uncertainty, mahalanobis_distance
from aiida_eipnn.science.predictions import Predictions
from aiida_eipnn.science.settings import build

REST = "pool"


class Strategy(StrEnum):
    """How candidates are chosen."""

    RANDOM = "random"
    UNCERTAINTY = "uncertainty"
    DIVERSE = "diverse"
    FARTHEST = "farthest"
    MAX_DET = "max_det"
    LCMD = "lcmd"
    REPRESENTATIVE = "representative"


# Strategies that look at the features alone, and at those of what is labelled already.
_BY_FEATURES = {
    Strategy.FARTHEST: farthest_points,
    Strategy.MAX_DET: most_informative_points,
    Strategy.LCMD: largest_cluster_points,
}


# All distances between so many are in memory: 32 MB, and twice as much for a moment.
MAX_REPRESENTED = 2000


class Measure(StrEnum):
    """By what candidates are ranked."""

    COMMITTEE = "committee"
    LAST_LAYER = "last_layer"
    DENSITY = "density"
    ATOM_LAST_LAYER = "atom_last_layer"
    ATOM_DENSITY = "atom_density"


_BY_KNOWN = {
    Measure.LAST_LAYER: last_layer_uncertainty,
    Measure.DENSITY: mahalanobis_distance,
}

# What the networks say of each atom; of a configuration the largest counts.
_BY_ATOMS = {
    Measure.ATOM_LAST_LAYER: "atom_energy_std",
    Measure.ATOM_DENSITY: "strangeness",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquisitionParameters:
    """How many candidates to choose, and how.

    Parameters
    ----------
    n_select
        Configurations to label.
    strategy
        ``random``: any candidate, the baseline. ``uncertainty``: the most uncertain ones.
        ``diverse``: those that differ most from one another among the uncertain ones.
        ``representative``: those that stand for the uncertain ones, with what is labelled.
        ``farthest``, ``max_det``, ``lcmd``: those that differ from one another and from what is
        labelled (:mod:`aiida_eipnn.science.batch_selection`), among those in the window.
    measure
        What ``uncertainty``, ``diverse`` and ``representative`` call uncertain: ``committee``, the
        spread of the members' forces; ``last_layer`` and ``density``, how strange features are
        to what is labelled (:mod:`aiida_eipnn.science.feature_uncertainty`);
        ``atom_last_layer`` and ``atom_density``, the same of its strangest atom, by what the
        networks learnt (``atom_energy_std`` and ``strangeness`` of the predictions). The window
        is always one of the committee.
    top_fraction
        Share of the candidates that ``diverse`` and ``representative`` call uncertain; never fewer
        than ``n_select``.
    min_uncertainty, max_uncertainty
        Window for all strategies but ``random``, in eV/Å. A configuration above it is more
        likely unphysical than informative, and DFT may not converge there.
    max_error
        The same in terms of errors, in eV/Å: a configuration whose worst force is expected to be
        further off is no candidate. What is expected is its uncertainty times the scale that the
        last labelled batch gave (:func:`aiida_eipnn.science.metrics.error_scale`); nothing is
        left out while there is none.
    cost_exponent
        Power of the DFT cost by which what a candidate brings is divided: 0 counts points, 1 what
        they cost.
    stratified
        Whether each type of configuration gets points in proportion to its candidates.
    allow_fewer
        Take all there are where there are fewer than ``n_select``; otherwise that is an error.

    Raises
    ------
    ValueError
        If a number is out of range or the strategy is unknown.
    """

    n_select: int
    strategy: Strategy = Strategy.REPRESENTATIVE
    measure: Measure = Measure.COMMITTEE
    top_fraction: float = 0.5
    min_uncertainty: float = 0.0
    max_uncertainty: float | None = None
    max_error: float | None = None
    cost_exponent: float = 0.0
    stratified: bool = False
    allow_fewer: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in list(Strategy):
            raise ValueError(
                f"no acquisition strategy {self.strategy!r}, only {[str(s) for s in Strategy]}"
            )
        if self.measure not in list(Measure):
            raise ValueError(
                f"no measure of uncertainty {self.measure!r}, only {[str(m) for m in Measure]}"
            )
        if self.n_select < 1:
            raise ValueError(f"n_select is {self.n_select}; choose at least one candidate")
        if not 0 < self.top_fraction <= 1:
            raise ValueError(f"top_fraction is {self.top_fraction}; it must lie in (0, 1]")
        if not 0 <= self.cost_exponent < math.inf:
            raise ValueError(f"cost_exponent is {self.cost_exponent}; it must be 0 or above")
        if not 0 <= self.min_uncertainty < math.inf:
            raise ValueError(f"min_uncertainty is {self.min_uncertainty}; it must be 0 or above")
        if self.max_error is not None and not self.max_error > 0:
            raise ValueError(f"max_error is {self.max_error} eV/Å; it must be above zero")
        if self.max_uncertainty is not None and not self.max_uncertainty > self.min_uncertainty:
            raise ValueError(
                f"no uncertainty lies between {self.min_uncertainty} and {self.max_uncertainty} "
                "eV/Å; raise max_uncertainty or lower min_uncertainty"
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build from plain values by name."""
        return build(cls, content, "acquisition")

    def most_uncertain(self, error_scale: float | None) -> float | None:
        """Return the uncertainty above which nothing is a candidate, in eV/Å, or ``None``.

        Parameters
        ----------
        error_scale
            Factor that turns an uncertainty into the error to expect of the worst force.
        """
        limits = [] if self.max_uncertainty is None else [self.max_uncertainty]
        # A scale of 0 expects no error anywhere.
        if self.max_error is not None and error_scale:
            limits.append(self.max_error / error_scale)
        return min(limits, default=None)


class PoolFacts(NamedTuple):
    """What else is known of the configurations of the predictions, in their order.

    Parameters
    ----------
    cost
        Relative cost of a DFT run (:func:`aiida_eipnn.science.dft_cost.estimate_cost`).
        Shape ``(n,)``.
    config_types
        Shape ``(n,)``.
    """

    cost: FloatArray
    config_types: StrArray


class Acquisition(NamedTuple):
    """The chosen rows of the predictions, in the order of choice, and their uncertainties.

    Both of shape ``(n_selected,)``; the scores are in eV/Å.
    """

    rows: IntArray
    scores: FloatArray


def acquire(
    predictions: Predictions,
    candidates: IntArray,
    parameters: AcquisitionParameters,
    rng: np.random.Generator,
    known: IntArray | None = None,
    facts: PoolFacts | None = None,
    error_scale: float | None = None,
) -> Acquisition:
    """Choose the candidates to label.

    Parameters
    ----------
    predictions
        What the committee says about the pool.
    candidates
        Rows of ``predictions`` that are up for DFT; of equal configurations the first counts.
    parameters
        How many, and how.
    rng
        Used by ``random`` only.
    known
        Rows of ``predictions`` that are labelled already.
    facts
        Needed where cost or type of a configuration counts.
    error_scale
        Factor that turns an uncertainty into the error to expect of the worst force.

    Raises
    ------
    ValueError
        If there are fewer candidates than to choose, unless the parameters allow it, or if facts
        are missing.
    """
    rows = first_of_each(predictions.ids, np.asarray(candidates, dtype=np.int64))
    uncertainty = predictions.uncertainty
    rows = within_window(rows, uncertainty, parameters, error_scale)
    if len(rows) < parameters.n_select and not parameters.allow_fewer:
        raise ValueError(
            f"cannot pick {parameters.n_select} of {len(rows)} candidates "
            f"({len(candidates)} before duplicates and the uncertainty window); "
            "lower n_select, widen the window or set allow_fewer"
        )
    n = min(parameters.n_select, len(rows))
    if n == 0:
        return Acquisition(rows, uncertainty[rows])
    chosen = np.zeros(0, dtype=np.int64)
    labelled = np.zeros(0, dtype=np.int64) if known is None else known
    for part, quota in _strata(rows, n, parameters, facts):
        choose = _Chooser(predictions, parameters, rng, np.concatenate([labelled, chosen]), facts)
        chosen = np.concatenate([chosen, part[choose.places(part, quota)]])
    return Acquisition(chosen, uncertainty[chosen])


def _strata(
    rows: IntArray, n: int, parameters: AcquisitionParameters, facts: PoolFacts | None
) -> list[tuple[IntArray, int]]:
    """Return the candidates of each type and how many of them to choose."""
    if not parameters.stratified:
        return [(rows, n)]
    types = _need(facts, "stratified acquisition", "types of the configurations").config_types[rows]
    parts = [rows[types == name] for name in np.unique(types)]
    quota = shares(np.array([len(part) for part in parts], dtype=np.int64), n)
    return [(part, int(size)) for part, size in zip(parts, quota, strict=True) if size]


def _need(facts: PoolFacts | None, what: str, which: str) -> PoolFacts:
    if facts is None:
        raise ValueError(f"{what} needs the {which} of the pool, and they are not given")
    return facts


class _Chooser(NamedTuple):
    """How some of the candidates of one type are chosen."""

    predictions: Predictions
    parameters: AcquisitionParameters
    rng: np.random.Generator
    known: IntArray
    facts: PoolFacts | None

    def places(self, rows: IntArray, n: int) -> IntArray:
        """Return which of these rows to take, the best first."""
        strategy = self.parameters.strategy
        if strategy == Strategy.RANDOM:
            return self.rng.choice(len(rows), size=n, replace=False)
        features = standardise(self.predictions.features[np.concatenate([rows, self.known])])
        features, known = features[: len(rows)], features[len(rows) :]
        worth = self._worth(rows)
        if choose := _BY_FEATURES.get(strategy):
            return choose(features, n, known if len(known) else None, worth)
        ranked = self._unsure(rows, features, known)
        # A stable sort: equal uncertainties keep the order of the pool on every machine.
        order = np.argsort(-worth * ranked, kind="stable")
        if strategy == Strategy.UNCERTAINTY:
            return order[:n]
        top = order[: max(n, math.ceil(self.parameters.top_fraction * len(order)))]
        if strategy == Strategy.REPRESENTATIVE:
            top = _thinned(top, max(n, MAX_REPRESENTED))
            there = known if len(known) else None
            return top[representative_points(features[top], n, there, worth[top])]
        unlike = standardise(self.predictions.features[rows[top]])
        return top[farthest_points(unlike, n, None, worth[top])]

    def _unsure(self, rows: IntArray, features: FloatArray, known: FloatArray) -> FloatArray:
        """Return how uncertain each of these rows is, by the measure that is asked for."""
        measure = self.parameters.measure
        if by_known := _BY_KNOWN.get(measure):
            return by_known(features, known)
        return self.predictions.largest(_BY_ATOMS.get(measure, "forces_std"))[rows]

    def _worth(self, rows: IntArray) -> FloatArray:
        """Return by what to multiply what each of these rows brings."""
        if self.parameters.cost_exponent == 0:
            return np.ones(len(rows))
        cost = _need(self.facts, "cost-aware acquisition", "DFT cost").cost[rows]
        worth: FloatArray = (cost / np.median(cost)) ** -self.parameters.cost_exponent
        return worth


def _thinned(order: IntArray, n: int) -> IntArray:
    """Return ``n`` at most, evenly from the first to the last."""
    if len(order) <= n:
        return order
    return order[np.linspace(0, len(order) - 1, n).round().astype(np.int64)]


def within_window(
    rows: IntArray,
    uncertainty: FloatArray,
    parameters: AcquisitionParameters,
    error_scale: float | None = None,
) -> IntArray:
    """Return the rows whose uncertainty, in eV/Å, lies in the window of the parameters.

    ``random`` has none.
    """
    if parameters.strategy == Strategy.RANDOM:
        return rows
    # A comparison with NaN is False: what has no uncertainty is left out.
    inside = uncertainty[rows] >= parameters.min_uncertainty
    if (highest := parameters.most_uncertain(error_scale)) is not None:
        inside &= uncertainty[rows] <= highest
    return rows[inside]


def standardise(features: NDArray[np.float32] | FloatArray) -> FloatArray:
    """Shift and scale each feature to mean 0 and deviation 1; a constant one becomes 0."""
    # In place: a pool of 100,000 has a hundred megabytes of features.
    scaled: FloatArray = features - features.mean(axis=0, dtype=np.float64)
    spread = np.sqrt(np.einsum("ij,ij->j", scaled, scaled) / len(scaled))
    largest = np.maximum(features.max(axis=0), -features.min(axis=0))
    # A feature that varies by rounding only must not be blown up to the weight of the others.
    rounding = max(1e-9, 4 * float(np.finfo(features.dtype).eps))
    constant = spread <= rounding * (largest + 1e-300)
    scaled /= np.where(constant, 1.0, spread)
    scaled[:, constant] = 0.0
    return scaled


def stratified_split(
    config_types: StrArray, sizes: Mapping[str, int], rng: np.random.Generator
) -> dict[str, IntArray]:
    """Split configurations into named parts that hold every type in proportion.

    Parameters
    ----------
    config_types
        Type of each configuration. Shape ``(n,)``.
    sizes
        Size of each part, such as ``{"test": 40, "initial": 10}``; what is left over comes back
        as ``pool``, unless ``pool`` has a size of its own. Each part has at least one of every
        type, where it is large enough and enough are there.
    rng
        Decides which configurations of a type go where.

    Returns
    -------
    dict
        Rows of each part, ascending.

    Raises
    ------
    ValueError
        If the parts need more configurations than there are, or a size is below zero.
    """
    config_types = np.asarray(config_types)
    if bad := {name: size for name, size in sizes.items() if size < 0}:
        raise ValueError(f"a part cannot have a size below zero: {bad}")
    if sum(sizes.values()) > len(config_types):
        raise ValueError(
            f"cannot split {len(config_types)} configurations into {dict(sizes)}: that needs "
            f"{sum(sizes.values())}; make the pool larger or the parts smaller"
        )
    left = [
        rng.permutation(np.flatnonzero(config_types == name)) for name in np.unique(config_types)
    ]
    parts: dict[str, IntArray] = {}
    for part, size in sizes.items():
        quota = shares(np.array([len(rows) for rows in left], dtype=np.int64), size)
        parts[part] = _sorted([rows[:k] for rows, k in zip(left, quota, strict=True)])
        left = [rows[k:] for rows, k in zip(left, quota, strict=True)]
    parts.setdefault(REST, _sorted(left))
    return parts


def shares(available: IntArray, size: int) -> IntArray:
    """Share ``size`` among groups in proportion to ``available``, at least one each if it can be.

    Parameters
    ----------
    available
        Members of each group. Shape ``(n_groups,)``.
    size
        How many to take in all, at most the sum of ``available``.
    """
    quota = np.zeros_like(available)
    present = np.flatnonzero(available > 0)
    if size < len(present):
        # Too few for one each: the largest groups come first.
        quota[present[np.argsort(-available[present], kind="stable")[:size]]] = 1
        return quota
    quota[present] = 1
    exact = size * available / max(int(available.sum()), 1)
    while quota.sum() < size:
        behind = np.where(quota < available, exact - quota, -np.inf)
        quota[behind.argmax()] += 1
    return quota


def first_of_each(ids: StrArray, rows: IntArray) -> IntArray:
    """Return of these rows the first with each id."""
    return rows[np.sort(np.unique(ids[rows], return_index=True)[1])]


def _sorted(parts: list[IntArray]) -> IntArray:
    return np.sort(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)
