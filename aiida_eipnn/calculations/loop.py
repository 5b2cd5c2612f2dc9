"""Calcfunctions that steer the loop: split, check, acquire, assess."""

from typing import Any

import numpy as np
from aiida.engine import ExitCode, calcfunction
from aiida.orm import Dict, Int

from aiida_eipnn.calculations.dft import same_level
from aiida_eipnn.data.choice import Choice, ChoiceData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.finite import finite
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.data.predictions import PredictionsData
from aiida_eipnn.science import acquisition
from aiida_eipnn.science.configurations import Configurations, ragged_rows, rows_of
from aiida_eipnn.science.convergence import IterationRecord, StopCriteria, stop_reason
from aiida_eipnn.science.gate import PROBLEMS, check_labels, keep_valid
from aiida_eipnn.science.labels import Labels, join_labels
from aiida_eipnn.science.metrics import errors, errors_by_type, prediction_errors
from aiida_eipnn.science.predictions import Predictions
from aiida_eipnn.science.reference import best_single, fit_alignment
from aiida_eipnn.science.uncertainty import calibrate

TEST, INITIAL, REFUSED = "test", "initial", "refused"

TAKEN = "taken_"
LABELS = "labels_"


@calcfunction
def split_pool(pool: ConfigurationsData, sizes: Dict, gate: Dict, seed: Int) -> dict[str, Any]:
    """Refuse what cannot be right, then choose the ``test`` and the ``initial`` configurations.

    Every type is represented in proportion. The choice ``refused`` has the reasons as attribute.
    """
    configurations = pool.value()
    kept, failures = keep_valid(configurations, **gate.get_dict())
    valid = configurations.rows_of(kept.ids)
    refused = np.setdiff1d(configurations.ids, kept.ids)
    rng = np.random.default_rng(seed.value)
    parts = acquisition.stratified_split(configurations.config_types[valid], sizes.get_dict(), rng)
    chosen = {
        name: ChoiceData.from_value(
            Choice.from_ids(configurations.ids[valid[parts[name]]]),
            strategy="random",
            seed=seed.value,
        )
        for name in sizes.get_dict()
    }
    reasons = {failure.id: failure.reason for failure in failures}
    refusal = ChoiceData.from_value(Choice.from_ids(refused), strategy="gate", reasons=reasons)
    return {**chosen, REFUSED: refusal}


@calcfunction
def check_given_labels(
    configurations: ConfigurationsData, labels: LabelsData, eip_labels: LabelsData
) -> dict[str, Any] | ExitCode:
    """Hold given labels against the EIPs: wrong units or signs are an error, outliers are dropped.

    See :func:`aiida_eipnn.science.gate.check_labels`.
    """
    given = labels.value()
    report = check_labels(configurations.value(), given, eip_labels.value())
    if report.verdict in PROBLEMS:
        return ExitCode(310, report.text)
    refused = {failure.id for failure in report.refused}
    kept = given.take([row for row, name in enumerate(given.ids) if str(name) not in refused])
    facts = {
        "verdict": str(report.verdict),
        "text": report.text,
        "refused": [failure._asdict() for failure in report.refused],
    }
    return {"labels": LabelsData.from_value(kept, level=labels.level), "report": Dict(facts)}


@calcfunction
def acquire(
    predictions: PredictionsData, parameters: Dict, seed: Int, **taken: ChoiceData
) -> ChoiceData:
    """Choose the next configurations to label; see :func:`aiida_eipnn.science.acquisition.acquire`.

    ``taken`` are the choices made before, the test set among them: they are no candidates.
    """
    predicted = predictions.value()
    settings = acquisition.AcquisitionParameters.from_dict(parameters.get_dict())
    # The number of choices made makes each iteration draw anew from the one seed.
    rng = np.random.default_rng([seed.value, len(taken)])
    chosen = acquisition.acquire(predicted, _candidates(predicted, taken), settings, rng)
    return ChoiceData.from_value(
        Choice(ids=predicted.ids[chosen.rows], scores=chosen.scores),
        strategy=str(settings.strategy),
        seed=seed.value,
    )


@calcfunction
def assess(
    pool: ConfigurationsData,
    predictions: PredictionsData,
    test_labels: LabelsData,
    eip_labels: LabelsData,
    criteria: Dict,
    **more: Any,
) -> Dict:
    """Measure the committee on the test set and decide whether the loop may stop.

    ``more`` holds the training labels (``labels_*``), the choices made (``taken_*``), and
    optionally ``scratch``, the predictions of the committee trained from scratch, and
    ``previous``, the history so far.

    Returns
    -------
    Dict
        The history: one record per iteration, and why to stop, or ``None`` to go on.
    """
    predicted = predictions.value()
    training = join_labels([more[key].value() for key in sorted(more) if key.startswith(LABELS)])
    same_level([test_labels, *(more[key] for key in sorted(more) if key.startswith(LABELS))])
    taken = {key: node for key, node in more.items() if key.startswith(TAKEN)}
    candidates = predicted.uncertainty[_candidates(predicted, taken)]
    test = test_labels.value().labelled()
    accuracy = prediction_errors(test, predicted)
    previous = more["previous"]["iterations"] if "previous" in more else []
    record = IterationRecord(
        iteration=len(previous) + 1,
        n_dft_labels=sum(len(node) for key, node in taken.items() if key != f"{TAKEN}{REFUSED}"),
        n_candidates=len(candidates),
        energy_mae=accuracy.energy_mae,
        forces_mae=accuracy.forces_mae,
        max_uncertainty=float(candidates.max()) if len(candidates) else None,
        mean_uncertainty=float(candidates.mean()) if len(candidates) else None,
    )
    details: dict[str, Any] = {
        "n_training_labels": int(training.ok.sum()),
        "committee": accuracy.as_dict(),
        "by_config_type": _errors_by_type(pool.value(), test, predicted),
        "best_eip": _best_eip(pool.value(), training.labelled(), test, eip_labels.value()),
        "calibration": _calibration(test, predicted),
    }
    if "scratch" in more:
        details["scratch"] = prediction_errors(test, more["scratch"].value()).as_dict()
    stop = stop_reason([record], StopCriteria.from_dict(criteria.get_dict()))
    fields = {name: getattr(record, name) for name in IterationRecord.__slots__}
    return Dict(
        finite(
            {
                "iterations": [*previous, {**fields, **details}],
                "stop": {"reason": str(stop.reason), "text": stop.text} if stop else None,
            }
        )
    )


def _candidates(predicted: Predictions, taken: dict[str, Any]) -> Any:
    seen = [node.ids() for node in taken.values()]
    return np.flatnonzero(~np.isin(predicted.ids, np.concatenate(seen) if seen else []))


def _errors_by_type(
    pool: Configurations, test: Labels, predicted: Predictions
) -> dict[str, dict[str, float | int]]:
    rows = rows_of(predicted.ids, test.ids)
    types = pool.config_types[rows_of(pool.ids, test.ids)]
    forces = predicted.forces[ragged_rows(predicted.offsets, rows)]
    by_type = errors_by_type(test, predicted.energy[rows], forces, types)
    return {name: value.as_dict() for name, value in by_type.items()}


def _best_eip(
    pool: Configurations, training: Labels, test: Labels, eip_labels: Labels
) -> dict[str, Any] | None:
    """Return the EIP that is best on the training labels, and its errors on the test labels."""
    here = training.take(np.flatnonzero(np.isin(training.ids, pool.ids)))
    aligned = fit_alignment(pool, here, eip_labels).apply(pool, eip_labels)
    try:
        name = best_single(pool, here, aligned)
        column = aligned.sources.tolist().index(name)
        of_test = aligned.take(aligned.rows_of(test.ids))
        found = errors(test, of_test.energy[:, column], of_test.forces[column])
    except ValueError:
        # No EIP labelled what DFT did: there is nothing to compare with, and the loop goes on.
        return None
    return {"name": name, **found.as_dict()}


def _calibration(test: Labels, predicted: Predictions) -> dict[str, float | int] | None:
    """Compare the spread of the forces with their errors, atom by atom."""
    atoms = ragged_rows(predicted.offsets, rows_of(predicted.ids, test.ids))
    error = np.linalg.norm(predicted.forces[atoms] - test.forces[0], axis=1)
    spread = predicted.forces_std[atoms]
    if not (spread > 0).any():
        return None
    found = calibrate(spread, error)
    return {name: getattr(found, name) for name in ("spearman", "scale", "coverage", "n")}
