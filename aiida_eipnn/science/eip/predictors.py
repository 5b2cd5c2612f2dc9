"""Predictors of labels, with EIPs and without, that know their error on labels they did not see."""

from typing import NamedTuple

import numpy as np

from aiida_eipnn.science.arrays import BoolArray, FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations, ragged_rows
from aiida_eipnn.science.descriptors import Descriptors, describe_structures
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.reference import (
    Alignment,
    element_fractions,
    fit_alignment,
    fit_robust_shifts,
    robust_sigma,
)
from aiida_eipnn.science.regression import (
    Fit,
    Kernel,
    fit_kernels,
    fit_linear,
    gaussian_kernels,
    linear_kernel,
)

# An EIP that labelled less than half of what the most complete one did is left out.
MIN_COVERAGE = 0.5

# In units of the robust spread of the energies: beyond, a value counts as far out and no more.
FAR_OUT = 8.0
NOISES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LENGTHS = (0.25, 0.5, 1.0, 2.0)
SHARES = (0.1, 1.0)
STRENGTHS = (1e-5, 1e-3, 1e-1)

CONSTANT, STRUCTURE = "constant for each element", "structure"
ZERO, PAIR = "zero", "pair potential"
BEST, STACK = "best EIP", "EIP stack"


class LabelledSet:
    """The labelled set as arrays, one row for each configuration or atom."""

    def __init__(self, configurations: Configurations, reference: Labels, labels: Labels) -> None:
        self.configurations, self.reference, self.labels = configurations, reference, labels
        self.described: Descriptors = describe_structures(configurations)
        self.n_atoms = reference.n_atoms
        self.energy = reference.energy[:, 0] / self.n_atoms
        elements = np.array(configurations.elements, dtype=np.int64)
        self.fractions = element_fractions(configurations, elements)
        self.used = covered(labels.ok)
        self.forces = reference.forces[0]
        self.eip_forces = _filled_forces(labels, self.used)
        self._alignments: dict[bytes, Alignment] = {}

    def alignment(self, train: IntArray) -> Alignment:
        """Return the alignment on these rows; energies and forces ask for the same."""
        key = train.tobytes()
        if key not in self._alignments:
            self._alignments[key] = fit_alignment(
                self.configurations, self.reference.take(train), self.labels
            )
        return self._alignments[key]

    def atoms(self, rows: IntArray) -> IntArray:
        """Return the atom rows of these configurations."""
        return ragged_rows(self.reference.offsets, rows)


class Split(NamedTuple):
    """Rows to learn from and rows to predict; ``parts`` number the training rows."""

    train: IntArray
    test: IntArray
    parts: IntArray


def fit_energies(problem: LabelledSet, split: Split) -> dict[str, Fit]:
    """Return each predictor of energies per atom, those without EIPs first."""
    train, test, parts = split
    level = problem.fractions @ fit_robust_shifts(problem.fractions[train], problem.energy[train])
    unit = max(robust_sigma((problem.energy - level)[train]), 1e-6)
    values = (problem.energy - level) / unit
    structure = problem.described.structure
    smooth = gaussian_kernels(structure[train], structure[test], LENGTHS)
    constant = Kernel(np.ones((len(train),) * 2), np.ones((len(test), len(train))))
    known = np.clip(values[train], -FAR_OUT, FAR_OUT)

    def fit(kernels: list[Kernel]) -> Fit:
        found = fit_kernels(kernels, known, parts, NOISES)
        return Fit(level[test] + unit * found.predicted, unit * found.held_out)

    fits = {
        CONSTANT: Fit(level[test], unit * np.abs(values[train])),
        STRUCTURE: fit([add_kernels(constant, kernel) for kernel in smooth]),
    }
    aligned = aligned_energies(problem, train, level).energy
    if aligned.shape[1] == 0:
        return fits
    best = int(np.abs(aligned[train] - problem.energy[train, None]).mean(axis=0).argmin())
    fits[BEST] = Fit(aligned[test, best], np.abs(aligned[train, best] - problem.energy[train]))
    says = np.clip((aligned - level[:, None]) / unit, -FAR_OUT, FAR_OUT)
    stack = add_kernels(constant, linear_kernel(says[train], says[test]))
    fits[STACK] = fit([stack])
    fits[f"{STACK} + {STRUCTURE}"] = fit(
        [add_kernels(stack, kernel, share) for kernel in smooth for share in SHARES]
    )
    return fits


class AlignedEnergies(NamedTuple):
    """Aligned energies per atom, in eV/atom, of the EIPs that labelled enough.

    ``energy`` and ``ok``, where they are labels and not stand-ins, are of shape ``(n, k)``;
    ``used`` says which of ``m`` EIPs they are of.
    """

    energy: FloatArray
    ok: BoolArray
    used: BoolArray


def aligned_energies(problem: LabelledSet, train: IntArray, level: FloatArray) -> AlignedEnergies:
    """Return energies aligned on the training rows.

    Where an EIP has no label, the median of the others stands in, or the constant.
    """
    aligned = problem.alignment(train).apply(problem.configurations, problem.labels)
    used = problem.used & covered(aligned.ok[train])
    energy = (aligned.energy / problem.n_atoms[:, None])[:, used]
    nothing = np.isnan(energy).all(axis=1)
    energy[nothing] = level[nothing, None]
    filled = np.where(np.isnan(energy), np.nanmedian(energy, axis=1, keepdims=True), energy)
    return AlignedEnergies(filled, aligned.ok[:, used], used)


def fit_forces(problem: LabelledSet, split: Split) -> dict[str, Fit]:
    """Return each predictor of force components, those without EIPs first."""
    train, test, parts = split
    atoms, unseen = problem.atoms(train), problem.atoms(test)
    target = problem.forces[atoms].ravel()
    of_component = np.repeat(parts, 3 * problem.n_atoms[train])
    pair, eips = problem.described.pair_forces, problem.eip_forces

    def fit(design: FloatArray) -> Fit:
        columns = design.shape[-1]
        found = fit_linear(
            design[atoms].reshape(-1, columns),
            target,
            of_component,
            design[unseen].reshape(-1, columns),
            STRENGTHS,
        )
        return Fit(found.predicted.reshape(-1, 3), found.held_out)

    fits = {ZERO: Fit(np.zeros((len(unseen), 3)), np.abs(target)), PAIR: fit(pair)}
    if eips.shape[2] == 0:
        return fits
    # As the EIP gives them, or as the scale of its energies would have them.
    scale = np.nan_to_num(problem.alignment(train).scale[problem.used])
    single = np.concatenate([eips, scale * eips], axis=2)
    errors = np.abs(single[atoms] - problem.forces[atoms][:, :, None])
    best = int(errors.mean(axis=(0, 1)).argmin())
    fits[BEST] = Fit(single[unseen, :, best], errors[:, :, best].ravel())
    fits[STACK] = fit(eips)
    fits[f"{STACK} + {PAIR}"] = fit(np.concatenate([eips, pair], axis=2))
    return fits


def _filled_forces(labels: Labels, used: BoolArray) -> FloatArray:
    """Return the forces of these EIPs; where one has none, the mean of the others, or zero.

    Shape ``(N, 3, m)``.
    """
    ok = np.repeat(labels.ok[:, used], labels.n_atoms, axis=0)
    forces = np.where(ok[:, None, :], labels.forces[used].transpose(1, 2, 0), 0.0)
    counts = np.maximum(ok.sum(axis=1), 1)[:, None, None]
    return np.where(ok[:, None, :], forces, forces.sum(axis=2, keepdims=True) / counts)


def covered(ok: BoolArray) -> BoolArray:
    """Return which EIPs labelled enough. Shape ``(m,)``."""
    counts = ok.sum(axis=0)
    return np.asarray((counts > 0) & (counts >= MIN_COVERAGE * counts.max(initial=0)))


def add_kernels(first: Kernel, second: Kernel, share: float = 1.0) -> Kernel:
    """Return the kernel of the sum of two functions, the second with this share of variance."""
    return Kernel(first.train + share * second.train, first.test + share * second.test)
