"""What a place for a neighbour takes of the memory: what `batch_edges` is to be chosen by.

    make bench-memory

Rattled silicon in cells of 64 atoms, networks with the defaults of their trunk, on the CPU. Each
row is a process of its own: the highest resident memory (VmHWM) during one batch, less what there
was before it, over the places of the batch (atoms, times the neighbours of the one with most).
`learn` is a step of fine-tuning on energies and forces, `replay` what holds the heads of EIPs
beside it (for `power_spectrum` by descriptors that are kept, hence by atom), `predict` energies,
forces, stresses and features.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.build import bulk

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.selection import SelectionParameters
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.nn.committee import Committee
from aiida_eipnn.science.nn.directions import directed_set
from aiida_eipnn.science.nn.network import NetworkParameters
from aiida_eipnn.science.nn.sizes import Sizes
from aiida_eipnn.science.nn.stage import Stage, StageInputs, StageSettings
from aiida_eipnn.science.nn.stages import STAGES, prepare
from aiida_eipnn.science.nn.training import TrainingParameters, fit, start_training

RESULTS = Path(__file__).parent / "results" / "memory.json"
TRUNKS = ("power_spectrum", "schnet", "mace")
PRECISIONS = ("float64", "float32")
TASKS = ("learn", "replay", "predict")
# Configurations of a batch.
BATCHES = (8, 24)
# No bound: what is measured is one batch.
WHOLE = 10**9


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    # Else memory that was given back is kept, and counts as taken before.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    rows = []
    for case in product(TRUNKS, PRECISIONS, TASKS, BATCHES):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(measure, *case).result())
        row = rows[-1]
        print(
            f"{row['trunk']:16} {row['precision']} {row['task']:8} {row['places']:8d} places "
            f"{row['MB']:8.0f} MB {row['kB_per_place']:7.2f} kB per place",
            flush=True,
        )
    given.output.write_text(json.dumps(rows, indent=1) + "\n")


def measure(trunk: str, precision: str, task: str, batch: int) -> dict[str, Any]:
    """Return the memory of one batch."""
    torch.set_num_threads(1)
    data = crystals(batch)
    parameters = NetworkParameters.from_dict({"trunk": trunk, "precision": precision})
    stage = stage_of(data, parameters, batch)
    sizes = stage.statistics.described.neighbours.sizes
    before, after = _peak(_act(task, stage, data))
    return {
        "trunk": trunk,
        "precision": precision,
        "task": task,
        "configurations": batch,
        "atoms": int(sizes.n_atoms.sum()),
        "places": places_of(sizes),
        "MB": (after - before) / 1e6,
        "kB_per_place": (after - before) / 1e3 / places_of(sizes),
    }


def places_of(sizes: Sizes) -> int:
    """Return the places of all configurations in one batch."""
    return int(sizes.n_atoms.sum() * sizes.n_places.max())


def crystals(n: int) -> Configurations:
    """Return cells of 64 atoms, all of them moved."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(n):
        atoms = bulk("Si", cubic=True).repeat(2)
        atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
        frames.append(atoms)
    return Configurations.from_atoms(frames, "rattled")


def stage_of(data: Configurations, parameters: NetworkParameters, batch: int) -> Stage:
    """Return a fine-tuning from scratch in one step."""
    labels = Labels.missing(data, ["dft"])
    rng = np.random.default_rng(1)
    labels = replace(
        labels,
        energy=rng.normal(size=labels.energy.shape),
        forces=rng.normal(size=labels.forces.shape),
        status=np.zeros_like(labels.status),
    )
    content = {"steps": 1, "min_epochs": 1, "batch_size": batch}
    settings = StageSettings(
        network=parameters,
        training=TrainingParameters.from_dict(content, STAGES["finetune"].defaults),
        selection=SelectionParameters(),
        batch_edges=WHOLE,
    )
    return prepare("finetune", StageInputs(configurations=data, labels=labels), settings)


def _act(task: str, stage: Stage, data: Configurations) -> Callable[[], object]:
    """Return what to measure."""
    network = stage.network(0, 0)
    if task == "predict":
        committee = Committee(members=(network,), stage="finetune", seeds=(0,))
        return lambda: committee.predict(data, len(data), WHOLE)
    if task == "learn":
        state = start_training(network, stage.settings.training, 0)
        return lambda: fit(state, stage, stage.settings.training, batch_edges=WHOLE)
    directed = directed_set(data, stage.parameters, stage.elements, seed=0, batch_edges=WHOLE)

    def replay() -> None:
        moved = directed.move(network, np.arange(len(data)), np.random.default_rng(0))
        (moved.energies.square().sum() + moved.along.square().sum()).backward()  # type: ignore[no-untyped-call]

    return replay


def _peak(act: Callable[[], object]) -> tuple[int, int]:
    """Return the resident memory before, and the highest while it acts, in bytes."""
    before = _status("VmRSS")
    # The highest so far is forgotten.
    Path("/proc/self/clear_refs").write_text("5")
    act()
    return before, _status("VmHWM")


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{name}:")[1].split()[0])


if __name__ == "__main__":
    main()
