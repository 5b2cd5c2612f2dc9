"""DFT points: what was asked for, which calculation answered, and what it cost."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from aiida.orm import (
    CalcJobNode,
    Data,
    Dict,
    Node,
    ProcessNode,
    QueryBuilder,
    WorkChainNode,
)

from aiida_eipnn.calculations.dft import n_cores
from aiida_eipnn.calculations.loop import LAST
from aiida_eipnn.data.choice import ChoiceData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData

# What exploration while the loop runs leaves at the end of an iteration.
_EXTENDED = re.compile(r"iterations__i\d+__(pool|eip_labels)")

TERMINATED = ("finished", "excepted", "killed")
CALLS = {"type": {"in": ["call_calc", "call_work"]}}
POINT = "dft_"

PROCESS_FIELDS = (
    "id",
    "uuid",
    "ctime",
    "mtime",
    "attributes.process_label",
    "attributes.process_state",
    "attributes.exit_status",
    "attributes.exit_message",
)


class PointState(StrEnum):
    """How far one DFT point is."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A process that another one called, as the database had it when it was asked.

    Parameters
    ----------
    label
        Label of the link from the caller.
    pk, uuid
        The process.
    name
        Its class.
    state
        ``created``, ``running``, ``waiting``, ``finished``, ``excepted`` or ``killed``.
    exit_status, exit_message
        How it ended, ``None`` before that.
    started, changed
        When it was created and when it last changed.
    """

    label: str
    pk: int
    uuid: str
    name: str
    state: str
    exit_status: int | None
    exit_message: str | None
    started: Any
    changed: Any

    @property
    def is_over(self) -> bool:
        """Whether it will not change any more."""
        return self.state in TERMINATED

    @property
    def is_ok(self) -> bool:
        """Whether it finished with exit status 0."""
        return self.state == "finished" and self.exit_status == 0

    @property
    def seconds(self) -> float:
        """From creation to the last change, in s."""
        return float((self.changed - self.started).total_seconds())


@dataclass(frozen=True, slots=True, kw_only=True)
class DftPoint:
    """One configuration that DFT was asked for.

    Parameters
    ----------
    id
        Geometry hash of the configuration.
    batch
        Who asked: ``test``, ``initial``, ``known``, or the iteration, ``i001``.
    config_type
        What kind of configuration it is.
    n_atoms
        How many atoms it has.
    uncertainty
        Of the committee when it asked, in eV/Å; ``None`` where chance decided.
    state
        How far it is.
    reason
        Why it has no label; empty where it has, or may still get one.
    energy
        Total energy, in eV.
    base_pk, base_uuid
        The PwBaseWorkChain that ran it.
    pw_pk, pw_uuid
        The last PwCalculation of that work chain.
    n_runs
        How many PwCalculations it took.
    wall_seconds, cpu_seconds
        Of all of them; 0 where the results came from the cache.
    cached
        Whether a calculation made before gave the results.
    """

    id: str
    batch: str
    config_type: str
    n_atoms: int
    uncertainty: float | None = None
    state: PointState = PointState.WAITING
    reason: str = ""
    energy: float | None = None
    base_pk: int | None = None
    base_uuid: str | None = None
    pw_pk: int | None = None
    pw_uuid: str | None = None
    n_runs: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    cached: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PwRun:
    """One PwCalculation: what it cost, and its energy in eV."""

    pk: int
    uuid: str
    wall_seconds: float
    cpu_seconds: float
    energy: float | None
    cached: bool


def called(pk: int) -> list[Call]:
    """Return what the process ``pk`` called, in the order of the calls."""
    query = QueryBuilder()
    query.append(ProcessNode, filters={"id": pk}, tag="caller")
    query.append(
        ProcessNode,
        with_incoming="caller",
        edge_filters=CALLS,
        edge_project="label",
        project=list(PROCESS_FIELDS),
        tag="called",
    )
    query.order_by({"called": "id"})
    # The projection of the edge comes after those of its node.
    return [_call(row[-1], row[:-1]) for row in query.all()]


def call_of(pk: int) -> Call:
    """Return the process ``pk`` itself, read afresh from the database."""
    query = QueryBuilder().append(ProcessNode, filters={"id": pk}, project=list(PROCESS_FIELDS))
    return _call("", query.first())


def outputs_of(pk: int) -> dict[str, Data]:
    """Return the outputs of a work chain by link label; of a running one those that are there."""
    query = QueryBuilder()
    query.append(WorkChainNode, filters={"id": pk}, tag="chain")
    query.append(Data, with_incoming="chain", edge_project="label", project="*")
    return {label: node for node, label in query.all()}


def latest(outputs: Mapping[str, Data], inputs: Mapping[str, Data], name: str) -> Any:
    """Return ``pool`` or ``eip_labels`` of a loop, if any, as the last exploration left it."""
    extended = sorted(key for key in outputs if _EXTENDED.fullmatch(key) and key.endswith(name))
    return outputs[extended[-1]] if extended else outputs.get(name, inputs.get(name))


def inputs_of(pk: int) -> dict[str, Data]:
    """Return the inputs of a process by link label."""
    query = QueryBuilder()
    query.append(ProcessNode, filters={"id": pk}, tag="process")
    query.append(Data, with_outgoing="process", edge_project="label", project="*")
    return {label: node for node, label in query.all()}


def loops_of(pk: int) -> list[int]:
    """Return the PKs of a loop and of those that it continues, the first one first."""
    found = [pk]
    while (previous := inputs_of(found[0]).get("previous__loop")) is not None:
        query = QueryBuilder()
        query.append(WorkChainNode, filters={"uuid": previous.value}, project="id")
        if (earlier := query.first(flat=True)) is None:
            break  # It was not imported with the other one.
        found.insert(0, earlier)
    return found


def loop_outputs(pk: int) -> dict[str, Data]:
    """Return the outputs of a loop and of those that it continues, the newest by each label.

    What a loop ended with counts only of the last one.
    """
    *earlier, last = loops_of(pk)
    found = {label: node for loop in earlier for label, node in outputs_of(loop).items()}
    return {**{key: node for key, node in found.items() if key not in LAST}, **outputs_of(last)}


def known_labels(pk: int) -> list[tuple[ConfigurationsData, LabelsData]]:
    """Return the known labels that a loop, or one that it continues, was given."""
    given = [inputs_of(loop) for loop in loops_of(pk)]
    return [
        (inputs["known__configurations"], inputs["known__labels"])
        for inputs in given
        if "known__labels" in inputs
    ]


def read_points(
    label_pk: int, batch: str, labels: LabelsData | None = None
) -> tuple[DftPoint, ...]:
    """Return the DFT points of a DftLabelWorkChain, finished or not, in the order of choice.

    Parameters
    ----------
    label_pk
        PK of the DftLabelWorkChain.
    batch
        What to call the points.
    labels
        What the gate left of its labels; by default what it returned.
    """
    inputs = inputs_of(label_pk)
    choice, pool = inputs["choice"], inputs["configurations"]
    bases = _bases(label_pk)
    runs = _runs([base.pk for base in bases.values()])
    labels = outputs_of(label_pk).get("labels") if labels is None else labels
    reasons, energies = _reasons(labels), _energies(labels)
    parent = call_of(label_pk)
    return tuple(
        _point(facts, batch, bases.get(facts["id"]), runs, reasons, energies, parent)
        for facts in chosen_facts(choice, pool)
    )


def chosen_facts(choice: ChoiceData, pool: ConfigurationsData) -> list[dict[str, Any]]:
    """Return id, type, atoms and uncertainty of each configuration of a choice."""
    configurations, chosen = pool.value(), choice.value()
    rows = configurations.rows_of(chosen.ids)
    return [
        {
            "id": str(name),
            "config_type": str(configurations.config_types[row]),
            "n_atoms": int(configurations.n_atoms[row]),
            "uncertainty": float(score) if np.isfinite(score) else None,
        }
        for name, score, row in zip(chosen.ids, chosen.scores, rows, strict=True)
    ]


def label_process(labels: Node) -> int | None:
    """Return the PK of the DftLabelWorkChain that returned these labels, if one did.

    Of labels that the gate left it is the one that returned those the gate was given.
    """
    creator = labels.creator
    if creator is not None and creator.process_label == "refuse_dft_labels":
        return label_process(creator.inputs.labels)
    query = QueryBuilder()
    query.append(LabelsData, filters={"id": labels.pk}, tag="labels")
    query.append(
        WorkChainNode,
        with_outgoing="labels",
        filters={"attributes.process_label": "DftLabelWorkChain"},
        project="id",
    )
    query.order_by({WorkChainNode: "id"})
    pks = query.all(flat=True)
    return int(pks[0]) if pks else None


def _call(label: str, fields: Any) -> Call:
    pk, uuid, started, changed, name, state, exit_status, exit_message = fields
    return Call(
        label=label,
        pk=pk,
        uuid=uuid,
        name=name or "",
        state=state or "created",
        exit_status=exit_status,
        exit_message=exit_message,
        started=started,
        changed=changed,
    )


def _bases(label_pk: int) -> dict[str, Call]:
    """Return the PwBaseWorkChain of each configuration, by id."""
    query = QueryBuilder()
    query.append(WorkChainNode, filters={"id": label_pk}, tag="labels")
    query.append(WorkChainNode, with_incoming="labels", tag="lane")
    query.append(
        WorkChainNode,
        with_incoming="lane",
        edge_filters={"label": {"like": "dft\\_%"}},
        edge_project="label",
        project=list(PROCESS_FIELDS),
    )
    calls = [_call(row[-1], row[:-1]) for row in query.all()]
    bases = {call.label.removeprefix(POINT): call for call in calls}
    return {**_bases_of_given_runs(label_pk), **bases}


def _bases_of_given_runs(label_pk: int) -> dict[str, Call]:
    """Return the PwBaseWorkChain of each run that was given instead of made, by configuration."""
    query = QueryBuilder()
    query.append(WorkChainNode, filters={"id": label_pk}, tag="labels")
    query.append(
        Data,
        with_outgoing="labels",
        edge_filters={"label": {"like": "runs\\_\\_%"}},
        edge_project="label",
        tag="result",
    )
    query.append(CalcJobNode, with_outgoing="result", tag="run")
    query.append(WorkChainNode, with_outgoing="run", project=list(PROCESS_FIELDS))
    # runs__labelled_<id> or runs__failed_<id>
    return {row[-1].rpartition("_")[2]: _call(row[-1], row[:-1]) for row in query.all()}


def _runs(base_pks: list[int]) -> dict[int, list[PwRun]]:
    """Return the PwCalculations of each PwBaseWorkChain, by its PK, in the order of the runs."""
    runs: dict[int, list[PwRun]] = defaultdict(list)
    if not base_pks:
        return runs
    query = QueryBuilder()
    query.append(WorkChainNode, filters={"id": {"in": base_pks}}, tag="base", project="id")
    query.append(
        CalcJobNode,
        with_incoming="base",
        tag="pw",
        project=["id", "uuid", "attributes.resources", "attributes.withmpi", "extras"],
    )
    query.order_by({"pw": "id"})
    found = query.all()
    said = _said([row[1] for row in found])
    for base_pk, pk, uuid, resources, withmpi, extras in found:
        cached = "_aiida_cached_from" in (extras or {})
        # A run that was killed or failed may have left no parameters.
        wall, energy = said.get(pk, (None, None))
        seconds = 0.0 if cached or wall is None else float(wall)
        runs[base_pk].append(
            PwRun(
                pk=pk,
                uuid=uuid,
                wall_seconds=seconds,
                cpu_seconds=seconds * n_cores(resources, withmpi),
                energy=energy,
                cached=cached,
            )
        )
    return runs


def _said(pks: list[int]) -> dict[int, tuple[float | None, float | None]]:
    """Return wall time, in s, and energy, in eV, of the runs that say so, by PK.

    Asked apart: a filter on the link of an outer join would drop the runs without one.
    """
    if not pks:
        return {}
    query = QueryBuilder()
    query.append(CalcJobNode, filters={"id": {"in": pks}}, tag="pw", project="id")
    query.append(
        Dict,
        with_incoming="pw",
        edge_filters={"label": "output_parameters"},
        project=["attributes.wall_time_seconds", "attributes.energy"],
    )
    return {pk: (wall, energy) for pk, wall, energy in query.all()}


def _reasons(labels: Data | None) -> dict[str, str] | None:
    """Return why labels are missing, by id; ``None`` while there are no labels at all."""
    if labels is None:
        return None
    return {failure.id: failure.reason for failure in labels.value().failures()}


def _energies(labels: Data | None) -> dict[str, float]:
    """Return the energy of each label, in eV, by id."""
    if labels is None:
        return {}
    value = labels.value()
    return {
        str(name): float(energy)
        for name, energy, ok in zip(value.ids, value.energy[:, 0], value.ok[:, 0], strict=True)
        if ok
    }


def _point(
    facts: Mapping[str, Any],
    batch: str,
    base: Call | None,
    runs: Mapping[int, list[PwRun]],
    reasons: Mapping[str, str] | None,
    energies: Mapping[str, float],
    parent: Call,
) -> DftPoint:
    state, reason = _outcome(facts["id"], base, reasons, parent)
    if base is None:
        # A label that was there already.
        energy = energies.get(facts["id"])
        return DftPoint(batch=batch, state=state, reason=reason, energy=energy, **facts)
    of_base = runs.get(base.pk, [])
    last = of_base[-1] if of_base else None
    return DftPoint(
        batch=batch,
        state=state,
        reason=reason,
        energy=last.energy if last and state is PointState.DONE else None,
        base_pk=base.pk,
        base_uuid=base.uuid,
        pw_pk=last.pk if last else None,
        pw_uuid=last.uuid if last else None,
        n_runs=len(of_base),
        wall_seconds=sum(run.wall_seconds for run in of_base),
        cpu_seconds=sum(run.cpu_seconds for run in of_base),
        cached=last.cached if last else False,
        **facts,
    )


def _outcome(
    name: str, base: Call | None, reasons: Mapping[str, str] | None, parent: Call
) -> tuple[PointState, str]:
    if reasons is not None:
        return (PointState.FAILED, reasons[name]) if name in reasons else (PointState.DONE, "")
    if base is None:
        if parent.is_over:
            return PointState.FAILED, f"it was never run: {parent.name} {parent.pk} ended before"
        return PointState.WAITING, ""
    if base.is_ok:
        return PointState.DONE, ""
    if base.is_over:
        return PointState.FAILED, base.exit_message or f"{base.name} {base.pk} was {base.state}"
    return PointState.RUNNING, ""
