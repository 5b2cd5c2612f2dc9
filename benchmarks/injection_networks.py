"""The arms of the injection benchmark that train networks.

Every arm trains the same network on the same DFT labels; they differ in what the EIPs teach.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aiida_eipnn.science.arrays import FloatArray
from aiida_eipnn.science.configurations import Configurations, ragged_rows
from aiida_eipnn.science.eip.label_model import LabelModelParameters, make_pseudo_labels
from aiida_eipnn.science.eip.pseudo_labels import WeightedLabels, weigh_pseudo_labels
from aiida_eipnn.science.eip.selection import SelectionParameters
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.nn.committee import CONFIG, Committee
from aiida_eipnn.science.nn.network import Network, NetworkParameters
from aiida_eipnn.science.nn.stage import StageInputs, StageSettings
from aiida_eipnn.science.nn.stages import STAGES, prepare
from aiida_eipnn.science.nn.training import SCORE, TrainingParameters, fit, start_training
from aiida_eipnn.science.reference import Alignment, fit_alignment

# The scratch twin may be as long as pre-training and fine-tuning together.
SCRATCH_STEPS = (300, 1000, 3000, 7000)
SCRATCH = {"weight_decay": 0.3}
VALIDATION = 0.2
# Pseudo-labels are many, and want at least so many steps.
PSEUDO_STEPS = 3000


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What an arm may learn from.

    Parameters
    ----------
    name
        Of the data set; networks that saw no DFT label are shared by all problems of a name.
    pool
        Every configuration without its DFT label, those that are labelled among them.
    labels
        DFT labels of some of them, validation labels among them.
    eip_labels
        What the EIPs say about the pool.
    network
        Architecture.
    """

    name: str
    pool: Configurations
    labels: Labels
    eip_labels: Labels
    network: NetworkParameters


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained arm.

    Parameters
    ----------
    predict
        From configurations and what the EIPs say about them to energies in eV and forces in eV/Å.
    steps
        Gradient steps of the network that is used, pre-training counted.
    cpu_s
        CPU seconds, all that was tried counted, in s.
    notes
        What was chosen, as plain values.
    """

    predict: Callable[[Configurations, Labels], tuple[FloatArray, FloatArray]]
    steps: int
    cpu_s: float
    notes: dict[str, Any] = field(default_factory=dict)


def train_arm(arm: str, problem: Problem, seed: int, cache_folder: Path) -> Trained:
    """Train one arm; ``KeyError`` where there is no such arm."""
    torch.set_num_threads(1)
    return ARMS[arm](problem, seed, cache_folder)


def scratch(problem: Problem, seed: int, _: Path) -> Trained:
    """Learn DFT labels alone, for a number of steps chosen on validation labels."""
    start = time.process_time()
    inputs = StageInputs(configurations=problem.pool, labels=problem.labels)
    score, steps = tuned_length(problem, inputs, seed)
    network, n_steps = run_stage(problem, "finetune", inputs, seed, SCRATCH | {"steps": steps})
    notes = {"chosen_steps": steps, "score": score}
    return Trained(
        predict=predictor(network), steps=n_steps, cpu_s=time.process_time() - start, notes=notes
    )


def tuned_length(problem: Problem, inputs: StageInputs, seed: int) -> tuple[float, int]:
    """Return the best validation score of networks from scratch, and their number of steps."""
    scores = [
        validation_score(problem, inputs, seed, SCRATCH | {"steps": steps})
        for steps in SCRATCH_STEPS
    ]
    best = int(np.argmin(scores))
    return scores[best], SCRATCH_STEPS[best]


def validation_score(
    problem: Problem, inputs: StageInputs, seed: int, training: dict[str, Any]
) -> float:
    """Return the score on validation labels at the end of a training on the others."""
    settings = settings_for(problem, "finetune", training | {"validation_fraction": VALIDATION})
    stage = prepare("finetune", inputs, settings)
    state = start_training(stage.network(seed, 0), settings.training, seed)
    fit(state, stage, settings.training)
    return state.history[-1][SCORE]


def ours_2(problem: Problem, seed: int, folder: Path) -> Trained:
    """Pre-train on energies and forces of all EIPs, replay them, and judge."""
    return taught(problem, seed, folder, problem.eip_labels, "ours")


def ours_1(problem: Problem, seed: int, _: Path) -> Trained:
    """Learn pseudo-labels of the label model beside the DFT labels, and judge."""
    start = time.process_time()
    pseudo, report = pseudo_labels_of(problem, seed)
    plain = StageInputs(configurations=problem.pool, labels=problem.labels)
    inputs = replace(plain, pseudo=pseudo)
    without, length = tuned_length(problem, plain, seed)
    settings = SCRATCH | {"steps": max(length, PSEUDO_STEPS)}
    with_eips = validation_score(problem, inputs, seed, settings)
    notes: dict[str, Any] = {"score": with_eips, "scratch_score": without, **report}
    chosen = plain if without < with_eips else inputs
    settings = SCRATCH | {"steps": length} if chosen is plain else settings
    network, n_steps = run_stage(problem, "finetune", chosen, seed, settings)
    notes["verdict"] = "EIPs do not help here" if chosen is plain else "EIPs help"
    return Trained(
        predict=predictor(network), steps=n_steps, cpu_s=time.process_time() - start, notes=notes
    )


def ours_both(problem: Problem, seed: int, folder: Path) -> Trained:
    """Pre-train, replay, learn pseudo-labels too, and judge."""
    start = time.process_time()
    pseudo, report = pseudo_labels_of(problem, seed)
    seconds = time.process_time() - start
    trained = taught(problem, seed, folder, problem.eip_labels, "ours", pseudo)
    notes = trained.notes | report
    return replace(trained, cpu_s=trained.cpu_s + seconds, notes=notes)


def pseudo_labels_of(problem: Problem, seed: int) -> tuple[WeightedLabels, dict[str, Any]]:
    """Return pseudo-labels of the pool, and what they rest on."""
    pseudo, model = make_pseudo_labels(
        problem.pool, problem.labels, problem.eip_labels, LabelModelParameters(), seed
    )
    weighted = weigh_pseudo_labels(pseudo)
    return weighted, {
        "pseudo_energy_error": float(np.median(pseudo.energy_error)),
        "pseudo_forces_error": float(np.median(pseudo.forces_error)),
        "n_labels": model.n_labels,
    }


def paper_2(problem: Problem, seed: int, folder: Path) -> Trained:
    """Transfer as published: learn energies of all EIPs, a new head, a trunk that may forget."""
    start = time.process_time()
    network, steps, cost = pretrained(problem, problem.eip_labels, "paper", folder)
    inputs = StageInputs(configurations=problem.pool, labels=problem.labels, members=(network,))
    training = {"replay_weight": 0.0, "head_start": "new"}
    tuned, n_steps = run_stage(problem, "finetune", inputs, seed, training)
    seconds = time.process_time() - start + cost
    return Trained(predict=predictor(tuned), steps=steps + n_steps, cpu_s=seconds)


def shuffled(problem: Problem, seed: int, folder: Path) -> Trained:
    """Learn from EIPs whose labels belong to other configurations of as many atoms."""
    labels = shuffle_labels(problem.eip_labels, np.random.default_rng(0))
    return taught(problem, seed, folder, labels, "shuffled")


def worst_eip(problem: Problem, seed: int, folder: Path) -> Trained:
    """Learn from the EIP alone that is worst on the DFT labels."""
    alignment = fit_alignment(problem.pool, problem.labels, problem.eip_labels)
    said = problem.eip_labels.take(problem.eip_labels.rows_of(problem.labels.ids))
    aligned = alignment.apply(problem.pool, said)
    wrong = np.abs(aligned.energy - problem.labels.energy) / problem.labels.n_atoms[:, None]
    column = int(np.nan_to_num(wrong.mean(axis=0), nan=-1.0).argmax())
    labels = only_source(problem.eip_labels, column)
    return taught(problem, seed, folder, labels, f"only-{column}")


def delta(problem: Problem, seed: int, _: Path) -> Trained:
    """Learn what the best EIP lacks; the EIP is needed ever after."""
    start = time.process_time()
    alignment = fit_alignment(problem.pool, problem.labels, problem.eip_labels)
    column = best_column(problem, alignment.apply(problem.pool, said_of(problem, problem.labels)))
    teacher = aligned_source(problem.pool, problem.eip_labels, alignment, column)
    base = teacher.take(teacher.rows_of(problem.labels.ids))
    known = np.flatnonzero(base.ok[:, 0])
    labels = problem.labels.take(known)
    lacking = replace(
        labels,
        energy=labels.energy - base.energy[known],
        forces=labels.forces - base.take(known).forces,
        stress=np.full_like(labels.stress, np.nan),
    )
    inputs = StageInputs(configurations=problem.pool, labels=lacking)
    score, steps = tuned_length(problem, inputs, seed)
    network, n_steps = run_stage(problem, "finetune", inputs, seed, SCRATCH | {"steps": steps})
    plain = predictor(network)

    def predict(
        configurations: Configurations, eip_labels: Labels
    ) -> tuple[FloatArray, FloatArray]:
        energy, forces = plain(configurations, eip_labels)
        said = aligned_source(configurations, eip_labels, alignment, column)
        return energy + np.nan_to_num(said.energy[:, 0]), forces + np.nan_to_num(said.forces[0])

    notes = {"eip": str(problem.eip_labels.sources[column]), "score": score}
    return Trained(predict=predict, steps=n_steps, cpu_s=time.process_time() - start, notes=notes)


def taught(
    problem: Problem,
    seed: int,
    folder: Path,
    eip_labels: Labels,
    kind: str,
    pseudo: WeightedLabels | None = None,
) -> Trained:
    """Pre-train, fine-tune with replay; the twin from scratch where validation says so."""
    start = time.process_time()
    network, steps, cost = pretrained(problem, eip_labels, kind, folder)
    inputs = StageInputs(
        configurations=problem.pool,
        labels=problem.labels,
        eip_labels=eip_labels,
        pseudo=pseudo,
        members=(network,),
    )
    plain = StageInputs(configurations=problem.pool, labels=problem.labels)
    with_eips = validation_score(problem, inputs, seed, {})
    without, length = tuned_length(problem, plain, seed)
    notes: dict[str, Any] = {"score": with_eips, "scratch_score": without}
    if without < with_eips:
        tuned, n_steps = run_stage(problem, "finetune", plain, seed, SCRATCH | {"steps": length})
        notes["verdict"] = "EIPs do not help here"
    else:
        tuned, n_steps = run_stage(problem, "finetune", inputs, seed, {})
        n_steps += steps
        notes["verdict"] = "EIPs help"
    seconds = time.process_time() - start + cost
    return Trained(predict=predictor(tuned), steps=n_steps, cpu_s=seconds, notes=notes)


def run_stage(
    problem: Problem, name: str, inputs: StageInputs, seed: int, training: dict[str, Any]
) -> tuple[Network, int]:
    """Train a network in a stage to the end; return it and its number of steps."""
    settings = settings_for(problem, name, training)
    stage = prepare(name, inputs, settings)
    state = start_training(stage.network(seed, 0), settings.training, seed)
    fit(state, stage, settings.training)
    stage.finish(state.network)
    return state.network, state.n_steps


def settings_for(problem: Problem, name: str, training: dict[str, Any]) -> StageSettings:
    """Return the defaults of a stage with a few settings of its own."""
    return StageSettings(
        network=problem.network,
        training=TrainingParameters.from_dict(training, STAGES[name].defaults),
        selection=SelectionParameters(),
    )


def pretrained(
    problem: Problem, eip_labels: Labels, kind: str, folder: Path
) -> tuple[Network, int, float]:
    """Return a pre-trained network, its steps and CPU seconds: trained once for all label counts.

    It saw no DFT label, so every draw of labels may start from it.
    """
    path = folder / f"{problem.name}-{problem.network.trunk}-{kind}"
    if not (path / CONFIG).exists():
        start = time.process_time()
        inputs = StageInputs(configurations=problem.pool, eip_labels=eip_labels)
        training = {"forces_weight": 0.0} if kind == "paper" else {}
        network, n_steps = run_stage(problem, "pretrain", inputs, 0, training)
        facts = {"steps": n_steps, "cpu_s": time.process_time() - start}
        # Another process may do the same: the last one to finish wins, whole.
        partial = path.with_name(f".{path.name}-{os.getpid()}")
        Committee(members=(network,), stage="pretrain", seeds=(0,), facts=facts).save(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    committee = Committee.load(path)
    return committee.members[0], committee.facts["steps"], committee.facts["cpu_s"]


def predictor(
    network: Network,
) -> Callable[[Configurations, Labels], tuple[FloatArray, FloatArray]]:
    """Return a function that predicts energies and forces, whatever the EIPs say."""
    committee = Committee(members=(network,), stage="finetune", seeds=(0,))

    def predict(configurations: Configurations, _: Labels) -> tuple[FloatArray, FloatArray]:
        predictions = committee.predict(configurations)
        return predictions.energy, predictions.forces

    return predict


def said_of(problem: Problem, labels: Labels) -> Labels:
    """Return what the EIPs say about labelled configurations."""
    return problem.eip_labels.take(problem.eip_labels.rows_of(labels.ids))


def best_column(problem: Problem, aligned: Labels) -> int:
    """Return the EIP that is best on the DFT labels, energies and forces counting alike."""
    labels = problem.labels
    energy = np.abs(aligned.energy - labels.energy) / labels.n_atoms[:, None]
    forces = np.abs(aligned.forces - labels.forces).mean(axis=2)
    complete = aligned.ok.mean(axis=0) > 0.9
    score = np.log(np.nanmean(energy, axis=0) + 2e-3) + np.log(np.nanmean(forces, axis=1) + 5e-3)
    return int(np.where(complete, score, np.inf).argmin())


def only_source(labels: Labels, column: int) -> Labels:
    """Return the labels of one source."""
    return replace(
        labels,
        sources=labels.sources[[column]],
        energy=labels.energy[:, [column]],
        forces=labels.forces[[column]],
        stress=labels.stress[:, [column]],
        status=labels.status[:, [column]],
    )


def aligned_source(
    configurations: Configurations, labels: Labels, alignment: Alignment, column: int
) -> Labels:
    """Return the aligned labels of one EIP."""
    return only_source(alignment.apply(configurations, labels), column)


def shuffle_labels(labels: Labels, rng: np.random.Generator) -> Labels:
    """Return labels that belong to other configurations of as many atoms."""
    rows = np.arange(len(labels))
    for n_atoms in np.unique(labels.n_atoms):
        group = np.flatnonzero(labels.n_atoms == n_atoms)
        rows[group] = rng.permutation(group)
    atoms = ragged_rows(labels.offsets, rows)
    return replace(
        labels,
        energy=labels.energy[rows],
        forces=labels.forces[:, atoms],
        stress=labels.stress[rows],
        status=labels.status[rows],
    )


ARMS: dict[str, Callable[[Problem, int, Path], Trained]] = {
    "scratch": scratch,
    "paper_2": paper_2,
    "ours_1": ours_1,
    "ours_2": ours_2,
    "ours_both": ours_both,
    "delta": delta,
    "worst_eip": worst_eip,
    "shuffled": shuffled,
}
