"""The arms of the injection benchmark that train networks.

Every arm trains the same network on the same DFT labels; they differ in what the EIPs teach.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.selection import SelectionParameters
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.nn.committee import Committee
from aiida_eipnn.science.nn.network import Network, NetworkParameters
from aiida_eipnn.science.nn.stage import StageInputs, StageSettings
from aiida_eipnn.science.nn.stages import STAGES, prepare
from aiida_eipnn.science.nn.training import SCORE, TrainingParameters, fit, start_training
from aiida_eipnn.science.reference import fit_alignment

# The scratch twin may be as long as pre-training and fine-tuning together.
SCRATCH_STEPS = (300, 1000, 3000, 7000)
SCRATCH = {"weight_decay": 0.3}
VALIDATION = 0.2


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
    """DFT labels alone, the number of steps chosen on validation labels."""
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
    """Pre-training on energies and forces of all EIPs, replay, and the verdict."""
    return taught(problem, seed, folder, problem.eip_labels, "ours")


def paper_2(problem: Problem, seed: int, folder: Path) -> Trained:
    """The published transfer: energies of all EIPs, a new head, the trunk forgets as it will."""
    start = time.process_time()
    network, steps, cost = pretrained(problem, problem.eip_labels, "paper", folder)
    inputs = StageInputs(configurations=problem.pool, labels=problem.labels, members=(network,))
    training = {"replay_weight": 0.0, "head_start": "new"}
    tuned, n_steps = run_stage(problem, "finetune", inputs, seed, training)
    seconds = time.process_time() - start + cost
    return Trained(predict=predictor(tuned), steps=steps + n_steps, cpu_s=seconds)


def shuffled(problem: Problem, seed: int, folder: Path) -> Trained:
    """A negative control: what EIPs say belongs to other configurations of as many atoms."""
    labels = shuffle_labels(problem.eip_labels, np.random.default_rng(0))
    return taught(problem, seed, folder, labels, "shuffled")


def worst_eip(problem: Problem, seed: int, folder: Path) -> Trained:
    """A negative control: the EIP that is worst on the DFT labels is the only teacher."""
    alignment = fit_alignment(problem.pool, problem.labels, problem.eip_labels)
    said = problem.eip_labels.take(problem.eip_labels.rows_of(problem.labels.ids))
    aligned = alignment.apply(problem.pool, said)
    wrong = np.abs(aligned.energy - problem.labels.energy) / problem.labels.n_atoms[:, None]
    column = int(np.nan_to_num(wrong.mean(axis=0), nan=-1.0).argmax())
    labels = only_source(problem.eip_labels, column)
    return taught(problem, seed, folder, labels, f"only-{column}")


def delta(problem: Problem, seed: int, _: Path) -> Trained:
    """A peer: the network learns what the best EIP lacks, and needs the EIP ever after."""
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
    pseudo: PseudoLabels | None = None,
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
    notes = {"score": with_eips, "scratch_score": without}
    if without < with_eips:
        tuned, n_steps = run_stage(problem, "finetune", plain, seed, SCRATCH | {"steps": length})
        notes["verdict"] = "EIPs do not help here"
    else:
        tuned, n_steps = run_stage(problem, "finetune", inputs, seed, {})
        n_steps += steps
        notes["verdict"] = "EIPs help"
    seconds = time.process_time() - start + cost
    return Trained(predict=predictor(tuned), steps=n_steps, cpu_s=seconds, notes=notes)
