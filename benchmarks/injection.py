"""What EIPs are worth when DFT labels are few: learning curves of every way to use them.

    make bench-injection          a part of it, below a quarter of an hour on two cores
    make bench-injection-full     all sets, arms, numbers of labelled points and seeds

Each training gets `n` labelled points of a set, validation among them, and the labels of every EIP
on the whole pool, and is tested on configurations that it never saw. Draws of one seed are nested.
Errors are mean absolute errors: of energies per atom in meV/atom, of force components in meV/Å,
every atom counts once and cells of one atom, whose forces are zero by symmetry, do not.

A run that was interrupted, or is repeated, goes on where it was; `--fresh` trains what was asked
for again. See injection_arms.py for the arms, injection_data.py for the sets and
injection_report.py for the page made of the results.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from injection_arms import (  # type: ignore[import-not-found]
    ARMS,
    NETWORKS,
    NO_TRUNK,
    ORACLE,
    Trained,
    fit_oracle,
    has_networks,
    train_network,
)
from injection_data import (  # type: ignore[import-not-found]
    BUILD,
    ELEMENTS,
    Dataset,
    Problem,
    load_dataset,
    make_problem,
)
from injection_summary import (  # type: ignore[import-not-found]
    QUANTITIES,
    judge,
    name_groups,
    save_points,
    sizes_of,
    tabulate,
    text_of,
)

from aiida_eipnn.science.arrays import BoolArray, FloatArray, write_whole
from aiida_eipnn.science.labels import Labels

T = TypeVar("T")
R = TypeVar("R")

RESULTS = Path(__file__).parent / "results" / "injection.json"
ERRORS = BUILD / "errors"
ALONE = (*ARMS, ORACLE)
PACKAGES = ("aiida-eipnn", "numpy", "ase", "kimpy", "torch", "mace-torch")

# Labelled points; 0 stands for all there are.
ALL = 0
SIZES = (5, 10, 20, 25, 50, 100, 200, 400, 762, ALL)
FULL = {"mvl_W": (*SIZES, 40), "pyxtal_Si": SIZES, "mlearn_Si": SIZES}
# Those that networks are trained on; arms without networks take no time.
FULL_NETWORKS = {"mvl_W": (5, 10, 20, 40), "pyxtal_Si": (25, 100, 400), "mlearn_Si": (20, 100)}
QUICK = {"mvl_W": (10,), "pyxtal_Si": (25,)}
QUICK_NETWORKS = ("scratch", "paper_both", "ours_both")
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
TRUNKS = ("power_spectrum",)


@dataclass(frozen=True, slots=True, order=True)
class Task:
    """One training."""

    dataset: str
    n: int
    seed: int
    trunk: str
    arm: str

    @property
    def key(self) -> str:
        """A name."""
        return f"{self.dataset}/{self.trunk}-{self.arm}-{self.n}-{self.seed}"

    @property
    def errors_file(self) -> Path:
        """Where the errors of the test configurations are kept."""
        return Path(ERRORS / f"{self.key}.npz")

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> "Task":
        """Return the task whose row this is."""
        return cls(row["dataset"], row["n"], row["seed"], row["trunk"], row["arm"])


def run_task(task: Task) -> dict[str, Any]:
    """Train, test, keep the errors of the test configurations, and return the row."""
    dataset = load_dataset(task.dataset)
    problem = make_problem(dataset, task.trunk, task.n, task.seed)
    truth = dataset.dft.take(dataset.test)
    wanted = dataset.configurations.take(dataset.test)
    start = time.process_time()
    trained = train(task, problem, truth)
    cpu_s = time.process_time() - start if trained.cpu_s is None else trained.cpu_s
    energy, forces = trained.predict(wanted)
    if not (np.isfinite(energy).all() and np.isfinite(forces).all()):
        raise ValueError(f"{task.arm} predicts numbers that are not finite")
    errors = test_errors(truth, energy, forces)
    task.errors_file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(task.errors_file, forces=errors["forces"], weights=errors["weights"])
    total = mean_errors(errors, np.ones(len(wanted), dtype=np.bool_))
    return {
        **{name: getattr(task, name) for name in ("dataset", "trunk", "arm", "n", "seed")},
        "steps": trained.steps,
        **{name: total[name] for name in QUANTITIES.values()},
        "by_type": {
            str(name): mean_errors(errors, wanted.config_types == name)
            for name in np.unique(wanted.config_types)
        },
        **twin_errors(dataset, errors),
        "cpu_s": round(cpu_s, 2),
        "notes": trained.notes or {},
    }


def train(task: Task, problem: Problem, truth: Labels) -> Trained:
    """Train one arm; only the oracle sees the test labels."""
    if task.arm == ORACLE:
        return fit_oracle(problem, truth)
    if task.arm in ARMS:
        return ARMS[task.arm](problem, task.seed)
    return train_network(task.arm, problem, task.seed)


def test_errors(truth: Labels, energy: FloatArray, forces: FloatArray) -> dict[str, FloatArray]:
    """Return the errors of each test configuration, in eV/atom and eV/Å, shapes ``(t,)``.

    Those of forces are summed over components, whose number is their weight.
    """
    of_atoms = np.abs(forces - truth.forces[0]).sum(axis=1)
    return {
        "energy": np.abs(energy - truth.energy[:, 0]) / truth.n_atoms,
        "forces": np.add.reduceat(of_atoms, truth.offsets[:-1]),
        "weights": np.where(truth.n_atoms > 1, 3.0 * truth.n_atoms, 0.0),
    }


def mean_errors(errors: dict[str, FloatArray], rows: BoolArray) -> dict[str, Any]:
    """Return mean absolute errors of these test configurations; of forces `None` without any."""
    used = rows & (errors["weights"] > 0)
    force = errors["forces"][used].sum() / errors["weights"][used].sum() if used.any() else None
    return {
        "energy_mae_mev": round(1000 * float(errors["energy"][rows].mean()), 4),
        "force_mae_mev": None if force is None else round(1000 * float(force), 4),
        "n": int(rows.sum()),
    }


def twin_errors(dataset: Dataset, errors: dict[str, FloatArray]) -> dict[str, Any]:
    """Return the errors without test configurations that have a twin in the pool, if there are."""
    if not dataset.twins.any():
        return {}
    return {"without_twins": mean_errors(errors, ~dataset.twins)}


def choose_tasks(given: argparse.Namespace) -> list[Task]:
    """Return the trainings that were asked for, those with few labelled points first."""
    arms = given.arms or (*ALONE, *(QUICK_NETWORKS if given.quick else NETWORKS))
    if not has_networks() and set(arms) & set(NETWORKS):
        print("networks are left out: there is no module that trains them")
        arms = [arm for arm in arms if arm not in NETWORKS]
    seeds = given.seeds or (QUICK_SEEDS if given.quick else SEEDS)
    tasks = []
    for name in given.datasets:
        if not (wanted := given.n or (QUICK if given.quick else FULL).get(name)):
            continue
        dataset = load_dataset(name)
        if dataset is None:
            print(f"{name} is left out: no such file in $EIPNN_DATA, and it is not on PyPI")
            continue
        print(
            f"{name}: {len(dataset.train)} configurations that may be labelled, "
            f"{len(dataset.test)} to test on, {len(dataset.eips.sources)} EIPs",
            flush=True,
        )
        for n in choose_sizes(wanted, len(dataset.train)):
            for arm in arms:
                if arm in NETWORKS and not given.n and n not in FULL_NETWORKS[name]:
                    continue
                for trunk in given.trunks if arm in NETWORKS else (NO_TRUNK,):
                    tasks += [Task(name, n, seed, trunk, arm) for seed in seeds]
    return sorted(tasks)


def choose_sizes(wanted: Sequence[int], n_train: int) -> list[int]:
    """Return the numbers of labelled points, ascending, as far as the set goes."""
    return sorted({n_train if n == ALL else n for n in wanted if n <= n_train})


def run_all(
    run: Callable[[T], R], tasks: Sequence[T], n_workers: int
) -> Iterator[tuple[T, R | None]]:
    """Yield each task with what it gave when it is done, with nothing where it failed."""
    # What the workers start with: each has a core.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(
        n_workers, mp_context=get_context("spawn"), initializer=end_with_parent
    ) as workers:
        running: dict[Future[R], T] = {workers.submit(run, task): task for task in tasks}
        try:
            for future in as_completed(running):
                yield running[future], _result(future)
        finally:
            # Where this is interrupted, those that wait do not start.
            workers.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """End this process when the one that started it ends, however that comes about."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        # Without the steps of an orderly end, which would wait for tasks that never come.
        os._exit(1)


def _result(future: Future[R]) -> R | None:
    try:
        return future.result()
    except Exception:
        # The others go on: hours of trainings do not end with one that diverged.
        traceback.print_exc()
        return None


class Results:
    """The file of results; saved after each training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"meta": {}, "rows": [], "saved": []}
        if path.exists():
            self.content = json.loads(path.read_text())
            unpack_errors(self.packed, self.rows)

    @property
    def packed(self) -> Path:
        """The errors of the test configurations, so that a run goes on in another checkout."""
        return self.path.with_suffix(".npz")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each training."""
        return list(self.content["rows"])

    @property
    def done(self) -> set[Task]:
        """The trainings whose rows are here and whose errors are kept."""
        tasks = map(Task.of_row, self.rows)
        return {task for task in tasks if task.errors_file.exists()}

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, in place of the one of the same training."""
        rows = {Task.of_row(each): each for each in [*self.rows, row]}
        self.content["rows"] = [rows[task] for task in sorted(rows)]
        self.save()

    def finish(self) -> None:
        """Add the points saved, of all trainings whose errors are here, and what they were on."""
        pack_errors(self.packed, self.done)
        rows = self.rows
        done = self.done
        here = [row for row in rows if Task.of_row(row) in done]
        saved = {
            (entry["dataset"], entry["trunk"], entry["arm"], entry["n_scratch"]): entry
            for entry in [*self.content["saved"], *list_saved(here)]
        }
        self.content["saved"] = [saved[key] for key in sorted(saved)]
        self.content["meta"] = {
            "date": datetime.now(UTC).date().isoformat(),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "versions": versions(),
            "cpu_s": round(sum(row["cpu_s"] for row in rows), 1),
        }
        self.save()

    def save(self) -> None:
        """Write the file, one row a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = [f'"meta": {json.dumps(self.content["meta"])}']
        for name in ("rows", "saved"):
            lines = ",\n".join(json.dumps(row) for row in self.content[name])
            parts.append(f'"{name}": [\n{lines}\n]')
        write_whole(self.path, "{\n" + ",\n".join(parts) + "\n}\n")


def pack_errors(path: Path, tasks: Iterable[Task]) -> None:
    """Write the errors of these trainings to one file; equal errors give equal files."""
    packed = {}
    for task in sorted(tasks):
        with np.load(task.errors_file) as kept:
            packed[f"forces/{task.key}"] = kept["forces"].astype(np.float32)
            # Those of the test set, whatever was trained.
            packed[f"weights/{task.dataset}"] = kept["weights"].astype(np.float32)
    partial = path.with_name(f".{path.name}")
    with partial.open("wb") as stream:
        np.savez_compressed(stream, **packed)
    partial.replace(path)


def unpack_errors(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put back the errors of trainings that were made elsewhere."""
    if not path.exists():
        return
    with np.load(path) as packed:
        for task in map(Task.of_row, rows):
            key = f"forces/{task.key}"
            if task.errors_file.exists() or key not in packed.files:
                continue
            task.errors_file.parent.mkdir(parents=True, exist_ok=True)
            weights = packed[f"weights/{task.dataset}"]
            np.savez(task.errors_file, forces=packed[key], weights=weights)


def list_saved(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points saved in each set and with each trunk."""
    saved = []
    for dataset, trunk in name_groups(rows):
        errors, weights = {}, np.zeros(0)
        for row in rows:
            if row["dataset"] == dataset and row["trunk"] in (trunk, NO_TRUNK):
                task = Task.of_row(row)
                kept = np.load(task.errors_file)
                errors[task.arm, task.n, task.seed], weights = kept["forces"], kept["weights"]
        found = save_points(errors, weights)
        saved += [{"dataset": dataset, "trunk": trunk, **entry} for entry in found]
    return saved


def versions() -> dict[str, str]:
    """Return the versions of what the numbers rest on, as far as it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def print_tables(results: Results, datasets: Sequence[str]) -> None:
    """Print the errors by arm and number of labelled points, then the targets."""
    for dataset, trunk in name_groups(results.rows):
        if dataset not in datasets:
            continue
        table = tabulate(results.rows, dataset, trunk)
        cells = {arm: [text_of(table, arm, n) for n in sizes_of(table)] for arm in table}
        width = 2 + max(len(cell) for row in cells.values() for cell in row)
        print(f"\n{dataset}, {trunk}: energy meV/atom / force meV/Å (against scratch)")
        print(f"{'points':12}" + "".join(f"{n:>{width}}" for n in sizes_of(table)))
        for arm, row in cells.items():
            print(f"{arm:12}" + "".join(f"{cell:>{width}}" for cell in row))
    for trunk, targets in judge(results.rows, results.content["saved"]).items():
        print(f"\ntargets, {trunk}")
        for target in targets:
            verdict = {True: "reached", False: "missed", None: "-"}[target.reached]
            print(f"{verdict:8} {target.what}: {target.found} (goal: {target.goal})")


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a part of it")
    parser.add_argument("--fresh", action="store_true", help="train again what was trained")
    parser.add_argument("--datasets", nargs="+", choices=ELEMENTS, default=list(ELEMENTS))
    parser.add_argument("--arms", nargs="+", choices=(*ALONE, *NETWORKS))
    parser.add_argument("--n", nargs="+", type=int, help="labelled points; 0 for all there are")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--trunks", nargs="+", default=TRUNKS)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> int:
    """Train what is not there yet, print the tables and write the JSON."""
    given = read_options()
    results, tasks = Results(given.output), choose_tasks(given)
    done = set() if given.fresh else results.done
    todo = [task for task in tasks if task not in done]
    print(f"{len(tasks)} trainings, {len(tasks) - len(todo)} of them done before", flush=True)
    failed = []
    for number, (task, row) in enumerate(run_all(run_task, todo, given.workers), 1):
        if row is None:
            failed.append(task)
            continue
        results.add(row)
        print(
            f"{number:5}/{len(todo)} {task.dataset} {task.trunk} {task.arm} {task.n} points, "
            f"seed {task.seed}: {row['energy_mae_mev']:.4g} meV/atom, "
            f"{row['force_mae_mev']:.4g} meV/Å, {row['cpu_s']:.0f} s",
            flush=True,
        )
    results.finish()
    print_tables(results, given.datasets)
    print(f"\nwritten to {given.output}")
    for task in failed:
        print(f"failed: {task}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
