"""The evaluate job: a committee predicts every configuration."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.inputs import read_configurations
from aiida_eipnn.science.arrays import save_arrays, save_parts
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.nn.committee import Committee
from aiida_eipnn.science.nn.device import choose_device
from aiida_eipnn.science.predictions import OF_FEATURES, Predictions

OFFSETS = "offsets"
OF_ATOMS = ("forces", "forces_std", *OF_FEATURES)


def run(job: spec.EvaluateJob, folder: Path) -> spec.State:
    """Predict the configurations in ``folder``; write predictions and metrics below its ``output``.

    Predictions are written batch by batch: beside the configurations, memory holds one of them.

    ``job.max_seconds`` is not watched: a prediction is seconds of work, and half of it of no use.

    Raises
    ------
    ValueError
        If there are no configurations, or if one contains an element that the committee does not
        know, or two atoms in the same place; or if there is no such device.
    """
    started = time.monotonic()
    torch.set_num_threads(1)
    configurations = read_configurations(folder, mapped=True)
    device = choose_device(job.device)
    committee = Committee.load(folder / spec.COMMITTEE).to(device)
    output = folder / spec.OUTPUT
    summary = _Summary()
    parts = committee.predict_parts(configurations, job.batch_size, job.batch_edges)
    write_predictions(output / spec.PREDICTIONS, configurations, map(summary.add, parts))
    metrics = {
        "n_configurations": len(configurations),
        "n_atoms": len(configurations.numbers),
        "n_members": len(committee),
        "n_heads": committee.n_heads,
        "stage": committee.stage,
        "device": device.type,
        "uncertainty": {
            "mean": summary.total / len(configurations),
            "max": summary.largest,
        },
        "seconds": time.monotonic() - started,
    }
    (output / spec.METRICS).write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    return spec.State.DONE


def write_predictions(
    folder: Path, configurations: Configurations, parts: Iterable[Predictions]
) -> None:
    """Write predictions of all configurations that come in parts."""
    n, n_atoms = len(configurations), len(configurations.numbers)
    # Known without a prediction, and the only array that is not one part after the other.
    save_arrays(folder, {OFFSETS: configurations.offsets})
    arrays = (part.arrays() for part in parts)
    first = next(arrays)
    # Not every committee tells everything, but it does so in all parts.
    rows = {name: n_atoms if name in OF_ATOMS else n for name in first if name != OFFSETS}
    save_parts(folder, rows, chain([first], arrays))


@dataclass(slots=True)
class _Summary:
    """What is reported of all uncertainties, in eV/Å."""

    total: float = 0.0
    largest: float = 0.0

    def add(self, part: Predictions) -> Predictions:
        """Count a part, and hand it on."""
        uncertainty = part.uncertainty
        self.total += float(uncertainty.sum())
        # Unlike max, it hands NaN on.
        self.largest = float(np.maximum(self.largest, uncertainty.max()))
        return part
