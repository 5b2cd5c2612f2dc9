"""When the active-learning loop may stop, and why it did."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, NamedTuple, Self

import numpy as np

from aiida_eipnn.science.settings import build

# Iterations that a learning curve is fitted through, at least.
MIN_FOR_CURVE = 3


class StopReason(StrEnum):
    """Why the loop stopped, one stable word each."""

    CONVERGED = "converged"
    CERTAIN = "certain"
    NO_GAIN = "no_gain"
    BUDGET = "budget"
    NO_CANDIDATES = "no_candidates"
    MAX_ITERATIONS = "max_iterations"


class Stop(NamedTuple):
    """A reason to stop: the word for programs, the text for people."""

    reason: StopReason
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopCriteria:
    """When to stop; a criterion that is ``None`` is not asked.

    Parameters
    ----------
    max_iterations
        Iterations at most.
    target_forces_mae
        Error of the forces on the test set to reach, in eV/Å: with 95 % confidence it must be
        below that, because a small test set is off by luck.
    target_energy_mae
        Error of the energy on the test set to reach, in eV/atom, likewise. With both targets, both
        must be reached.
    uncertainty_threshold
        Stop when no candidate is more uncertain than this, in eV/Å: when the error to expect of
        its worst force, which is the uncertainty times the scale that test errors give, is not
        above it. Candidates are those in the window of the acquisition.
    min_gain
        Stop when the next DFT points, as many as the last time, would lower the error of the
        forces by less than this part of it, as the learning curve goes on; it is asked from the
        third iteration on.
    dft_budget
        DFT labels at most, those asked for and failed included.
    core_hours_budget
        Core hours of DFT at most; the last batch is cut to what the labels so far cost each.

    Raises
    ------
    ValueError
        If a criterion is not above zero.
    """

    max_iterations: int = 10
    target_forces_mae: float | None = None
    target_energy_mae: float | None = None
    uncertainty_threshold: float | None = None
    min_gain: float | None = None
    dft_budget: int | None = None
    core_hours_budget: float | None = None

    def __post_init__(self) -> None:
        if self.max_iterations is None:
            raise ValueError("max_iterations is null; give a number, so that the loop ends")
        for name in (item.name for item in fields(self)):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above zero")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build from plain numbers by name."""
        return build(cls, content)

    def affordable(self, n_dft_labels: int, core_hours: float) -> float:
        """Return how many more DFT labels the budgets pay for, by what those so far cost.

        Parameters
        ----------
        n_dft_labels, core_hours
            Spent so far.
        """
        left = math.inf if self.dft_budget is None else self.dft_budget - n_dft_labels
        if self.core_hours_budget is None or not core_hours > 0:
            return left
        each = core_hours / n_dft_labels
        return min(left, (self.core_hours_budget - core_hours) // each)


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationRecord:
    """What one iteration of the loop came to.

    Parameters
    ----------
    iteration
        Number of the iteration, from 1.
    n_dft_labels
        DFT calculations spent so far, failed ones included.
    core_hours
        What they took.
    n_training_labels
        DFT labels that the networks learnt; ``None`` where that is not known.
    n_candidates
        Configurations that are still up for DFT.
    n_outside
        Configurations that would be, were they inside the window of uncertainty.
    energy_mae
        Error on the test set, in eV/atom; ``None`` without a test set.
    forces_mae
        Error on the test set, in eV/Å; ``None`` without a test set.
    energy_mae_high, forces_mae_high
        What the errors are below with 95 % confidence; ``None`` where that is not known.
    max_uncertainty, mean_uncertainty
        Of the candidates, in eV/Å; ``None`` if there are none.
    uncertainty_scale
        Factor that turns an uncertainty into an error to expect; ``None`` where that is not known.
    """

    iteration: int
    n_dft_labels: int
    n_candidates: int
    n_training_labels: int | None = None
    n_outside: int = 0
    core_hours: float = 0.0
    energy_mae: float | None = None
    forces_mae: float | None = None
    energy_mae_high: float | None = None
    forces_mae_high: float | None = None
    max_uncertainty: float | None = None
    mean_uncertainty: float | None = None
    uncertainty_scale: float | None = None


def stop_reason(history: Sequence[IterationRecord], criteria: StopCriteria) -> Stop | None:
    """Return why to stop after the iterations of ``history``, or ``None`` to go on.

    Reaching the goal is asked before running out of something.
    """
    if not history:
        return None
    for ask in (_converged, _certain, _no_gain, _no_candidates, _budget, _max_iterations):
        if stop := ask(history, criteria):
            return stop
    return None


def predicted_gain(history: Sequence[IterationRecord]) -> float | None:
    r"""Return the part of the force error that the next DFT points would take away.

    A power law :math:`e = a\, n^{-b}` through the force errors of all iterations by the DFT labels
    learnt, least squares of the logarithms; the next points are as many as the last ones. ``None``
    before the third iteration, and where an error or a number of labels is not known.
    """
    learnt = [record.n_training_labels for record in history]
    if any(number is None for number in learnt):
        return None
    sizes = np.array(learnt, dtype=np.float64)
    values = [record.forces_mae for record in history]
    if len(history) < MIN_FOR_CURVE or any(value is None or not value > 0 for value in values):
        return None
    errors = np.array(values, dtype=np.float64)
    step = sizes[-1] - sizes[-2]
    if not np.isfinite(errors).all() or sizes[0] < 1 or step < 1:
        return None
    slope = float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])
    return float(1 - ((sizes[-1] + step) / sizes[-1]) ** slope)


def _converged(history: Sequence[IterationRecord], criteria: StopCriteria) -> Stop | None:
    last = history[-1]
    goals = [
        ("forces", last.forces_mae, last.forces_mae_high, criteria.target_forces_mae, "eV/Å"),
        ("energy", last.energy_mae, last.energy_mae_high, criteria.target_energy_mae, "eV/atom"),
    ]
    texts = []
    for name, value, high, target, unit in goals:
        if target is None:
            continue
        bound = value if high is None else high
        if value is None or bound is None or not bound <= target:
            return None
        sure = "" if high is None else f" (with 95 % confidence below {high:.4g})"
        texts.append(f"{name} MAE {value:.4g}{sure} <= {target:.4g} {unit}")
    if not texts:
        return None
    return Stop(StopReason.CONVERGED, f"the test error reached its target: {', '.join(texts)}")


def _certain(history: Sequence[IterationRecord], criteria: StopCriteria) -> Stop | None:
    last, threshold = history[-1], criteria.uncertainty_threshold
    # No candidates means no uncertainty, and is a reason of its own. A committee that is of one
    # opinion everywhere, such as a single network, says nothing of its errors.
    if threshold is None or last.max_uncertainty is None or last.uncertainty_scale is None:
        return None
    expected = last.uncertainty_scale * last.max_uncertainty
    if not expected <= threshold:
        return None
    return Stop(
        StopReason.CERTAIN,
        f"no candidate is uncertain any more: errors of at most {expected:.4g} eV/Å are to be "
        f"expected, threshold {threshold:.4g}",
    )


def _no_gain(history: Sequence[IterationRecord], criteria: StopCriteria) -> Stop | None:
    gain = None if criteria.min_gain is None else predicted_gain(history)
    if gain is None or criteria.min_gain is None or not gain < criteria.min_gain:
        return None
    step = (history[-1].n_training_labels or 0) - (history[-2].n_training_labels or 0)
    return Stop(
        StopReason.NO_GAIN,
        f"{step} more DFT points would lower the error of the forces by {100 * gain:.1f} % only, "
        f"by the learning curve of {len(history)} iterations; at least "
        f"{100 * criteria.min_gain:.1f} % were asked for",
    )


def _no_candidates(history: Sequence[IterationRecord], criteria: StopCriteria) -> Stop | None:
    del criteria
    last = history[-1]
    if last.n_candidates > 0:
        return None
    outside = f": {last.n_outside} are outside the window of uncertainty" if last.n_outside else ""
    return Stop(StopReason.NO_CANDIDATES, f"no candidates are left in the pool{outside}")


def _budget(history: Sequence[IterationRecord], criteria: StopCriteria) -> Stop | None:
    last = history[-1]
    if criteria.affordable(last.n_dft_labels, last.core_hours) >= 1:
        return None
    spent = []
    if criteria.dft_budget is not None:
        spent.append(f"{last.n_dft_labels} of {criteria.dft_budget} labels")
    if criteria.core_hours_budget is not None:
        spent.append(f"{last.core_hours:.3g} of {criteria.core_hours_budget:.3g} core hours")
    return Stop(StopReason.BUDGET, f"the DFT budget is spent: {', '.join(spent)}")


def _max_iterations(history: Sequence[IterationRecord], criteria: StopCriteria) -> Stop | None:
    last = history[-1]
    if last.iteration < criteria.max_iterations:
        return None
    return Stop(
        StopReason.MAX_ITERATIONS,
        f"iteration {last.iteration} of {criteria.max_iterations} is done",
    )
