"""The same loop on AiiDA and without it, and whether both ask for the same DFT points.

    make bench-workchain

mvl_W, real DFT labels looked up, `full` of `make bench-active-learning` but for its first points:
networks that learnt from EIPs, pseudo-labels, and the points that stand for the more uncertain half
of a window that the last batch calibrated. First the WorkChain runs in a profile of its own; then
the science layer does the same in this process, from the settings that the WorkChain was given. A
line for each batch says whether the choices are equal.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from injection_data import load_dataset  # type: ignore[import-not-found]
from scale import make_profile  # type: ignore[import-not-found]

from aiida_eipnn.science.acquisition import (
    AcquisitionParameters,
    PoolFacts,
    acquire,
    stratified_split,
)
from aiida_eipnn.science.arrays import StrArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.dft_cost import estimate_cost
from aiida_eipnn.science.duplicates import find_twins
from aiida_eipnn.science.eip.engine import label_with_eips
from aiida_eipnn.science.eip.label_model import LabelModelParameters, make_pseudo_labels
from aiida_eipnn.science.eip.selection import SelectionParameters
from aiida_eipnn.science.gate import keep_valid
from aiida_eipnn.science.labels import Labels, join_labels
from aiida_eipnn.science.metrics import error_scale
from aiida_eipnn.science.nn.committee import Committee
from aiida_eipnn.science.nn.network import Network, NetworkParameters
from aiida_eipnn.science.nn.stage import StageInputs, StageSettings
from aiida_eipnn.science.nn.stages import STAGES, prepare
from aiida_eipnn.science.nn.training import TrainingParameters, fit, start_training
from aiida_eipnn.science.predictions import Predictions

RESULTS = Path(__file__).parent / "results" / "workchain_arm.json"
# Small enough for minutes; what is asked is whether the choices are equal, not how good they are.
OVERRIDES: dict[str, Any] = {
    "n_members": 3,
    "n_pretrained": 1,
    "train_scratch": False,
    "use_pseudo_labels": True,
    "pretrain": {"steps": 600},
    "classify": {"steps": 20},
    "finetune": {"steps": 300},
    "split": {"test": 60, "initial": 5},
    "acquisition": {"n_select": 5, "strategy": "representative", "max_error": 5.0},
    "extend": {"recipes": []},
    "stop": {"max_iterations": 4},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """What the loop was given, as plain values; the names are those of the WorkChain's inputs."""

    seed: int
    seeds: tuple[int, ...]
    pretrain_seeds: tuple[int, ...]
    network: Mapping[str, Any]
    pretrain: Mapping[str, Any]
    finetune: Mapping[str, Any]
    split: Mapping[str, int]
    gate: Mapping[str, Any]
    acquisition: Mapping[str, Any]
    label_model: Mapping[str, Any] | None
    eips: tuple[str, ...]
    max_iterations: int


def settings_of(inputs: Any) -> LoopSettings:
    """Read the settings from the inputs of a WorkChain, or from its builder."""
    job = inputs.train.job
    return LoopSettings(
        seed=inputs.seed.value,
        seeds=tuple(job.seeds.get_list()),
        pretrain_seeds=tuple(inputs.pretrain_seeds.get_list()),
        network=job.network.get_dict(),
        pretrain=_training(inputs.pretrain),
        finetune=_training(inputs.finetune),
        split=inputs.split.get_dict(),
        gate=inputs.gate.get_dict(),
        acquisition=inputs.acquisition.get_dict(),
        label_model=inputs.label_model.get_dict() if inputs.use_pseudo_labels else None,
        eips=tuple(inputs.label.job.eips.get_list()),
        max_iterations=inputs.stop.get_dict()["max_iterations"],
    )


def choices_of_science(
    pool: Configurations, truth: Labels, settings: LoopSettings
) -> list[StrArray]:
    """Run the loop without AiiDA; return the ids of each batch, in the order of the choice."""
    torch.set_num_threads(1)
    sound, _ = keep_valid(pool, **settings.gate)
    eips = label_with_eips(sound, list(settings.eips))
    is_twin = find_twins(sound, eips) != np.arange(len(sound))
    twins, single = sound.ids[is_twin], sound.take(np.flatnonzero(~is_twin))
    parts = stratified_split(
        single.config_types, settings.split, np.random.default_rng(settings.seed)
    )
    test, initial = (single.ids[parts[name]] for name in ("test", "initial"))
    learnt = _without(sound, test)
    eip_labels = eips.take(eips.rows_of(learnt.ids))
    start = StageInputs(configurations=learnt, eip_labels=eip_labels)
    members = train("pretrain", start, settings.pretrain, settings.pretrain_seeds, settings)
    batches, asked_by, chosen = {"initial": initial}, None, []
    for number in range(1, settings.max_iterations):
        # In the order in which a job reads its sets.
        labels = join_labels([_known(truth, batches[key]) for key in sorted(batches)])
        pseudo = None
        if settings.label_model is not None:
            parameters = LabelModelParameters.from_dict(dict(settings.label_model))
            pseudo, _ = make_pseudo_labels(
                learnt, labels, eip_labels, parameters, settings.seeds[0]
            )
        inputs = replace(
            start,
            labels=labels,
            pseudo=pseudo,
            members=members,
            eips=settings.eips,
            judges=tuple(initial.tolist()),
        )
        networks = train("finetune", inputs, settings.finetune, settings.seeds, settings)
        committee = Committee(members=networks, stage="finetune", seeds=settings.seeds)
        predicted = committee.predict(sound)
        scale = None
        if asked_by is not None:
            scale = error_scale(_known(truth, chosen[-1]), asked_by)
        # What is refused, twins, the test set, the first points, then a batch each time.
        n_choices = 3 + len(batches)
        kept_apart = np.concatenate([test, twins])
        found = _choose(sound, predicted, (kept_apart, batches, n_choices), settings, scale)
        batches[f"i{number:03d}"], asked_by = found, predicted
        chosen.append(found)
    return chosen


def train(
    stage_name: str,
    inputs: StageInputs,
    training: Mapping[str, Any],
    seeds: tuple[int, ...],
    settings: LoopSettings,
) -> tuple[Network, ...]:
    """Return the networks of a stage, one for each seed."""
    content = {key: value for key, value in training.items() if key != "stage"}
    stage_settings = StageSettings(
        network=NetworkParameters.from_dict(settings.network),
        training=TrainingParameters.from_dict(content, STAGES[stage_name].defaults),
        selection=SelectionParameters(),
    )
    stage = prepare(stage_name, inputs, stage_settings)
    networks = []
    for member, seed in enumerate(seeds):
        task = stage.for_member(member)
        state = start_training(task.network(seed, member), stage_settings.training, seed)
        fit(state, task, stage_settings.training)
        task.finish(state.network, seed)
        networks.append(state.network)
    return tuple(networks)


def _choose(
    sound: Configurations,
    predicted: Predictions,
    taken: tuple[StrArray, Mapping[str, StrArray], int],
    settings: LoopSettings,
    scale: float | None,
) -> StrArray:
    kept_apart, batches, n_choices = taken
    labelled = np.concatenate(list(batches.values()))
    facts = PoolFacts(cost=estimate_cost(sound), config_types=sound.config_types)
    found = acquire(
        predicted,
        np.flatnonzero(~np.isin(predicted.ids, np.concatenate([kept_apart, labelled]))),
        AcquisitionParameters.from_dict(dict(settings.acquisition)),
        np.random.default_rng([settings.seed, n_choices]),
        np.flatnonzero(np.isin(predicted.ids, labelled)),
        facts,
        scale,
    )
    ids: StrArray = predicted.ids[found.rows]
    return ids


def choices_of_workchain(loop: Any) -> list[StrArray]:
    """Return the ids of each batch that a finished loop asked for."""
    made = loop.outputs.iterations
    return [made[name].choice.ids() for name in sorted(made) if "choice" in made[name]]


def _training(node: Any) -> dict[str, Any]:
    """Return the settings of a training without those that are not of the network's training."""
    content = dict(node.get_dict())
    content.pop("judges", None)
    return content


def _known(truth: Labels, ids: StrArray) -> Labels:
    """Return the labels that there are: DFT may have failed."""
    return truth.take(truth.rows_of(ids[np.isin(ids, truth.ids)]))


def _without(configurations: Configurations, ids: StrArray) -> Configurations:
    return configurations.take(np.flatnonzero(~np.isin(configurations.ids, ids)))


def run_workchain(pool: Configurations, truth: Labels, eips: list[str]) -> Any:
    """Run the loop in the profile that is loaded."""
    from aiida.engine import run_get_node
    from aiida.orm import load_code

    from aiida_eipnn.data.configurations import ConfigurationsData
    from aiida_eipnn.data.labels import LabelsData
    from aiida_eipnn.workflows.active_learning import ActiveLearningWorkChain
    from aiida_eipnn.workflows.builder import Codes, Start

    builder = ActiveLearningWorkChain.get_builder_from_protocol(
        Codes(job=load_code("eipnn-job@localhost")),
        Start(
            pool=ConfigurationsData.from_value(pool),
            eips=eips,
            stored_labels=LabelsData.from_value(truth, level={}),
        ),
        protocol="demo",
        overrides=OVERRIDES,
    )
    _, node = run_get_node(builder)
    if not node.is_finished_ok:
        raise SystemExit(f"the loop ended with {node.exit_status}: {node.exit_message}")
    return node


def main() -> None:
    """Run both, compare, write JSON."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args()
    dataset = load_dataset("mvl_W")
    pool = dataset.configurations.take(dataset.train)
    truth = dataset.dft.take(dataset.train)
    truth = replace(truth, sources=np.array(["dft"]))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AIIDA_PATH"] = folder
        make_profile()
        loop = run_workchain(pool, truth, [str(name) for name in dataset.eips.sources[:4]])
        theirs = choices_of_workchain(loop)
        settings = settings_of(loop.inputs)
        errors = [row["forces_mae"] for row in loop.outputs.history["iterations"]]
    ours = choices_of_science(pool, truth, settings)
    rows = [
        {"batch": number + 1, "points": len(one), "equal": one.tolist() == other.tolist()}
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True))
    ]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    content = {"dataset": "mvl_W", "pool": len(pool), "batches": rows, "test_forces_mae": errors}
    given.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
