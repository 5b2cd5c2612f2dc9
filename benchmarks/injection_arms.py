"""The ways to learn of `make bench-injection`: EIPs alone, and networks with or without EIPs.

EIPs alone; the best EIP is chosen on the labelled points, for energies and for forces separately:

constant    the mean energy per atom, no forces
eip_raw     the best EIP as it is
eip_shift   ... its energies shifted onto DFT
eip_affine  ... scaled too, its forces with them, from 10 labels on
stack       a ridge regression on all EIPs, one for energies and one for forces; that of energies
            starts from nothing or from the best EIP, by cross-validation
oracle      the best of all shifted and scaled EIPs for each test configuration, by its DFT label:
            a bound

Networks, in `injection_networks.py`:

scratch     DFT labels alone
paper_1, paper_2, paper_both   the published method: pseudo-labels, pre-training, both
ours_1, ours_2, ours_both      ours
delta       the difference of DFT and the best EIP
worst_eip   ours with the worst EIPs alone; shuffled: with EIP labels of other configurations
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from injection_data import Problem  # type: ignore[import-not-found]

from aiida_eipnn.science.arrays import BoolArray, FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.reference import Alignment, fit_alignment, robust_sigma
from aiida_eipnn.science.regression import fit_linear

# Total energies in eV, shape (n,), and forces in eV/Å, shape (N, 3).
Predict = Callable[[Configurations], tuple[FloatArray, FloatArray]]

NO_TRUNK = "none"
ORACLE = "oracle"
NETWORKS = (
    "scratch", "paper_1", "paper_2", "paper_both", "ours_1", "ours_2", "ours_both",
    "delta", "worst_eip", "shuffled",
)  # fmt: skip
NETWORKS_MODULE = "injection_networks"

# An EIP that labelled less than half of what the most complete one did is left out.
MIN_COVERAGE = 0.5
N_FOLDS = 5
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
# In units of the spread of the energies: beyond, an EIP says far out and no more.
FAR_OUT = 8.0


class Trained(NamedTuple):
    """What a training gives.

    Parameters
    ----------
    predict
        Predicts configurations that were not in the pool.
    steps
        Gradient steps, pre-training included.
    cpu_s
        CPU time in s, with a share of what several trainings use; `None` to have the call timed.
    notes
        What else is worth keeping, in types of JSON.
    """

    predict: Predict
    steps: int = 0
    cpu_s: float | None = None
    notes: dict[str, Any] | None = None


def train_network(arm: str, problem: Problem, seed: int) -> Trained:
    """Train a network. The one place where the networks are plugged in.

    `train_arm(arm, problem, seed)` returns a record with the fields of `Trained`. It may use all
    of `problem`, whose `trunk` names the network.
    """
    # By name: the module needs torch, and the arms without networks do not.
    result = importlib.import_module(NETWORKS_MODULE).train_arm(arm, problem, seed)
    return Trained(result.predict, result.steps, result.cpu_s, result.notes)


def has_networks() -> bool:
    """Return whether there are networks to train."""
    return importlib.util.find_spec(NETWORKS_MODULE) is not None


def fit_constant(problem: Problem, seed: int) -> Trained:
    """Return the mean energy per atom, and no forces."""
    del seed
    level = _level(problem)

    def predict(wanted: Configurations) -> tuple[FloatArray, FloatArray]:
        return np.full(len(wanted), level) * wanted.n_atoms, np.zeros((len(wanted.numbers), 3))

    return Trained(predict)


def fit_raw(problem: Problem, seed: int) -> Trained:
    """Return the best EIP as it is."""
    del seed
    return _fit_single(problem, lambda _, labels: labels)


def fit_shifted(problem: Problem, seed: int) -> Trained:
    """Return the best EIP with its energies shifted."""
    del seed
    return _fit_single(problem, _align(problem, scaled=False).apply)


def fit_affine(problem: Problem, seed: int) -> Trained:
    """Return the best EIP, scaled and shifted."""
    del seed
    return _fit_single(problem, _align(problem).apply)


def fit_stack(problem: Problem, seed: int) -> Trained:
    """Return a ridge regression on all EIPs, of strengths by cross-validation."""
    n = len(problem.rows)
    parts = np.random.default_rng(seed).permutation(n) % min(N_FOLDS, n)
    stack = _Stack(problem)
    alignment, labelled = _align(problem), problem.labelled
    own = problem.eips.take(problem.rows)
    known = stack.describe_energies(alignment.apply(labelled, own))
    known_forces = stack.describe_forces(own)
    of_component = np.repeat(parts, 3 * labelled.n_atoms)

    def predict(wanted: Configurations) -> tuple[FloatArray, FloatArray]:
        labels = problem.label(wanted)
        unseen = stack.describe_energies(alignment.apply(wanted, labels))
        energy = _stack_energies(known, stack.target, parts, unseen)
        forces = fit_linear(
            known_forces,
            problem.dft.forces[0].ravel(),
            of_component,
            stack.describe_forces(labels),
            STRENGTHS,
        ).predicted
        per_atom = stack.level + stack.unit * energy
        return per_atom * wanted.n_atoms, forces.reshape(-1, 3)

    return Trained(predict)


def fit_oracle(problem: Problem, truth: Labels) -> Trained:
    """Return the best shifted or scaled EIP of each configuration, for energies and for forces.

    ``truth`` are the DFT labels of the configurations to predict, in their order: a bound of what
    choosing among EIPs can give, not a way to learn.
    """
    alignments, level = (
        [_align(problem, scaled=scaled) for scaled in (False, True)],
        _level(problem),
    )

    def predict(wanted: Configurations) -> tuple[FloatArray, FloatArray]:
        labels = problem.label(wanted)
        says = [_filled(alignment.apply(wanted, labels), level) for alignment in alignments]
        energy = np.concatenate([item[0] for item in says], axis=1)
        forces = np.concatenate([item[1] for item in says])
        best = np.abs(energy - truth.energy).argmin(axis=1)
        best_force = _force_errors(forces, truth).argmin(axis=1)
        owner = np.repeat(best_force, wanted.n_atoms)
        return energy[np.arange(len(wanted)), best], forces[owner, np.arange(len(owner))]

    return Trained(predict)


ARMS: dict[str, Callable[[Problem, int], Trained]] = {
    "constant": fit_constant,
    "eip_raw": fit_raw,
    "eip_shift": fit_shifted,
    "eip_affine": fit_affine,
    "stack": fit_stack,
}


def _stack_energies(
    known: FloatArray, target: FloatArray, parts: IntArray, unseen: FloatArray
) -> FloatArray:
    """Return the regression, from nothing or from the best EIP, that errs less on unseen parts."""
    # With few labels a ridge towards nothing errs more than the best EIP alone.
    best = 1 + int(np.abs(known[:, 1:] - target[:, None]).mean(axis=0).argmin())
    plain = fit_linear(known, target, parts, unseen, STRENGTHS)
    beyond = fit_linear(known, target - known[:, best], parts, unseen, STRENGTHS)
    if beyond.held_out.mean() < plain.held_out.mean():
        return np.asarray(unseen[:, best] + beyond.predicted, dtype=np.float64)
    return plain.predicted


class _Stack:
    """What regressions on all EIPs learn from; energies per atom, in units of their spread."""

    def __init__(self, problem: Problem) -> None:
        energy = problem.dft.energy[:, 0] / problem.dft.n_atoms
        self.level = float(np.median(energy))
        self.unit = max(robust_sigma(energy - self.level), 1e-6)
        self.target = (energy - self.level) / self.unit
        self.used = _covered(problem.eips.take(problem.rows).ok)

    def describe_energies(self, aligned: Labels) -> FloatArray:
        """Return a constant and what each EIP says. Shape ``(n, 1 + m)``."""
        energy = (aligned.energy / aligned.n_atoms[:, None])[:, self.used]
        energy[np.isnan(energy).all(axis=1)] = self.level
        middle = np.nanmedian(energy, axis=1, keepdims=True)
        says = (np.where(np.isnan(energy), middle, energy) - self.level) / self.unit
        constant = np.ones((len(says), 1))
        return np.hstack([constant, np.clip(says, -FAR_OUT, FAR_OUT)])

    def describe_forces(self, labels: Labels) -> FloatArray:
        """Return the forces of each EIP, the mean of the others where it has none.

        Shape ``(3 N, m)``.
        """
        ok = np.repeat(labels.ok[:, self.used], labels.n_atoms, axis=0)[:, None]
        forces = np.where(ok, labels.forces[self.used].transpose(1, 2, 0), 0.0)
        mean = forces.sum(axis=2, keepdims=True) / np.maximum(ok.sum(axis=2, keepdims=True), 1)
        filled = np.where(ok, forces, mean).astype(np.float64)
        return filled.reshape(-1, filled.shape[2])


def _fit_single(problem: Problem, align: Callable[[Configurations, Labels], Labels]) -> Trained:
    """Return the EIP with the smallest errors on the labelled points, brought onto DFT."""
    level, own = _level(problem), problem.eips.take(problem.rows)
    aligned = align(problem.labelled, own)
    energy, forces = _filled(aligned, level)
    left_out = np.where(_covered(aligned.ok), 0.0, np.inf)
    n_atoms = own.n_atoms[:, None]
    of_energy = (np.abs(energy - problem.dft.energy) / n_atoms).mean(axis=0) + left_out
    of_forces = _force_errors(forces, problem.dft).sum(axis=0) + left_out
    best, best_force = int(of_energy.argmin()), int(of_forces.argmin())

    def predict(wanted: Configurations) -> tuple[FloatArray, FloatArray]:
        energy, forces = _filled(align(wanted, problem.label(wanted)), level)
        return energy[:, best], forces[best_force]

    names = problem.eips.sources
    return Trained(predict, notes={"energy": str(names[best]), "forces": str(names[best_force])})


def _align(problem: Problem, *, scaled: bool = True) -> Alignment:
    own = problem.eips.take(problem.rows)
    if scaled:
        return fit_alignment(problem.labelled, problem.dft, own)
    return fit_alignment(problem.labelled, problem.dft, own, min_labels_for_scale=None)


def _level(problem: Problem) -> float:
    """Return the mean energy per atom, in eV."""
    return float((problem.dft.energy[:, 0] / problem.dft.n_atoms).mean())


def _filled(labels: Labels, level: float) -> tuple[FloatArray, FloatArray]:
    """Return energies and forces; where an EIP has none, the constant and zero.

    Shapes ``(n, m)`` and ``(m, N, 3)``.
    """
    per_atom = np.repeat(labels.ok, labels.n_atoms, axis=0).T[:, :, None]
    energy = np.where(labels.ok, labels.energy, level * labels.n_atoms[:, None])
    return energy, np.where(per_atom, labels.forces, 0.0).astype(np.float64)


def _force_errors(forces: FloatArray, truth: Labels) -> FloatArray:
    """Return the absolute error of each EIP, summed over components. Shape ``(n, m)``."""
    of_atoms = np.abs(forces - truth.forces[0]).sum(axis=2)
    return np.asarray(np.add.reduceat(of_atoms, truth.offsets[:-1], axis=1).T, dtype=np.float64)


def _covered(ok: BoolArray) -> BoolArray:
    """Return which EIPs labelled enough. Shape ``(m,)``."""
    counts = ok.sum(axis=0)
    return np.asarray((counts > 0) & (counts >= MIN_COVERAGE * counts.max(initial=0)))
