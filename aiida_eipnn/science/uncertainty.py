"""Is the committee unsure where it is wrong: rank correlation, scale, coverage."""

from dataclasses import dataclass

import numpy as np

from aiida_eipnn.science.arrays import FloatArray


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


def coverage(uncertainty: FloatArray, error: FloatArray, n_sigma: float = 1.0) -> float:
    """Return the share of absolute errors that are at most ``n_sigma`` uncertainties."""
    _check_pairs(uncertainty, error)
    return float(np.mean(np.abs(error) <= n_sigma * uncertainty))


def ranks(values: FloatArray) -> FloatArray:
    """Return the rank of each value, from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]


def _check_pairs(first: FloatArray, second: FloatArray) -> None:
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"need one number on each side, at least one pair; got shapes {first.shape} "
            f"and {second.shape}"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("uncertainties and errors must be finite; drop the missing ones first")
