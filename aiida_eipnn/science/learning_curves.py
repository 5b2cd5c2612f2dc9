r"""Learning curves: errors on a test set by the number of labelled points, and points saved.

A curve keeps the error of every test configuration for every training, so that intervals can be
had by the bootstrap over trainings and test configurations together.
"""

from dataclasses import dataclass

import numpy as np

from aiida_eipnn.science.arrays import BoolArray, FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.reference import count_elements

CONFIDENCE = 0.95
RESAMPLES = 1000
# In units of what files round to: 1e-4 eV and 0.01 Å³.
SAME_TOTAL_ENERGY = 1e-4
SAME_VOLUME = 1e-2
# So that no other use of the same seed gives the same numbers.
_DRAW = 0xD7A


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearningCurve:
    """Errors of one way to learn, ``k`` sizes of the training set by ``s`` seeds.

    Parameters
    ----------
    n
        Labelled points, ascending. Shape ``(k,)``.
    errors
        Absolute error of each of ``t`` test configurations, summed over what it has of the
        quantity: of forces the 3 N components, of energies one. Shape ``(k, s, t)``.
    weights
        Over how many numbers each sum goes; 0 leaves a configuration out. Shape ``(t,)``.

    Raises
    ------
    ValueError
        If the shapes do not fit one another, if ``n`` does not ascend, or if no configuration
        counts.
    """

    n: IntArray
    errors: FloatArray
    weights: FloatArray

    def __post_init__(self) -> None:
        if self.errors.ndim != 3 or self.errors.shape[::2] != (len(self.n), len(self.weights)):
            raise ValueError(
                f"errors have shape {self.errors.shape}, but {len(self.n)} sizes and "
                f"{len(self.weights)} test configurations need "
                f"({len(self.n)}, seeds, {len(self.weights)})"
            )
        if len(self.n) == 0 or (np.diff(self.n) <= 0).any() or self.n[0] < 1:
            raise ValueError(f"labelled points must ascend from 1 or more, not {self.n.tolist()}")
        if (self.weights < 0).any() or not self.weights.any():
            raise ValueError("no test configuration counts: give one a weight above zero")

    @property
    def mae(self) -> FloatArray:
        """Mean absolute error, the mean over seeds. Shape ``(k,)``."""
        n_seeds, n_test = self.errors.shape[1:]
        once = self.resampled_mae(np.ones((1, n_seeds)), np.ones((1, n_test)))
        return np.asarray(once[0], dtype=np.float64)

    def resampled_mae(self, seeds: FloatArray, tests: FloatArray) -> FloatArray:
        """Return the mean absolute error of ``b`` resamples. Shape ``(b, k)``.

        Parameters
        ----------
        seeds, tests
            How often each seed and each test configuration was drawn. Shapes ``(b, s)`` and
            ``(b, t)``.
        """
        totals = np.einsum("bs,kst,bt->bk", seeds, self.errors, tests, optimize=True)
        # A resample may hold nothing but configurations that do not count.
        counted = np.maximum(tests @ self.weights, 1e-300)
        return np.asarray(totals / (seeds.sum(axis=1) * counted)[:, None], dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    r"""Labelled points that one way to learn saves against another at equal error.

    Parameters
    ----------
    target
        The error, in the unit of the curves: that of the other way with ``n_reference`` points.
    n_reference
        Labelled points of the other way.
    n_needed
        Labelled points with which this way errs as little, between the smallest and the largest
        there are.
    saving
        :math:`1 - n_{needed} / n_{reference}`; negative where more points are needed.
    low, high
        Its interval, 95 %, by bootstrap over seeds and test configurations.
    bound
        ``at least`` where the smallest training set already errs less than the target, ``at most``
        where the largest errs more still, else empty.
    """

    target: float
    n_reference: int
    n_needed: float
    saving: float
    low: float
    high: float
    bound: str


def draw_points(rows: IntArray, n: int, seed: int) -> IntArray:
    """Return ``n`` of the rows at random; of one seed, the smaller draws are in the larger ones.

    Raises
    ------
    ValueError
        If there are fewer rows.
    """
    if not 1 <= n <= len(rows):
        raise ValueError(f"cannot draw {n} of {len(rows)} configurations; draw 1 to {len(rows)}")
    return np.random.default_rng([_DRAW, seed]).permutation(rows)[:n]


def find_twins(
    configurations: Configurations, reference: Labels, train: IntArray, test: IntArray
) -> BoolArray:
    """Return which test rows have a twin among the training rows. Shape of ``test``.

    Twins have the same composition and volume and the same energy, as far as files tell: strains
    that symmetry makes equal. Their errors are a matter of memory.

    Parameters
    ----------
    configurations, reference
        All configurations, and their labels of one source in the same order.
    train, test
        Rows of both.
    """
    elements = np.array(configurations.elements, dtype=np.int64)
    keys = np.column_stack(
        [
            # An atom more is far beyond the distance of 1 that twins have at most.
            2.0 * count_elements(configurations, elements),
            reference.energy[:, 0] / SAME_TOTAL_ENERGY,
            np.abs(np.linalg.det(configurations.cells)) / SAME_VOLUME,
        ]
    )
    return np.array([_has_near(keys[train], keys[row]) for row in test], dtype=np.bool_)


def find_points_needed(n: IntArray, mae: FloatArray, target: float) -> float:
    """Return with how many labelled points the error first is the target or less.

    Between two sizes the logarithm of the error is linear in the logarithm of their number. Where
    the smallest training set already errs less, its size; where none does, infinity.

    Parameters
    ----------
    n
        Labelled points, ascending. Shape ``(k,)``.
    mae
        Errors, in any unit. Shape ``(k,)``.
    target
        An error in the same unit.
    """
    reached = np.flatnonzero(mae <= target)
    if not len(reached):
        return float("inf")
    first = int(reached[0])
    if first == 0:
        return float(n[0])
    before, after = np.log(mae[first - 1]), np.log(max(mae[first], 1e-300))
    share = (before - np.log(max(target, 1e-300))) / (before - after)
    return float(np.exp(np.log(n[first - 1]) + share * np.log(n[first] / n[first - 1])))


def estimate_saving(
    curve: LearningCurve,
    reference: LearningCurve,
    n_reference: int,
    rng: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
) -> Saving:
    """Return the points that ``curve`` saves against ``reference`` with ``n_reference`` points.

    Seeds and test configurations are drawn alike for both curves: what makes one draw easy makes
    it easy for both.

    Parameters
    ----------
    curve, reference
        Curves of the same seeds on the same test configurations.
    n_reference
        Labelled points of the reference, one of its sizes.
    rng
        The source of all randomness.
    resamples
        Bootstrap resamples.

    Raises
    ------
    ValueError
        If the curves are of other seeds or test configurations, or the reference has no such size.
    """
    _check_pair(curve, reference, n_reference)
    n_seeds, n_test = curve.errors.shape[1:]
    at = int(np.flatnonzero(reference.n == n_reference)[0])
    target = float(reference.mae[at])
    needed = find_points_needed(curve.n, curve.mae, target)
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples)
    tests = rng.multinomial(n_test, np.full(n_test, 1 / n_test), size=resamples)
    errors = curve.resampled_mae(seeds.astype(float), tests.astype(float))
    targets = reference.resampled_mae(seeds.astype(float), tests.astype(float))[:, at]
    drawn = [
        _saving(find_points_needed(curve.n, row, one), curve.n, n_reference)
        for row, one in zip(errors, targets, strict=True)
    ]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Saving(
        target=target,
        n_reference=n_reference,
        n_needed=float(min(needed, curve.n[-1])),
        saving=_saving(needed, curve.n, n_reference),
        low=float(low),
        high=float(high),
        bound=_bound(curve, target),
    )


def _saving(needed: float, n: IntArray, n_reference: int) -> float:
    """Return the saving, of what was measured: never beyond the smallest and largest size."""
    return 1.0 - min(needed, float(n[-1])) / n_reference


def _bound(curve: LearningCurve, target: float) -> str:
    if curve.mae[0] < target:
        return "at least"
    return "" if (curve.mae <= target).any() else "at most"


def _check_pair(curve: LearningCurve, reference: LearningCurve, n_reference: int) -> None:
    if curve.errors.shape[1:] != reference.errors.shape[1:]:
        raise ValueError(
            f"curves of {curve.errors.shape[1:]} and {reference.errors.shape[1:]} seeds and test "
            "configurations cannot be compared; give those that both have, in the same order"
        )
    if n_reference not in reference.n:
        raise ValueError(
            f"the reference has no training with {n_reference} points, only with "
            f"{reference.n.tolist()}"
        )


def _has_near(keys: FloatArray, key: FloatArray) -> bool:
    return bool((np.abs(keys - key) < 1.0).all(axis=1).any())
