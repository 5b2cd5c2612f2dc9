"""The evaluate job: a committee predicts every configuration."""

import json
import time
from pathlib import Path

import torch

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.inputs import read_configurations
from aiida_eipnn.science.arrays import save_arrays
from aiida_eipnn.science.nn.committee import Committee
from aiida_eipnn.science.nn.device import choose_device


def run(job: spec.EvaluateJob, folder: Path) -> spec.State:
    """Predict the configurations in ``folder``; write predictions and metrics below its ``output``.

    ``job.max_seconds`` is not watched: a prediction is seconds of work, and half of it of no use.

    Raises
    ------
    ValueError
        If there are no configurations, or if one contains an element that the committee does not
        know, or two atoms in the same place; or if there is no such device.
    """
    started = time.monotonic()
    torch.set_num_threads(1)
    configurations = read_configurations(folder)
    device = choose_device(job.device)
    committee = Committee.load(folder / spec.COMMITTEE).to(device)
    predictions = committee.predict(configurations, job.batch_size)
    output = folder / spec.OUTPUT
    save_arrays(output / spec.PREDICTIONS, predictions.arrays())
    uncertainty = predictions.uncertainty
    metrics = {
        "n_configurations": len(configurations),
        "n_atoms": len(configurations.numbers),
        "n_members": len(committee),
        "stage": committee.stage,
        "device": device.type,
        "uncertainty": {
            "mean": float(uncertainty.mean()),
            "max": float(uncertainty.max()),
        },
        "seconds": time.monotonic() - started,
    }
    (output / spec.METRICS).write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    return spec.State.DONE
