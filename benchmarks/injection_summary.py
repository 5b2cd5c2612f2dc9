"""What the rows of `make bench-injection` say: means, changes, points saved, targets."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from aiida_eipnn.science.arrays import FloatArray
from aiida_eipnn.science.learning_curves import LearningCurve, estimate_saving

Row = dict[str, Any]
SCRATCH, OURS, PAPER = "scratch", "ours_both", "paper_both"
QUANTITIES = {"energy": "energy_mae_mev", "force": "force_mae_mev"}
RESAMPLES = 1000

# How much less ours_both errs than scratch, at least: (set, labelled points, quantity).
GAINS = {
    ("mvl_W", 10, "energy"): 0.55,
    ("mvl_W", 10, "force"): 0.55,
    ("mvl_W", 20, "energy"): 0.45,
    ("mvl_W", 20, "force"): 0.45,
    ("pyxtal_Si", 25, "energy"): 0.40,
    ("pyxtal_Si", 25, "force"): 0.55,
    ("pyxtal_Si", 100, "energy"): 0.30,
    ("pyxtal_Si", 100, "force"): 0.35,
}
SAVINGS = {"mvl_W": 0.60, "pyxtal_Si": 0.50}
# How much worse than scratch ours_both may be anywhere.
TOLERANCE = 0.02


class Target(NamedTuple):
    """What was to be reached, what was, and whether that is enough (`None`: not measured)."""

    what: str
    goal: str
    found: str
    reached: bool | None


class Means(NamedTuple):
    """Errors of one arm with one number of labelled points, means over seeds.

    In meV/atom and meV/Å; spreads are standard deviations over seeds.
    """

    energy: float
    force: float
    energy_spread: float
    force_spread: float
    n_seeds: int


Table = dict[str, dict[int, Means]]


def name_groups(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Return the pairs of set and trunk that trained networks, sets without any with `none`."""
    pairs = list(dict.fromkeys((row["dataset"], row["trunk"]) for row in rows))
    trained = {dataset for dataset, trunk in pairs if trunk != "none"}
    return [(name, trunk) for name, trunk in pairs if trunk != "none" or name not in trained]


def tabulate(rows: Iterable[Row], dataset: str, trunk: str) -> Table:
    """Return means by arm and number of labelled points; arms without networks are of any trunk."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        if row["dataset"] == dataset and row["trunk"] in (trunk, "none"):
            found.setdefault(row["arm"], {}).setdefault(row["n"], []).append(row)
    return {arm: {n: _means(sizes[n]) for n in sorted(sizes)} for arm, sizes in sorted_arms(found)}


def sorted_arms(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return items in the order of the arms: EIPs alone, scratch, paper, ours, the rest."""
    order = ("constant", "eip", "stack", "oracle", "scratch", "paper", "ours")

    def place(arm: str) -> int:
        return next((i for i, start in enumerate(order) if arm.startswith(start)), len(order))

    return sorted(found.items(), key=lambda item: (place(item[0]), item[0]))


def _means(rows: Sequence[Row]) -> Means:
    energy, force = (np.array([row[key] for row in rows]) for key in QUANTITIES.values())
    spreads = float(energy.std()), float(force.std())
    return Means(float(energy.mean()), float(force.mean()), *spreads, len(rows))


def change(table: Table, arm: str, n: int, quantity: str) -> float | None:
    """Return the relative change of an error against scratch; negative is better."""
    if n not in table.get(SCRATCH, {}) or n not in table.get(arm, {}):
        return None
    scratch = float(getattr(table[SCRATCH][n], quantity))
    return float(getattr(table[arm][n], quantity)) / scratch - 1.0


def text_of(table: Table, arm: str, n: int) -> str:
    """Return errors and changes of one cell: `5.2 / 101 (-40 / -55 %)`."""
    if n not in table[arm]:
        return ""
    cell = table[arm][n]
    text = f"{_short(cell.energy)} / {_short(cell.force)}"
    changes = [change(table, arm, n, quantity) for quantity in QUANTITIES]
    if arm == SCRATCH or None in changes:
        return text
    return f"{text} ({' / '.join(f'{100 * item:+.0f}' for item in changes if item is not None)} %)"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def sizes_of(table: Table) -> list[int]:
    """Return all numbers of labelled points, ascending."""
    return sorted({n for sizes in table.values() for n in sizes})


def save_points(
    errors: dict[tuple[str, int, int], FloatArray], weights: FloatArray
) -> list[dict[str, Any]]:
    """Return the points that each arm saves against scratch, at scratch's force errors.

    Parameters
    ----------
    errors
        Summed absolute force error in eV/Å of each test configuration, by arm, labelled points
        and seed.
    weights
        Force components of each test configuration.
    """
    saved = []
    for arm in dict.fromkeys(arm for arm, _, _ in errors):
        if arm == SCRATCH or not any(key[0] == SCRATCH for key in errors):
            continue
        keys = [key for key in errors if key[0] in (arm, SCRATCH)]
        seeds = _common_seeds(keys)
        if not seeds:
            continue
        curve, scratch = (_curve(errors, weights, each, seeds) for each in (arm, SCRATCH))
        for n in scratch.n[scratch.n > curve.n[0]]:
            rng = np.random.default_rng(int(n))
            found = asdict(estimate_saving(curve, scratch, int(n), rng, resamples=RESAMPLES))
            saved.append({"arm": arm, "n_seeds": len(seeds), **_in_mev(found)})
    return saved


def _in_mev(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "target_force_mae_mev": round(1000 * found["target"], 3),
        "n_scratch": found["n_reference"],
        "n_arm": round(found["n_needed"], 1),
        **{name: round(found[name], 4) for name in ("saving", "low", "high")},
        "bound": found["bound"],
    }


def _common_seeds(keys: Sequence[tuple[str, int, int]]) -> list[int]:
    """Return the seeds that every arm has at every number of labelled points."""
    by_size: dict[tuple[str, int], set[int]] = {}
    for arm, n, seed in keys:
        by_size.setdefault((arm, n), set()).add(seed)
    return sorted(set.intersection(*by_size.values()))


def _curve(
    errors: dict[tuple[str, int, int], FloatArray],
    weights: FloatArray,
    arm: str,
    seeds: Sequence[int],
) -> LearningCurve:
    sizes = sorted({n for each, n, _ in errors if each == arm})
    values = np.array([[errors[arm, n, seed] for seed in seeds] for n in sizes])
    return LearningCurve(n=np.array(sizes, dtype=np.int64), errors=values, weights=weights)


def judge(rows: Sequence[Row], saved: Sequence[Row]) -> dict[str, list[Target]]:
    """Return the targets by trunk."""
    trunks = list(dict.fromkeys(row["trunk"] for row in rows if row["trunk"] != "none"))
    return {trunk: _judge_trunk(rows, saved, trunk) for trunk in trunks}


def _judge_trunk(rows: Sequence[Row], saved: Sequence[Row], trunk: str) -> list[Target]:
    sets = [name for name, each in name_groups(rows) if each == trunk]
    tables = {name: tabulate(rows, name, trunk) for name in sets}
    targets = [_judge_gain(tables, *key, goal) for key, goal in GAINS.items()]
    mine = [row for row in saved if row["trunk"] == trunk and row["arm"] == OURS]
    targets += [_judge_saving(mine, name, goal) for name, goal in SAVINGS.items()]
    targets += [_judge_order(tables[name], name, PAPER, 0.0) for name in sets]
    return targets + [_judge_order(tables[name], name, SCRATCH, TOLERANCE) for name in sets]


def _judge_gain(
    tables: dict[str, Table], dataset: str, n: int, quantity: str, goal: float
) -> Target:
    what = f"{dataset}, {n} points: {quantity} error of {OURS} below {SCRATCH}"
    found = change(tables.get(dataset, {}), OURS, n, quantity)
    if found is None:
        return Target(what, f"{100 * goal:.0f} %", "not measured", None)
    return Target(what, f"{100 * goal:.0f} %", f"{-100 * found:.1f} %", -found >= goal)


def _judge_saving(saved: Sequence[Row], dataset: str, goal: float) -> Target:
    """Judge the median of the targets that the arm's curve reaches inside, or bounds from below."""
    what = f"{dataset}: points saved by {OURS}, median over targets"
    mine = [row for row in saved if row["dataset"] == dataset]
    if not mine:
        return Target(what, f"{100 * goal:.0f} %", "not measured", None)
    savings = sorted(row["saving"] for row in mine)
    middle = float(np.median(savings))
    text = f"{100 * middle:.0f} % ({100 * savings[0]:.0f} to {100 * savings[-1]:.0f} %)"
    return Target(what, f"{100 * goal:.0f} %", text, middle >= goal)


def _judge_order(table: Table, dataset: str, other: str, tolerance: float) -> Target:
    """Judge whether ours errs less than another arm, or hardly more, wherever both were run."""
    better = "never more than 2 % worse than" if tolerance else "better than"
    what = f"{dataset}: {OURS} {better} {other}, every number of points"
    ratios = {
        (n, quantity): getattr(cell, quantity) / getattr(table[other][n], quantity)
        for n, cell in table.get(OURS, {}).items()
        if n in table.get(other, {})
        for quantity in QUANTITIES
    }
    if not ratios:
        return Target(what, "all", "not measured", None)
    failed = {key: ratio for key, ratio in ratios.items() if ratio >= 1.0 + tolerance}
    n, quantity = max(ratios, key=lambda key: ratios[key])
    worst = f"worst {100 * (ratios[n, quantity] - 1):+.1f} % ({quantity}, {n} points)"
    text = f"{len(ratios) - len(failed)} of {len(ratios)}, {worst}"
    return Target(what, "all", text, not failed)
