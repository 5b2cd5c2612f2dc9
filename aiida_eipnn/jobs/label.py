"""The label job: every EIP labels every configuration of the pool."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.inputs import read_configurations
from aiida_eipnn.jobs.progress import remove_checkpoint
from aiida_eipnn.jobs.stop import NEVER, Stop
from aiida_eipnn.science.arrays import load_arrays, save_arrays
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.checked import fault_of
from aiida_eipnn.science.eip.engine import FORCE_LIMIT, Limits, label_into
from aiida_eipnn.science.eip.isolation import Lost, each_apart
from aiida_eipnn.science.eip.potential import (
    PotentialDescription,
    describe_potential,
    symbols_of,
)
from aiida_eipnn.science.eip.store import Progress
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.outliers import refuse_outliers

PROGRESS_SECONDS = 10.0
# Opening the slowest KIM model takes a tenth of a second.
DESCRIBE_SECONDS = 60.0

LOGGER = logging.getLogger(__name__)


def run(job: spec.LabelJob, folder: Path, stop: Stop = NEVER) -> spec.State:
    """Label the configurations in ``folder``; write labels and metrics below its ``output``.

    Labels lie in the checkpoint while they are made: a job that was killed goes on where it was,
    in memory that does not grow with the pool. An EIP that fails loses its labels, and nothing
    else; if all fail, the metrics say why.

    Raises
    ------
    ValueError
        If there are no configurations, or if an element is known to no EIP.
    """
    pool = read_configurations(folder, mapped=True)
    descriptions = describe_eips(job.eips)
    require_known_elements(pool, descriptions)
    store = label_into(
        folder / spec.CHECKPOINT,
        pool,
        job.eips,
        n_workers=job.n_workers,
        limits=Limits(timeout=job.timeout, memory=job.memory),
        atomic_energies=job.atomic_energies,
        must_stop=stop,
        on_progress=report_progress,
        progress_interval=PROGRESS_SECONDS,
    )
    progress = store.progress()
    if progress.n_done < progress.n_labels:
        return spec.State.INTERRUPTED
    output = folder / spec.OUTPUT / spec.LABELS
    store.write_labels(output)
    labels = keep_within_limits(output, pool)
    faults = {name: fault_of(name, pool.symbols) or "" for name in job.eips}
    write_metrics(folder, summarise(labels, store.seconds(), descriptions, faults))
    # All of it is in the output now, and would be brought home twice.
    remove_checkpoint(folder / spec.CHECKPOINT)
    return spec.State.DONE


def keep_within_limits(output: Path, pool: Configurations) -> Labels:
    """Take out of the labels in ``output`` those that stick out; return the rest, left on disk."""
    before = Labels.from_arrays(load_arrays(output, mapped=True))
    kept = refuse_outliers(pool, before, FORCE_LIMIT)
    refused = before.ok & ~kept.ok
    if refused.any():
        forces = np.load(output / "forces.npy", mmap_mode="r+")
        for row, source in np.argwhere(refused):
            forces[source, before.offsets[row] : before.offsets[row + 1]] = np.nan
        forces.flush()
        changed = ("energy", "stress", "status", "reasons")
        save_arrays(output, {name: getattr(kept, name) for name in changed})
    return Labels.from_arrays(load_arrays(output, mapped=True))


def report_progress(progress: Progress) -> None:
    """Say in the log of the job how far it is."""
    LOGGER.info("%d of %d labels are done", progress.n_done, progress.n_labels)


def describe_eips(eips: Sequence[str]) -> dict[str, PotentialDescription]:
    """Describe each EIP that is there."""
    apart = each_apart(describe_potential, eips, seconds=DESCRIBE_SECONDS)
    # The labels will say why an EIP is not there: opening it fails for the same reason.
    return {name: found for name, found in apart if not isinstance(found, Lost)}


def require_known_elements(
    pool: Configurations, descriptions: Mapping[str, PotentialDescription]
) -> None:
    """Raise ``ValueError`` if configurations could get no label because nobody knows an element."""
    known = {
        name: {atomic_numbers[symbol] for symbol in description.species}
        for name, description in descriptions.items()
    }
    # An EIP that lists no elements is not tied to any: it is asked for each configuration.
    if not known or not all(known.values()):
        return
    if missing := sorted(set(pool.elements) - set().union(*known.values())):
        table = "; ".join(f"{name}: {symbols_of(sorted(z))}" for name, z in known.items())
        raise ValueError(
            f"no EIP knows {symbols_of(missing)}, which the configurations contain; add an EIP for "
            f"it or drop these configurations (they know: {table})"
        )


def summarise(
    labels: Labels,
    seconds: Mapping[str, float],
    descriptions: Mapping[str, PotentialDescription],
    faults: Mapping[str, str],
) -> dict[str, Any]:
    """Say for each EIP how many labels it gave, how long it took, and why others are missing."""
    eips = {}
    for column, name in enumerate(map(str, labels.sources)):
        reasons = _count_reasons(labels, column)
        n_ok = int(labels.ok[:, column].sum())
        eips[name] = {
            "n_ok": n_ok,
            "n_failed": len(labels) - n_ok,
            "seconds": round(seconds.get(name, 0.0), 3),
            "reasons": reasons,
            "fault": faults.get(name, ""),
            "metadata": asdict(descriptions.get(name, PotentialDescription(name=name))),
        }
    return {"n_configurations": len(labels), "n_atoms": int(labels.offsets[-1]), "eips": eips}


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write ``output/metrics.json``."""
    text = json.dumps(metrics, indent=1, ensure_ascii=False) + "\n"
    (folder / spec.OUTPUT / spec.METRICS).write_text(text, encoding="utf-8")


def _count_reasons(labels: Labels, column: int) -> dict[str, int]:
    """Count the reasons of one EIP, the most frequent first."""
    status = labels.status[:, column]
    counted = Counter(str(labels.reasons[code - 1]) for code in status[status > 0])
    return dict(counted.most_common())
