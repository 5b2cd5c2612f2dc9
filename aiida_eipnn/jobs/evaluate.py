"""The evaluate job: a committee predicts every configuration."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.inputs import digest_of, read_configurations
from aiida_eipnn.jobs.progress import read_progress, remove_checkpoint, write_progress
from aiida_eipnn.jobs.stop import NEVER, Stop
from aiida_eipnn.science.arrays import Arrays, load_arrays, save_arrays, save_parts
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.nn.committee import Committee
from aiida_eipnn.science.nn.device import choose_device
from aiida_eipnn.science.predictions import OF_FEATURES, Predictions

OFFSETS = "offsets"
OF_ATOMS = ("forces", "forces_std", *OF_FEATURES)
# What predictions depend on.
INPUTS = (spec.CONFIGURATIONS, spec.EXCLUDE, spec.COMMITTEE)
CHECKPOINT_SECONDS = 10.0

LOGGER = logging.getLogger(__name__)


def run(job: spec.EvaluateJob, folder: Path, stop: Stop = NEVER) -> spec.State:
    """Predict the configurations in ``folder``; write predictions and metrics below its ``output``.

    Predictions are written batch by batch: beside the configurations, memory holds one of them.
    They lie in the checkpoint until they are complete, and a job that was stopped or killed goes
    on after those.

    Raises
    ------
    ValueError
        If there are no configurations, or if one contains an element that the committee does not
        know, or two atoms in the same place; or if there is no such device.
    """
    started = time.monotonic()
    torch.set_num_threads(1)
    configurations = read_configurations(folder, mapped=True)
    if not len(configurations):
        raise ValueError("nothing is left to predict: every configuration is in `exclude`")
    device = choose_device(job.device)
    committee = Committee.load(folder / spec.COMMITTEE).to(device)
    checkpoint = Checkpoint(folder / spec.CHECKPOINT, digest_of(folder, INPUTS))

    def parts_from(first: int) -> Iterator[Predictions]:
        parts = committee.predict_parts(configurations, job.batch_size, job.batch_edges, first)
        return _until(stop, parts)

    if not write_predictions(checkpoint, configurations, parts_from):
        return spec.State.INTERRUPTED
    arrays = load_arrays(checkpoint.predictions, mapped=True)
    uncertainty = Predictions.from_arrays(arrays).uncertainty
    metrics = {
        "n_configurations": len(configurations),
        "n_atoms": len(configurations.numbers),
        "n_members": len(committee),
        "n_heads": committee.n_heads,
        "stage": committee.stage,
        "device": device.type,
        "uncertainty": {"mean": float(uncertainty.mean()), "max": float(uncertainty.max())},
        "seconds": time.monotonic() - started,
    }
    output = folder / spec.OUTPUT
    output.mkdir(exist_ok=True)
    (output / spec.METRICS).write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    checkpoint.predictions.replace(output / spec.PREDICTIONS)
    # All of it is in the output now.
    remove_checkpoint(checkpoint.folder)
    return spec.State.DONE


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Predictions that are not complete.

    Parameters
    ----------
    folder
        The checkpoint of the job.
    mark
        Digest of what is predicted, and by whom.
    """

    folder: Path
    mark: str

    @property
    def predictions(self) -> Path:
        """Where the arrays are."""
        return self.folder / spec.PREDICTIONS

    @property
    def _progress(self) -> Path:
        return self.folder / f"{spec.PREDICTIONS}.json"

    def read(self) -> dict[str, int]:
        """Return how many rows of each array are there.

        Raises
        ------
        ValueError
            If they are predictions of something else.
        """
        if not self._progress.exists() or not self.predictions.is_dir():
            return {}
        rows: dict[str, int] = read_progress(self._progress, self.mark)
        return rows

    def write(self, rows: dict[str, int]) -> None:
        """Write down how many rows of each array are there."""
        write_progress(self._progress, self.mark, rows)


def write_predictions(
    checkpoint: Checkpoint,
    configurations: Configurations,
    parts_from: Callable[[int], Iterable[Predictions]],
) -> bool:
    """Write predictions of all configurations after those that are there.

    ``parts_from`` gives them from a row on, part by part, and may end early.

    Returns
    -------
    bool
        Whether they are complete.
    """
    n, n_atoms = len(configurations), len(configurations.numbers)
    done = checkpoint.read()
    arrays: Iterator[Arrays] = (part.arrays() for part in parts_from(done.get("ids", 0)))
    names = list(done)
    if not done:
        # Known without a prediction, and the only array that is not one part after the other.
        save_arrays(checkpoint.predictions, {OFFSETS: configurations.offsets})
        first = next(arrays)
        arrays = chain([first], arrays)
        # Not every committee tells everything, but it does so in all parts.
        names = [name for name in first if name != OFFSETS]
    written, saved = done, time.monotonic()

    def report(rows: dict[str, int]) -> None:
        nonlocal written, saved
        written = rows
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            checkpoint.write(rows)
            saved = time.monotonic()
            LOGGER.info("%d of %d configurations are predicted", rows["ids"], n)

    rows = {name: n_atoms if name in OF_ATOMS else n for name in names}
    complete = save_parts(checkpoint.predictions, rows, arrays, done, report)
    if not complete and written:
        checkpoint.write(written)
    return complete


def _until(stop: Stop, parts: Iterable[Predictions]) -> Iterator[Predictions]:
    for part in parts:
        yield part
        if stop():
            return
