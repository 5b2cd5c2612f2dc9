"""The history of an active-learning loop: finished, broken or running, read from the database.

Everything is asked by query, never from a node in memory, so that a loop that runs in another
process is seen as it is now.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from aiida.orm import Data, Node, ProcessNode, WorkChainNode

from aiida_eipnn.calculations.loop import iteration_name
from aiida_eipnn.reports.points import (
    POINT,
    Call,
    DftPoint,
    PointState,
    call_of,
    called,
    chosen_facts,
    inputs_of,
    latest,
    loop_outputs,
    loops_of,
    read_points,
)
from aiida_eipnn.science.assessment import FORCES, Assessment
from aiida_eipnn.science.convergence import StopCriteria
from aiida_eipnn.science.metrics import Errors
from aiida_eipnn.science.uncertainty import Calibration, Conformal, Curves, Panel

LOOP = "ActiveLearningWorkChain"
TEST = "test"

# What the link label of a call says to people.
STAGES = {
    "explore": "making the pool",
    "label_with_eips": "labelling with EIPs",
    "dft_test": "labelling the test set with DFT",
    "dft_initial": "labelling the first points with DFT",
    "pretrain": "pre-training",
    "classify": "learning which EIP to believe",
    "finetune": "fine-tuning the committee",
    "scratch": "training the twin from scratch",
    "evaluate": "evaluating the committee",
    "evaluate_scratch": "evaluating the twin",
    "extend": "exploring",
    "label_found": "labelling with EIPs what exploration found",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What an iteration asked DFT for.

    Parameters
    ----------
    config_types
        How many of each type.
    uncertainties
        Of the committee at the time of choice, in eV/Å; without those that chance chose.
    strategy
        How they were chosen.
    """

    config_types: dict[str, int]
    uncertainties: tuple[float, ...]
    strategy: str

    @property
    def n(self) -> int:
        """How many configurations."""
        return sum(self.config_types.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """One turn of the loop; what is not there yet is ``None``.

    Parameters
    ----------
    number
        From 1.
    n_training_labels
        DFT labels that it learned from.
    n_dft_labels
        DFT points asked for up to then, the test set and those that failed included.
    committee, scratch, best_eip
        Errors on the test set: of the committee, of its twin without EIPs, of the best EIP.
    finetuned
        Those of the network that learnt from EIPs, where the twin is used as the committee.
    verdict
        Whether the EIPs help, in a sentence; empty where it was not asked.
    best_eip_name
        Which EIP that is.
    by_config_type
        Errors of the committee by type of configuration.
    n_candidates
        Configurations still up for DFT.
    max_uncertainty, mean_uncertainty
        Of the candidates, in eV/Å.
    uncertainties
        What is known of everything that tells how wrong the committee may be, by the field of its
        predictions; see :func:`aiida_eipnn.science.assessment.assess_uncertainties`.
    choices
        How often each EIP, or ``none``, was chosen in the pool.
    asked
        What it asked DFT for.
    seconds
        From its first step to the first of the next iteration.
    """

    number: int
    n_training_labels: int | None = None
    n_dft_labels: int | None = None
    committee: Errors | None = None
    scratch: Errors | None = None
    finetuned: Errors | None = None
    verdict: str = ""
    best_eip: Errors | None = None
    best_eip_name: str = ""
    by_config_type: dict[str, Errors]
    n_candidates: int | None = None
    max_uncertainty: float | None = None
    mean_uncertainty: float | None = None
    uncertainties: dict[str, Assessment] = field(default_factory=dict)
    choices: dict[str, int]
    asked: Asked | None = None
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The name under which its outputs and its DFT points are kept."""
        return iteration_name(self.number)

    @property
    def of_forces(self) -> Assessment | None:
        """What is known of the spread of the forces of its members."""
        return self.uncertainties.get(FORCES)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a loop did, and how far it is.

    Parameters
    ----------
    pk, uuid
        The loop.
    state
        Process state.
    exit_status, exit_message
        How it ended, ``None`` before that.
    started, changed
        When it was created, and when it or a process that it called last changed.
    max_iterations
        At most so many iterations.
    elements
        Chemical symbols of the pool.
    n_pool
        Configurations in the pool, ``None`` before there is one.
    eips
        Names of the EIPs.
    n_eip_labels, n_eip_failures
        EIP labels made, and not made.
    calls
        What the loop called, in order, after what those called that it continues.
    continues
        PKs of the loops that it continues, the first one first.
    iterations
        The turns of the loop that started.
    points
        Every DFT point asked for.
    stop_reason, stop_text
        Why it stopped, in a word and in a sentence; ``None`` before that.
    """

    pk: int
    uuid: str
    state: str
    exit_status: int | None
    exit_message: str | None
    started: datetime
    changed: datetime
    max_iterations: int
    elements: tuple[str, ...]
    n_pool: int | None
    eips: tuple[str, ...]
    n_eip_labels: int | None
    n_eip_failures: int | None
    calls: tuple[Call, ...]
    continues: tuple[int, ...] = ()
    iterations: tuple[Iteration, ...]
    points: tuple[DftPoint, ...]
    stop_reason: str | None
    stop_text: str | None

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.state in {"finished", "excepted", "killed"}

    @property
    def is_ok(self) -> bool:
        """Whether it came to its end without breaking."""
        return self.state == "finished" and self.exit_status == 0

    @property
    def seconds(self) -> float:
        """From its start to its end, or until now, in s."""
        end = self.changed if self.is_over else datetime.now(UTC)
        return float((end - self.started).total_seconds())

    @property
    def stage(self) -> str:
        """What it does now, or how it ended."""
        if self.is_ok:
            return "finished"
        if self.is_over:
            return f"{self._ending}: {self.exit_message or 'see `verdi process report`'}"
        running = dict.fromkeys(stage_text(call.label) for call in self.calls if not call.is_over)
        if running:
            return ", ".join(running)
        return "between two steps" if self.calls else "waiting to start"

    @property
    def _ending(self) -> str:
        return f"failed ({self.exit_status})" if self.state == "finished" else self.state

    @property
    def assessed(self) -> tuple[Iteration, ...]:
        """The iterations whose errors are known."""
        return tuple(item for item in self.iterations if item.committee is not None)

    def count(self, state: PointState, batch: str | None = None) -> int:
        """Return how many DFT points are in this state, of one batch or of all."""
        return sum(
            point.state is state for point in self.points if batch is None or point.batch == batch
        )

    @property
    def failures(self) -> tuple[DftPoint, ...]:
        """The DFT points that got no label, each with its reason."""
        return tuple(point for point in self.points if point.state is PointState.FAILED)

    @property
    def batches(self) -> tuple[str, ...]:
        """The names of the batches of DFT points, in the order in which they were asked for."""
        return tuple(dict.fromkeys(point.batch for point in self.points))

    def seconds_by_stage(self) -> dict[str, float]:
        """Return the wall time of each stage, in s; stages that ran side by side overlap."""
        seconds: dict[str, float] = {}
        for call in self.calls:
            if call.label in STAGES or call.label.startswith(POINT):
                stage = "dft" if call.label.startswith(POINT) else call.label
                seconds[stage] = seconds.get(stage, 0.0) + call.seconds
        return seconds


def read_history(node: ProcessNode) -> History:
    """Read the history of an ActiveLearningWorkChain: finished, broken or still running.

    Parameters
    ----------
    node
        The process node of the loop.

    Raises
    ------
    ValueError
        If it is not a loop.
    """
    require_loop(node)
    own, inputs, outputs = call_of(node.pk), inputs_of(node.pk), loop_outputs(node.pk)
    loops = loops_of(node.pk)
    calls_by_loop = {loop: called(loop) for loop in loops}
    calls = [call for made in calls_by_loop.values() for call in made]
    own_calls = calls_by_loop[node.pk]
    # What a loop asked for and did not get, the one that continues it asked for again.
    points = {point.id: point for call in calls for point in _points(call)}
    records, stop = _records(outputs)
    pool, eip_labels = (latest(outputs, inputs, name) for name in ("pool", "eip_labels"))
    return History(
        pk=own.pk,
        uuid=own.uuid,
        state=own.state,
        exit_status=own.exit_status,
        exit_message=own.exit_message,
        started=own.started,
        changed=max([own.changed, *(call.changed for call in own_calls)]),
        max_iterations=StopCriteria.from_dict(inputs["stop"].get_dict()).max_iterations,
        elements=tuple(pool.base.attributes.get("elements")) if pool else (),
        n_pool=len(pool) if pool else None,
        eips=tuple(inputs["label__job__eips"].get_list()),
        n_eip_labels=_fact(eip_labels, "n_labels"),
        n_eip_failures=_fact(eip_labels, "n_failures"),
        calls=tuple(calls),
        continues=tuple(loops[:-1]),
        iterations=_iterations(calls_by_loop, outputs, records, pool),
        points=tuple(points.values()),
        stop_reason=stop.get("reason"),
        stop_text=stop.get("text"),
    )


def require_loop(node: Node, wanted: str = "a loop") -> None:
    """Raise ``ValueError`` unless ``node`` is an active-learning loop."""
    if isinstance(node, WorkChainNode) and node.process_label == LOOP:
        return
    kind = node.process_label if isinstance(node, ProcessNode) else type(node).__name__
    raise ValueError(
        f"node {node.pk} is a {kind}, not {wanted}; `verdi process list -a -L {LOOP}` shows the "
        "loops there are"
    )


def stage_text(label: str) -> str:
    """Return what a call of the loop does, in words for people."""
    if label.startswith(f"{POINT}i"):
        number = label.removeprefix(f"{POINT}i")
        if number.isdigit():
            return f"labelling the points of iteration {int(number)} with DFT"
    return STAGES.get(label, label)


def iteration_outputs(outputs: Mapping[str, Data], number: int) -> dict[str, Data]:
    """Return what an iteration emitted, by name."""
    prefix = f"iterations__{iteration_name(number)}__"
    return {
        label.removeprefix(prefix): node
        for label, node in outputs.items()
        if label.startswith(prefix)
    }


def errors_from(record: Mapping[str, Any] | None) -> Errors | None:
    """Return the errors of a record; a number that could not be stored is NaN."""
    if not record:
        return None
    return Errors(**_numbers(record, Errors.__slots__))


def _points(call: Call) -> tuple[DftPoint, ...]:
    if call.name != "DftLabelWorkChain":
        return ()
    return read_points(call.pk, call.label.removeprefix(POINT))


def _fact(node: Data | None, name: str) -> int | None:
    return None if node is None else int(node.base.attributes.get(name))


def _records(outputs: Mapping[str, Data]) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """Return the record of each assessed iteration, and why to stop (empty to go on)."""
    labels = sorted(label for label in outputs if label.endswith("__history"))
    last = outputs.get("history", outputs[labels[-1]] if labels else None)
    if last is None:
        return {}, {}
    content = last.get_dict()
    return {item["iteration"]: item for item in content["iterations"]}, content["stop"] or {}


def _iterations(
    calls_by_loop: Mapping[int, list[Call]],
    outputs: Mapping[str, Data],
    records: Mapping[int, Mapping[str, Any]],
    pool: Data | None,
) -> tuple[Iteration, ...]:
    """Return the iterations; each one begins by calling ``classify``.

    One that broke while it trained was begun again by the loop that continues it: that counts.
    """
    spans: dict[int, float] = {}
    for loop, calls in calls_by_loop.items():
        starts = [call.started for call in calls if call.label == "classify"]
        ends = [*starts[1:], max((call.changed for call in calls), default=None)]
        first = _first_iteration(loop)
        for number, (start, end) in enumerate(zip(starts, ends, strict=False), start=first):
            spans[number] = (end - start).total_seconds()
    return tuple(
        _iteration(number, iteration_outputs(outputs, number), records.get(number, {}), pool, span)
        for number, span in sorted(spans.items())
    )


def _first_iteration(loop: int) -> int:
    """Return the number of the first iteration that a loop trains."""
    previous = inputs_of(loop).get("previous__history")
    return 1 if previous is None else len(previous["iterations"]) + 1


def _iteration(
    number: int,
    outputs: Mapping[str, Data],
    record: Mapping[str, Any],
    pool: Data | None,
    seconds: float,
) -> Iteration:
    selection = outputs.get("selection")
    best = record.get("best_eip") or {}
    return Iteration(
        number=number,
        n_training_labels=record.get("n_training_labels"),
        n_dft_labels=record.get("n_dft_labels"),
        committee=errors_from(record.get("committee")),
        scratch=errors_from(record.get("scratch")),
        finetuned=errors_from(record.get("finetuned")),
        verdict=str(record.get("verdict", {}).get("text", "")),
        best_eip=errors_from(best),
        best_eip_name=best.get("name", ""),
        by_config_type={
            name: found
            for name, item in record.get("by_config_type", {}).items()
            if (found := errors_from(item))
        },
        n_candidates=record.get("n_candidates"),
        max_uncertainty=record.get("max_uncertainty"),
        mean_uncertainty=record.get("mean_uncertainty"),
        uncertainties={
            name: _assessment(facts) for name, facts in record.get("uncertainties", {}).items()
        },
        choices=dict(selection.base.attributes.get("counts")) if selection else {},
        asked=_asked(outputs.get("choice"), pool),
        seconds=seconds,
    )


def _assessment(record: Mapping[str, Any]) -> Assessment:
    return Assessment(
        calibration=Calibration(**_numbers(record["calibration"], Calibration.__slots__)),
        panel=Panel(**_numbers(record["panel"], Panel.__slots__)),
        curves=Curves(**{name: tuple(record["curves"][name]) for name in Curves.__slots__}),
        conformal=_conformal(record["conformal"]),
        conformal_worst=_conformal(record.get("conformal_worst")),
    )


def _conformal(record: Mapping[str, Any] | None) -> Conformal | None:
    return Conformal(**_numbers(record, Conformal.__slots__)) if record else None


def _numbers(record: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: np.nan if record.get(name) is None else record[name] for name in names}


def _asked(choice: Data | None, pool: Data | None) -> Asked | None:
    if choice is None or pool is None:
        return None
    facts = chosen_facts(choice, pool)
    return Asked(
        config_types=dict(Counter(item["config_type"] for item in facts)),
        uncertainties=tuple(
            item["uncertainty"] for item in facts if item["uncertainty"] is not None
        ),
        strategy=str(choice.base.attributes.get("strategy", "")),
    )
