"""The label job: every EIP labels every configuration of the pool."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.inputs import read_configurations
from aiida_eipnn.science.arrays import load_arrays, save_arrays
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.engine import Progress, label_with_eips
from aiida_eipnn.science.eip.potential import (
    PotentialDescription,
    describe_potential,
    symbols_of,
)
from aiida_eipnn.science.labels import NOT_RUN, Labels

CHECKPOINT_SECONDS = 10.0


def run(job: spec.LabelJob, folder: Path) -> spec.State:
    """Label the configurations in ``folder``; write labels and metrics below its ``output``.

    Labels made so far are saved every few seconds, so that a job that was killed goes on where it
    was. An EIP that fails loses its labels, and nothing else; if all fail, the metrics say why.

    Raises
    ------
    ValueError
        If there are no configurations, or if an element is known to no EIP.
    """
    started = time.monotonic()
    pool = read_configurations(folder)
    descriptions = describe_eips(job.eips)
    require_known_elements(pool, descriptions)
    seconds: dict[str, float] = {}

    def save(progress: Progress) -> None:
        seconds.update(progress.seconds)
        write_checkpoint(folder, progress.labels)

    labels = label_with_eips(
        pool,
        job.eips,
        n_workers=job.n_workers,
        timeout=job.timeout,
        deadline=None if job.max_seconds is None else started + job.max_seconds,
        previous=read_checkpoint(folder),
        on_progress=save,
        progress_interval=CHECKPOINT_SECONDS,
    )
    save_arrays(folder / spec.OUTPUT / spec.LABELS, labels.arrays())
    write_metrics(folder, summarise(labels, seconds, descriptions))
    if any(failure.reason == NOT_RUN for failure in labels.failures()):
        return spec.State.INTERRUPTED
    return spec.State.DONE


def describe_eips(eips: Sequence[str]) -> dict[str, PotentialDescription]:
    """Describe each EIP that is there."""
    described = {}
    for name in eips:
        # The labels will say why an EIP is not there: opening it fails for the same reason.
        with suppress(ValueError, TypeError, ImportError):
            described[name] = describe_potential(name)
    return described


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


def write_checkpoint(folder: Path, labels: Labels) -> None:
    """Save labels for a restart; a job killed while it writes leaves labels that fit together."""
    arrays = labels.arrays()
    # Reasons only grow and labels only appear, so the status, which points at both, comes last.
    status = arrays.pop("status")
    save_arrays(folder / spec.CHECKPOINT, {"reasons": arrays.pop("reasons"), **arrays})
    save_arrays(folder / spec.CHECKPOINT, {"status": status})


def read_checkpoint(folder: Path) -> Labels | None:
    """Read the labels of an interrupted run, ``None`` where there are none."""
    if not (folder / spec.CHECKPOINT / "status.npy").exists():
        return None
    return Labels.from_arrays(load_arrays(folder / spec.CHECKPOINT))


def summarise(
    labels: Labels, seconds: dict[str, float], descriptions: Mapping[str, PotentialDescription]
) -> dict[str, Any]:
    """Say for each EIP how many labels it gave, how long it took, and why others are missing."""
    eips = {}
    for column, name in enumerate(map(str, labels.sources)):
        reasons = _count_reasons(labels, column)
        n_ok = int(labels.ok[:, column].sum())
        n_not_run = reasons.get(NOT_RUN, 0)
        eips[name] = {
            "n_ok": n_ok,
            "n_failed": len(labels) - n_ok - n_not_run,
            "n_not_run": n_not_run,
            "seconds": round(seconds.get(name, 0.0), 3),
            "reasons": reasons,
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
