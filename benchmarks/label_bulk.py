"""100,000 configurations and 8 EIPs in one job, interrupted once by its walltime.

    make bench-label-bulk

Runs `eipnn.label.base` in the profile of the demo: the first job is cut off by its walltime and
the second goes on from the checkpoint. Records the largest memory of the job's processes together
and of the process that parses, the wall time, how many nodes were made, and how many bytes the
labels take, over those of float64 energies and float32 forces and stresses.
"""

import argparse
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from aiida import load_profile
from aiida.engine import run_get_node
from aiida.orm import Node, QueryBuilder, load_code
from label import RESULTS, make_pool, write  # type: ignore[import-not-found]

from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.workflows.restart import LabelBaseWorkChain

EVERY = 0.2


class Watch:
    """Watches the memory of the processes of `eipnn-job`, and of this one."""

    def __init__(self) -> None:
        self.job = self.here = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(EVERY):
            self.here = max(self.here, psutil.Process().memory_info().rss / 2**20)
            self.job = max(self.job, memory_of_job())


def memory_of_job() -> float:
    """Return the resident memory of all processes of the job together, in MB.

    Pages that they share count for each of them.
    """
    total = 0.0
    for process in psutil.process_iter(["cmdline"]):
        if any(Path(part).name == "eipnn-job" for part in process.info["cmdline"] or []):
            try:
                family = [process, *process.children(recursive=True)]
                total += sum(member.memory_info().rss for member in family) / 2**20
            except psutil.NoSuchProcess:
                continue
    return total


def raw_bytes(labels: Any) -> int:
    """Return the bytes of float64 energies and float32 forces and stresses."""
    n, m = labels.energy.shape
    return int(8 * n * m + 4 * labels.forces.size + 4 * labels.stress.size)


def stored_bytes(node: Any) -> int:
    """Return the bytes of the arrays of a node."""
    repository = node.base.repository
    return sum(repository.get_object_size(name) for name in repository.list_object_names())


def main() -> None:
    """Run it, print the figures and add them to the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=100_000, help="configurations")
    parser.add_argument("--walltime", type=int, default=120, help="of each job, in s")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    load_profile()
    pool = ConfigurationsData.from_value(
        Configurations.from_atoms(make_pool("Si", given.n), "rattled")
    ).store()
    builder = LabelBaseWorkChain.get_builder_from_protocol(
        load_code("eipnn-job@localhost"),
        pool,
        protocol="demo",
        options={"max_wallclock_seconds": given.walltime},
    )
    builder.job.metadata.disable_cache = True
    before, started, watch = QueryBuilder().append(Node).count(), time.perf_counter(), Watch()
    outputs, node = run_get_node(builder)
    seconds = time.perf_counter() - started
    watch.stop()
    if not node.is_finished_ok:
        raise SystemExit(f"the work chain ended with {node.exit_status}: {node.exit_message}")
    labels = outputs["labels"].value()
    jobs = [child for child in node.called if child.process_label == "LabelCalculation"]
    bulk_results = {
        "configurations": given.n,
        "eips": len(labels.sources),
        "peak_rss_mb": round(watch.job),
        "parser_peak_rss_mb": round(watch.here),
        "seconds": round(seconds, 1),
        "jobs": len(jobs),
        "nodes": QueryBuilder().append(Node).count() - before,
        "bytes_ratio": round(stored_bytes(outputs["labels"]) / raw_bytes(labels), 4),
        "labels": int(labels.ok.sum()),
        "failed": int((~labels.ok).sum()),
    }
    for name, value in bulk_results.items():
        print(f"{name:20} {value}")
    write(given.output, {"bulk": bulk_results})


if __name__ == "__main__":
    main()
