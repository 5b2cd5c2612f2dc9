r"""Candidates for pseudo-labels: ways to make one label out of those of many EIPs.

Energies and forces are separate: the EIP with the best energy is rarely that with the best forces.
Beside the predictors of :mod:`~.predictors` there are those that choose or weigh EIPs by a model of
each one's error, :math:`\log |e_k(x)|` by kernel ridge regression, and those that are not linear in
what the EIPs say. A label that an EIP does not have is never chosen and has no weight; where a
regression needs a number, the median of the other EIPs stands in.
"""

from collections.abc import Iterator, Sequence
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
from aiida_eipnn.science.reference import fit_robust_shifts, robust_sigma
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
# Atoms to predict at a time.
BLOCK = 20_000


class _Known(NamedTuple):
    """What the energies of EIPs say of all rows, and how they are compared.

    ``level`` is the energy of each composition, ``unit`` the spread about it, both in eV/atom;
    ``aligned`` are the energies per atom of the EIPs in use, ``ok`` where they are labels and not
    stand-ins.
    """

    level: FloatArray
    unit: float
    aligned: FloatArray
    ok: BoolArray


def energy_candidates(problem: LabelledSet, split: Split) -> dict[str, FloatArray]:
    """Return energies per atom of the test rows by each candidate, in eV/atom.

    Few labels (below ``MIN_TO_LEARN``) leave the best EIP and the median of all.
    """
    train, test, _ = split
    known = _compare_energies(problem, train)
    if len(train) < MIN_TO_LEARN:
        best = _best_column(problem, known, train)
        found = {MEDIAN: np.median(known.aligned[test], axis=1)}
        return {**found, BEST: known.aligned[test, best]} if len(train) > 1 else found
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
    return {**found, **_chosen_forces(problem, split), SATURATED: _saturated_stack(problem, split)}


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
    aligned, ok = aligned_energies(problem, train, level)
    unit = max(robust_sigma((problem.energy - level)[train]), 1e-6)
    return _Known(level=level, unit=unit, aligned=aligned, ok=ok)


def _best_column(problem: LabelledSet, known: _Known, train: IntArray) -> int:
    """Return the EIP with the smallest mean error of the energy on the training rows."""
    errors = np.abs(known.aligned[train] - problem.energy[train, None])
    return int(errors.mean(axis=0).argmin())


def _chosen_energies(problem: LabelledSet, known: _Known, split: Split) -> dict[str, FloatArray]:
    """Return energies of the EIP that should err least, and of all, weighted by expected error."""
    train, test, _ = split
    errors = np.abs(known.aligned[train] - problem.energy[train, None]) + SMALLEST_ENERGY_ERROR
    says = _deviations(known.aligned, known.level, known.unit)
    features = np.hstack([problem.described.structure, says])
    weights = _weights(_expected(features, errors, split), known.ok[test])
    aligned = known.aligned[test]
    chosen = weights.argmax(axis=1)
    return {
        SELECT: aligned[np.arange(len(test)), chosen],
        SOFT: (weights * aligned).sum(axis=1),
    }


def _regressed_energies(problem: LabelledSet, known: _Known, split: Split) -> dict[str, FloatArray]:
    """Return regressions that are not linear in the energies of the EIPs."""
    train, test, parts = split
    structure = problem.described.structure
    says = _deviations(known.aligned, known.level, known.unit)
    all_say = np.hstack([structure, says])
    best = known.aligned[:, _best_column(problem, known, train)]
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
    """Return 1, or the scale of an EIP's energies where its forces are better with it."""
    scale = np.nan_to_num(problem.alignment(train).scale[problem.used], nan=1.0)
    atoms = problem.atoms(train)
    eips, forces = problem.eip_forces[atoms], problem.forces[atoms][:, :, None]
    plain = np.abs(eips - forces).mean(axis=(0, 1))
    return np.where(np.abs(scale * eips - forces).mean(axis=(0, 1)) < plain, scale, 1.0)


def _saturated_stack(problem: LabelledSet, split: Split) -> FloatArray:
    """Return a linear function of EIP forces as they are, and as they are where not too large.

    What EIPs say of atoms that come close is large and often wrong; a stack of plain forces must
    weigh it as it weighs small forces.
    """
    train, test, parts = split
    atoms, unseen = problem.atoms(train), problem.atoms(test)
    median = np.median(np.linalg.norm(problem.eip_forces[atoms], axis=1), axis=0)

    def design(rows: IntArray) -> FloatArray:
        eips = problem.eip_forces[rows]
        length = np.linalg.norm(eips, axis=1)
        saturated = [
            eips / np.sqrt(1.0 + (length / np.maximum(share * median, 1e-6)) ** 2)[:, None, :]
            for share in SATURATIONS
        ]
        columns = np.concatenate([eips, *saturated, problem.described.pair_forces[rows]], axis=2)
        return columns.reshape(-1, columns.shape[2])

    of_component = np.repeat(parts, 3 * problem.n_atoms[train])
    found = learn_linear(design(atoms), problem.forces[atoms].ravel(), of_component, STRENGTHS)
    blocks = np.split(unseen, np.arange(BLOCK, len(unseen), BLOCK))
    return np.concatenate([found.predict(design(rows)).reshape(-1, 3) for rows in blocks])


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
