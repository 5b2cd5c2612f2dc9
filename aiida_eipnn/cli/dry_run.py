"""What a loop would do, before anything is stored or run."""

from collections.abc import Iterator
from typing import Any

from aiida.engine import ProcessBuilder
from aiida.orm import Dict, List, Node, StructureData

from aiida_eipnn.reports.dft_cost import CostRate, cost_rate
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.convergence import StopCriteria
from aiida_eipnn.science.dft_cost import cost_units
from aiida_eipnn.workflows.label_dft import runs_pw

_HOUR = 3600.0


def describe_loop(builder: ProcessBuilder) -> str:
    """Return what the loop would do, a line for each thing to know.

    Raises
    ------
    ValueError
        If the loop would be refused.
    """
    inputs = builder._inputs(prune=True)
    if problem := builder.process_class.spec().inputs.validate(inputs):
        raise ValueError(f"{problem.port}: {problem.message}")
    lines = [*_pool(builder), *_dft(builder), *_inputs(builder), "nothing was stored, nothing runs"]
    return "\n".join(lines)


def dft_points(builder: ProcessBuilder) -> tuple[int, int, int, int]:
    """Return how many DFT points are for the test, to begin with, in each batch, and in all."""
    split = builder.split.get_dict()
    batch = int(builder.acquisition.get_dict()["n_select"])
    criteria = StopCriteria.from_dict(builder.stop.get_dict())
    test, initial = int(split["test"]), int(split.get("initial", 0))
    total = test + initial + batch * (criteria.max_iterations - 1)
    if criteria.dft_budget is not None:
        # The batch that spends it is paid for whole.
        spent = test + initial + batch * max(0, -(-(criteria.dft_budget - test - initial) // batch))
        total = min(total, spent)
    return test, initial, batch, total


def _pool(builder: ProcessBuilder) -> Iterator[str]:
    pool = builder.pool
    if pool is not None:
        known = pool.value()
        yield f"pool: {len(known)} configurations of {_symbols(known)}"
    else:
        recipes = builder.explore.recipes.get_list()
        made = ", ".join(f"{item['count']} {item['config_type']}" for item in recipes)
        yield f"pool: {sum(int(item['count']) for item in recipes)} to be made: {made}"
    yield f"EIPs: {len(builder.label.job.eips.get_list())}"
    yield from (f"  {name}" for name in builder.label.job.eips.get_list())


def _dft(builder: ProcessBuilder) -> Iterator[str]:
    test, initial, batch, total = dft_points(builder)
    iterations = StopCriteria.from_dict(builder.stop.get_dict()).max_iterations
    yield (
        f"DFT points: {total} at most ({test} to test on, {initial} to begin with, "
        f"{batch} in each iteration after the first of {iterations})"
    )
    if not runs_pw(builder.dft):
        yield "DFT cost: none, labels are looked up"
        return
    sizes = _sizes(builder)
    symbols = _elements(builder)
    rate = cost_rate(symbols)
    yield f"DFT cost: {_cost(rate, sizes, total, symbols)}"


def _cost(rate: CostRate | None, units: float, total: int, symbols: list[str]) -> str:
    what = "-".join(symbols)
    if rate is None:
        return (
            f"unknown, for no run of pw.x on {what} has finished in this profile; label a few "
            "points first (workflows/02_label_with_dft.py)"
        )
    hours = units * total / _HOUR
    return (
        f"about {rate.median * hours:.2g} core hours ({rate.low * hours:.2g} to "
        f"{rate.high * hours:.2g}), as {rate.n_runs} runs on {what} in this profile took, by atoms "
        "squared times volume, whatever their cutoffs and k-points"
    )


def _sizes(builder: ProcessBuilder) -> float:
    """Return the mean size of what DFT labels, in the units of its cost."""
    pool = builder.pool
    known = pool.value() if pool is not None else _seeds(builder)
    return float(cost_units(known.n_atoms, known.cells).mean())


def _elements(builder: ProcessBuilder) -> list[str]:
    known = builder.pool.value() if builder.pool is not None else _seeds(builder)
    return _symbols(known).split("-")


def _seeds(builder: ProcessBuilder) -> Configurations:
    # What is made of them is of their size, mostly.
    seeds: Configurations = next(iter(builder.explore.configurations.values())).value()
    return seeds


def _symbols(configurations: Configurations) -> str:
    rows = range(len(configurations))
    names = {symbol for row in rows for symbol in configurations.atoms(row).get_chemical_symbols()}
    return "-".join(sorted(names))


def _inputs(builder: ProcessBuilder) -> Iterator[str]:
    """Return every input, nested ones by their path."""
    yield "inputs:"
    for name, value in _flat(builder._inputs(prune=True)):
        yield f"  {name}: {_value(value)}"


def _flat(inputs: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in sorted(inputs.items()):
        label = f"{prefix}{name}"
        if isinstance(value, dict) or (hasattr(value, "items") and not isinstance(value, Node)):
            yield from _flat(value, f"{label}.")
        else:
            yield label, value


def _value(value: Any) -> str:
    if isinstance(value, Dict):
        return str(value.get_dict())
    if isinstance(value, List):
        return str(value.get_list())
    if isinstance(value, StructureData):
        return value.get_formula()
    if isinstance(value, Node):
        plain = getattr(value, "value", None)
        if plain is not None and not callable(plain):
            return str(plain)
        label = getattr(value, "full_label", value.label)
        return f"{type(value).__name__} {label}".strip()
    return str(value)
