"""When the active-learning loop may stop, and why it did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, NamedTuple, Self

from aiida_eipnn.science.settings import build


class StopReason(StrEnum):
    """Why the loop stopped, one stable word each."""

    CONVERGED = "converged"
    CERTAIN = "certain"
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
        Error of the forces on the test set to reach, in eV/Å.
    target_energy_mae
        Error of the energy on the test set to reach, in eV/atom. With both targets, both must
        be reached.
    uncertainty_threshold
        Stop when no candidate is more uncertain than this, in eV/Å.
    dft_budget
        DFT labels at most, those asked for and failed included.

    Raises
    ------
    ValueError
        If a criterion is not above zero.
    """

    max_iterations: int = 10
    target_forces_mae: float | None = None
    target_energy_mae: float | None = None
    uncertainty_threshold: float | None = None
    dft_budget: int | None = None

    def __post_init__(self) -> None:
        for name in (item.name for item in fields(self)):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above zero")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build from plain numbers by name."""
        return build(cls, content)


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationRecord:
    """What one iteration of the loop came to.

    Parameters
    ----------
    iteration
        Number of the iteration, from 1.
    n_dft_labels
        DFT calculations spent so far, failed ones included.
    n_candidates
        Configurations that are still up for DFT.
    energy_mae
        Error on the test set, in eV/atom; ``None`` without a test set.
    forces_mae
        Error on the test set, in eV/Å; ``None`` without a test set.
    max_uncertainty, mean_uncertainty
        Of the candidates, in eV/Å; ``None`` if there are none.
    """

    iteration: int
    n_dft_labels: int
    n_candidates: int
    energy_mae: float | None = None
    forces_mae: float | None = None
    max_uncertainty: float | None = None
    mean_uncertainty: float | None = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build from plain numbers by name."""
        return build(cls, content)


def stop_reason(history: Sequence[IterationRecord], criteria: StopCriteria) -> Stop | None:
    """Return why to stop after the iterations of ``history``, or ``None`` to go on.

    Reaching the goal is asked before running out of something.
    """
    if not history:
        return None
    last = history[-1]
    for ask in (_converged, _certain, _no_candidates, _budget, _max_iterations):
        if stop := ask(last, criteria):
            return stop
    return None


def _converged(last: IterationRecord, criteria: StopCriteria) -> Stop | None:
    goals = [
        ("forces", last.forces_mae, criteria.target_forces_mae, "eV/Å"),
        ("energy", last.energy_mae, criteria.target_energy_mae, "eV/atom"),
    ]
    texts = []
    for name, value, target, unit in goals:
        if target is None:
            continue
        if value is None or not value <= target:
            return None
        texts.append(f"{name} MAE {value:.4g} <= {target:.4g} {unit}")
    if not texts:
        return None
    return Stop(StopReason.CONVERGED, f"the test error reached its target: {', '.join(texts)}")


def _certain(last: IterationRecord, criteria: StopCriteria) -> Stop | None:
    threshold = criteria.uncertainty_threshold
    # No candidates means no uncertainty, and is a reason of its own.
    if threshold is None or last.max_uncertainty is None or not last.max_uncertainty <= threshold:
        return None
    return Stop(
        StopReason.CERTAIN,
        f"no candidate is uncertain any more: at most {last.max_uncertainty:.4g} eV/Å, "
        f"threshold {threshold:.4g}",
    )


def _no_candidates(last: IterationRecord, criteria: StopCriteria) -> Stop | None:
    del criteria
    if last.n_candidates > 0:
        return None
    return Stop(StopReason.NO_CANDIDATES, "no candidates are left in the pool")


def _budget(last: IterationRecord, criteria: StopCriteria) -> Stop | None:
    if criteria.dft_budget is None or last.n_dft_labels < criteria.dft_budget:
        return None
    return Stop(
        StopReason.BUDGET,
        f"the DFT budget is spent: {last.n_dft_labels} of {criteria.dft_budget} labels",
    )


def _max_iterations(last: IterationRecord, criteria: StopCriteria) -> Stop | None:
    if last.iteration < criteria.max_iterations:
        return None
    return Stop(
        StopReason.MAX_ITERATIONS,
        f"iteration {last.iteration} of {criteria.max_iterations} is done",
    )
