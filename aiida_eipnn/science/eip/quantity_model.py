"""One quantity, energy or forces: candidates judged on held-out labels, mixed, errors expected."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.eip.candidates import (
    MIN_TO_LEARN,
    log_forces,
    mean_by_configuration,
)
from aiida_eipnn.science.eip.expected_error import Reliability, Signs, expect_errors
from aiida_eipnn.science.eip.predictors import BEST, LabelledSet, Split
from aiida_eipnn.science.reference import EXPECTED_WEIGHT
from aiida_eipnn.science.regression import squared_distances

MIX = "mix of candidates"
# Weight of a candidate in the mix: this power of its inverse held-out error. With 14 and 28 EIPs
# and 10 to 400 labels such a mix errs no more than the candidate that hindsight would choose.
SHARPNESS = 8
# A single candidate must be better than the mix by this many standard errors: of a dozen, one
# seems to be by chance.
CLEARLY = 2.0

Values = Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantityModel:
    """How energies, or forces, were made.

    Parameters
    ----------
    errors
        Mean absolute error of each candidate on DFT labels it did not see, in eV/atom or eV/Å;
        empty where one label leaves nothing to hold out.
    chosen
        The candidate that is used.
    weights
        Weight of each candidate in what is used.
    reliability
        How well the expected errors do; ``None`` where labels are too few to tell.
    """

    errors: dict[str, float]
    chosen: str
    weights: dict[str, float]
    reliability: Reliability | None


class Quantity(NamedTuple):
    """What differs between energies and forces.

    Parameters
    ----------
    predict
        Returns candidates by name, a row for each test configuration, or for each of its atoms.
    truth
        Returns the DFT labels of rows in the same way.
    disagreement
        Returns how far EIPs are from one another, for each configuration.
    names
        The first of these that can be had is used; with none, the best or the mix.
    floor, prior
        Smallest error to expect, and error to expect before any label is seen.
    """

    predict: Callable[[LabelledSet, Split], dict[str, FloatArray]]
    truth: Callable[[LabelledSet, IntArray], FloatArray]
    disagreement: Callable[[LabelledSet, IntArray], FloatArray]
    names: tuple[str, ...]
    floor: float
    prior: float


class Found(NamedTuple):
    """Predictions and expected errors of the wanted rows, and how they were made."""

    predicted: FloatArray
    expected: FloatArray
    model: QuantityModel


class _Choice(NamedTuple):
    """What is used, the weights that make it of the candidates, and its held-out errors."""

    name: str
    weights: dict[str, float]
    errors: FloatArray


def model_quantity(
    train: LabelledSet, pool: LabelledSet, parts: IntArray, quantity: Quantity
) -> Found:
    """Judge the candidates on held-out labels, and let the chosen one label what is wanted.

    Parameters
    ----------
    train
        The ``n`` configurations with DFT labels.
    pool
        The same, in the same order, and after them what is wanted.
    parts
        Number of the part of each configuration with a label. Shape ``(n,)``.
    quantity
        Energy or forces.
    """
    n = len(parts)
    split = Split(np.arange(n), np.arange(n, len(pool.n_atoms)), parts)
    found = quantity.predict(pool, split)
    held = {name: held for name, held in _hold_out(train, parts, quantity).items() if name in found}
    if not held:
        return _without_hold_out(pool, split, found, quantity)
    truth = quantity.truth(train, split.train)
    errors = {name: _errors(values, truth, train.n_atoms) for name, values in held.items()}
    mixed = _mix_held_out(held, errors, train.n_atoms, parts)
    errors[MIX] = _errors(mixed, truth, train.n_atoms)
    choice = _choose(errors, quantity.names)
    predicted = _mix(found, choice.weights)
    unlike = _mix_weights({name: errors[name] for name in held})
    signs = (
        _spread(held, mixed, unlike, train.n_atoms),
        _spread(found, _mix(found, unlike), unlike, pool.n_atoms[n:]),
    )
    expected, how = _expect(pool, split, quantity, choice.errors, signs)
    model = QuantityModel(
        errors={name: float(values.mean()) for name, values in errors.items()},
        chosen=choice.name,
        weights=choice.weights,
        reliability=how,
    )
    return Found(predicted, expected, model)


def _hold_out(train: LabelledSet, parts: IntArray, quantity: Quantity) -> dict[str, FloatArray]:
    """Return predictions of each row by candidates that did not see its part."""
    truth = quantity.truth(train, np.arange(len(parts)))
    held: dict[str, FloatArray] = {}
    if parts.max() == 0:
        return held
    counts: dict[str, int] = {}
    for part in range(parts.max() + 1):
        known, unseen = np.flatnonzero(parts != part), np.flatnonzero(parts == part)
        rest = np.unique(parts[known], return_inverse=True)[1].astype(np.int64)
        rows = unseen if truth.ndim == 1 else train.atoms(unseen)
        for name, values in quantity.predict(train, Split(known, unseen, rest)).items():
            held.setdefault(name, np.zeros(truth.shape))[rows] = values
            counts[name] = counts.get(name, 0) + 1
    # With EIPs that labelled little, a part may have left none to align.
    return {name: values for name, values in held.items() if counts[name] == parts.max() + 1}


def _without_hold_out(
    pool: LabelledSet, split: Split, found: dict[str, FloatArray], quantity: Quantity
) -> Found:
    """Return what a single label allows: no candidate can be judged, errors are as always."""
    name = _first((*quantity.names, BEST), found)
    expected = np.maximum(quantity.prior, quantity.disagreement(pool, split.train)[split.test])
    model = QuantityModel(errors={}, chosen=name, weights={name: 1.0}, reliability=None)
    return Found(found[name], expected, model)


def _first(names: tuple[str, ...], there: Mapping[str, object]) -> str:
    return next((name for name in names if name in there), next(iter(there)))


def _errors(values: FloatArray, truth: FloatArray, n_atoms: IntArray) -> FloatArray:
    """Return the absolute error of each configuration, of forces the mean over components."""
    errors = np.abs(values - truth)
    return errors if errors.ndim == 1 else mean_by_configuration(errors.mean(axis=1), n_atoms)


def _mix_weights(errors: Values) -> dict[str, float]:
    """Return the weights of candidates, by their mean error."""
    means = np.maximum([values.mean() for values in errors.values()], 1e-12)
    weights = (means / means.min()) ** -SHARPNESS
    return {
        name: float(weight) for name, weight in zip(errors, weights / weights.sum(), strict=True)
    }


def _mix(values: Values, weights: Mapping[str, float]) -> FloatArray:
    parts = [weight * values[name] for name, weight in weights.items()]
    return np.asarray(np.sum(parts, axis=0), dtype=np.float64)


def _mix_held_out(held: Values, errors: Values, n_atoms: IntArray, parts: IntArray) -> FloatArray:
    """Return what the mix says of each row with weights that its part had no say in."""
    first = next(iter(held.values()))
    owner = parts if first.ndim == 1 else np.repeat(parts, n_atoms)
    mixed = np.empty(first.shape)
    for part in np.unique(parts):
        weights = _mix_weights({name: errors[name][parts != part] for name in held})
        rows = owner == part
        mixed[rows] = _mix({name: values[rows] for name, values in held.items()}, weights)
    return mixed


def _choose(errors: Values, names: tuple[str, ...]) -> _Choice:
    """Return the candidate that was asked for, or the mix unless a single one is clearly better."""
    if names:
        name = _first(names, errors)
        return _Choice(name, {name: 1.0}, errors[name])
    single = {name: values for name, values in errors.items() if name != MIX}
    best = min(single, key=lambda name: single[name].mean())
    worse = errors[MIX] - single[best]
    if worse.mean() > CLEARLY * worse.std() / np.sqrt(len(worse)) or len(single) == 1:
        return _Choice(best, {best: 1.0}, single[best])
    return _Choice(MIX, _mix_weights(single), errors[MIX])


def _spread(
    values: Values, mixed: FloatArray, weights: Mapping[str, float], n_atoms: IntArray
) -> FloatArray:
    """Return how far candidates are from their mix. Shape ``(n,)``."""
    return np.asarray(
        sum(weight * _errors(values[name], mixed, n_atoms) for name, weight in weights.items()),
        dtype=np.float64,
    )


def _expect(
    pool: LabelledSet,
    split: Split,
    quantity: Quantity,
    errors: FloatArray,
    spreads: tuple[FloatArray, FloatArray],
) -> tuple[FloatArray, Reliability | None]:
    """Return the expected errors of the wanted rows, and how well that works on held-out ones."""
    disagreement = quantity.disagreement(pool, split.train)
    if len(errors) < MIN_TO_LEARN:
        total = EXPECTED_WEIGHT * quantity.prior**2 + (errors**2).sum()
        usual = float(np.sqrt(total / (EXPECTED_WEIGHT + len(errors))))
        return np.maximum(usual, disagreement[split.test]), None
    size = np.median(log_forces(pool), axis=1) if pool.used.any() else np.zeros(len(disagreement))
    distances = _distances(pool.described.structure, split)
    held, wanted = (
        Signs(
            trouble=np.column_stack(
                [
                    np.log(disagreement[rows] + quantity.floor),
                    np.log(spread + quantity.floor),
                    np.log(distance + 1e-2),
                    size[rows],
                ]
            ),
            structure=pool.described.structure[rows],
            distance=distance,
        )
        for rows, spread, distance in zip(split[:2], spreads, distances, strict=True)
    )
    return expect_errors(held, errors, split.parts, wanted, quantity.floor)


def _distances(structure: FloatArray, split: Split) -> tuple[FloatArray, FloatArray]:
    """Return the distance to the nearest labelled row of another part, or of any part.

    Descriptors count in units of their spread over all rows.
    """
    spread = structure.std(axis=0)
    points = structure / np.where(spread > 1e-9, spread, np.inf)
    known = points[split.train]
    among = squared_distances(known, known)
    among[split.parts[:, None] == split.parts] = np.inf
    to_known = squared_distances(points[split.test], known)
    return np.sqrt(among.min(axis=1)), np.sqrt(to_known.min(axis=1))
