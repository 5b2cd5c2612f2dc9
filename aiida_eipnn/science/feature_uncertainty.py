"""How strange a configuration is to what is labelled, by the features of the trunk alone.

They cost next to nothing and need no committee, but have no unit: they rank.
"""

import numpy as np

from aiida_eipnn.science.arrays import FloatArray

# Regularisation, relative to the mean square of the features and to the mean variance.
RIDGE = 1e-3
SHRINKAGE = 0.1


def last_layer_uncertainty(features: FloatArray, known: FloatArray) -> FloatArray:
    r"""Return :math:`\sqrt{f^T (F^T F + \varsigma^2 I)^{-1} f}` of each configuration [1]_.

    The spread of what a linear readout of the features, fitted to the known ones, predicts.

    Parameters
    ----------
    features
        Mean over atoms of the trunk's features. Shape ``(n, n_features)``.
    known
        The same of what is labelled. Shape ``(n_known, n_features)``.

    References
    ----------
    .. [1] Bigi et al., Mach. Learn.: Sci. Technol. 5, 045018 (2024), arXiv:2403.02251.
    """
    _check_known(known)
    ridge = RIDGE * max(float((known**2).sum(axis=1).mean()), 1e-300)
    precision = known.T @ known + ridge * np.eye(known.shape[1])
    spread: FloatArray = np.sqrt(_quadratic(features, precision))
    return spread


def mahalanobis_distance(features: FloatArray, known: FloatArray) -> FloatArray:
    r"""Return :math:`\sqrt{(f - \mu)^T S^{-1} (f - \mu)}` of each configuration.

    Mean and covariance are those of the known features; the covariance is shrunk towards a sphere,
    which keeps it invertible with fewer labels than features.

    Parameters
    ----------
    features
        Mean over atoms of the trunk's features. Shape ``(n, n_features)``.
    known
        The same of what is labelled. Shape ``(n_known, n_features)``.
    """
    _check_known(known)
    centre = known.mean(axis=0)
    covariance = (known - centre).T @ (known - centre) / len(known)
    sphere = max(float(np.trace(covariance)) / len(covariance), 1e-300)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * sphere * np.eye(len(covariance))
    distance: FloatArray = np.sqrt(_quadratic(features - centre, shrunk))
    return distance


def _quadratic(features: FloatArray, matrix: FloatArray) -> FloatArray:
    solved = np.linalg.solve(matrix, features.T)
    quadratic: FloatArray = np.maximum(np.einsum("ij,ji->i", features, solved), 0.0)
    return quadratic


def _check_known(known: FloatArray) -> None:
    if not len(known):
        raise ValueError("nothing is labelled yet, so nothing is strange to it: choose by another")
