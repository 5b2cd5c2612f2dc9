"""Small regressions that know how wrong they are: each returns errors on parts it did not see."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.reference import huber_weights, robust_sigma

# A column smaller than this share of the largest one is not brought to the size of the others.
RARE = 1e-2
# Predictions end at this many times the largest value that was learnt.
FARTHEST = 2.0

_ROUNDS = 6


class Fit(NamedTuple):
    """Predictions for test rows, and absolute errors on training rows by fits without their part.

    ``predicted`` has the shape of the test rows, ``held_out`` that of the training rows.
    """

    predicted: FloatArray
    held_out: FloatArray


class Regression(NamedTuple):
    """Predictions for test rows, and what the training rows are above those without their part.

    ``predicted`` has the shape of the test rows, ``residual`` that of the training rows.
    """

    predicted: FloatArray
    residual: FloatArray


class Linear(NamedTuple):
    """A linear function that was learnt, and absolute errors on training rows without their part.

    ``coefficients`` are of shape ``(p,)``; no prediction is beyond ``limit``.
    """

    coefficients: FloatArray
    limit: float
    held_out: FloatArray

    def predict(self, test: FloatArray) -> FloatArray:
        """Return predictions for rows of ``p`` columns. Shape ``(n_test,)``."""
        return np.clip(test @ self.coefficients, -self.limit, self.limit)


class Kernel(NamedTuple):
    """Covariances: among the training rows, and of the test rows with them."""

    train: FloatArray
    test: FloatArray


def linear_kernel(train: FloatArray, test: FloatArray) -> Kernel:
    """Return the kernel of linear functions; rows are points."""
    return Kernel(train @ train.T, test @ train.T)


def gaussian_kernels(
    train: FloatArray, test: FloatArray, lengths: Sequence[float]
) -> tuple[Kernel, ...]:
    """Return kernels of smooth functions, one for each length.

    Columns count alike: each is brought to unit spread over the training rows. Lengths are in units
    of the typical distance of two points.
    """
    spread = train.std(axis=0)
    used = spread > 1e-9 * (np.abs(train).max(axis=0, initial=0.0) + 1e-300)
    if not used.any():
        return (Kernel(np.zeros((len(train),) * 2), np.zeros((len(test), len(train)))),)
    first, second = train[:, used] / spread[used], test[:, used] / spread[used]
    # Two points of unit spread are sqrt(2 d) apart.
    scale = 2.0 * used.sum()
    near, far = squared_distances(first, first) / scale, squared_distances(second, first) / scale
    return tuple(
        Kernel(np.exp(-0.5 * near / length**2), np.exp(-0.5 * far / length**2))
        for length in lengths
    )


def fit_kernels(
    kernels: Iterable[Kernel], values: FloatArray, parts: IntArray, noises: Sequence[float]
) -> Fit:
    """Return the kernel ridge regression with the smallest error on parts it did not see.

    Parameters are those of :func:`regress_on_kernels`.
    """
    found = regress_on_kernels(kernels, values, parts, noises)
    return Fit(found.predicted, np.abs(found.residual))


def regress_on_kernels(
    kernels: Iterable[Kernel], values: FloatArray, parts: IntArray, noises: Sequence[float]
) -> Regression:
    r"""Return the kernel ridge regression with the smallest error on parts it did not see.

    With :math:`C = (K + \lambda I)^{-1}` and :math:`\alpha = C y`, the errors of the fit without
    part :math:`P` on that part are :math:`C_{PP}^{-1} \alpha_P` [1]_: no fit is repeated.

    Parameters
    ----------
    kernels
        The kernels to choose from.
    values
        What to learn, of about unit size: one quantity or several that share the kernel. Shape
        ``(n,)`` or ``(n, m)``.
    parts
        Number of the part of each row. Shape ``(n,)``.
    noises
        The :math:`\lambda` to choose from.

    References
    ----------
    .. [1] Rasmussen, Williams, Gaussian Processes for Machine Learning, eq. 5.12, for parts.
    """
    best, smallest = Regression(np.zeros(0), np.zeros(0)), np.inf
    groups = [np.flatnonzero(parts == part) for part in np.unique(parts)]
    for kernel in kernels:
        sizes, vectors = np.linalg.eigh(kernel.train)
        turned = vectors.T @ values
        for noise in noises:
            scaled = vectors / (np.maximum(sizes, 0.0) + noise)
            alpha = scaled @ turned
            residual = np.empty(values.shape)
            for rows in groups:
                residual[rows] = np.linalg.solve(scaled[rows] @ vectors[rows].T, alpha[rows])
            size = float(np.abs(residual).mean())
            if size < smallest:
                smallest, best = size, Regression(kernel.test @ alpha, residual)
    return best


def fit_linear(
    train: FloatArray,
    values: FloatArray,
    parts: IntArray,
    test: FloatArray,
    strengths: Sequence[float],
) -> Fit:
    """Return predictions by :func:`learn_linear` for ``test``, of shape ``(n_test, p)``."""
    found = learn_linear(train, values, parts, strengths)
    return Fit(found.predict(test), found.held_out)


def learn_linear(
    train: FloatArray, values: FloatArray, parts: IntArray, strengths: Sequence[float]
) -> Linear:
    """Return the linear function with the smallest error on parts it did not see.

    Robust: Huber's weights, found once on all rows, and no prediction beyond twice the largest
    value that was learnt.

    Parameters
    ----------
    train
        Rows are points, columns what to combine. Shape ``(n, p)``.
    values
        What to learn. Shape ``(n,)``.
    parts
        Number of the part of each row. Shape ``(n,)``.
    strengths
        Strengths of the ridge to choose from, relative to the columns' mean square.
    """
    size = np.sqrt((train**2).mean(axis=0))
    limit = float(FARTHEST * np.abs(values).max())
    if not size.any():
        return Linear(np.zeros(train.shape[1]), limit, np.abs(values))
    # What training rows hardly know stays small, so that the ridge takes care of it.
    size = np.maximum(size, RARE * size.max())
    train = train / size
    weights = _robust_weights(train, values, strengths[0])
    best, smallest = Linear(np.zeros(0), limit, np.zeros(0)), np.inf
    groups = [np.flatnonzero(parts == part) for part in np.unique(parts)]
    moments = [_moments(train[rows], values[rows], weights[rows]) for rows in groups]
    square, product, total = (sum(item) for item in zip(*moments, strict=True))
    for strength in strengths:
        errors = np.empty(len(values))
        for rows, (own_square, own_product, own_total) in zip(groups, moments, strict=True):
            rest = _ridge(square - own_square, product - own_product, total - own_total, strength)
            errors[rows] = np.abs(values[rows] - train[rows] @ rest)
        if errors.mean() < smallest:
            smallest = float(errors.mean())
            best = Linear(_ridge(square, product, total, strength) / size, limit, errors)
    return best


def squared_distances(first: FloatArray, second: FloatArray) -> FloatArray:
    """Return the squared distance of each row of one to each of the other. Shape ``(n, m)``."""
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T
    return np.asarray(np.maximum(squares, 0.0), dtype=np.float64)


def _moments(
    train: FloatArray, values: FloatArray, weights: FloatArray
) -> tuple[FloatArray, FloatArray, float]:
    weighted = (train * weights[:, None]).T
    return weighted @ train, weighted @ values, float(weights.sum())


def _ridge(square: FloatArray, product: FloatArray, total: float, strength: float) -> FloatArray:
    # At least the weight of one row, so that without any row nothing is learnt.
    ridge = strength * max(total, 1.0) * np.eye(len(square))
    return np.asarray(np.linalg.solve(square + ridge, product), dtype=np.float64)


def _robust_weights(train: FloatArray, values: FloatArray, strength: float) -> FloatArray:
    weights: FloatArray = np.ones(len(values))
    for _ in range(_ROUNDS):
        residual = values - train @ _ridge(*_moments(train, values, weights), strength)
        weights = huber_weights(residual, robust_sigma(residual))
    return weights
