"""What DFT runs will cost, by those that this profile has finished."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from aiida.orm import CalcJobNode, Dict, QueryBuilder, StructureData

from aiida_eipnn.calculations.dft import n_cores
from aiida_eipnn.science.dft_cost import cost_units

# The newest ones: codes, machines and settings change.
MAX_RUNS = 200
PW = "aiida.calculations:quantumespresso.pw"


class CostRate(NamedTuple):
    """Core seconds of a run for one unit of size (:func:`cost_units`), and how many runs say so.

    ``low`` and ``high`` are the quartiles: the runs may differ in cutoff and k-points.
    """

    median: float
    low: float
    high: float
    n_runs: int


def cost_rate(elements: Iterable[str]) -> CostRate | None:
    """Return what finished pw.x runs on these elements, and no others, took.

    ``None`` where there are none.
    """
    query = QueryBuilder()
    query.append(
        CalcJobNode,
        filters={"process_type": PW, "attributes.exit_status": 0},
        tag="pw",
        project=["attributes.resources", "attributes.withmpi", "extras"],
    )
    query.append(
        StructureData,
        with_outgoing="pw",
        edge_filters={"label": "structure"},
        project=["attributes.cell", "attributes.sites", "attributes.kinds"],
    )
    query.append(
        Dict,
        with_incoming="pw",
        edge_filters={"label": "output_parameters"},
        project="attributes.wall_time_seconds",
    )
    query.order_by({"pw": {"id": "desc"}}).limit(MAX_RUNS)
    wanted, rates = set(elements), []
    for resources, withmpi, extras, cell, sites, kinds, wall in query.all():
        symbols = {symbol for kind in kinds for symbol in kind["symbols"]}
        # What came from the cache says what it took when it ran.
        if symbols != wanted or not wall or "_aiida_cached_from" in (extras or {}):
            continue
        units = cost_units(np.array([len(sites)]), np.array([cell]))[0]
        rates.append(float(wall) * n_cores(resources, withmpi) / units)
    if not rates:
        return None
    low, median, high = np.quantile(rates, (0.25, 0.5, 0.75))
    return CostRate(float(median), float(low), float(high), len(rates))
