"""How good the uncertainties of a committee are, by its errors on labels that it has not learnt."""

from dataclasses import dataclass

import numpy as np

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.configurations import ragged_rows, rows_of
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.predictions import OF_FEATURES, Predictions
from aiida_eipnn.science.uncertainty import (
    Calibration,
    Conformal,
    Curves,
    Panel,
    calibrate,
    calibration_scale,
    judge_conformal,
    judge_uncertainties,
    uncertainty_curves,
)

ENERGY, FORCES = "energy_std", "forces_std"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """What is known of one kind of uncertainty.

    Parameters
    ----------
    calibration
        How it compares with the size of the error of each force; with that of the energy per atom,
        for the spread of energies.
    panel, curves
        What is known of it once its scale is right, by force components, or by energies.
    conformal
        Intervals for the force on an atom, or for an energy.
    conformal_worst
        Intervals for the worst force of a configuration.
    """

    calibration: Calibration
    panel: Panel
    curves: Curves
    conformal: Conformal | None
    conformal_worst: Conformal | None = None


def assess_uncertainties(test: Labels, predicted: Predictions) -> dict[str, Assessment]:
    """Judge everything that predictions say of their own errors.

    Parameters
    ----------
    test
        Labels of one source that no member has learnt; each configuration has one.
    predicted
        Predictions of these configurations and any others.

    Returns
    -------
    dict
        By the name of the field of the predictions: ``forces_std`` and ``energy_std``, the spread
        of the members, and ``atom_energy_std`` and ``strangeness``, what features alone tell of an
        atom, which is compared with the error of the force on it. What is not told, or is zero or
        no number everywhere, is not there.
    """
    rows = rows_of(predicted.ids, test.ids)
    atoms = ragged_rows(predicted.offsets, rows)
    error = predicted.forces[atoms] - test.forces[0]
    told = {FORCES: predicted.forces_std} | {
        name: values for name in OF_FEATURES if (values := getattr(predicted, name)) is not None
    }
    found = {name: _of_forces(values[atoms], error, test) for name, values in told.items()}
    wrong = (predicted.energy[rows] - test.energy[:, 0]) / test.n_atoms
    found[ENERGY] = _of_energies(predicted.energy_std[rows], wrong)
    return {name: judged for name, judged in found.items() if judged is not None}


def _of_forces(uncertainty: FloatArray, error: FloatArray, test: Labels) -> Assessment | None:
    """Judge uncertainties of shape ``(N,)`` by the errors of forces, ``(N, 3)``."""
    size = np.linalg.norm(error, axis=1)
    # An atom that rests by symmetry has neither spread nor error. One prediction that is no number
    # says nothing of the others.
    used = (uncertainty > 0) & np.isfinite(uncertainty) & np.isfinite(size)
    if not used.any():
        return None
    owner = np.repeat(np.arange(len(test)), test.n_atoms)
    told = uncertainty[used].astype(np.float64)
    # The spread is that of the vector; each of its three components has a part of it.
    panel, curves = _judge(np.repeat(told / np.sqrt(3), 3), error[used].ravel())
    starts = test.offsets[:-1]
    worst = [np.maximum.reduceat(values, starts) for values in (uncertainty, size)]
    return Assessment(
        calibration=calibrate(told, size[used]),
        panel=panel,
        curves=curves,
        conformal=judge_conformal(told, size[used], owner[used]),
        conformal_worst=_conformal(*worst),
    )


def _of_energies(uncertainty: FloatArray, error: FloatArray) -> Assessment | None:
    """Judge uncertainties of energies per atom by their errors, both of shape ``(n,)``."""
    used = (uncertainty > 0) & np.isfinite(uncertainty) & np.isfinite(error)
    if not used.any():
        return None
    told, wrong = uncertainty[used], error[used]
    panel, curves = _judge(told, wrong)
    return Assessment(
        calibration=calibrate(told, np.abs(wrong)),
        panel=panel,
        curves=curves,
        conformal=_conformal(told, np.abs(wrong)),
    )


def _judge(uncertainty: FloatArray, error: FloatArray) -> tuple[Panel, Curves]:
    sigma = calibration_scale(uncertainty, error) * uncertainty
    if not (sigma > 0).all():
        # Not one error: there is no scale to judge by.
        sigma = uncertainty
    return judge_uncertainties(sigma, error), uncertainty_curves(sigma, error)


def _conformal(uncertainty: FloatArray, error: FloatArray) -> Conformal | None:
    """Judge intervals for one number of each configuration."""
    groups: IntArray = np.arange(len(error))
    used = (uncertainty > 0) & np.isfinite(uncertainty) & np.isfinite(error)
    return judge_conformal(uncertainty[used], error[used], groups[used]) if used.any() else None
