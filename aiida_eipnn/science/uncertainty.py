"""Is the committee unsure where it is wrong: rank correlation, scale, coverage."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from aiida_eipnn.science.arrays import FloatArray, IntArray

# Probabilities whose intervals are looked at, and bins of the uncertainty.
LEVELS = (0.68, 0.9, 0.95)
N_BINS = 10
# Points of a curve that is drawn.
N_CURVE = 20
# Parts of the groups that conformal intervals are judged on in turn.
CONFORMAL_FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How uncertainties compare with errors.

    Parameters
    ----------
    spearman
        Rank correlation of uncertainty and absolute error.
    scale
        Factor that turns the uncertainty into a standard error (:func:`calibration_scale`).
    coverage
        Share of errors below one scaled uncertainty; 0.68 for normally distributed errors.
    n
        Number of pairs.
    """

    spearman: float
    scale: float
    coverage: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    r"""What is known of uncertainties whose scale is calibrated.

    Parameters
    ----------
    spearman
        Rank correlation of uncertainty and absolute error.
    nll
        Mean negative logarithm of the likelihood of the errors, :math:`N(0, \sigma_i^2)`; with
        errors in eV/Å.
    miscalibration_area
        Area between the share of errors that lie within the interval of each probability and that
        probability: 0 is perfect, 0.5 the worst.
    ence
        Mean over ten bins of :math:`\sigma`, as many in each, of
        :math:`|\sigma_b - e_b| / \sigma_b` with root mean squares [1]_.
    coverage
        Share of errors within the interval of each probability, as ``"0.68"``.
    rejection
        How far the error falls when the most uncertain are left out, from 0 as by chance to 1 as
        if the errors were known; negative where it rises.
    n
        Number of pairs.

    References
    ----------
    .. [1] Levi et al., Sensors 22, 5540 (2022).
    """

    spearman: float
    nll: float
    miscalibration_area: float
    ence: float
    coverage: dict[str, float]
    rejection: float
    n: int


def judge_uncertainties(sigma: FloatArray, error: FloatArray) -> Panel:
    """Compare calibrated uncertainties with the errors that were made, both of shape ``(n,)``.

    Raises
    ------
    ValueError
        If an uncertainty is not above zero.
    """
    _check_pairs(sigma, error)
    if not (sigma > 0).all():
        raise ValueError(f"{int((sigma <= 0).sum())} of {len(sigma)} uncertainties are not above 0")
    error = np.abs(error)
    z = error / sigma
    return Panel(
        spearman=spearman(sigma, error),
        nll=float(np.mean(0.5 * np.log(2 * np.pi * sigma**2) + 0.5 * z**2)),
        miscalibration_area=_miscalibration_area(z),
        ence=_calibration_error(sigma, error),
        coverage={str(level): float(np.mean(z <= normal_quantile(level))) for level in LEVELS},
        rejection=_rejection(sigma, error),
        n=len(sigma),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """What the panel is the summary of, as lines to draw, with five digits.

    Parameters
    ----------
    expected, observed
        Probabilities, and the share of errors within the intervals that should have them.
    kept
        Shares of the pairs that are kept when the most uncertain are left out, from all down.
    kept_error, least_error
        Mean absolute error of those, and of as many with the least errors.
    bin_sigma, bin_error
        Root mean squares of uncertainty and error in bins of the uncertainty, as many pairs in
        each.
    """

    expected: tuple[float, ...]
    observed: tuple[float, ...]
    kept: tuple[float, ...]
    kept_error: tuple[float, ...]
    least_error: tuple[float, ...]
    bin_sigma: tuple[float, ...]
    bin_error: tuple[float, ...]


def uncertainty_curves(sigma: FloatArray, error: FloatArray) -> Curves:
    """Return the curves of calibrated uncertainties, above zero, and errors, both ``(n,)``."""
    _check_pairs(sigma, error)
    error = np.abs(error)
    expected = np.linspace(0, 1, N_CURVE + 1)[1:-1]
    kept = np.linspace(1, 0, N_CURVE + 1)[:-1]
    last = np.ceil(kept * len(error) - 1e-9).astype(int) - 1
    by_sigma = _mean_of_kept(error[np.argsort(sigma, kind="stable")])
    by_error = _mean_of_kept(np.sort(error))
    bin_sigma, bin_error = _bins(sigma, error)
    return Curves(
        expected=_digits(expected),
        observed=_digits(_observed(error / sigma, expected)),
        kept=_digits(kept),
        kept_error=_digits(by_sigma[last]),
        least_error=_digits(by_error[last]),
        bin_sigma=_digits(bin_sigma),
        bin_error=_digits(bin_error),
    )


def _digits(values: FloatArray) -> tuple[float, ...]:
    return tuple(float(f"{value:.5g}") for value in values)


def normal_quantile(level: float) -> float:
    """Return the number of standard deviations within which normal errors lie so often."""
    return NormalDist().inv_cdf((1 + level) / 2)


def calibrate(uncertainty: FloatArray, error: FloatArray) -> Calibration:
    """Compare uncertainties with the errors that were made, both of shape ``(n,)``."""
    scale = calibration_scale(uncertainty, error)
    return Calibration(
        spearman=spearman(uncertainty, np.abs(error)),
        scale=scale,
        coverage=coverage(scale * uncertainty, error),
        n=len(uncertainty),
    )


def spearman(first: FloatArray, second: FloatArray) -> float:
    """Return the rank correlation; ties share their mean rank. NaN where one side is constant."""
    _check_pairs(first, second)
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else float("nan")


def calibration_scale(uncertainty: FloatArray, error: FloatArray) -> float:
    r"""Return the factor on the uncertainty that is most likely, given the errors.

    For errors drawn from :math:`N(0, (s u_i)^2)` the likelihood is largest at
    :math:`s = \\sqrt{\\langle e_i^2 / u_i^2 \\rangle}`. Pairs with no uncertainty are left out:
    no factor can repair them.

    Raises
    ------
    ValueError
        If no uncertainty is above zero.
    """
    _check_pairs(uncertainty, error)
    used = uncertainty > 0
    if not used.any():
        raise ValueError(
            f"all {len(uncertainty)} uncertainties are zero; a committee of one member, or of "
            "equal members, has no disagreement to calibrate"
        )
    return float(np.sqrt(np.mean((error[used] / uncertainty[used]) ** 2)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Conformal:
    """Intervals that hold whatever the errors are distributed like, if new ones are of their kind.

    Parameters
    ----------
    level
        Probability that an error is within its interval.
    factor
        Half the width of an interval over the uncertainty.
    coverage
        Share of errors within intervals that other configurations gave.
    n
        Number of pairs.
    """

    level: float
    factor: float
    coverage: float
    n: int


def conformal_factor(uncertainty: FloatArray, error: FloatArray, level: float) -> float:
    r"""Return the factor on the uncertainty that gives intervals of a probability.

    The :math:`\lceil (n + 1) p \rceil`-th smallest of :math:`|e_i| / u_i`: the error of a new
    pair, exchangeable with these, is within :math:`\pm q u` with a probability of at least
    :math:`p` [1]_. Infinite where there are too few pairs for that.

    Parameters
    ----------
    uncertainty, error
        Of ``n`` pairs, none of which was learnt from. Shape ``(n,)``.
    level
        The probability :math:`p`.

    Raises
    ------
    ValueError
        If an uncertainty is not above zero, or a level not between 0 and 1.

    References
    ----------
    .. [1] Lei et al., J. Am. Stat. Assoc. 113, 1094 (2018).
    """
    _check_pairs(uncertainty, error)
    if not 0 < level < 1:
        raise ValueError(f"a probability must be between 0 and 1, not {level}")
    if not (uncertainty > 0).all():
        raise ValueError(
            f"{int((uncertainty <= 0).sum())} of {len(uncertainty)} uncertainties are not above 0"
        )
    rank = int(np.ceil((len(error) + 1) * level))
    if rank > len(error):
        return float("inf")
    return float(np.sort(np.abs(error) / uncertainty)[rank - 1])


def judge_conformal(
    uncertainty: FloatArray, error: FloatArray, groups: IntArray, level: float = 0.9
) -> Conformal | None:
    """Return conformal intervals, and how often errors of other groups are within them.

    Parameters
    ----------
    uncertainty, error
        Of ``n`` pairs, none of which was learnt from. Shape ``(n,)``.
    groups
        What each pair belongs to, such as its configuration: pairs of one are alike, so each group
        is judged by intervals of groups of other folds. Shape ``(n,)``.
    level
        The probability.

    Returns
    -------
    Conformal or None
        ``None`` where there are too few pairs for such intervals.
    """
    names, place = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return None
    folds = np.random.default_rng(0).permutation(len(names)) % min(CONFORMAL_FOLDS, len(names))
    inside = np.zeros(len(error), dtype=bool)
    for fold in np.unique(folds):
        held = folds[place] == fold
        factor = conformal_factor(uncertainty[~held], error[~held], level)
        if not np.isfinite(factor):
            return None
        inside[held] = np.abs(error[held]) <= factor * uncertainty[held]
    return Conformal(
        level=level,
        factor=conformal_factor(uncertainty, error, level),
        coverage=float(inside.mean()),
        n=len(error),
    )


def coverage(uncertainty: FloatArray, error: FloatArray, n_sigma: float = 1.0) -> float:
    """Return the share of absolute errors that are at most ``n_sigma`` uncertainties."""
    _check_pairs(uncertainty, error)
    return float(np.mean(np.abs(error) <= n_sigma * uncertainty))


def ranks(values: FloatArray) -> FloatArray:
    """Return the rank of each value, from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]


def _miscalibration_area(z: FloatArray) -> float:
    levels = np.linspace(0, 1, 101)[1:-1]
    return float(np.mean(np.abs(_observed(z, levels) - levels)))


def _observed(z: FloatArray, levels: FloatArray) -> FloatArray:
    """Return the share of scaled errors within the interval of each probability."""
    limits = np.array([normal_quantile(float(level)) for level in levels])
    found: FloatArray = np.searchsorted(np.sort(z), limits, side="right") / len(z)
    return found


def _calibration_error(sigma: FloatArray, error: FloatArray) -> float:
    expected, made = _bins(sigma, error)
    return float(np.mean(np.abs(expected - made) / expected))


def _bins(sigma: FloatArray, error: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return root mean squares of uncertainty and error in bins of the uncertainty."""
    order = np.argsort(sigma, kind="stable")
    bins = np.array_split(order, min(N_BINS, len(order)))
    expected = np.array([np.sqrt(np.mean(sigma[rows] ** 2)) for rows in bins])
    made = np.array([np.sqrt(np.mean(error[rows] ** 2)) for rows in bins])
    return expected, made


def _rejection(sigma: FloatArray, error: FloatArray) -> float:
    by_sigma = _mean_of_kept(error[np.argsort(sigma, kind="stable")])
    by_error = _mean_of_kept(np.sort(error))
    possible = error.mean() - by_error.mean()
    return float((error.mean() - by_sigma.mean()) / possible) if possible > 0 else 0.0


def _mean_of_kept(ordered: FloatArray) -> FloatArray:
    """Return the mean error when only the first 1, 2, ... are kept."""
    kept: FloatArray = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    return kept


def _check_pairs(first: FloatArray, second: FloatArray) -> None:
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"need one number on each side, at least one pair; got shapes {first.shape} "
            f"and {second.shape}"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("uncertainties and errors must be finite; drop the missing ones first")
