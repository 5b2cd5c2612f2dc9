"""DFT points saved by asking for those that are worth it: ways to choose them, on stored labels.

    make bench-active-learning          a part of it, below a quarter of an hour on two cores
    make bench-active-learning-full     all sets, arms and seeds

Each run starts from a few labelled points, trains a committee, asks for as many labels again, and
goes on, until it has the last number of points. The oracle is the stored DFT labels; what chooses
is the code of the loop (aiida_eipnn.science.acquisition). Errors are mean absolute errors of the
committee's mean prediction on test configurations that no run may ask for: energies per atom in
meV/atom, force components in meV/Å. `cpu_s` is what fine-tuning the committee took; networks that
learnt from EIPs are shared by all arms and not counted. A run that is there already is not run
again; `--fresh` does.

    random             any points, from scratch: what the others are compared with
    fps                farthest points in the network's features
    committee_top      the most uncertain ones
    window_lcmd        LCMD inside a window of uncertainty that the last batch calibrated
    representative     in that window, those that stand for the more uncertain half of it
    random_eip         any points, and a network that learnt from EIPs
    window_lcmd_eip    LCMD, and a network that learnt from EIPs
    full               points that stand for the more uncertain half, a network that learnt from
                       EIPs, the first points by what EIPs disagree about, and pseudo-labels
    dpgen_rule         any points in a fixed window of uncertainty
    trains_pot_rule    any points above a threshold from the line of spread on error
"""

import argparse
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from injection import run_all  # type: ignore[import-not-found]
from injection_data import Problem, load_dataset, make_problem  # type: ignore[import-not-found]
from injection_networks import (  # type: ignore[import-not-found]
    SCRATCH,
    material,
    pretrained,
    settings_for,
    trained_state,
)

from aiida_eipnn.science.acquisition import (
    AcquisitionParameters,
    Strategy,
    acquire,
)
from aiida_eipnn.science.arrays import FloatArray, IntArray, write_whole
from aiida_eipnn.science.cold_start import first_points
from aiida_eipnn.science.eip.label_model import LabelModelParameters, make_pseudo_labels
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.learning_curves import find_points_needed
from aiida_eipnn.science.metrics import error_scale, worst_forces
from aiida_eipnn.science.nn.committee import Committee
from aiida_eipnn.science.nn.stage import StageInputs
from aiida_eipnn.science.nn.stages import prepare
from aiida_eipnn.science.predictions import Predictions
from aiida_eipnn.science.uncertainty import (
    calibration_scale,
    judge_conformal,
    judge_uncertainties,
    spearman,
)

RESULTS = Path(__file__).parent / "results" / "active_learning.json"
MEMBERS = 3
# The hard variant: the first points of two types, all tests on another one.
HARD = "pyxtal_Si_hard"
SEED_TYPES, TEST_TYPES = ("Si4_random", "Si6_random"), ("Si16_random",)
SIZES: dict[str, tuple[int, ...]] = {
    "mvl_W": (5, 10, 20, 40, 80),
    "pyxtal_Si": (25, 50, 100, 200),
    HARD: (25, 50, 100, 200),
}
QUICK: dict[str, tuple[int, ...]] = {"mvl_W": (5, 10)}
QUICK_ARMS = ("random", "representative", "full")
# Seeds 0 and 1 chose the method: they prove nothing.
SEEDS = range(2, 7)
# Candidates that the committee is asked about each time, drawn anew: enough to choose from.
CANDIDATES = 1500
# Steps of a training by the number of labels, the same for all arms. One network from scratch,
# random points, seeds 0 and 1: 1,000 steps are as good as 3,000 on mvl_W with 20 labels and better
# on pyxtal_Si with 50 and 200; with 80 labels of mvl_W 3,000 are better. The others lie between.
STEPS = {
    "mvl_W": {5: 1000, 10: 1000, 20: 1000, 40: 2000, 80: 3000},
    "pyxtal_Si": dict.fromkeys((25, 50, 100, 200), 1000),
}
# Expected errors above this, in eV/Å, are not physics.
MAX_ERROR = 5.0
# Trust levels of DP-GEN, in eV/Å.
FIXED_WINDOW = (0.05, 0.25)
# The error, in eV/Å, whose usual spread is the threshold of the other rule.
THRESHOLD_ERROR = 0.1
# Errors at which points are compared: this times the last one of `random`, and in meV/Å.
TARGET = 1.2
FIXED_TARGETS = {"mvl_W": 80.0, "pyxtal_Si": 120.0, HARD: 150.0}


class Batch(NamedTuple):
    """Labels that were asked for, and what the committee said before it learnt them."""

    labels: Labels
    said: Predictions


class Arm(NamedTuple):
    """A way to choose, and what the network knows beforehand."""

    strategy: str
    transfer: bool = False
    cold_start: bool = False
    pseudo: bool = False
    window: str = ""


ARMS = {
    "random": Arm("random"),
    "fps": Arm("farthest"),
    "committee_top": Arm("uncertainty"),
    "window_lcmd": Arm("lcmd", window="calibrated"),
    "representative": Arm("representative", window="calibrated"),
    "random_eip": Arm("random", transfer=True),
    "window_lcmd_eip": Arm("lcmd", transfer=True, window="calibrated"),
    "full": Arm("representative", transfer=True, cold_start=True, pseudo=True, window="calibrated"),
    "dpgen_rule": Arm("random", window="fixed"),
    "trains_pot_rule": Arm("random", window="line"),
}


@dataclass(frozen=True, slots=True, order=True)
class Task:
    """One run."""

    dataset: str
    arm: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setting:
    """Where a run asks for labels, and where it is tested.

    ``everything`` is the problem with every row labelled, ``first`` are rows that the first points
    come from, ``test`` are rows of the set.
    """

    everything: Problem
    first: IntArray
    test: IntArray

    def problem(self, rows: IntArray) -> Problem:
        """Return the problem in which these rows of the pool are labelled."""
        dft = self.everything.dft.take(np.argsort(self.everything.rows)[rows])
        return replace(self.everything, rows=rows, dft=dft)


@functools.cache
def setting_of(name: str) -> Setting:
    """Return a set, or the hard variant of one."""
    dataset = load_dataset(name.removesuffix("_hard"))
    n = len(dataset.train)
    everything = make_problem(dataset, "power_spectrum", n, 0)
    first, test = np.arange(n), dataset.test
    if name == HARD:
        types = dataset.configurations.config_types
        first = np.flatnonzero(np.isin(types[dataset.train], SEED_TYPES))
        test = test[np.isin(types[test], TEST_TYPES)]
    return Setting(everything=everything, first=first, test=test)


def run_task(task: Task, sizes: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """Run one loop; return a row for each number of labelled points."""
    numbers = sizes[task.dataset]
    torch.set_num_threads(1)
    setting, arm = setting_of(task.dataset), ARMS[task.arm]
    dataset = load_dataset(task.dataset.removesuffix("_hard"))
    unseen = dataset.configurations.take(setting.test)
    truth = dataset.dft.take(setting.test)
    rng = np.random.default_rng([task.seed, 11])
    rows = start_rows(setting, arm, numbers[0], rng)
    batch: Batch | None = None
    found = []
    for number, size in enumerate(numbers):
        start = time.process_time()
        committee = train(setting.problem(rows), arm, task.seed)
        seconds = time.process_time() - start
        predicted = committee.predict(unseen)
        found.append(
            {
                "dataset": task.dataset,
                "arm": task.arm,
                "seed": task.seed,
                "n": size,
                **errors_of(predicted, truth, unseen.config_types),
                "cpu_s": round(seconds, 1),
            }
        )
        if number + 1 < len(numbers):
            chosen, said = choose(setting, arm, committee, rows, numbers[number + 1], batch, rng)
            batch = Batch(setting.problem(chosen).dft, said)
            rows = np.concatenate([rows, chosen])
    return found


def start_rows(setting: Setting, arm: Arm, n: int, rng: np.random.Generator) -> IntArray:
    """Return the first points: any, or those that EIPs disagree about."""
    if not arm.cold_start:
        return rng.permutation(setting.first)[:n]
    # Some of the pool, anew for each seed: the choice itself is no matter of chance.
    part = np.sort(rng.permutation(setting.first)[: max(n, CANDIDATES // 2)])
    everything = setting.everything
    return part[first_points(everything.pool.take(part), everything.eips.take(part), n)]


def train(problem: Problem, arm: Arm, seed: int) -> Committee:
    """Return a committee that learnt the labels there are."""
    inputs = StageInputs(configurations=material(problem).pool, labels=problem.dft)
    training = {"steps": STEPS[problem.dataset][len(problem.rows)]}
    if arm.transfer:
        network, _, _ = pretrained(problem, material(problem).eips, "ours")
        inputs = replace(inputs, eip_labels=material(problem).eips, members=(network,))
    if arm.pseudo:
        pseudo, _ = make_pseudo_labels(
            material(problem).pool,
            problem.dft,
            material(problem).eips,
            LabelModelParameters(),
            seed,
        )
        inputs = replace(inputs, pseudo=pseudo)
    settings = settings_for(problem, "finetune", training if arm.transfer else SCRATCH | training)
    stage = prepare("finetune", inputs, settings)
    seeds = tuple(range(100 * seed, 100 * seed + MEMBERS))
    members = tuple(
        trained_state(stage.for_member(number), settings, one, number).network
        for number, one in enumerate(seeds)
    )
    return Committee(members=members, stage="finetune", seeds=seeds)


def choose(
    setting: Setting,
    arm: Arm,
    committee: Committee,
    rows: IntArray,
    size: int,
    batch: Batch | None,
    rng: np.random.Generator,
) -> tuple[IntArray, Predictions]:
    """Return rows of the pool to label next, and what the committee says of them and others."""
    pool, n = setting.everything.pool, size - len(rows)
    free = np.setdiff1d(np.arange(len(pool)), rows)
    # Where chance alone chooses, it has chosen by drawing.
    blind = arm.strategy == Strategy.RANDOM and not arm.window
    drawn = np.sort(rng.permutation(free)[: n if blind else CANDIDATES])
    asked = np.concatenate([drawn, rows])
    predicted = committee.predict(pool.take(asked))
    low, high = window_of(arm, batch)
    uncertainty = predicted.uncertainty[: len(drawn)]
    within = (uncertainty >= low) & (uncertainty <= high)
    inside, outside = np.flatnonzero(within), np.flatnonzero(~within)
    parameters = AcquisitionParameters(
        n_select=n, strategy=Strategy(arm.strategy), allow_fewer=True
    )
    found = acquire(predicted, inside, parameters, rng, np.arange(len(drawn), len(asked)))
    # The same number of points for all: what the window lacks comes from anywhere.
    chosen = np.concatenate([found.rows, rng.permutation(outside)[: n - len(found.rows)]])
    return asked[chosen], predicted


def window_of(arm: Arm, batch: Batch | None) -> tuple[float, float]:
    """Return the window of uncertainty, in eV/Å; all there is before a batch was labelled."""
    if arm.window == "fixed":
        return FIXED_WINDOW
    if not arm.window or batch is None:
        return 0.0, np.inf
    if arm.window == "calibrated":
        parameters = AcquisitionParameters(n_select=1, max_error=MAX_ERROR)
        highest = parameters.most_uncertain(error_scale(*batch))
        return 0.0, np.inf if highest is None else highest
    # A line through zero of spread on error.
    spread, error = worst_forces(*batch)
    slope = float((spread * error).sum() / (error**2).sum())
    return slope * THRESHOLD_ERROR, np.inf


def errors_of(predicted: Predictions, truth: Labels, types: Any) -> dict[str, Any]:
    """Return errors on the test set, and how good the uncertainties are."""
    wrong = predicted.forces - truth.forces[0]
    sums = np.add.reduceat(np.abs(wrong).sum(axis=1), truth.offsets[:-1])
    counts = np.where(truth.n_atoms > 1, 3.0 * truth.n_atoms, 0.0)
    by_type = {
        str(name): float(sums[types == name].sum() / counts[types == name].sum())
        for name in np.unique(types)
        if counts[types == name].any()
    }
    used = counts > 0
    energy = np.abs(predicted.energy - truth.energy[:, 0]) / truth.n_atoms
    return {
        "energy_mae_mev": round(1000 * float(energy.mean()), 4),
        "force_mae_mev": round(1000 * float(sums[used].sum() / counts.sum()), 4),
        "worst_type_force_mae_mev": round(1000 * max(by_type.values()), 4),
        **trust(predicted, truth, wrong),
    }


def trust(predicted: Predictions, truth: Labels, wrong: FloatArray) -> dict[str, Any]:
    """Return coverage of conformal intervals and the panel, of forces on atoms."""
    size, owner = np.linalg.norm(wrong, axis=1), np.repeat(np.arange(len(truth)), truth.n_atoms)
    used = predicted.forces_std > 0
    sigma, error = predicted.forces_std[used], size[used]
    conformal = judge_conformal(sigma, error, owner[used])
    components = np.repeat(sigma / np.sqrt(3), 3), wrong[used].ravel()
    panel = judge_uncertainties(calibration_scale(*components) * components[0], components[1])
    return {
        "coverage_90": None if conformal is None else round(conformal.coverage, 4),
        "spearman": round(spearman(sigma, error), 4),
        "panel": {
            name: round(getattr(panel, name), 4)
            for name in ("nll", "miscalibration_area", "ence", "rejection")
        },
    }


def savings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return points saved against `random` at two errors: near its last one, and a fixed one.

    Intervals, 95 %, are those of the bootstrap over seeds, which an arm and `random` share.
    """
    found = []
    for name in dict.fromkeys(row["dataset"] for row in rows):
        curves = {arm: curve_of(rows, name, arm) for arm in ARMS}
        reference = curves.pop("random")
        for arm, curve in curves.items():
            if reference is None or curve is None or not np.array_equal(reference[0], curve[0]):
                continue
            if seeds := sorted(set(reference[1]) & set(curve[1])):
                saved = {"dataset": name, "arm": arm, "seeds": len(seeds)}
                found += [saved | part for part in _savings(name, reference, curve, seeds)]
    return found


def worst_types(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return by how much the error of the worst type is below that of `random`, at equal points.

    Intervals as for :func:`savings`.
    """
    found = []
    for name in dict.fromkeys(row["dataset"] for row in rows):
        curves = {arm: curve_of(rows, name, arm, "worst_type_force_mae_mev") for arm in ARMS}
        reference = curves.pop("random")
        for arm, curve in curves.items():
            if reference is None or curve is None:
                continue
            seeds = sorted(set(reference[1]) & set(curve[1]))
            if not seeds or not np.array_equal(reference[0], curve[0]):
                continue
            means = _means(reference, curve, seeds)
            lower = np.array([1 - mine / theirs for mine, theirs in means])
            for column, n in enumerate(reference[0]):
                where = {"dataset": name, "arm": arm, "seeds": len(seeds), "n": int(n)}
                found.append({**where, "lower_by": round(float(lower[0, column]), 3)})
                found[-1] |= _interval(lower[1:, column], len(seeds))
    return found


Curve = tuple[IntArray, dict[int, FloatArray]]


def curve_of(
    rows: list[dict[str, Any]], name: str, arm: str, error: str = "force_mae_mev"
) -> Curve | None:
    """Return sizes, and errors by seed, of the runs that are complete."""
    mine = [row for row in rows if (row["dataset"], row["arm"]) == (name, arm)]
    sizes = np.array(sorted({row["n"] for row in mine}), dtype=np.int64)
    by_seed: dict[int, dict[int, float]] = {}
    for row in mine:
        by_seed.setdefault(row["seed"], {})[row["n"]] = row[error]
    whole = {
        seed: np.array([values[n] for n in sizes])
        for seed, values in by_seed.items()
        if len(values) == len(sizes)
    }
    return (sizes, whole) if whole else None


def _savings(
    name: str, reference: Curve, curve: Curve, seeds: list[int]
) -> Iterator[dict[str, Any]]:
    means = _means(reference, curve, seeds)
    for fixed in (None, FIXED_TARGETS[name]):
        values = [_saving(reference[0], *pair, fixed) for pair in means]
        yield {
            "target": "relative" if fixed is None else "fixed",
            "target_force_mae_mev": fixed or round(TARGET * float(means[0][1][-1]), 2),
            "saving": round(values[0], 3),
            **_interval(values[1:], len(seeds)),
        }


def _means(reference: Curve, curve: Curve, seeds: list[int]) -> list[tuple[FloatArray, FloatArray]]:
    """Return the means over seeds of both curves: of all seeds, then of seeds drawn at random."""
    mine, theirs = (np.array([item[1][seed] for seed in seeds]) for item in (curve, reference))
    rng = np.random.default_rng(0)
    draws = [np.arange(len(seeds)), *rng.integers(0, len(seeds), (1000, len(seeds)))]
    return [(mine[rows].mean(axis=0), theirs[rows].mean(axis=0)) for rows in draws]


def _interval(values: Any, n_seeds: int) -> dict[str, float | None]:
    """Return the middle 95 % of the values; of one seed there is no interval."""
    if n_seeds == 1:
        return {"low": None, "high": None}
    low, high = np.quantile(values, (0.025, 0.975))
    return {"low": round(float(low), 3), "high": round(float(high), 3)}


def _saving(sizes: IntArray, mine: FloatArray, theirs: FloatArray, fixed: float | None) -> float:
    target = fixed or TARGET * float(theirs[-1])
    # One that never comes so far needs twice as many points as were asked for, at least.
    most = 2.0 * sizes[-1]
    needed = [min(find_points_needed(sizes, mean, target), most) for mean in (mine, theirs)]
    return float(1 - needed[0] / needed[1])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the force errors, means over seeds, a line for each set and arm."""
    lines = []
    for name in dict.fromkeys(row["dataset"] for row in rows):
        for arm in ARMS:
            if (curve := curve_of(rows, name, arm)) is None:
                continue
            means = np.mean(list(curve[1].values()), axis=0)
            shown = "  ".join(f"{n}: {mean:.1f}" for n, mean in zip(curve[0], means, strict=True))
            lines.append(f"{name:<15} {arm:<16} {len(curve[1])} seeds  meV/Å  {shown}")
    return lines


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write everything that is known so far."""
    rows = sorted(rows, key=lambda row: (row["dataset"], row["arm"], row["seed"], row["n"]))
    coverage = [
        {name: row[name] for name in ("dataset", "arm", "seed", "n", "coverage_90")} for row in rows
    ]
    content = {
        "members": MEMBERS,
        "steps": STEPS,
        "rows": rows,
        "savings": savings(rows),
        "worst_types": worst_types(rows),
        "coverage_90": coverage,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def main() -> None:
    """Run what was asked for and is not there, print a table, write JSON."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="a part of it")
    options.add_argument("--datasets", nargs="+", choices=SIZES)
    options.add_argument("--arms", nargs="+", choices=ARMS)
    options.add_argument("--seeds", nargs="+", type=int)
    options.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    options.add_argument("--fresh", action="store_true", help="run again what is there")
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args()
    sizes = QUICK if given.quick else SIZES
    names = given.datasets or list(QUICK if given.quick else SIZES)
    arms = given.arms or (QUICK_ARMS if given.quick else tuple(ARMS))
    seeds = given.seeds or list(SEEDS[: 1 if given.quick else None])
    rows = json.loads(given.output.read_text())["rows"] if given.output.exists() else []
    wanted = [Task(name, arm, seed) for seed in seeds for name in names for arm in arms]
    if given.fresh:
        rows = [row for row in rows if Task(row["dataset"], row["arm"], row["seed"]) not in wanted]
    done = {Task(row["dataset"], row["arm"], row["seed"]) for row in rows}
    missing = [task for task in wanted if task not in done]
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done before", flush=True)
    run = functools.partial(run_task, sizes=sizes)
    for _, made in run_all(run, missing, given.workers):
        if made is not None:
            rows += made
            save(given.output, rows)
            print(*table(made), sep="\n", flush=True)
    print(*table(rows), sep="\n")
    for item in savings(rows):
        within = "one seed"
        if item["low"] is not None:
            within = f"{100 * item['low']:.0f} to {100 * item['high']:.0f} %"
        print(
            f"{item['dataset']:<15} {item['arm']:<18} {100 * item['saving']:.0f} % of the points "
            f"saved at {item['target_force_mae_mev']} meV/Å ({within})"
        )


if __name__ == "__main__":
    main()
