"""The arms of the injection benchmark that train networks.

Every arm trains the same network on the same DFT labels; they differ in what the EIPs teach.
"""

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from injection_arms import Predict, Trained  # type: ignore[import-not-found]
from injection_data import Problem  # type: ignore[import-not-found]
from torch import Tensor

from aiida_eipnn.science.arrays import FloatArray, load_arrays, save_arrays, write_whole
from aiida_eipnn.science.configurations import (
    Configurations,
    join_configurations,
    ragged_rows,
)
from aiida_eipnn.science.eip.engine import label_with_eips
from aiida_eipnn.science.eip.label_model import LabelModelParameters, make_pseudo_labels
from aiida_eipnn.science.eip.pseudo_labels import PseudoLabels, pseudo_labels_of_selection
from aiida_eipnn.science.eip.selection import SelectionParameters
from aiida_eipnn.science.labels import Labels, join_labels
from aiida_eipnn.science.nn.committee import Committee
from aiida_eipnn.science.nn.finetuning import Finetuning, Teachers
from aiida_eipnn.science.nn.losses import standardise_residuals, tukey_biweight
from aiida_eipnn.science.nn.network import Network, NetworkParameters
from aiida_eipnn.science.nn.stage import Stage, StageInputs, StageSettings
from aiida_eipnn.science.nn.stages import STAGES, prepare
from aiida_eipnn.science.nn.training import (
    Step,
    TrainingParameters,
    TrainingState,
    fit,
    start_training,
)
from aiida_eipnn.science.pool import make_pool
from aiida_eipnn.science.reference import Alignment, fit_alignment
from aiida_eipnn.science.verdict import SCORE, Verdict, force_agreement

# The scratch twin may be as long as pre-training and fine-tuning together.
SCRATCH_STEPS = (300, 1000, 3000, 7000)
SCRATCH = {"weight_decay": 0.3}
VALIDATION = 0.2
# Pseudo-labels are many, and want at least so many steps.
PSEUDO_STEPS = 3000
# As published: the largest error of an EIP that is right, in eV/atom; fine-tuning without anything
# that holds what was learnt before; weights of the pseudo-labels to choose from.
PAPER_TOLERANCE = 0.1
PAPER_TRANSFER = {"replay_weight": 0.0, "head_start": "new"}
PAPER_WEIGHTS = (1e-3, 1e-2, 1e-1)


# What the pool is enlarged by for pre-training: unlabelled configurations cost nothing. The same
# for every set.
RECIPES: tuple[dict[str, Any], ...] = (
    {"config_type": "rattled", "count": 800, "amplitude": (0.02, 0.3)},
    {
        "config_type": "strained",
        "count": 800,
        "shear": 0.1,
        "volume": (0.8, 1.25),
        "amplitude": (0.0, 0.1),
    },
    {"config_type": "vacancy", "count": 200, "min_atoms": 8, "amplitude": (0.02, 0.3)},
    {"config_type": "surface", "count": 200, "max_atoms": 12, "amplitude": (0.0, 0.2)},
)
SEEDS_OF_POOL = 400
LARGEST_SEED = 24


class Material(NamedTuple):
    """What pre-training learns from: the pool of the problem and generated configurations."""

    pool: Configurations
    eips: Labels


@functools.cache
def _material(folder: Path) -> Material:
    pool, eips = folder / "configurations", folder / "eips"
    return Material(
        Configurations.from_arrays(load_arrays(pool)), Labels.from_arrays(load_arrays(eips))
    )


def material(problem: Problem) -> Material:
    """Return the pool with what was generated, made once for all trainings of a set."""
    folder = problem.folder / "material"
    if not folder.exists():
        rng = np.random.default_rng(0)
        small = np.flatnonzero(problem.pool.n_atoms <= LARGEST_SEED)
        rows = small if len(small) else np.argsort(problem.pool.n_atoms)[:SEEDS_OF_POOL]
        seeds = problem.pool.take(np.sort(rng.permutation(rows)[:SEEDS_OF_POOL]))
        made, _ = make_pool(seeds, RECIPES, rng)
        made = made.take(np.flatnonzero(~np.isin(made.ids, problem.pool.ids)))
        labels = label_with_eips(made, list(map(str, problem.eips.sources)))
        pool = join_configurations([problem.pool, made])
        eips = join_labels([problem.eips, labels])
        with whole_folder(folder) as partial:
            save_arrays(partial / "configurations", pool.arrays())
            save_arrays(partial / "eips", eips.take(eips.rows_of(pool.ids)).arrays())
    return _material(folder)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a place to write what ``folder`` shall hold, as a whole or not at all.

    Other processes may do the same: the first one to finish wins, for others read it by then.
    """
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    yield partial
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(partial)


def network_of(problem: Problem) -> NetworkParameters:
    """Return the architecture, with the defaults of its trunk."""
    return NetworkParameters.from_dict({"trunk": problem.trunk, "precision": "float32"})


def train_arm(arm: str, problem: Problem, seed: int) -> Trained:
    """Train one arm; ``KeyError`` where there is no such arm."""
    torch.set_num_threads(1)
    return ARMS[arm](problem, seed)


def scratch(problem: Problem, seed: int) -> Trained:
    """Learn DFT labels alone, for a number of steps chosen on validation labels."""
    twin = twin_of(problem, seed)
    start = time.process_time()
    network, n_steps = run_stage(
        problem, "finetune", without_eips(problem), seed, SCRATCH | {"steps": twin.steps}
    )
    seconds = time.process_time() - start + twin.cpu_s
    notes = {"chosen_steps": twin.steps, "score": twin.score}
    return Trained(predict=predictor(network), steps=n_steps, cpu_s=seconds, notes=notes)


class Twin(NamedTuple):
    """What validation says of networks from scratch: the best score, its steps, what it cost."""

    score: float
    steps: int
    cpu_s: float


def twin_of(problem: Problem, seed: int) -> Twin:
    """Return the twin from scratch, tuned once for all arms of the same labels."""
    path = problem.folder / "twins" / f"{problem.trunk}-{len(problem.rows)}-{seed}.json"
    if not path.exists():
        start = time.process_time()
        score, steps = tuned_length(problem, without_eips(problem), seed)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps([score, steps, time.process_time() - start]))
    return Twin(*json.loads(path.read_text()))


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
    state = trained_state(prepare("finetune", inputs, settings), settings, seed)
    return state.history[-1][SCORE]


def ours_2(problem: Problem, seed: int) -> Trained:
    """Pre-train on energies and forces of all EIPs, replay them, and judge."""
    return taught(problem, seed, material(problem).eips, "ours")


def ours_1(problem: Problem, seed: int) -> Trained:
    """Learn pseudo-labels of the label model beside the DFT labels, and judge."""
    start = time.process_time()
    pseudo, report = pseudo_labels_of(problem, seed)
    seconds = time.process_time() - start
    inputs = replace(without_eips(problem), pseudo=pseudo)
    trained = judged(
        problem, seed, inputs, lambda length: SCRATCH | {"steps": max(length, PSEUDO_STEPS)}
    )
    notes = (trained.notes or {}) | report
    return trained._replace(cpu_s=(trained.cpu_s or 0.0) + seconds, notes=notes)


def ours_both(problem: Problem, seed: int) -> Trained:
    """Pre-train, replay, learn pseudo-labels too, and judge."""
    start = time.process_time()
    pseudo, report = pseudo_labels_of(problem, seed)
    seconds = time.process_time() - start
    trained = taught(problem, seed, material(problem).eips, "ours", pseudo)
    notes = (trained.notes or {}) | report
    return trained._replace(cpu_s=(trained.cpu_s or 0.0) + seconds, notes=notes)


def pseudo_labels_of(problem: Problem, seed: int) -> tuple[PseudoLabels, dict[str, Any]]:
    """Return pseudo-labels of the pool, and what they rest on."""
    pseudo, model = make_pseudo_labels(
        material(problem).pool, problem.dft, material(problem).eips, LabelModelParameters(), seed
    )
    return pseudo, {
        "pseudo_energy_error": float(np.median(pseudo.energy_error)),
        "pseudo_forces_error": float(np.median(pseudo.forces_error)),
        "n_labels": model.n_labels,
    }


def paper_2(problem: Problem, seed: int) -> Trained:
    """Transfer as published: learn energies of all EIPs, a new head, a trunk that may forget."""
    network, steps, cost = pretrained(problem, material(problem).eips, "paper")
    start = time.process_time()
    inputs = replace(without_eips(problem), members=(network,))
    tuned, n_steps = run_stage(problem, "finetune", inputs, seed, PAPER_TRANSFER)
    seconds = time.process_time() - start + cost
    return Trained(predict=predictor(tuned), steps=steps + n_steps, cpu_s=seconds)


def paper_1(problem: Problem, seed: int) -> Trained:
    """Weak supervision as published: learn the energies of the EIPs that a classifier chose."""
    training = SCRATCH | {"steps": PSEUDO_STEPS}
    return augmented(problem, seed, without_eips(problem), training)


def paper_both(problem: Problem, seed: int) -> Trained:
    """Both as published: transfer, then weak supervision."""
    network, steps, cost = pretrained(problem, material(problem).eips, "paper")
    inputs = replace(without_eips(problem), members=(network,))
    training = PAPER_TRANSFER | {"steps": PSEUDO_STEPS}
    trained = augmented(problem, seed, inputs, training)
    return trained._replace(steps=trained.steps + steps, cpu_s=(trained.cpu_s or 0.0) + cost)


def augmented(
    problem: Problem, seed: int, inputs: StageInputs, training: dict[str, Any]
) -> Trained:
    """Learn DFT labels and the energies of the chosen EIPs, weighted as validation says."""
    start = time.process_time()
    pseudo = classified(problem, seed)
    part = training | {"validation_fraction": VALIDATION}
    inputs = replace(inputs, pseudo=pseudo)
    scores, teachers = [], None
    for weight in PAPER_WEIGHTS:
        settings = settings_for(problem, "finetune", part)
        stage = Augmentation(inputs, settings, weight, teachers)
        scores.append(trained_state(stage, settings, seed).history[-1][SCORE])
        teachers = stage.teachers
    weight = PAPER_WEIGHTS[int(np.argmin(scores))]
    settings = settings_for(problem, "finetune", training)
    state = trained_state(Augmentation(inputs, settings, weight, teachers), settings, seed)
    notes = {"weight": weight, "score": min(scores), "n_pseudo": len(pseudo) if pseudo else 0}
    seconds = time.process_time() - start
    return Trained(
        predict=predictor(state.network), steps=state.n_steps, cpu_s=seconds, notes=notes
    )


def classified(problem: Problem, seed: int) -> PseudoLabels | None:
    """Return aligned energies of the EIP that a classifier holds for best, where it names one."""
    pool, eips = material(problem)
    inputs = StageInputs(configurations=pool, labels=problem.dft, eip_labels=eips)
    network, _ = run_stage(problem, "classify", inputs, seed, {"trunk_rate_factor": 1.0})
    classifier = Committee(
        members=(network,),
        stage="classify",
        seeds=(seed,),
        eips=tuple(map(str, eips.sources)),
    )
    aligned = fit_alignment(pool, problem.dft, eips).apply(pool, eips)
    selection = classifier.select(pool, aligned)
    return pseudo_labels_of_selection(pool, problem.dft, eips, selection)


class Augmentation(Finetuning):
    """Fine-tuning with hard pseudo-labels under Tukey's loss, as published."""

    def __init__(
        self,
        inputs: StageInputs,
        settings: StageSettings,
        weight: float,
        teachers: Teachers | None,
    ) -> None:
        super().__init__(inputs, settings, teachers)
        self.weight = weight

    def knowledge(self, network: Network, step: Step) -> Tensor:
        """Return Tukey's loss of the pseudo-labels: all weigh the same, to the end."""
        if self.teachers.pseudo is None:
            return torch.zeros(())
        errors = self.teachers.pseudo.errors(network, step.rng).energy
        return self.weight * tukey_biweight(standardise_residuals(errors, errors)).mean()


def shuffled(problem: Problem, seed: int) -> Trained:
    """Learn from EIPs whose labels belong to other configurations of as many atoms."""
    labels = shuffle_labels(material(problem).eips, np.random.default_rng(0))
    return taught(problem, seed, labels, "shuffled")


def worst_eip(problem: Problem, seed: int) -> Trained:
    """Learn from the EIP alone that is worst on the DFT labels."""
    alignment = fit_alignment(material(problem).pool, problem.dft, material(problem).eips)
    said = material(problem).eips.take(material(problem).eips.rows_of(problem.dft.ids))
    aligned = alignment.apply(material(problem).pool, said)
    wrong = np.abs(aligned.energy - problem.dft.energy) / problem.dft.n_atoms[:, None]
    column = int(mean_of_known(wrong).argmax())
    labels = only_source(material(problem).eips, column)
    return taught(problem, seed, labels, f"only-{column}")


def delta(problem: Problem, seed: int) -> Trained:
    """Learn what the best EIP lacks; the EIP is needed ever after."""
    start = time.process_time()
    alignment = fit_alignment(material(problem).pool, problem.dft, material(problem).eips)
    column = best_column(
        problem, alignment.apply(material(problem).pool, said_of(problem, problem.dft))
    )
    teacher = aligned_source(material(problem).pool, material(problem).eips, alignment, column)
    base = teacher.take(teacher.rows_of(problem.dft.ids))
    known = np.flatnonzero(base.ok[:, 0])
    labels = problem.dft.take(known)
    lacking = replace(
        labels,
        energy=labels.energy - base.energy[known],
        forces=labels.forces - base.take(known).forces,
        stress=np.full_like(labels.stress, np.nan),
    )
    inputs = StageInputs(configurations=material(problem).pool, labels=lacking)
    score, steps = tuned_length(problem, inputs, seed)
    network, n_steps = run_stage(problem, "finetune", inputs, seed, SCRATCH | {"steps": steps})
    plain = predictor(network)

    def predict(wanted: Configurations) -> tuple[FloatArray, FloatArray]:
        energy, forces = plain(wanted)
        said = aligned_source(wanted, problem.label(wanted), alignment, column)
        return energy + np.nan_to_num(said.energy[:, 0]), forces + np.nan_to_num(said.forces[0])

    notes = {"eip": str(material(problem).eips.sources[column]), "score": score}
    return Trained(predict=predict, steps=n_steps, cpu_s=time.process_time() - start, notes=notes)


def taught(
    problem: Problem,
    seed: int,
    eip_labels: Labels,
    kind: str,
    pseudo: PseudoLabels | None = None,
) -> Trained:
    """Pre-train, fine-tune with replay; the twin from scratch where validation says so."""
    network, steps, cost = pretrained(problem, eip_labels, kind)
    inputs = StageInputs(
        configurations=material(problem).pool,
        labels=problem.dft,
        eip_labels=eip_labels,
        pseudo=pseudo,
        members=(network,),
    )
    # As long as the twin, and at least as long as by default.
    least = Finetuning.defaults["steps"] if pseudo is None else PSEUDO_STEPS
    trained = judged(problem, seed, inputs, lambda length: {"steps": max(length, least)})
    used = trained.notes is not None and trained.notes["eips_help"]
    return trained._replace(
        steps=trained.steps + (steps if used else 0), cpu_s=(trained.cpu_s or 0.0) + cost
    )


def without_eips(problem: Problem) -> StageInputs:
    """Return what the twin from scratch learns from."""
    return StageInputs(configurations=material(problem).pool, labels=problem.dft)


def judged(
    problem: Problem,
    seed: int,
    inputs: StageInputs,
    training_of: Callable[[int], dict[str, Any]],
) -> Trained:
    """Learn from EIPs, or from scratch where validation labels say so.

    ``training_of`` gives the settings with EIPs for the number of steps of the twin.
    """
    twin = twin_of(problem, seed)
    start = time.process_time()
    said = inputs.eip_labels or material(problem).eips
    training = training_of(twin.steps)
    settings = settings_for(problem, "finetune", training | {"validation_fraction": VALIDATION})
    stage = Finetuning(inputs, settings)
    with_eips = trained_state(stage, settings, seed).history[-1][SCORE]
    verdict = Verdict(
        score=with_eips,
        scratch_score=twin.score,
        n_held_out=len(stage.held_out),
        agreement=force_agreement(problem.dft, said),
    )
    settings = settings_for(problem, "finetune", training)
    if verdict.eips_help:
        stage = Finetuning(inputs, settings, stage.teachers)
    else:
        settings = settings_for(problem, "finetune", SCRATCH | {"steps": twin.steps})
        stage = Finetuning(without_eips(problem), settings)
    state = trained_state(stage, settings, seed)
    notes = {
        "score": with_eips,
        "scratch_score": twin.score,
        "agreement": verdict.agreement,
        "eips_help": verdict.eips_help,
    }
    seconds = time.process_time() - start + twin.cpu_s
    return Trained(
        predict=predictor(state.network), steps=state.n_steps, cpu_s=seconds, notes=notes
    )


def run_stage(
    problem: Problem, name: str, inputs: StageInputs, seed: int, training: dict[str, Any]
) -> tuple[Network, int]:
    """Train a network in a stage to the end; return it and its number of steps."""
    settings = settings_for(problem, name, training)
    stage = prepare(name, inputs, settings)
    state = trained_state(stage, settings, seed)
    stage.finish(state.network, seed)
    return state.network, state.n_steps


def trained_state(
    stage: Stage, settings: StageSettings, seed: int, member: int = 0
) -> TrainingState:
    """Return the state after the last step of a training."""
    state = start_training(stage.network(seed, member), settings.training, seed)
    fit(state, stage, settings.training)
    return state


def settings_for(problem: Problem, name: str, training: dict[str, Any]) -> StageSettings:
    """Return the defaults of a stage with a few settings of its own."""
    return StageSettings(
        network=network_of(problem),
        training=TrainingParameters.from_dict(training, STAGES[name].defaults),
        selection=SelectionParameters(tolerance=PAPER_TOLERANCE),
    )


def pretrained(problem: Problem, eip_labels: Labels, kind: str) -> tuple[Network, int, float]:
    """Return a pre-trained network, its steps and CPU seconds: trained once for all label counts.

    It saw no DFT label, so every draw of labels may start from it.
    """
    path = problem.folder / f"{problem.trunk}-{kind}"
    if not path.exists():
        start = time.process_time()
        inputs = StageInputs(configurations=material(problem).pool, eip_labels=eip_labels)
        training = {"forces_weight": 0.0} if kind == "paper" else {}
        network, n_steps = run_stage(problem, "pretrain", inputs, 0, training)
        facts = {"steps": n_steps, "cpu_s": time.process_time() - start}
        committee = Committee(members=(network,), stage="pretrain", seeds=(0,), facts=facts)
        with whole_folder(path) as partial:
            committee.save(partial)
    committee = Committee.load(path)
    return committee.members[0], committee.facts["steps"], committee.facts["cpu_s"]


def predictor(network: Network) -> Predict:
    """Return a function that predicts energies and forces."""
    committee = Committee(members=(network,), stage="finetune", seeds=(0,))

    def predict(wanted: Configurations) -> tuple[FloatArray, FloatArray]:
        predictions = committee.predict(wanted)
        return predictions.energy, predictions.forces

    return predict


def said_of(problem: Problem, labels: Labels) -> Labels:
    """Return what the EIPs say about labelled configurations."""
    return material(problem).eips.take(material(problem).eips.rows_of(labels.ids))


def best_column(problem: Problem, aligned: Labels) -> int:
    """Return the EIP that is best on the DFT labels, energies and forces counting alike."""
    labels = problem.dft
    energy = np.abs(aligned.energy - labels.energy) / labels.n_atoms[:, None]
    forces = np.abs(aligned.forces - labels.forces).mean(axis=2)
    complete = aligned.ok.mean(axis=0) > 0.9
    score = np.log(mean_of_known(energy) + 2e-3) + np.log(mean_of_known(forces.T) + 5e-3)
    return int(np.where(complete, score, np.inf).argmin())


def mean_of_known(values: FloatArray) -> FloatArray:
    """Return the mean of each column over what is a number; zero where nothing is."""
    known = np.isfinite(values)
    mean: FloatArray = np.where(known, values, 0.0).sum(axis=0) / np.maximum(1, known.sum(axis=0))
    return mean


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


ARMS: dict[str, Callable[[Problem, int], Trained]] = {
    "scratch": scratch,
    "paper_1": paper_1,
    "paper_2": paper_2,
    "paper_both": paper_both,
    "ours_1": ours_1,
    "ours_2": ours_2,
    "ours_both": ours_both,
    "delta": delta,
    "worst_eip": worst_eip,
    "shuffled": shuffled,
}
