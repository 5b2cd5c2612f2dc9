"""How far predictions, or labels of another source, are from reference labels."""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from aiida_eipnn.science.arrays import BoolArray, FloatArray, StrArray
from aiida_eipnn.science.configurations import ragged_rows, rows_of
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.predictions import Predictions

CONFIDENCE = 0.95
RESAMPLES = 2000
# Configurations that an error is expected by, at least.
MIN_FOR_SCALE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Errors over a set of configurations.

    Energies are compared as they are: both sides must count from the same zero, as a network
    trained on the reference does and an EIP that was not aligned does not.

    Parameters
    ----------
    energy_mae, energy_rmse
        Error of the energy per atom, in eV/atom; every configuration counts once.
    forces_mae, forces_rmse
        Error of the force components, in eV/Å; every component counts once.
    n_configurations
        Configurations that were compared.
    n_components
        Force components that were compared.
    """

    energy_mae: float
    energy_rmse: float
    forces_mae: float
    forces_rmse: float
    n_configurations: int
    n_components: int

    def as_dict(self) -> dict[str, float | int]:
        """Return every field by name."""
        return asdict(self)


def errors(
    reference: Labels, energy: FloatArray, forces: FloatArray, rows: BoolArray | None = None
) -> Errors:
    """Compare energies and forces with the first source of ``reference``.

    Parameters
    ----------
    reference
        What is taken for true; configurations without a label are left out.
    energy
        Total energies of the same configurations, in eV. Shape ``(n,)``.
    forces
        Forces on the same atoms, in eV/Å. Shape ``(N, 3)``.
    rows
        The configurations to compare; all by default. Shape ``(n,)``.

    Raises
    ------
    ValueError
        If the shapes differ, or if not one configuration has both numbers.
    """
    n, n_atoms = len(reference), reference.forces.shape[1]
    if energy.shape != (n,) or forces.shape != (n_atoms, 3):
        raise ValueError(
            f"energies of shape {energy.shape} and forces of shape {forces.shape} do not fit "
            f"reference labels of {n} configurations with {n_atoms} atoms"
        )
    used = reference.ok[:, 0] & np.isfinite(energy) & _finite_forces(forces, reference)
    if rows is not None:
        used &= rows
    if not used.any():
        raise ValueError(
            f"nothing to compare: none of the {n} configurations has both a reference label "
            f"and a finite prediction"
        )
    energy_error = (energy - reference.energy[:, 0])[used] / reference.n_atoms[used]
    atoms = ragged_rows(reference.offsets, np.flatnonzero(used))
    forces_error = (forces - reference.forces[0])[atoms]
    return Errors(
        energy_mae=float(np.abs(energy_error).mean()),
        energy_rmse=float(np.sqrt((energy_error**2).mean())),
        forces_mae=float(np.abs(forces_error).mean()),
        forces_rmse=float(np.sqrt((forces_error**2).mean())),
        n_configurations=int(used.sum()),
        n_components=int(forces_error.size),
    )


def errors_by_type(
    reference: Labels, energy: FloatArray, forces: FloatArray, config_types: StrArray
) -> dict[str, Errors]:
    """Return :func:`errors` for each type of configuration that can be compared, by name.

    ``config_types`` has shape ``(n,)``; a type without one comparable configuration is left out.
    """
    usable = reference.ok[:, 0] & np.isfinite(energy) & _finite_forces(forces, reference)
    return {
        str(name): errors(reference, energy, forces, rows=config_types == name)
        for name in np.unique(config_types)
        if (usable & (config_types == name)).any()
    }


def prediction_errors(reference: Labels, predictions: Predictions) -> Errors:
    """Compare a committee with reference labels of configurations that it predicted, by id."""
    rows = rows_of(predictions.ids, reference.ids)
    atoms = ragged_rows(predictions.offsets, rows)
    return errors(reference, predictions.energy[rows], predictions.forces[atoms])


class UpperBounds(NamedTuple):
    """Mean absolute errors of energy per atom, in eV/atom, and of forces, in eV/Å, at most."""

    energy_mae: float
    forces_mae: float


def upper_bounds(reference: Labels, predictions: Predictions) -> UpperBounds:
    """Return what the mean errors of a committee are below with 95 % confidence.

    By the bootstrap over configurations, because errors within one are alike; the draws are the
    same every time.

    Raises
    ------
    ValueError
        If there is nothing to compare.
    """
    rows = rows_of(predictions.ids, reference.ids)
    forces = predictions.forces[ragged_rows(predictions.offsets, rows)] - reference.forces[0]
    energy = (predictions.energy[rows] - reference.energy[:, 0]) / reference.n_atoms
    sums = np.add.reduceat(np.abs(forces).sum(axis=1), reference.offsets[:-1])
    used = reference.ok[:, 0] & np.isfinite(energy) & np.isfinite(sums)
    if not used.any():
        raise ValueError(f"none of {len(reference)} labels can be compared with a prediction")
    n = int(used.sum())
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    energies = drawn @ np.abs(energy[used]) / n
    components = drawn @ (3 * reference.n_atoms[used])
    return UpperBounds(
        energy_mae=float(np.quantile(energies, CONFIDENCE)),
        forces_mae=float(np.quantile(drawn @ sums[used] / components, CONFIDENCE)),
    )


def _finite_forces(forces: FloatArray, reference: Labels) -> BoolArray:
    bad = np.concatenate([[0], np.cumsum(~np.isfinite(forces).all(axis=1))])
    finite: BoolArray = np.diff(bad[reference.offsets]) == 0
    return finite


class WorstForces(NamedTuple):
    """The largest spread, and the largest error, of a force in each configuration, in eV/Å.

    Both of shape ``(n,)``; they need not be those of one atom.
    """

    spread: FloatArray
    error: FloatArray


def worst_forces(reference: Labels, predictions: Predictions) -> WorstForces:
    """Return how unsure a committee was of labelled configurations, and how wrong.

    Parameters
    ----------
    reference
        What is taken for true, one source; each configuration has a label.
    predictions
        Of these configurations and any others.
    """
    atoms = ragged_rows(predictions.offsets, rows_of(predictions.ids, reference.ids))
    wrong = np.linalg.norm(predictions.forces[atoms] - reference.forces[0], axis=1)
    starts = reference.offsets[:-1]
    return WorstForces(
        spread=np.maximum.reduceat(predictions.forces_std[atoms], starts),
        error=np.maximum.reduceat(wrong, starts),
    )


def error_scale(reference: Labels, predictions: Predictions) -> float | None:
    """Return the factor from the uncertainty of a configuration to the error of its worst force.

    The median of the ratios: one configuration that is far off, as some that are asked for are,
    says nothing of the others.

    Parameters
    ----------
    reference
        Labels that the committee had not learnt when it made these predictions.
    predictions
        Of these configurations and any others.

    Returns
    -------
    float or None
        ``None`` where fewer than ``MIN_FOR_SCALE`` have a label and a spread.
    """
    found = worst_forces(reference.labelled(), predictions)
    used = found.spread > 0
    if used.sum() < MIN_FOR_SCALE:
        return None
    return float(np.median(found.error[used] / found.spread[used]))
