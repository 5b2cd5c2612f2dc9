r"""How large the error of a pseudo-label should be, by the errors of those that were held out.

The logarithm of the error is a linear function of a few signs of trouble, plus a smooth one of the
structure where that helps; a factor makes it calibrated. Errors are taken to be distributed as
:math:`p(e) = e^{-e/\sigma} / \sigma`, Laplace's law, with :math:`\sigma` the expected error.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.eip.predictors import LENGTHS, add_kernels
from aiida_eipnn.science.regression import (
    Kernel,
    gaussian_kernels,
    linear_kernel,
    regress_on_kernels,
)
from aiida_eipnn.science.uncertainty import coverage, spearman

# Multiples of the expected error at which the share of errors below is told.
MULTIPLES = (1.0, 2.0, 3.0)
# The same distance from the labels as this share of held-out labels had is still inside.
INSIDE = 0.9
NOISES = (0.3, 3.0, 30.0, 300.0)
SHARES = (0.3, 3.0)
# Signs farther out than this many standard deviations count as that.
FAR_OUT = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """How expected errors compare with the errors of held-out labels.

    Parameters
    ----------
    n
        Held-out labels.
    mean_error, mean_expected
        Means over them, in eV/atom or eV/Å.
    coverage
        Share of errors below 1, 2 and 3 expected errors.
    ideal
        What Laplace's law has there: 0.63, 0.86, 0.95.
    nll
        Mean negative log-likelihood of the errors, less that of one expected error for all: below
        zero where telling configurations apart pays.
    spearman
        Rank correlation of expected error and error; NaN where one of them is constant.
    """

    n: int
    mean_error: float
    mean_expected: float
    coverage: tuple[float, ...]
    ideal: tuple[float, ...]
    nll: float
    spearman: float


class Signs(NamedTuple):
    """What tells good from bad pseudo-labels, each row a configuration.

    ``trouble`` are numbers that rise with the error (``(n, q)``), ``structure`` the descriptors
    (``(n, d)``), ``distance`` that to the nearest configuration that was learnt from (``(n,)``).
    """

    trouble: FloatArray
    structure: FloatArray
    distance: FloatArray


def expect_errors(
    held: Signs, errors: FloatArray, parts: IntArray, wanted: Signs, floor: float
) -> tuple[FloatArray, Reliability]:
    """Return the expected error of each wanted pseudo-label, and how well that works.

    Farther from the labels than nearly all held-out ones were, the error is expected to grow in
    proportion to the distance.

    Parameters
    ----------
    held, wanted
        Signs of the held-out labels and of those that are wanted.
    errors
        Absolute errors of the held-out labels. Shape ``(n,)``.
    parts
        Number of the part of each held-out label.
    floor
        Smallest error to expect, in the unit of ``errors``.
    """
    size = np.log(errors + floor)
    mean = size.mean()
    found = regress_on_kernels(_kernels(held, wanted), size - mean, parts, NOISES)
    of_held = np.exp(size - found.residual)
    # Right on the mean of the ratios and of the errors: the larger of the two factors is safe.
    scale = float(max((errors / of_held).mean(), errors.mean() / of_held.mean()))
    expected = np.maximum(scale * np.exp(mean + found.predicted), floor)
    inside = max(float(np.quantile(held.distance, INSIDE)), 1e-9)
    outside = np.maximum(1.0, wanted.distance / inside)
    return expected * outside, reliability(np.maximum(scale * of_held, floor), errors)


def reliability(expected: FloatArray, errors: FloatArray) -> Reliability:
    """Compare expected errors with the absolute errors that were made, both of shape ``(n,)``."""
    constant = np.full(len(errors), max(float(errors.mean()), 1e-12))
    return Reliability(
        n=len(errors),
        mean_error=float(errors.mean()),
        mean_expected=float(expected.mean()),
        coverage=tuple(coverage(expected, errors, multiple) for multiple in MULTIPLES),
        ideal=tuple(float(1.0 - np.exp(-multiple)) for multiple in MULTIPLES),
        nll=_laplace_nll(expected, errors) - _laplace_nll(constant, errors),
        spearman=spearman(expected, errors),
    )


def _laplace_nll(expected: FloatArray, errors: FloatArray) -> float:
    return float((np.log(expected) + errors / expected).mean())


def _kernels(held: Signs, wanted: Signs) -> list[Kernel]:
    """Return kernels of nothing, of linear and of smooth functions of the signs."""
    n, n_wanted = len(held.trouble), len(wanted.trouble)
    centre, spread = held.trouble.mean(axis=0), held.trouble.std(axis=0) + 1e-9
    first, second = (
        np.clip((signs.trouble - centre) / spread, -FAR_OUT, FAR_OUT) for signs in (held, wanted)
    )
    linear = linear_kernel(first, second)
    smooth = gaussian_kernels(held.structure, wanted.structure, LENGTHS)
    return [
        Kernel(np.zeros((n, n)), np.zeros((n_wanted, n))),
        linear,
        *(add_kernels(linear, kernel, share) for kernel in smooth for share in SHARES),
    ]
