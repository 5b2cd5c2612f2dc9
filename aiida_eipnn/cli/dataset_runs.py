"""Runs of pw.x into the database as datasets: of the profile, or of a folder with their output."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiida.common.exceptions import MultipleObjectsError, NotExistent
from aiida.orm import CalcJobNode, Data, Dict, FolderData, Group, Node, ProcessNode, load_group

from aiida_eipnn.calculations import pw_runs
from aiida_eipnn.calculations.dft import FINGERPRINT, MAX_NODES, differences, with_fingerprint
from aiida_eipnn.calculations.pw_runs import MESH, Run
from aiida_eipnn.cli.dataset import (
    SHORT,
    check_labels,
    import_lines,
    known_lines,
    pass_gate,
    unread_lines,
)
from aiida_eipnn.cli.loop import load_stored
from aiida_eipnn.reports.dataset import Dataset, datasets_of_runs
from aiida_eipnn.reports.dft_cost import PW

PROCESSES = "`verdi process list -a -L PwCalculation` shows the runs of pw.x"


def import_runs(
    path: Path | None,
    nodes: Sequence[str],
    groups: Sequence[str],
    facts: Mapping[str, Any],
    label: str | None,
    eips: str | None,
    gate: bool,
) -> list[str]:
    """Store runs of pw.x, a dataset for each level of theory; return what to say.

    Raises
    ------
    ValueError
        If not one run has a label, if runs differ in their k-points only, or if the gate finds
        wrong units or signs.
    """
    if path is not None:
        what, read = path.name or str(path.absolute().name), _runs_of_path(path)
        calculations: dict[str, CalcJobNode] = {}
    else:
        calculations = {str(run.pk): run for run in find_calculations(nodes, groups)}
        what = ", ".join([*groups, *nodes]) if len([*groups, *nodes]) < SHORT else "runs of pw.x"
        read = [pw_runs.run_of(run) for run in calculations.values()]
    runs = [pw_runs.with_facts(run, facts) for run in read]
    parts = [part for part in pw_runs.by_level(runs) if any(run.steps for run in part)]
    failed = _failures(runs, parts)
    _refuse_nothing(what, parts, failed)
    _refuse_meshes(what, parts)
    judges = [_check(what, part, eips) if gate else [] for part in parts]
    lines: list[str] = []
    for number, (part, names) in enumerate(zip(parts, judges, strict=True)):
        level, labels = pw_runs.level_of_runs(part), pw_runs.table_of(part)[1]
        # What was stored unchecked may be checked now.
        if known := [item for item in datasets_of_runs(level, labels) if item.gate or not gate]:
            lines += [*known_lines(what, known[0]), ""]
            continue
        unread = failed if number == 0 else {}
        if path is not None:
            made = _read_files(path, part, unread, facts)
        else:
            made = _read_calculations([calculations[run.name] for run in part], facts)
        name = label or what
        if len(parts) > 1:
            name = f"{name} {with_fingerprint(level)[FINGERPRINT][:SHORT]}"
        dataset = pass_gate(what, made, names, name)
        lines += [*import_lines(dataset), *_unrecorded(dataset, unread), ""]
    return [*_several(parts), *lines[:-1]]


def find_calculations(nodes: Sequence[str], groups: Sequence[str]) -> list[CalcJobNode]:
    """Return PwCalculations: those named, those of groups, and those that work chains of both ran.

    Raises
    ------
    ValueError
        If there is no such node or group, or if no run of pw.x is among them.
    """
    found: dict[int, CalcJobNode] = {}
    named = [load_stored(name, PROCESSES) for name in nodes]
    members = [node for name in groups for node in _group(name).nodes]
    for number, node in enumerate([*named, *members]):
        runs = [run for run in _descendants(node) if run.process_type == PW]
        # A group may hold other nodes too.
        if not runs and number < len(named):
            kind = getattr(node, "process_label", None) or type(node).__name__
            raise ValueError(f"node {node.pk} is a {kind} without a run of pw.x; {PROCESSES}")
        found |= {run.pk: run for run in runs}
    if not found:
        raise ValueError(f"no run of pw.x is among what was named; {PROCESSES}")
    return [found[pk] for pk in sorted(found)]


def _descendants(node: Node) -> list[CalcJobNode]:
    if isinstance(node, CalcJobNode):
        return [node]
    called = getattr(node, "called_descendants", []) if isinstance(node, ProcessNode) else []
    return [run for run in called if isinstance(run, CalcJobNode)]


def _group(name: str) -> Group:
    try:
        return load_group(name)
    except (NotExistent, MultipleObjectsError, ValueError) as error:
        raise ValueError(f"there is no group {name!r}: `verdi group list` shows them") from error


def _runs_of_path(path: Path) -> list[Run]:
    if path.is_dir():
        return pw_runs.runs_of_folder(path)
    return pw_runs.runs_of_files({path.name: path})


def _failures(runs: Iterable[Run], parts: Iterable[Sequence[Run]]) -> dict[str, str]:
    """Return which runs are no row of any dataset, and why."""
    rows = {run.name for part in parts for run in part if run.steps or run.start is not None}
    return {run.name: run.reason for run in runs if run.name not in rows}


def _refuse_nothing(what: str, parts: Sequence[Any], failed: Mapping[str, str]) -> None:
    if parts:
        return
    if not failed:
        raise ValueError(
            f"{what} holds no output of pw.x: its XML (data-file-schema.xml) or standard output"
        )
    name, reason = next(iter(failed.items()))
    raise ValueError(
        f"not one of {len(failed)} runs in {what} has a label; nothing was stored; the first, "
        f"{name}: {reason}"
    )


def _refuse_meshes(what: str, parts: Sequence[Sequence[Run]]) -> None:
    """Raise ``ValueError`` where runs differ in their meshes only: cells differ, so may these."""
    levels = [pw_runs.level_of_runs(part) for part in parts]
    for number, level in enumerate(levels):
        for other in levels[number + 1 :]:
            differing = differences(level, other)
            if differing and set(differing) <= set(MESH):
                raise ValueError(
                    f"{what}: these runs are of one level of theory but for their k-points, "
                    f"{differing}: say how far apart k-points may be (1/Å), for instance --level "
                    "kpoints_distance=0.2, if one distance gives all the meshes; nothing was stored"
                )


def _check(what: str, part: Sequence[Run], eips: str | None) -> list[str]:
    configurations, labels, _, _ = pw_runs.table_of(part)
    return check_labels(what, configurations, labels, eips)


def _read_files(
    path: Path, part: Sequence[Run], unread: Mapping[str, str], facts: Mapping[str, Any]
) -> dict[str, Any]:
    files = FolderData()
    root = path if path.is_dir() else path.parent
    for name in sorted({run.name for run in part} | set(unread)):
        files.base.repository.put_object_from_file(str((root / name).absolute()), name)
    files.label = path.name or path.absolute().name
    made: dict[str, Any] = pw_runs.read_pw_output(files, Dict(dict(facts)))
    return made


def _read_calculations(
    calculations: Sequence[CalcJobNode], facts: Mapping[str, Any]
) -> dict[str, Any]:
    level = Dict(dict(facts)).store()
    made = []
    for start in range(0, len(calculations), MAX_NODES):
        some = calculations[start : start + MAX_NODES]
        made.append(pw_runs.read_runs(level, **{f"run_{run.pk}": _left(run) for run in some}))
    while len(made) > 1:
        chunks = [
            made[start : start + MAX_NODES // 2] for start in range(0, len(made), MAX_NODES // 2)
        ]
        made = [pw_runs.join_runs(**_numbered(chunk)) for chunk in chunks]
    return dict(made[0])


def _numbered(parts: Sequence[Mapping[str, Data]]) -> dict[str, Data]:
    return {
        f"{name}_{number:03d}": part[name]
        for number, part in enumerate(parts)
        for name in ("configurations", "labels")
    }


def _left(run: CalcJobNode) -> Data:
    """Return what a run left: its trajectory, or else its files."""
    outputs = run.outputs
    return outputs.output_trajectory if "output_trajectory" in outputs else outputs.retrieved


def _several(parts: Sequence[Any]) -> list[str]:
    if len(parts) < 2:
        return []
    return [f"{len(parts)} levels of theory, which are never mixed: a dataset for each", ""]


def _unrecorded(dataset: Dataset, failed: Mapping[str, str]) -> list[str]:
    """Say what left nothing that a dataset could keep."""
    return unread_lines({name: why for name, why in failed.items() if name not in dataset.unread})
