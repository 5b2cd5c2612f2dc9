"""Batches of points that differ from one another and from what is known already.

All methods are greedy and deterministic, of two points as good as each other the first is taken,
and cost ``O(n k d)`` for ``k`` chosen or known points among ``n`` with ``d`` features. Where
nothing is known, distances begin at the first point.
"""

import numpy as np

from aiida_eipnn.science.arrays import FloatArray, IntArray

# Variance of the noise of a label, relative to the mean variance of the features.
NOISE = 1e-3

# Squared distances below this part of the squared lengths are zero.
ROUNDING = 1e-12

# Points whose distances to all centres are in memory at a time.
BLOCK = 2048


def farthest_points(
    features: FloatArray,
    n: int,
    known: FloatArray | None = None,
    weights: FloatArray | None = None,
) -> IntArray:
    """Choose ``n`` rows, each as far as possible from what is known or was chosen before.

    Parameters
    ----------
    features
        One point a row. Shape ``(n_points, n_features)``.
    n
        How many to choose.
    known
        Points that are labelled already. Shape ``(n_known, n_features)``.
    weights
        What each point is worth, one by default: what is dear to label is worth less. Shape
        ``(n_points,)``.

    Raises
    ------
    ValueError
        If there are fewer points than to choose.
    """
    check_number(features, n)
    lengths = _lengths(features)
    distance, worth = _nearest(features, lengths, known)[0], _worth(features, weights)
    chosen: list[int] = []
    for _ in range(n):
        first = known is None and not chosen
        chosen.append(0 if first else int((worth * distance).argmax()))
        distance = np.minimum(distance, _squared(features, lengths, features[chosen[-1]]))
        # Where all points coincide with chosen ones, a chosen one must still not come again.
        distance[chosen] = -1.0
    return np.array(chosen, dtype=np.int64)


def most_informative_points(
    features: FloatArray,
    n: int,
    known: FloatArray | None = None,
    weights: FloatArray | None = None,
) -> IntArray:
    r"""Choose ``n`` rows that together have the largest determinant of their kernel matrix.

    Each is the one of which a linear model of the features, with all that is known and was chosen
    before, is least certain (MaxDet) [1]_.

    Parameters
    ----------
    features
        One point a row. Shape ``(n_points, n_features)``.
    n
        How many to choose.
    known
        Points that are labelled already. Shape ``(n_known, n_features)``.
    weights
        What each point is worth, one by default: what is dear to label is worth less. Shape
        ``(n_points,)``.

    Raises
    ------
    ValueError
        If there are fewer points than to choose.

    References
    ----------
    .. [1] Holzmüller et al., J. Mach. Learn. Res. 24, 164 (2023).
    """
    check_number(features, n)
    noise = NOISE * max(float((features**2).sum(axis=1).mean()), 1e-300)
    precision = noise * np.eye(features.shape[1])
    if known is not None:
        precision += known.T @ known
    covariance = np.linalg.inv(precision)
    variance = np.einsum("ij,ij->i", features @ covariance, features)
    worth = _worth(features, weights)
    chosen: list[int] = []
    for _ in range(n):
        variance[chosen] = -1.0
        chosen.append(int((worth * variance).argmax()))
        # What a label there would tell, by the formula of Sherman and Morrison.
        learnt = covariance @ features[chosen[-1]]
        size = 1.0 + float(features[chosen[-1]] @ learnt)
        covariance -= np.outer(learnt, learnt) / size
        variance -= (features @ learnt) ** 2 / size
    return np.array(chosen, dtype=np.int64)


def largest_cluster_points(
    features: FloatArray,
    n: int,
    known: FloatArray | None = None,
    weights: FloatArray | None = None,
) -> IntArray:
    """Choose ``n`` rows, each the farthest of the cluster whose distances add up to most (LCMD).

    Every point belongs to the nearest of those that are known or chosen; the size of a cluster is
    the sum of its squared distances [1]_. Where points are dense, several are taken; a lonely one
    far off, which farthest points would begin with, has to wait.

    Parameters
    ----------
    features
        One point a row. Shape ``(n_points, n_features)``.
    n
        How many to choose.
    known
        Points that are labelled already. Shape ``(n_known, n_features)``.
    weights
        What each point is worth, one by default: what is dear to label is worth less. Shape
        ``(n_points,)``.

    Raises
    ------
    ValueError
        If there are fewer points than to choose.

    References
    ----------
    .. [1] Holzmüller et al., J. Mach. Learn. Res. 24, 164 (2023).
    """
    check_number(features, n)
    lengths = _lengths(features)
    (distance, owner), worth = _nearest(features, lengths, known), _worth(features, weights)
    n_centres = 0 if known is None else len(known)
    chosen: list[int] = []
    for _ in range(n):
        first = n_centres == 0
        row = 0 if first else _farthest_of_largest(worth * distance, owner, n_centres)
        chosen.append(row)
        to_new = _squared(features, lengths, features[row])
        closer = (to_new < distance) | first
        owner[closer] = n_centres
        distance = np.where(closer, to_new, distance)
        # A chosen point is in no cluster, so that it cannot come again.
        owner[row], distance[row] = -1, -1.0
        n_centres += 1
    return np.array(chosen, dtype=np.int64)


def representative_points(
    features: FloatArray,
    n: int,
    known: FloatArray | None = None,
    weights: FloatArray | None = None,
) -> IntArray:
    """Choose ``n`` rows such that every point is close to one of them or to what is known.

    Each is the one that lowers the sum of the distances of all points to the nearest one most
    (greedy k-medoids); where nothing is known, the first is the medoid. What is typical is taken,
    where the other methods begin at the border. It needs all distances, ``O(n_points^2)`` numbers,
    in memory [1]_.

    Parameters
    ----------
    features
        One point a row. Shape ``(n_points, n_features)``.
    n
        How many to choose.
    known
        Points that are labelled already. Shape ``(n_known, n_features)``.
    weights
        What each point is worth, one by default: what is dear to label is worth less. Shape
        ``(n_points,)``.

    Raises
    ------
    ValueError
        If there are fewer points than to choose.

    References
    ----------
    .. [1] Krause, Golovin, "Submodular function maximization" (2014), facility location.
    """
    check_number(features, n)
    lengths, worth = _lengths(features), _worth(features, weights)
    distance = np.sqrt(_table(features, lengths, features))
    nearest = np.sqrt(_nearest(features, lengths, known)[0])
    nearest = np.where(np.isinf(nearest), distance.max(axis=1), nearest)
    chosen: list[int] = []
    for _ in range(n):
        gain = worth * np.maximum(nearest[:, None] - distance, 0.0).sum(axis=0)
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
        nearest = np.minimum(nearest, distance[:, chosen[-1]])
    return np.array(chosen, dtype=np.int64)


def check_number(features: FloatArray, n: int) -> None:
    """Raise ``ValueError`` where ``n`` of these points cannot be chosen."""
    if not 1 <= n <= len(features):
        raise ValueError(f"cannot pick {n} of {len(features)} points")


def _farthest_of_largest(distance: FloatArray, owner: IntArray, n_centres: int) -> int:
    free = owner >= 0
    sizes = np.bincount(owner[free], weights=distance[free], minlength=n_centres)
    members = np.bincount(owner[free], minlength=n_centres)
    # Of clusters without extent, one that has members.
    largest = int(np.where(members > 0, sizes, -1.0).argmax())
    return int(np.where(owner == largest, distance, -1.0).argmax())


def _worth(features: FloatArray, weights: FloatArray | None) -> FloatArray:
    return np.ones(len(features)) if weights is None else weights


def _lengths(features: FloatArray) -> FloatArray:
    lengths: FloatArray = np.einsum("ij,ij->i", features, features)
    return lengths


def _squared(features: FloatArray, lengths: FloatArray, centre: FloatArray) -> FloatArray:
    """Return squared distances to a centre; ``lengths`` are the squared lengths of the features."""
    return _table(features, lengths, centre[None])[:, 0]


def _table(features: FloatArray, lengths: FloatArray, centres: FloatArray) -> FloatArray:
    """Return squared distances of all to all. Shape ``(n_points, n_centres)``.

    A product of matrices is several times faster than the sum of squared differences, and needs no
    copy of the features.
    """
    scale = lengths[:, None] + _lengths(centres)
    squared = scale - 2 * (features @ centres.T)
    # What is left of the rounding must not tell equal points apart.
    return np.where(squared < ROUNDING * scale, 0.0, squared)


def _nearest(
    features: FloatArray, lengths: FloatArray, known: FloatArray | None
) -> tuple[FloatArray, IntArray]:
    """Return the squared distance to the nearest known point, infinite without one, and which."""
    distance = np.full(len(features), np.inf)
    owner = np.zeros(len(features), dtype=np.int64)
    if known is None or not len(known):
        return distance, owner
    for start in range(0, len(features), BLOCK):
        rows = slice(start, start + BLOCK)
        table = _table(features[rows], lengths[rows], known)
        # Of centres as near as each other the first.
        owner[rows] = table.argmin(axis=1)
        distance[rows] = table.min(axis=1)
    return distance, owner
