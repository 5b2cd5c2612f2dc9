"""Calcfunctions that steer the loop: split, check, acquire, assess."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from aiida.engine import ExitCode, calcfunction
from aiida.orm import Dict, Float, Int, List, Str

from aiida_eipnn.calculations.dft import MAX_FORCE, same_level
from aiida_eipnn.data.choice import Choice, ChoiceData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.finite import finite
from aiida_eipnn.data.labels import CORE_SECONDS, LabelsData
from aiida_eipnn.data.predictions import PredictionsData
from aiida_eipnn.science import acquisition
from aiida_eipnn.science.arrays import IntArray, StrArray
from aiida_eipnn.science.assessment import FORCES, assess_uncertainties
from aiida_eipnn.science.cold_start import first_points
from aiida_eipnn.science.configurations import (
    Configurations,
    join_configurations,
    ragged_rows,
    rows_of,
)
from aiida_eipnn.science.convergence import IterationRecord, StopCriteria, stop_reason
from aiida_eipnn.science.dft_cost import KPOINTS_DISTANCE, estimate_cost
from aiida_eipnn.science.duplicates import find_twins
from aiida_eipnn.science.extension import ExtensionParameters, plan
from aiida_eipnn.science.gate import PROBLEMS, GateReport, keep_valid, refuse_labels
from aiida_eipnn.science.labels import Labels, join_labels
from aiida_eipnn.science.metrics import (
    error_scale,
    errors,
    errors_by_type,
    prediction_errors,
    upper_bounds,
)
from aiida_eipnn.science.predictions import Predictions
from aiida_eipnn.science.reference import best_single, fit_alignment
from aiida_eipnn.science.verdict import AGREEMENT, N_HELD_OUT, SCORE, Verdict

TEST, INITIAL, REFUSED, KNOWN, TWINS = "test", "initial", "refused", "known", "twins"

# How the initial configurations are chosen.
FIRST, RANDOM, DISPUTED = "first", "random", "disputed"

# Choices that the loop did not pay DFT for.
FREE = (REFUSED, KNOWN, TWINS)

# What a loop ends with: that of its last iteration.
LAST = ("committee", "selection", "predictions", "history")

TAKEN = "taken_"
LABELS = "labels_"


@calcfunction
def refuse(pool: ConfigurationsData, gate: Dict) -> ChoiceData:
    """Return the configurations that cannot be right, the reasons as attribute."""
    configurations = pool.value()
    kept, failures = keep_valid(configurations, **gate.get_dict())
    return ChoiceData.from_value(
        Choice.from_ids(np.setdiff1d(configurations.ids, kept.ids)),
        strategy="gate",
        reasons={failure.id: failure.reason for failure in failures},
    )


@calcfunction
def set_apart_twins(pool: ConfigurationsData, eip_labels: LabelsData) -> ChoiceData:
    """Return the configurations that are an earlier one moved, turned, mirrored or repeated.

    DFT has the same to say of them, and one of the test set must not be learnt by its twin.
    """
    configurations = pool.value()
    first = find_twins(configurations, eip_labels.value())
    is_first = first == np.arange(len(first))
    # Copies have one id together: it stays.
    twins = np.setdiff1d(configurations.ids[~is_first], configurations.ids[is_first])
    return ChoiceData.from_value(Choice.from_ids(twins), strategy=TWINS)


@calcfunction
def choose_random(configurations: ConfigurationsData, n_chosen: Int, seed: Int) -> ChoiceData:
    """Choose configurations by chance; see :func:`draw_choice`."""
    return draw_choice(configurations, n_chosen.value, seed.value)


def draw_choice(configurations: ConfigurationsData, n_chosen: int, seed: int) -> ChoiceData:
    """Return an unstored choice of configurations by chance.

    Raises
    ------
    ValueError
        If there are fewer.
    """
    ids = configurations.value().ids
    if not 0 < n_chosen <= len(ids):
        raise ValueError(f"cannot pick {n_chosen} of {len(ids)} configurations")
    chosen = np.random.default_rng(seed).permutation(ids)[:n_chosen]
    return ChoiceData.from_value(Choice.from_ids(chosen), strategy="random", seed=seed)


@calcfunction
def split_pool(
    pool: ConfigurationsData, sizes: Dict, seed: Int, eip_labels: LabelsData, **taken: ChoiceData
) -> dict[str, Any]:
    """Choose the ``test`` and the ``initial`` configurations.

    The test set has every type in proportion, and so have the initial ones, unless ``first`` is
    ``disputed``: then they are those that EIPs disagree about. ``taken`` are the choices made
    before, what is refused or known already: they are left out.

    Raises
    ------
    ValueError
        If the pool is too small.
    """
    configurations = pool.value()
    free = np.flatnonzero(~np.isin(configurations.ids, _ids_of(taken)))
    free = acquisition.first_of_each(configurations.ids, free)
    rng = np.random.default_rng(seed.value)
    given = sizes.get_dict()
    first = given.pop(FIRST, RANDOM)
    parts = acquisition.stratified_split(configurations.config_types[free], given, rng)
    strategies = dict.fromkeys(given, RANDOM)
    if first == DISPUTED and given.get(INITIAL):
        rest = np.setdiff1d(np.arange(len(free)), parts[TEST])
        labels = eip_labels.value()
        of_rest = labels.take(labels.rows_of(configurations.ids[free[rest]]))
        chosen = first_points(configurations.take(free[rest]), of_rest, given[INITIAL])
        parts[INITIAL], strategies[INITIAL] = rest[chosen], DISPUTED
    return {
        name: ChoiceData.from_value(
            Choice.from_ids(configurations.ids[free[parts[name]]]),
            strategy=strategies[name],
            seed=seed.value,
        )
        for name in given
    }


@calcfunction
def check_given_labels(
    configurations: ConfigurationsData,
    labels: LabelsData,
    eip_labels: LabelsData,
    **taken: ChoiceData,
) -> dict[str, Any] | ExitCode:
    """Hold given labels against the gate: wrong units or signs are an error.

    A single label that is refused becomes a row without a label, with the reason; see
    :func:`aiida_eipnn.science.gate.refuse_labels`. What was chosen before (``taken``), to be
    tested on or to be learnt, has its label from there: it is left out.
    """
    given = labels.value()
    if strange := sorted(set(given.ids.tolist()) - set(configurations.value().ids.tolist())):
        return ExitCode(310, f"there are labels of unknown configurations: {strange[:3]}")
    chosen = {key: node for key, node in taken.items() if key != f"{TAKEN}{REFUSED}"}
    given, n_given = given.take(np.flatnonzero(~np.isin(given.ids, _ids_of(chosen)))), len(given)
    n_before = n_given - len(given)
    if n_before and not len(given):
        return {"report": Dict({"text": "nothing is new", "n_chosen_before": n_before})}
    kept, report = refuse_labels(configurations.value(), given, eip_labels.value())
    if report.verdict in PROBLEMS:
        return ExitCode(310, report.text)
    return {
        "labels": LabelsData.from_value(kept, level=labels.level, **_gate_facts(report)),
        "choice": ChoiceData.from_value(Choice.from_ids(given.ids), strategy=KNOWN),
        "report": Dict(
            {
                "verdict": str(report.verdict),
                "text": f"{report.text}; {report.summary}",
                "n_chosen_before": n_before,
                "refused": [failure._asdict() for failure in report.refused],
            }
        ),
    }


@calcfunction
def add_known(old: LabelsData, new: LabelsData) -> dict[str, Any]:
    """Return known ``labels`` with new ones behind them, and the ``choice`` that all of them are.

    Raises
    ------
    ValueError
        If the levels of theory differ.
    """
    level = same_level([old, new])
    labels = _with_new(old.value(), new.value())
    return {
        "labels": LabelsData.from_value(labels, level=level),
        "choice": ChoiceData.from_value(Choice.from_ids(labels.ids), strategy=KNOWN),
    }


@calcfunction
def add_eip_labels(old: LabelsData, new: LabelsData) -> LabelsData:
    """Return EIP labels with those of configurations that were not among them."""
    return LabelsData.from_value(_with_new(old.value(), new.value()), level={})


def _with_new(old: Labels, new: Labels) -> Labels:
    return join_labels([old, new.take(np.flatnonzero(~np.isin(new.ids, old.ids)))])


@calcfunction
def refuse_dft_labels(
    pool: ConfigurationsData, labels: LabelsData, eip_labels: LabelsData, **known: LabelsData
) -> LabelsData:
    """Return new DFT labels of the pool without those that the gate refuses.

    ``known`` are labels that are there already: of the pool, they make the judgement firmer; they
    are not judged again. What the gate found is the attribute ``gate`` of the labels.
    """
    new, configurations = labels.value(), pool.value()
    others = [node.value() for node in known.values()]
    others = [part.take(np.flatnonzero(np.isin(part.ids, configurations.ids))) for part in others]
    kept, report = refuse_labels(
        configurations,
        join_labels([*others, new]),
        eip_labels.value(),
        min_contact=0.0,
        force_limit=MAX_FORCE,
    )
    here = set(new.ids.tolist())
    report = replace(report, refused=tuple(f for f in report.refused if f.id in here))
    kept = kept.take(kept.rows_of(new.ids))
    return LabelsData.from_value(
        kept, level=labels.level, **{CORE_SECONDS: labels.core_seconds}, **_gate_facts(report)
    )


def _gate_facts(report: GateReport) -> dict[str, Any]:
    """Return what the node of labels says about the gate."""
    reasons = {failure.id: failure.reason for failure in report.refused}
    return {
        "gate": {
            "verdict": str(report.verdict),
            "problem": report.problem,
            "text": report.summary,
            "reasons": reasons,
        }
    }


@calcfunction
def acquire(
    pool: ConfigurationsData,
    predictions: PredictionsData,
    parameters: Dict,
    stop: Dict,
    history: Dict,
    seed: Int,
    kpoints_distance: Float | None = None,
    **taken: ChoiceData,
) -> ChoiceData:
    """Choose the next configurations to label; see :func:`aiida_eipnn.science.acquisition.acquire`.

    ``taken`` are the choices made before, the test set among them: they are no candidates. No more
    are chosen than the budget of ``stop`` leaves. ``history`` says how wrong the last committee
    was where it was unsure, and ``kpoints_distance``, in 1/Å, what DFT costs.

    Raises
    ------
    ValueError
        If there are fewer candidates than to choose, unless the parameters allow it.
    """
    predicted = predictions.value()
    settings = acquisition.AcquisitionParameters.from_dict(parameters.get_dict())
    last = history["iterations"][-1]
    affordable = StopCriteria.from_dict(stop.get_dict()).affordable(
        _n_paid(taken), last.get("core_hours", 0.0)
    )
    settings = replace(settings, n_select=int(max(min(settings.n_select, affordable), 1)))
    # The number of choices made makes each iteration draw anew from the one seed.
    rng = np.random.default_rng([seed.value, len(taken)])
    configurations = pool.value()
    # In the order of the predictions.
    rows = configurations.rows_of(predicted.ids)
    distance = KPOINTS_DISTANCE if kpoints_distance is None else kpoints_distance.value
    facts = acquisition.PoolFacts(
        cost=estimate_cost(configurations, distance)[rows],
        config_types=configurations.config_types[rows],
    )
    chosen = acquisition.acquire(
        predicted,
        _candidates(predicted, taken),
        settings,
        rng,
        _labelled(predicted, taken),
        facts,
        last.get("error_scale"),
    )
    return ChoiceData.from_value(
        Choice(ids=predicted.ids[chosen.rows], scores=chosen.scores),
        strategy=str(settings.strategy),
        seed=seed.value,
    )


@calcfunction
def plan_exploration(
    recipes: List,
    seed: Int,
    eip: Str,
    extension: Dict,
    acquisition_parameters: Dict,
    history: Dict,
) -> dict[str, Any]:
    """Return the ``recipes`` and the ``seed`` of the next exploration, and its ``driver``.

    That is an EIP or a committee. An empty ``eip`` means that there is none.
    """
    last = history["iterations"][-1]
    settings = acquisition.AcquisitionParameters.from_dict(acquisition_parameters.get_dict())
    found = plan(
        recipes.get_list(),
        ExtensionParameters.from_dict(extension.get_dict()),
        last.get("forces_mae_high"),
        settings.most_uncertain(last.get("error_scale")),
        has_eip=bool(eip.value),
    )
    return {
        "recipes": List(found.recipes),
        "seed": Int(seed.value + int(last["iteration"])),
        "driver": Str(found.driver),
    }


@calcfunction
def keep_new(
    pool: ConfigurationsData, explored: ConfigurationsData, gate: Dict
) -> ConfigurationsData:
    """Return what exploration found: sound, and not in the pool yet.

    What is refused is in the attribute ``refused``, with the reason.
    """
    found = explored.value()
    kept, failures = keep_valid(found, **gate.get_dict())
    new = kept.take(np.flatnonzero(~np.isin(kept.ids, pool.value().ids)))
    reasons = {failure.id: failure.reason for failure in failures}
    return ConfigurationsData.from_value(new, refused=reasons)


@calcfunction
def extend_pool(
    pool: ConfigurationsData,
    new: ConfigurationsData,
    eip_labels: LabelsData,
    new_eip_labels: LabelsData,
) -> dict[str, Any]:
    """Return ``pool`` and ``eip_labels`` with what is new at their ends."""
    # Of configurations with known labels there are EIP labels, though they are not in the pool.
    labels = _with_new(eip_labels.value(), new_eip_labels.value())
    return {
        "pool": ConfigurationsData.from_value(join_configurations([pool.value(), new.value()])),
        "eip_labels": LabelsData.from_value(labels, level=eip_labels.level),
    }


@calcfunction
def judge(metrics: Dict, scratch_metrics: Dict) -> Dict:
    """Return whether to use the committee that learnt from EIPs, by labels that it did not learn.

    Parameters are the metrics of its fine-tuning and of its twin from scratch, which held out the
    same labels; see :class:`aiida_eipnn.science.verdict.Verdict`.
    """
    verdict = Verdict(
        score=metrics[SCORE],
        scratch_score=scratch_metrics[SCORE],
        n_held_out=metrics[N_HELD_OUT],
        agreement=metrics.get(AGREEMENT),
    )
    return Dict({**asdict(verdict), "eips_help": verdict.eips_help, "text": verdict.text})


@calcfunction
def assess(
    pool: ConfigurationsData,
    predictions: PredictionsData,
    test_labels: LabelsData,
    eip_labels: LabelsData,
    parameters: Dict,
    stop: Dict,
    **more: Any,
) -> Dict:
    """Measure the committee on the test set and decide whether the loop may stop.

    ``parameters`` are those of the acquisition: what it would not choose is no candidate.
    ``more`` holds the training labels (``labels_*``), the choices made (``taken_*``), and
    optionally ``scratch``, the predictions of the committee trained from scratch, ``verdict``,
    whether it is the one that is measured, then ``finetuned``, the predictions of the other,
    ``previous``, the history so far, and ``asked``, the predictions by which the last batch of
    labels was asked for.

    Returns
    -------
    Dict
        The history: one record per iteration, and why to stop, or ``None`` to go on.
    """
    predicted = predictions.value()
    trained_on = [more[key] for key in sorted(more) if key.startswith(LABELS)]
    training = join_labels([node.value() for node in trained_on])
    same_level([test_labels, *trained_on])
    taken = {key: node for key, node in more.items() if key.startswith(TAKEN)}
    settings = acquisition.AcquisitionParameters.from_dict(parameters.get_dict())
    previous = more["previous"]["iterations"] if "previous" in more else []
    scale = _error_scale(more, len(previous))
    test = test_labels.value().labelled()
    accuracy = prediction_errors(test, predicted)
    bounds, uncertainties = upper_bounds(test, predicted), assess_uncertainties(test, predicted)
    of_forces = uncertainties.get(FORCES)
    record = IterationRecord(
        iteration=len(previous) + 1,
        n_dft_labels=_n_paid(taken),
        n_training_labels=int(training.ok.sum()),
        **_candidate_facts(predicted, taken, settings, scale),
        core_hours=sum(node.core_seconds for node in [test_labels, *trained_on]) / 3600,
        energy_mae=accuracy.energy_mae,
        forces_mae=accuracy.forces_mae,
        energy_mae_high=bounds.energy_mae,
        forces_mae_high=bounds.forces_mae,
        uncertainty_scale=None if of_forces is None else of_forces.calibration.scale,
    )
    details: dict[str, Any] = {
        "committee": accuracy.as_dict(),
        "by_config_type": _errors_by_type(pool.value(), test, predicted),
        "best_eip": _best_eip(pool.value(), training.labelled(), test, eip_labels.value()),
        "error_scale": scale,
        "uncertainties": {name: asdict(judged) for name, judged in uncertainties.items()},
    }
    for name in ("scratch", "finetuned"):
        if name in more:
            details[name] = prediction_errors(test, more[name].value()).as_dict()
    if "verdict" in more:
        details["verdict"] = more["verdict"].get_dict()
    fields = {name: getattr(record, name) for name in IterationRecord.__slots__}
    return Dict(_history([*previous, {**fields, **details}], stop.get_dict()))


@calcfunction
def reconsider(
    history: Dict, predictions: PredictionsData, parameters: Dict, stop: Dict, **taken: ChoiceData
) -> Dict:
    """Return a history whose last iteration is judged by other ``parameters`` and ``stop``.

    What was measured stays; the candidates are counted, and a reason to stop is looked for, anew.
    """
    return Dict(
        reconsidered(
            history.get_dict(),
            predictions.value(),
            parameters.get_dict(),
            stop.get_dict(),
            {key.removeprefix(TAKEN): node for key, node in taken.items()},
        )
    )


def reconsidered(
    history: Mapping[str, Any],
    predicted: Predictions,
    parameters: Mapping[str, Any],
    stop: Mapping[str, Any],
    choices: Mapping[str, ChoiceData],
) -> dict[str, Any]:
    """Return what :func:`reconsider` does, of plain values."""
    settings = acquisition.AcquisitionParameters.from_dict(parameters)
    *earlier, last = history["iterations"]
    facts = _candidate_facts(predicted, choices, settings, last.get("error_scale"))
    return _history([*earlier, {**last, **facts}], stop)


def _candidate_facts(
    predicted: Predictions,
    taken: Mapping[str, ChoiceData],
    settings: acquisition.AcquisitionParameters,
    scale: float | None,
) -> dict[str, Any]:
    """Return how many candidates there are, and how uncertain, as fields of IterationRecord."""
    free = _candidates(predicted, taken)
    rows = acquisition.within_window(free, predicted.uncertainty, settings, scale)
    found = predicted.uncertainty[rows]
    return {
        "n_candidates": len(found),
        "n_outside": len(free) - len(found),
        "max_uncertainty": float(found.max()) if len(found) else None,
        "mean_uncertainty": float(found.mean()) if len(found) else None,
    }


def _history(records: list[dict[str, Any]], stop: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a history: the records, and why to stop, or ``None`` to go on."""
    names = IterationRecord.__slots__
    measured = [
        IterationRecord(**{name: item[name] for name in names if name in item}) for item in records
    ]
    found = stop_reason(measured, StopCriteria.from_dict(stop))
    reason = {"reason": str(found.reason), "text": found.text} if found else None
    content: dict[str, Any] = finite({"iterations": records, "stop": reason})
    return content


def _candidates(predicted: Predictions, taken: Mapping[str, ChoiceData]) -> IntArray:
    return np.flatnonzero(~np.isin(predicted.ids, _ids_of(taken)))


def _labelled(predicted: Predictions, taken: Mapping[str, ChoiceData]) -> IntArray:
    """Return the rows that are learnt from; those asked for in vain would fail again."""
    kept_apart = {f"{TAKEN}{name}" for name in (TEST, REFUSED, TWINS)}
    asked = {key: node for key, node in taken.items() if key not in kept_apart}
    return np.flatnonzero(np.isin(predicted.ids, _ids_of(asked)))


def _ids_of(choices: Mapping[str, ChoiceData]) -> StrArray:
    return np.concatenate([np.array([], dtype="<U32"), *(node.ids() for node in choices.values())])


def _n_paid(taken: Mapping[str, ChoiceData]) -> int:
    free = {f"{TAKEN}{name}" for name in FREE}
    return sum(len(node) for key, node in taken.items() if key not in free)


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
    # First what is labelled: a pool may be large, and this runs in the daemon.
    labelled = np.intersect1d(np.concatenate([training.ids, test.ids]), pool.ids)
    eip_labels = eip_labels.take(np.flatnonzero(np.isin(eip_labels.ids, labelled)))
    of_pool = np.isin(training.ids, eip_labels.ids)
    here = training.take(np.flatnonzero(of_pool & ~np.isin(training.ids, test.ids)))
    try:
        aligned = fit_alignment(pool, here, eip_labels).apply(pool, eip_labels)
        name = best_single(pool, here, aligned)
        column = aligned.sources.tolist().index(name)
        of_test = aligned.take(aligned.rows_of(test.ids))
        found = errors(test, of_test.energy[:, column], of_test.forces[column])
    except ValueError:
        # No EIP labelled what DFT did: there is nothing to compare with, and the loop goes on.
        return None
    return {"name": name, **found.as_dict()}


def _error_scale(more: Mapping[str, Any], iteration: int) -> float | None:
    """Return how wrong the last committee was where it was unsure, by the batch it asked for."""
    batch = f"{LABELS}{iteration_name(iteration)}"
    if "asked" not in more or batch not in more:
        return None
    return error_scale(more[batch].value(), more["asked"].value())


def iteration_name(number: int) -> str:
    """Return the name of an iteration, in the outputs of the loop and of what it asks for."""
    return f"i{number:03d}"
