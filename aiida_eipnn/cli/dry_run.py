"""What a loop, or a labelling with DFT, would do, before anything is stored or run."""

from collections.abc import Iterator, Sequence
from typing import Any

from aiida.engine import ProcessBuilder
from aiida.orm import Dict, List, Node, StructureData

from aiida_eipnn.calculations.loop import FREE
from aiida_eipnn.reports.dft_cost import CostRate, cost_rate
from aiida_eipnn.science.configurations import Configurations, join_configurations
from aiida_eipnn.science.convergence import StopCriteria
from aiida_eipnn.science.dft_cost import cost_units
from aiida_eipnn.workflows.continuation import last_name, must_train
from aiida_eipnn.workflows.label_dft import runs_pw

_HOUR = 3600.0
_NOTHING = "nothing was stored, nothing runs"


def describe_loop(builder: ProcessBuilder) -> str:
    """Return what the loop would do, a line for each thing to know.

    Raises
    ------
    ValueError
        If the loop would be refused.
    """
    _refuse_invalid(builder)
    lines = [*_pool(builder), *_dft(builder), *_inputs(builder), _NOTHING]
    return "\n".join(lines)


def describe_labelling(builder: ProcessBuilder) -> str:
    """Return what a labelling with pw.x would do, a line for each thing to know.

    Raises
    ------
    ValueError
        If it would be refused.
    """
    _refuse_invalid(builder)
    pool = builder.configurations.value()
    chosen = pool.take(pool.rows_of(builder.choice.ids()))
    units = float(cost_units(chosen.n_atoms, chosen.cells).mean())
    cost = _cost(cost_rate(chosen.symbols), units, len(chosen), chosen.symbols)
    lines = [
        f"pool: {len(pool)} configurations of {'-'.join(pool.symbols)}",
        f"DFT points: {len(chosen)}, {builder.n_lanes.value} at a time",
        f"DFT cost: {cost}",
        *_inputs(builder),
        _NOTHING,
    ]
    return "\n".join(lines)


def _refuse_invalid(builder: ProcessBuilder) -> None:
    inputs = builder._inputs(prune=True)
    if problem := builder.process_class.spec().inputs.validate(inputs):
        raise ValueError(f"{problem.port}: {problem.message}")


def dft_points(builder: ProcessBuilder) -> tuple[int, int, int, int]:
    """Return how many DFT points are for the test, to begin with, in each batch, and in all."""
    split = builder.split.get_dict()
    batch = int(builder.acquisition.get_dict()["n_select"])
    criteria = StopCriteria.from_dict(builder.stop.get_dict())
    test, initial = int(split["test"]), int(split.get("initial", 0))
    total = test + initial + batch * (criteria.max_iterations - 1)
    previous = dict(builder.previous)
    if "history" in previous:
        chosen = {name: node for name, node in previous["choices"].items() if name not in FREE}
        n_batches = criteria.max_iterations - len(previous["history"]["iterations"])
        if must_train(previous, dict(builder.known)) or last_name(previous) in chosen:
            n_batches -= 1
        total = sum(len(node) for node in chosen.values()) + batch * max(n_batches, 0)
    if criteria.dft_budget is not None:
        # The last batch is cut to what is left; test and first points are paid for in any case.
        total = min(total, max(criteria.dft_budget, test + initial))
    return test, initial, batch, total


def n_labelled(builder: ProcessBuilder) -> int:
    """Return for how many DFT points a previous loop has the label, or why there is none."""
    previous = dict(builder.previous)
    labels = {name: node for name, node in previous.get("labels", {}).items() if name not in FREE}
    n_rows = sum(node.base.attributes.get("n_configurations") for node in labels.values())
    return int(n_rows) + len(previous.get("runs", {}))


def _pool(builder: ProcessBuilder) -> Iterator[str]:
    pool = builder.pool
    if pool is not None:
        known = pool.value()
        yield f"pool: {len(known)} configurations of {'-'.join(known.symbols)}"
    else:
        recipes = builder.explore.recipes.get_list()
        made = ", ".join(f"{item['count']} {item['config_type']}" for item in recipes)
        yield f"pool: {sum(int(item['count']) for item in recipes)} to be made: {made}"
    yield f"EIPs: {len(builder.label.job.eips.get_list())}"
    yield from (f"  {name}" for name in builder.label.job.eips.get_list())


def _dft(builder: ProcessBuilder) -> Iterator[str]:
    test, initial, batch, total = dft_points(builder)
    there = n_labelled(builder)
    iterations = StopCriteria.from_dict(builder.stop.get_dict()).max_iterations
    yield (
        f"DFT points: {total} at most ({test} to test on, {initial} to begin with, "
        f"{batch} in each iteration after the first of {iterations})"
        + (f", {there} of them are there already" if there else "")
    )
    if not runs_pw(builder.dft):
        yield "DFT cost: none, labels are looked up"
        return
    known = _labelled_by_dft(builder)
    units = float(cost_units(known.n_atoms, known.cells).mean())
    rate = cost_rate(known.symbols)
    yield f"DFT cost: {_cost(rate, units, total - there, known.symbols)}"
    budget = StopCriteria.from_dict(builder.stop.get_dict()).core_hours_budget
    if budget is not None and rate is not None:
        yield _within(budget, rate.median * units / _HOUR, (test + initial, total))


def _within(budget: float, each: float, points: tuple[int, int]) -> str:
    """Return how many of at least and at most so many points a budget in core hours pays for."""
    least, most = points
    # The first points are paid for in any case: only then does the loop know what a label costs.
    paid = min(max(int(budget // each), least), most)
    return f"budget: {budget:.3g} core hours, enough for about {paid} of these points"


def _cost(rate: CostRate | None, units: float, total: int, symbols: Sequence[str]) -> str:
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


def _labelled_by_dft(builder: ProcessBuilder) -> Configurations:
    """Return what DFT labels: the pool, or the seeds, which are about as large as it will be."""
    if builder.pool is not None:
        pool: Configurations = builder.pool.value()
        return pool
    sets = builder.explore.configurations.values()
    return join_configurations([node.value() for node in sets])


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
