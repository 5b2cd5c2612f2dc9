r"""Candidates for pseudo-labels: ways to make one label out of those of many EIPs.

Energies and forces are separate: the EIP with the best energy is rarely that with the best forces.
Beside the predictors of :mod:`~.predictors` there are those that choose or weigh EIPs by a model of
each one's error, :math:`\log |e_k(x)|` by kernel ridge regression, and those that are not linear in
what the EIPs say. A label that an EIP does not have is never chosen and has no weight; where a
regression needs a number, the median of the other EIPs stands in.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from aiida_eipnn.science.arrays import BoolArray, FloatArray, IntArray
from aiida_eipnn.science.eip.predictors import (
    BEST,
    FAR_OUT,
    LENGTHS,
    NOISES,
    PAIR,
    STRENGTHS,
    LabelledSet,
    Split,
    add_kernels,
    aligned_energies,
    fit_energies,
    fit_forces,
)
from aiida_eipnn.science.reference import SCALE_SPREAD, fit_robust_shifts, robust_sigma
from aiida_eipnn.science.regression import (
    Kernel,
    fit_kernels,
    gaussian_kernels,
    learn_linear,
    linear_kernel,
    regress_on_kernels,
)

# Below this many labels nothing is fitted to energies but the alignment.
MIN_TO_LEARN = 8

SELECT, SOFT, MEDIAN = "EIP of smallest expected error", "soft mix of EIPs", "median of EIPs"
SMOOTH = "kernel on EIPs"
REGRESS = "EIP stack + kernel on EIPs and structure"
CORRECT = "best EIP + kernel on EIPs"
CORRECT_ALL = "best EIP + kernel on EIPs and structure"
SATURATED = f"stack of EIPs and saturated EIPs + {PAIR}"
LOCAL = f"stack that varies with the structure + {PAIR}"

# Weight of an EIP: this power of its inverse expected error. Inverse variances (2) are for errors
# that are independent; those of EIPs are alike, and the best should count more.
SHARPNESS = 4
# Errors below this, in eV/atom and eV/Å, are all good.
SMALLEST_ENERGY_ERROR = 1e-4
SMALLEST_FORCE_ERROR = 1e-3
# Logarithms of errors are noisy: those of exponentially distributed ones spread by 1.3.
ERROR_NOISES = (1e-2, 1e-1, 1.0, 10.0)
# Corrections to a good EIP may be mere noise.
CORRECTION_NOISES = (*NOISES, 10.0, 100.0)
# Shares of the part that is not linear.
SHARES = (0.1, 1.0, 10.0)
# Forces saturate at these multiples of an EIP's median force.
SATURATIONS = (0.3, 1.0)
# Rounds of weights by which EIPs are aligned on where they are right, and how far their scales may
# change by that.
REALIGNMENTS = 20
SLOPE_BOUNDS = (-0.5, 0.5)
# Principal directions of the structure along which coefficients vary, and how far, in standard
# deviations.
N_MODES = 3
FARTHEST_MODE = 2.5
# Atoms to predict at a time.
BLOCK = 20_000


class _Known(NamedTuple):
    """What the energies of EIPs say of all rows, and how they are compared.

    ``level`` is the energy of each composition, ``unit`` the spread about it, both in eV/atom;
    ``best`` is the column of the best EIP.
    """

    level: FloatArray
    unit: float
    aligned: FloatArray
    ok: BoolArray
    best: int


def energy_candidates(problem: LabelledSet, split: Split) -> dict[str, FloatArray]:
    """Return energies per atom of the test rows by each candidate, in eV/atom.

    Few labels (below ``MIN_TO_LEARN``) leave the best EIP and the median of all.
    """
    train, test, _ = split
    known = _compare_energies(problem, train)
    if len(train) < MIN_TO_LEARN and known.aligned.shape[1] > 0:
        return {
            BEST: known.aligned[test, known.best],
            MEDIAN: np.median(known.aligned[test], axis=1),
        }
    found = {name: fit.predicted for name, fit in fit_energies(problem, split).items()}
    if known.aligned.shape[1] == 0:
        return found
    return {
        **found,
        MEDIAN: np.median(known.aligned[test], axis=1),
        **_chosen_energies(problem, known, split),
        **_regressed_energies(problem, known, split),
    }


def force_candidates(problem: LabelledSet, split: Split) -> dict[str, FloatArray]:
    """Return forces on the atoms of the test rows by each candidate, in eV/Å. Shape ``(N, 3)``.

    Few labels (below ``MIN_TO_LEARN``) leave those of :func:`~.predictors.fit_forces`.
    """
    found = {name: fit.predicted for name, fit in fit_forces(problem, split).items()}
    if len(split.train) < MIN_TO_LEARN or problem.eip_forces.shape[2] == 0:
        return found
    return {**found, **_chosen_forces(problem, split), **_stacked_forces(problem, split)}


def energy_disagreement(problem: LabelledSet, train: IntArray) -> FloatArray:
    """Return the median deviation of the EIPs' aligned energies, in eV/atom. Shape ``(n,)``."""
    aligned = _compare_energies(problem, train).aligned
    if not aligned.shape[1]:
        return np.zeros(len(aligned))
    middle = np.median(aligned, axis=1, keepdims=True)
    return np.asarray(np.median(np.abs(aligned - middle), axis=1), dtype=np.float64)


def force_disagreement(problem: LabelledSet, train: IntArray) -> FloatArray:
    """Return the median deviation of the EIPs' force components, in eV/Å. Shape ``(n,)``."""
    eips = problem.eip_forces * _force_scales(problem, train)
    if not eips.shape[2]:
        return np.zeros(len(problem.n_atoms))
    middle = np.median(eips, axis=2, keepdims=True)
    deviation = np.median(np.abs(eips - middle), axis=2).mean(axis=1)
    return mean_by_configuration(deviation, problem.n_atoms)


def log_forces(problem: LabelledSet) -> FloatArray:
    """Return the logarithm of the mean force on an atom, by each EIP in use. Shape ``(n, m)``."""
    lengths = mean_by_configuration(
        np.linalg.norm(problem.eip_forces, axis=1), problem.reference.n_atoms
    )
    return np.asarray(np.log(np.maximum(lengths, 1e-2)), dtype=np.float64)


def mean_by_configuration(values: FloatArray, n_atoms: IntArray) -> FloatArray:
    """Return the mean over the atoms of each configuration; rows of ``values`` are atoms."""
    if not len(n_atoms):
        return np.zeros((0, *values.shape[1:]))
    starts = np.concatenate([[0], np.cumsum(n_atoms)[:-1]])
    counts = n_atoms.reshape(-1, *[1] * (values.ndim - 1))
    return np.asarray(np.add.reduceat(values, starts) / counts, dtype=np.float64)


def _compare_energies(problem: LabelledSet, train: IntArray) -> _Known:
    """Return what EIPs say of the energy of every row, aligned on the training rows."""
    level = problem.fractions @ fit_robust_shifts(problem.fractions[train], problem.energy[train])
    aligned, ok, used = aligned_energies(problem, train, level)
    return _Known(
        level=level,
        unit=max(robust_sigma((problem.energy - level)[train]), 1e-6),
        aligned=aligned,
        ok=ok,
        best=_best_column(problem, aligned, used, train),
    )


def _best_column(
    problem: LabelledSet, aligned: FloatArray, used: BoolArray, train: IntArray
) -> int:
    """Return the EIP with the smallest mean error of the energy on the training rows.

    Where there are no more labels than an alignment has parameters, every energy is met by
    construction: there the forces decide.
    """
    if not used.any():
        return -1
    errors = np.abs(aligned[train] - problem.energy[train, None])
    if len(train) <= 1 + problem.fractions.shape[1]:
        atoms = problem.atoms(train)
        eips = problem.eip_forces[atoms][:, :, used[problem.used]]
        errors = np.abs(eips - problem.forces[atoms][:, :, None]).mean(axis=1)
    return int(errors.mean(axis=0).argmin())


def _chosen_energies(problem: LabelledSet, known: _Known, split: Split) -> dict[str, FloatArray]:
    """Return energies of the EIP that should err least, and of all, weighted by expected error."""
    train, test, _ = split
    aligned = _realigned(known, problem.energy, train)
    errors = np.abs(aligned[train] - problem.energy[train, None]) + SMALLEST_ENERGY_ERROR
    says = _deviations(known.aligned, known.level, known.unit)
    features = np.hstack([problem.described.structure, says])
    weights = _weights(_expected(features, errors, split), known.ok[test])
    chosen = weights.argmax(axis=1)
    return {
        SELECT: aligned[test, chosen],
        SOFT: (weights * aligned[test]).sum(axis=1),
    }


def _realigned(known: _Known, energy: FloatArray, train: IntArray) -> FloatArray:
    """Return energies of each EIP aligned on where it is right, in eV/atom. Shape ``(n, k)``.

    An EIP that is right on a part of the space need not be so elsewhere: it will not be chosen
    there. So weights fall as the square of the residual, unlike those of the alignment.
    """
    aligned = known.aligned.copy()
    for column in range(aligned.shape[1]):
        ok = known.ok[train, column]
        says, truth = known.aligned[train[ok], column], energy[train[ok]]
        if len(says) >= MIN_TO_LEARN:
            scale, shift = _fit_redescending(says - known.level[train[ok]], truth - says)
            aligned[:, column] += scale * (aligned[:, column] - known.level) + shift
    return aligned


def _fit_redescending(x: FloatArray, y: FloatArray) -> tuple[float, float]:
    """Return slope and intercept of the line that most points are near to (Cauchy's weights)."""
    slope = shift = 0.0
    width = max(robust_sigma(y - np.median(y)), SMALLEST_ENERGY_ERROR)
    for _ in range(REALIGNMENTS):
        residual = y - slope * x - shift
        width = max(min(width, float(np.median(np.abs(residual)))), SMALLEST_ENERGY_ERROR)
        weights = 1.0 / (1.0 + (residual / width) ** 2)
        centre = np.average(x, weights=weights)
        mean = np.average(y, weights=weights)
        ridge = (width / SCALE_SPREAD) ** 2
        steepness = weights @ (x - centre) ** 2 + ridge
        slope = float(np.clip(weights @ ((x - centre) * (y - mean)) / steepness, *SLOPE_BOUNDS))
        shift = float(mean - slope * centre)
    return slope, shift


def _regressed_energies(problem: LabelledSet, known: _Known, split: Split) -> dict[str, FloatArray]:
    """Return regressions that are not linear in the energies of the EIPs."""
    train, test, parts = split
    structure = problem.described.structure
    says = _deviations(known.aligned, known.level, known.unit)
    all_say = np.hstack([structure, says])
    best = known.aligned[:, known.best]
    unit = max(robust_sigma((problem.energy - best)[train]), 1e-6)
    differ = np.hstack([all_say, _deviations(known.aligned, best, unit)])

    def fit(
        kernels: Iterator[Kernel], base: FloatArray, unit: float, noises: Sequence[float]
    ) -> FloatArray:
        values = np.clip((problem.energy - base)[train] / unit, -FAR_OUT, FAR_OUT)
        return base[test] + unit * fit_kernels(kernels, values, parts, noises).predicted

    stack = linear_kernel(says[train], says[test])
    mixed = (
        add_kernels(add_kernels(_constant(split), stack), kernel, share)
        for kernel in gaussian_kernels(all_say[train], all_say[test], LENGTHS)
        for share in SHARES
    )
    return {
        SMOOTH: fit(_smooth(says, split), known.level, known.unit, NOISES),
        REGRESS: fit(mixed, known.level, known.unit, NOISES),
        CORRECT: fit(_smooth(says, split), best, unit, CORRECTION_NOISES),
        CORRECT_ALL: fit(_smooth(differ, split), best, unit, CORRECTION_NOISES),
    }


def _deviations(aligned: FloatArray, base: FloatArray, unit: float) -> FloatArray:
    """Return how far each EIP is from a common energy, what is far out counting as that."""
    return np.clip((aligned - base[:, None]) / unit, -FAR_OUT, FAR_OUT)


def _chosen_forces(problem: LabelledSet, split: Split) -> dict[str, FloatArray]:
    """Return forces of the EIP that should err least, and of all, weighted by expected error."""
    train, test, _ = split
    atoms, unseen = problem.atoms(train), problem.atoms(test)
    eips = problem.eip_forces
    scale = _force_scales(problem, train)
    errors = np.abs(scale * eips[atoms] - problem.forces[atoms][:, :, None]).mean(axis=1)
    by_row = mean_by_configuration(errors, problem.n_atoms[train]) + SMALLEST_FORCE_ERROR
    features = np.hstack([problem.described.structure, log_forces(problem)])
    ok = problem.labels.ok[:, problem.used][test]
    weights = _weights(_expected(features, by_row, split), ok)
    owner = np.repeat(np.arange(len(test)), problem.n_atoms[test])
    chosen = weights.argmax(axis=1)
    return {
        SELECT: eips[unseen, :, chosen[owner]] * scale[chosen[owner], None],
        SOFT: np.einsum("nam,nm->na", eips[unseen], (scale * weights)[owner]),
    }


def _force_scales(problem: LabelledSet, train: IntArray) -> FloatArray:
    """Return what the forces of each EIP are best multiplied with.

    That is 1, the scale of its energies, or what fits its forces where the EIP is right.
    """
    atoms = problem.atoms(train)
    eips, forces = problem.eip_forces[atoms], problem.forces[atoms].ravel()
    of_energy = np.nan_to_num(problem.alignment(train).scale[problem.used], nan=1.0)
    best = np.ones(len(of_energy))
    for column, scale in enumerate(of_energy):
        says = eips[:, :, column].ravel()
        options = (1.0, scale, 1.0 + _fit_slope(says, forces - says))
        best[column] = options[
            np.argmin([np.abs(value * says - forces).mean() for value in options])
        ]
    return best


def _fit_slope(x: FloatArray, y: FloatArray) -> float:
    """Return the slope of the line through zero that most points are near to."""
    slope, width = 0.0, np.inf
    for _ in range(REALIGNMENTS):
        residual = y - slope * x
        width = max(min(width, float(np.median(np.abs(residual)))), SMALLEST_FORCE_ERROR)
        weights = 1.0 / (1.0 + (residual / width) ** 2)
        ridge = (width / SCALE_SPREAD) ** 2
        slope = float(np.clip(weights @ (x * y) / (weights @ x**2 + ridge), *SLOPE_BOUNDS))
    return slope


def _stacked_forces(problem: LabelledSet, split: Split) -> dict[str, FloatArray]:
    """Return linear functions of EIP forces, as they are and as they are where not too large.

    What EIPs say of atoms that come close is large and often wrong; a stack of plain forces must
    weigh it as it weighs small forces. The coefficients are the same everywhere, or vary with the
    structure along its principal directions.
    """
    atoms = problem.atoms(split.train)
    median = np.median(np.linalg.norm(problem.eip_forces[atoms], axis=1), axis=0)
    modes = _principal_modes(problem.described.structure, split.train)
    by_atom = np.repeat(modes, problem.reference.n_atoms, axis=0)

    def saturated(rows: IntArray) -> FloatArray:
        eips = problem.eip_forces[rows]
        length = np.linalg.norm(eips, axis=1)
        limits = [np.maximum(share * median, 1e-6) for share in SATURATIONS]
        small = [eips / np.sqrt(1.0 + (length / limit) ** 2)[:, None, :] for limit in limits]
        return np.concatenate([eips, *small, problem.described.pair_forces[rows]], axis=2)

    def local(rows: IntArray) -> FloatArray:
        plain = saturated(rows)
        eips = plain[:, :, : problem.eip_forces.shape[2]]
        pairs = problem.described.pair_forces[rows]
        varied = [
            forces * mode[:, None, None] for mode in by_atom[rows].T for forces in (eips, pairs)
        ]
        return np.concatenate([plain, *varied], axis=2)

    return {
        name: _linear_forces(problem, split, design)
        for name, design in ((SATURATED, saturated), (LOCAL, local))
    }


def _linear_forces(
    problem: LabelledSet, split: Split, design: Callable[[IntArray], FloatArray]
) -> FloatArray:
    """Return forces by a linear function of what ``design`` makes of atoms, ``(n_atoms, 3, p)``."""

    def rows_of(atoms: IntArray) -> FloatArray:
        columns = design(atoms)
        return columns.reshape(-1, columns.shape[2])

    atoms, unseen = problem.atoms(split.train), problem.atoms(split.test)
    of_component = np.repeat(split.parts, 3 * problem.n_atoms[split.train])
    target = problem.forces[atoms].ravel()
    found = learn_linear(rows_of(atoms), target, of_component, STRENGTHS)
    blocks = np.split(unseen, np.arange(BLOCK, len(unseen), BLOCK))
    return np.concatenate([found.predict(rows_of(block)).reshape(-1, 3) for block in blocks])


def _principal_modes(structure: FloatArray, train: IntArray) -> FloatArray:
    """Return the principal components of the training rows, of unit spread. Shape ``(n, k)``."""
    centre, spread = structure[train].mean(axis=0), structure[train].std(axis=0)
    points = (structure - centre) / np.where(spread > 1e-9, spread, np.inf)
    _, sizes, directions = np.linalg.svd(points[train], full_matrices=False)
    n_modes = min(N_MODES, int((sizes > 1e-6).sum()))
    modes = points @ directions[:n_modes].T / (sizes[:n_modes] / np.sqrt(len(train)))
    # Far from the labels the coefficients stay what they are at the edge.
    return np.asarray(np.clip(modes, -FARTHEST_MODE, FARTHEST_MODE), dtype=np.float64)


def _expected(features: FloatArray, errors: FloatArray, split: Split) -> FloatArray:
    """Return the error of each EIP that its errors on training rows let expect for test rows.

    Errors are of shape ``(n_train, m)``, what is returned of shape ``(n_test, m)``.
    """
    size = np.log(errors)
    mean = size.mean(axis=0)
    kernels = _smooth(features, split)
    found = regress_on_kernels(kernels, size - mean, split.parts, ERROR_NOISES)
    return np.asarray(np.exp(mean + found.predicted), dtype=np.float64)


def _weights(expected: FloatArray, ok: BoolArray) -> FloatArray:
    """Return weights of EIPs that sum to 1 in each row; without any label all count alike."""
    expected = np.where(ok | ~ok.any(axis=1, keepdims=True), expected, np.inf)
    weights = (expected / expected.min(axis=1, keepdims=True)) ** -SHARPNESS
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float64)


def _smooth(features: FloatArray, split: Split) -> Iterator[Kernel]:
    """Yield kernels of a constant and a smooth function of the features."""
    kernels = gaussian_kernels(features[split.train], features[split.test], LENGTHS)
    return (add_kernels(_constant(split), kernel) for kernel in kernels)


def _constant(split: Split) -> Kernel:
    n = len(split.train)
    return Kernel(np.ones((n, n)), np.ones((len(split.test), n)))
