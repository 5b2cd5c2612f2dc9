"""Where the head of DFT starts from: the combination of EIP heads that fits the DFT labels."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.nn.device import array_of
from aiida_eipnn.science.nn.directions import DrawnDirections, ask_along
from aiida_eipnn.science.nn.network import Network
from aiida_eipnn.science.reference import element_fractions

# Directions along which forces are compared, and labels that are compared at most.
N_PROBES = 24
MAX_LABELS = 300
# Strengths of the ridge to choose from, and folds to choose by.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
N_FOLDS = 5
# One eV/atom weighs like three eV/Å.
ENERGY_WEIGHT = 3.0
# Errors below these, in eV/atom and eV/Å, are as good as none.
SMALL_ENERGY, SMALL_FORCE = 2e-3, 5e-3


class _Rows(NamedTuple):
    """What the heads say and what DFT says: ``n`` energies, ``n`` times ``N_PROBES`` forces."""

    energies: FloatArray
    energy: FloatArray
    forces: FloatArray
    force: FloatArray
    fractions: FloatArray

    def take(self, rows: IntArray) -> "_Rows":
        return _Rows(*(values[rows] for values in self))


def combine_heads(
    network: Network,
    described: DrawnDirections,
    configurations: Configurations,
    labels: Labels,
    learnt: IntArray,
    rng: np.random.Generator,
) -> FloatArray:
    """Return how much of each head to take. Shape ``(n_heads,)``.

    Ridge regression on energies and forces together, towards nothing at all: an EIP that is no
    better than zero forces gets no weight. The strength of the ridge is chosen by
    cross-validation.

    Parameters
    ----------
    network
        A network with the heads of the EIPs.
    described
        The configurations with DFT labels.
    configurations
        The same configurations.
    labels
        Their DFT labels.
    learnt
        Rows of those that may be fitted.
    rng
        Draws directions and folds.
    """
    chosen = np.sort(rng.permutation(learnt)[:MAX_LABELS])
    rows = _compare(network, described, configurations, labels, chosen, rng)
    parts = rng.permutation(len(chosen)) % min(N_FOLDS, len(chosen))
    errors = [_held_out(rows, parts, strength) for strength in STRENGTHS]
    return _fit(rows, STRENGTHS[int(np.argmin(errors))])


def _compare(
    network: Network,
    described: DrawnDirections,
    configurations: Configurations,
    labels: Labels,
    chosen: IntArray,
    rng: np.random.Generator,
) -> _Rows:
    """Ask the heads about the labelled configurations."""
    part, known = configurations.take(chosen), labels.take(chosen)
    said, true = [], []
    for _ in range(N_PROBES):
        moved, along = ask_along(
            lambda rows: described.move(network, rows, rng),
            described.batches(chosen),
            known.forces,
            part.n_atoms,
        )
        said.append(_joined([item.along for item in moved]))
        true.append(along)
    return _Rows(
        energies=_joined([item.energies for item in moved]),
        energy=known.energy[:, 0] / part.n_atoms,
        forces=np.stack(said, axis=1),
        force=np.stack(true, axis=1),
        fractions=element_fractions(part, np.array(network.elements)),
    )


def _joined(parts: list[Tensor]) -> FloatArray:
    return array_of(torch.cat(parts).to(torch.float64))


def _held_out(rows: _Rows, parts: IntArray, strength: float) -> float:
    """Return the error on parts that the fit did not see, of energies times that of forces."""
    if parts.max(initial=0) == 0:
        return 0.0
    energy, force = [], []
    for part in np.unique(parts):
        train, test = (
            rows.take(np.flatnonzero(parts != part)),
            rows.take(np.flatnonzero(parts == part)),
        )
        weights = _fit(train, strength)
        left = train.energy - train.energies @ weights
        shift = np.linalg.lstsq(train.fractions, left, rcond=None)[0]
        energy.append(np.abs(test.energies @ weights + test.fractions @ shift - test.energy))
        force.append(np.abs(test.forces @ weights - test.force).ravel())
    return float(
        np.log(np.concatenate(energy).mean() + SMALL_ENERGY)
        + np.log(np.concatenate(force).mean() + SMALL_FORCE)
    )


def _fit(rows: _Rows, strength: float) -> FloatArray:
    """Return the weights of the heads, with what references explain taken out of the energies."""
    projector = rows.fractions @ np.linalg.pinv(rows.fractions)
    says = ENERGY_WEIGHT * (rows.energies - projector @ rows.energies)
    wants = ENERGY_WEIGHT * (rows.energy - projector @ rows.energy)
    says = np.concatenate([says, rows.forces.reshape(-1, says.shape[1]) / np.sqrt(N_PROBES)])
    wants = np.concatenate([wants, rows.force.ravel() / np.sqrt(N_PROBES)])
    # Heads count alike, whatever the size of what they say.
    size = np.sqrt((says**2).mean(axis=0)) + 1e-12
    scaled = says / size
    ridge = strength * len(scaled) * np.eye(scaled.shape[1])
    fitted: FloatArray = np.linalg.solve(scaled.T @ scaled + ridge, scaled.T @ wants) / size
    return fitted
