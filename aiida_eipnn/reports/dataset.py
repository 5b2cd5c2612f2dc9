"""Datasets of DFT labels: which there are, where they come from, what is in them.

A dataset is a node of labels that :func:`~.calculations.dataset.read_dataset` read from a file,
:func:`~.calculations.pw_runs.read_pw_output` from output of pw.x, or
:func:`~.calculations.pw_runs.read_runs` from PwCalculations, or that a DftLabelWorkChain returned;
where the gate checked these, it is what the gate left.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from aiida.orm import (
    CalcFunctionNode,
    CalcJobNode,
    Data,
    FolderData,
    Node,
    QueryBuilder,
    SinglefileData,
    WorkChainNode,
    load_node,
)

from aiida_eipnn.calculations.dft import FINGERPRINT, compare_levels, with_fingerprint
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.reports.history import LOOP
from aiida_eipnn.reports.lineage import outputs_of_calculation
from aiida_eipnn.reports.points import CALLS, POINT, DftPoint, inputs_of, read_points
from aiida_eipnn.science.arrays import FloatArray, IntArray, StrArray
from aiida_eipnn.science.configurations import (
    Configurations,
    configuration_id,
    join_configurations,
)
from aiida_eipnn.science.duplicates import SAME_ENERGY, find_known, say_the_same
from aiida_eipnn.science.labels import Labels, checksum, join_labels

READ, READ_OUTPUT = "read_dataset", "read_pw_output"
READ_RUNS, JOIN_RUNS = "read_runs", "join_runs"
DFT_LABELS = "DftLabelWorkChain"
CHECKS = ("check_given_labels", "refuse_dft_labels")


class Kind(StrEnum):
    """Where a dataset comes from.

    Files, PwCalculations of the profile, a loop, or a DftLabelWorkChain outside of any loop.
    """

    FILE = "file"
    RUNS = "runs"
    LOOP = "loop"
    DFT = "dft"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the labels of a dataset come from.

    Parameters
    ----------
    kind
        Of what kind it is.
    process_pk
        The calcfunction that read the file or the runs, or the DftLabelWorkChain.
    file_pk, file_name
        The file, or the folder of files of pw.x; ``None`` and empty where there is none.
    loop_pk
        The loop that asked for the labels; ``None`` where none did.
    batch
        For what the loop asked: ``test``, ``initial``, or the iteration, ``i001``.
    """

    kind: Kind
    process_pk: int
    file_pk: int | None = None
    file_name: str = ""
    loop_pk: int | None = None
    batch: str = ""

    @property
    def text(self) -> str:
        """For people."""
        if self.kind is Kind.FILE:
            return f"file {self.file_name}"
        if self.kind is Kind.RUNS:
            return f"runs of pw.x, read by {self.process_pk}"
        if self.kind is Kind.LOOP:
            return f"loop {self.loop_pk} {self.batch}"
        return f"{DFT_LABELS} {self.process_pk}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A set of DFT labels of one level of theory.

    Parameters
    ----------
    pk, uuid, name, created
        The node of the labels, its label, and when it was stored.
    source
        Where the labels come from.
    configurations_pk
        The node that has the configurations, perhaps among others.
    elements
        Chemical symbols that occur.
    n_labels, n_missing
        Rows with a label, and rows that have none: the calculation failed, or the gate refused it.
    level
        Level of theory; empty where nobody declared one.
    checksum
        SHA-256 of what the labels say; to read them holds them against it.
    gate
        What the gate found; empty where it was not asked.
    n_copies
        Frames of the file that repeat an earlier one and are left out.
    unread
        Files of pw.x that gave no label, and why.
    """

    pk: int
    uuid: str
    name: str
    created: datetime
    source: Source
    configurations_pk: int
    elements: tuple[str, ...]
    n_labels: int
    n_missing: int
    level: dict[str, Any]
    checksum: str
    gate: str = ""
    n_copies: int = 0
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of the level of theory; empty where none is declared."""
        return str(with_fingerprint(self.level)[FINGERPRINT]) if self.level else ""

    def labels(self) -> Labels:
        """Return the labels, rows without one among them."""
        labels: Labels = load_node(self.pk).value()
        return labels

    def configurations(self, rows: Sequence[int] | None = None) -> Configurations:
        """Return the configurations of some rows, by default of all, in the order of the labels.

        Raises
        ------
        ValueError
            If one of them is not the one that its id is the hash of.
        """
        pool: Configurations = load_node(self.configurations_pk).value()
        ids = load_node(self.pk).get_array("ids")
        found = pool.take(pool.rows_of(ids if rows is None else ids[list(rows)]))
        for row, name in enumerate(found.ids):
            if configuration_id(found.atoms(row)) != name:
                raise ValueError(
                    f"configuration {name} of node {self.configurations_pk} is not the one that "
                    "was stored; the file repository of the profile is damaged, restore it from a "
                    "backup (`verdi storage backup`)"
                )
        return found


class Shared(NamedTuple):
    """Geometries that another dataset labels too.

    ``difference`` is the largest one of two energies, in eV/atom; NaN where the levels differ.
    ``fault`` says why the other one cannot be read.
    """

    other: Dataset
    n: int
    is_same_level: bool
    difference: float
    fault: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What there is to plot about each label of a dataset.

    Parameters
    ----------
    config_types
        Type of each configuration. Shape ``(n,)``.
    n_atoms
        How many atoms it has. Shape ``(n,)``.
    energy
        Energy, in eV/atom. Shape ``(n,)``.
    volume
        Volume of the cell, in Å³/atom; NaN where it is not periodic throughout. Shape ``(n,)``.
    forces
        Length of the force on each atom, in eV/Å. Shape ``(N,)``.
    """

    config_types: StrArray
    n_atoms: FloatArray
    energy: FloatArray
    volume: FloatArray
    forces: FloatArray

    def of_type(self, name: str) -> "Facts":
        """Return those of one type."""
        rows = self.config_types == name
        return Facts(
            config_types=self.config_types[rows],
            n_atoms=self.n_atoms[rows],
            energy=self.energy[rows],
            volume=self.volume[rows],
            forces=self.forces[np.repeat(rows, self.n_atoms.astype(int))],
        )

    def by_type(self) -> dict[str, "Facts"]:
        """Return those of each type, the most frequent first."""
        names, counts = np.unique(self.config_types, return_counts=True)
        return {str(name): self.of_type(name) for name in names[np.argsort(-counts, kind="stable")]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Where one label comes from.

    Parameters
    ----------
    id
        Geometry hash of the configuration.
    config_type, n_atoms
        What it is.
    energy
        Total energy, in eV; ``None`` where there is no label.
    reason
        Why there is none; empty where there is.
    dataset
        The dataset that was asked.
    origin
        The dataset that the label came from: another one where a loop took it from there.
    file, md5, file_kind
        The file, its MD5, and the class of the node that has it; empty where there is none.
    point
        The DFT point; ``None`` where the label came from a file or from outside.
    stored_pk, process_uuid
        Where it came from outside: the labels that the DftLabelWorkChain was given, and the process
        which they say made it.
    code, code_version
        The code that ran it, and the version it gave of itself.
    """

    id: str
    config_type: str
    n_atoms: int
    energy: float | None
    reason: str
    dataset: Dataset
    origin: Dataset
    file: str = ""
    md5: str = ""
    file_kind: str = ""
    point: DftPoint | None = None
    stored_pk: int | None = None
    process_uuid: str = ""
    code: str = ""
    code_version: str = ""


class _Entry(NamedTuple):
    """A dataset by the PKs of its nodes; ``raw_pk`` is that of the labels before the gate."""

    pk: int
    raw_pk: int
    configurations_pk: int
    source: Source


def find_datasets() -> list[Dataset]:
    """Return all datasets of the profile, the oldest first."""
    entries = _entries()
    nodes = _nodes({pk for entry in entries for pk in (entry.pk, entry.raw_pk)})
    return [_dataset(entry, nodes) for entry in entries]


def find_dataset(node: Node) -> Dataset:
    """Return the dataset that a node of labels is.

    Raises
    ------
    ValueError
        If it is none; the message says what to look at instead.
    """
    entries = {entry.pk: entry for entry in _entries()}
    if node.pk in entries:
        entry = entries[node.pk]
        return _dataset(entry, _nodes({entry.pk, entry.raw_pk}))
    for entry in entries.values():
        if node.pk == entry.raw_pk:
            raise ValueError(
                f"the labels {node.pk} are those from before the gate; the dataset is {entry.pk}"
            )
    raise ValueError(
        f"node {node.pk} is a {type(node).__name__}, not a dataset of DFT labels; "
        "`aiida-eipnn dataset list` shows the datasets"
    )


def datasets_of_file(content: bytes, level: dict[str, Any]) -> list[Dataset]:
    """Return the datasets read from a file with this content at this level of theory."""
    fingerprint, md5 = with_fingerprint(level)[FINGERPRINT], md5_of(content)
    return [
        dataset
        for dataset in find_datasets()
        if dataset.fingerprint == fingerprint
        and dataset.source.file_pk is not None
        and isinstance(file := load_node(dataset.source.file_pk), SinglefileData)
        and md5_of(file.get_content(mode="rb")) == md5
    ]


def datasets_of_runs(level: dict[str, Any], labels: Labels) -> list[Dataset]:
    """Return the datasets read from runs of pw.x that say the same at this level of theory."""
    fingerprint, wanted = with_fingerprint(level)[FINGERPRINT], checksum(labels)
    entries = [
        *_read_from_files(READ_OUTPUT, FolderData, "label"),
        *_read_from_runs(),
    ]
    nodes = _nodes({labels_pk for labels_pk, _, _ in entries})
    same = {
        pk
        for pk, node in nodes.items()
        if node.level.get(FINGERPRINT) == fingerprint
        and node.base.attributes.get("n_configurations") == len(labels)
        and node.checksum == wanted
    }
    found = [entry for entry in _entries() if entry.raw_pk in same]
    return [_dataset(entry, _nodes({entry.pk, entry.raw_pk})) for entry in found]


def md5_of(content: bytes) -> str:
    """Return the MD5 of bytes, as `md5sum` prints it."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def shared_geometries(dataset: Dataset, others: Iterable[Dataset]) -> list[Shared]:
    """Return which of the other datasets label some of the same geometries.

    Moved, turned, mirrored and repeated ones count as the same
    (:func:`aiida_eipnn.science.duplicates.find_known`).
    """
    here, labels = _labelled(dataset)
    found = []
    for other in others:
        if other.pk == dataset.pk or not set(other.elements) & set(dataset.elements):
            continue
        try:
            there, other_labels = _labelled(other)
        except ValueError as error:
            found.append(Shared(other, 0, False, np.nan, str(error)))
            continue
        same = other.fingerprint == dataset.fingerprint
        rows = _known_rows(there, other_labels, here, labels) if same else find_known(there, here)
        both = np.flatnonzero(rows >= 0)
        if not len(both):
            continue
        difference = np.abs(_per_atom(other_labels)[both] - _per_atom(labels)[rows[both]]).max()
        found.append(Shared(other, len(both), same, float(difference if same else np.nan)))
    return found


def read_facts(dataset: Dataset) -> Facts:
    """Return what there is to say about the labels of a dataset, one by one."""
    labels = dataset.labels()
    rows = np.flatnonzero(labels.ok[:, 0])
    labels, configurations = labels.take(rows), dataset.configurations(rows.tolist())
    volume = np.abs(np.linalg.det(configurations.cells)) / labels.n_atoms
    return Facts(
        config_types=configurations.config_types,
        n_atoms=labels.n_atoms.astype(float),
        energy=labels.energy[:, 0] / labels.n_atoms,
        volume=np.where(configurations.pbc.all(axis=1), volume, np.nan),
        forces=np.linalg.norm(labels.forces[0], axis=1),
    )


def join_datasets(datasets: Sequence[Dataset]) -> tuple[Configurations, Labels, int]:
    """Put the labels of several datasets one after the other, each geometry once.

    A moved, turned, mirrored or repeated one is the same, if its label says the same.

    Returns
    -------
    tuple
        The configurations that have a label, their labels, and how many labels are left out
        because an earlier dataset has the geometry.

    Raises
    ------
    ValueError
        If the levels of theory differ, or two energies of one geometry.
    """
    compare_levels([dataset.level for dataset in datasets])
    first, *rest = datasets
    configurations, labels = _labelled(first)
    owners = [first.pk] * len(labels)
    n_left_out = 0
    for dataset in rest:
        more, more_labels = _labelled(dataset)
        _refuse_conflicts(dataset.pk, more_labels, labels, owners)
        new = np.flatnonzero(_known_rows(more, more_labels, configurations, labels) < 0)
        n_left_out += len(more) - len(new)
        configurations = join_configurations([configurations, more.take(new)])
        labels = join_labels([labels, more_labels.take(new)])
        owners += [dataset.pk] * len(new)
    return configurations, labels, n_left_out


def trace_row(dataset: Dataset, prefix: str) -> Trace:
    """Return where the label of one configuration comes from.

    Parameters
    ----------
    dataset
        Where the row is.
    prefix
        How its id begins.

    Raises
    ------
    ValueError
        If no id begins so, or more than one.
    """
    labels = dataset.labels()
    row = _row_of(labels.ids.tolist(), prefix, dataset.pk)
    labels = labels.take([row])
    configurations = dataset.configurations([row])
    failures = labels.failures()
    return Trace(
        id=str(labels.ids[0]),
        config_type=str(configurations.config_types[0]),
        n_atoms=int(labels.n_atoms[0]),
        energy=None if failures else float(labels.energy[0, 0]),
        reason=failures[0].reason if failures else "",
        dataset=dataset,
        **_origin(dataset, str(labels.ids[0])),
    )


def _entries() -> list[_Entry]:
    checked = _checked()
    made = [
        *_read_from_files(READ, SinglefileData, "attributes.filename"),
        *_read_from_files(READ_OUTPUT, FolderData, "label"),
        *_read_from_runs(),
        *_returned_by_dft(),
    ]
    entries = {
        # The gate of the same caller: that of the import, or that of the loop which asked.
        raw_pk: _Entry(
            checked.get((raw_pk, source.loop_pk), raw_pk), raw_pk, configurations_pk, source
        )
        for raw_pk, configurations_pk, source in made
    }
    return sorted(entries.values())


def _read_from_files(function: str, kind: type[Data], name: str) -> list[tuple[int, int, Source]]:
    """Return labels, configurations and source of what a calcfunction read from files."""
    query = QueryBuilder()
    query.append(CalcFunctionNode, filters=_readers(function), tag="reader", project="id")
    query.append(LabelsData, with_incoming="reader", project="id")
    query.append(ConfigurationsData, with_incoming="reader", project="id")
    query.append(kind, with_outgoing="reader", project=["id", name])
    return [
        (
            labels,
            configurations,
            Source(kind=Kind.FILE, process_pk=reader, file_pk=file, file_name=file_name),
        )
        for reader, labels, configurations, file, file_name in query.all()
    ]


def _read_from_runs() -> list[tuple[int, int, Source]]:
    """Return labels, configurations and source of what was read from PwCalculations."""
    parts = QueryBuilder()
    parts.append(LabelsData, tag="part", project="id")
    parts.append(CalcFunctionNode, with_incoming="part", filters=_readers(JOIN_RUNS))
    joined = set(parts.all(flat=True))
    query = QueryBuilder()
    readers = {"or": [_readers(READ_RUNS), _readers(JOIN_RUNS)]}
    query.append(CalcFunctionNode, filters=readers, tag="reader", project="id")
    query.append(LabelsData, with_incoming="reader", project="id")
    query.append(ConfigurationsData, with_incoming="reader", project="id")
    return [
        (labels, configurations, Source(kind=Kind.RUNS, process_pk=reader))
        for reader, labels, configurations in query.all()
        if labels not in joined
    ]


def _readers(function: str) -> dict[str, Any]:
    return {"attributes.process_label": function, "attributes.exit_status": 0}


def _returned_by_dft() -> list[tuple[int, int, Source]]:
    """Return labels, configurations and source of what DftLabelWorkChains returned."""
    query = QueryBuilder()
    query.append(
        WorkChainNode, filters={"attributes.process_label": DFT_LABELS}, tag="dft", project="id"
    )
    query.append(LabelsData, with_incoming="dft", edge_filters={"label": "labels"}, project="id")
    query.append(
        ConfigurationsData,
        with_outgoing="dft",
        edge_filters={"label": "configurations"},
        project="id",
    )
    made = query.all()
    loops = _loops([process for process, _, _ in made])
    found = []
    for process, labels, configurations in made:
        loop, batch = loops.get(process, (None, ""))
        kind = Kind.DFT if loop is None else Kind.LOOP
        source = Source(kind=kind, process_pk=process, loop_pk=loop, batch=batch)
        found.append((labels, configurations, source))
    return found


def _loops(pks: list[int]) -> dict[int, tuple[int, str]]:
    """Return the loop that called each process, and what for."""
    query = QueryBuilder()
    loops = {"attributes.process_label": LOOP}
    query.append(WorkChainNode, filters=loops, tag="loop", project="id")
    query.append(
        WorkChainNode,
        with_incoming="loop",
        filters={"attributes.process_label": DFT_LABELS},
        edge_filters=CALLS,
        project="id",
        edge_project="label",
    )
    wanted = set(pks)
    return {
        process: (loop, label.removeprefix(POINT))
        for loop, process, label in query.all()
        if process in wanted
    }


def _checked() -> dict[tuple[int, int | None], int]:
    """Return what the gate left, by the PKs of the labels it was given and of its caller."""
    query = QueryBuilder()
    query.append(LabelsData, tag="given", project="id")
    query.append(
        CalcFunctionNode,
        with_incoming="given",
        edge_filters={"label": "labels"},
        filters={"attributes.process_label": {"in": list(CHECKS)}},
        tag="check",
        project="id",
    )
    query.append(LabelsData, with_incoming="check", project="id")
    found = query.all()
    query = QueryBuilder()
    query.append(WorkChainNode, tag="caller", project="id")
    query.append(
        CalcFunctionNode,
        with_incoming="caller",
        filters={"attributes.process_label": {"in": list(CHECKS)}},
        project="id",
    )
    callers = {check: caller for caller, check in query.all()}
    return {(given, callers.get(check)): left for given, check, left in found}


def _nodes(pks: set[int]) -> dict[int, LabelsData]:
    if not pks:
        return {}
    query = QueryBuilder().append(LabelsData, filters={"id": {"in": sorted(pks)}})
    return {node.pk: node for node in query.all(flat=True)}


def _dataset(entry: _Entry, nodes: dict[int, LabelsData]) -> Dataset:
    node, attributes = nodes[entry.pk], nodes[entry.pk].base.attributes
    gate = attributes.get("gate", {})
    return Dataset(
        pk=entry.pk,
        uuid=node.uuid,
        name=node.label,
        created=node.ctime,
        source=entry.source,
        configurations_pk=entry.configurations_pk,
        elements=_elements(node, load_node(entry.configurations_pk)),
        n_labels=attributes.get("n_labels"),
        n_missing=attributes.get("n_failures"),
        level={key: value for key, value in node.level.items() if key != FINGERPRINT},
        checksum=node.checksum,
        gate=f"{gate['verdict']}; {gate['text']}" if gate else "",
        n_copies=nodes[entry.raw_pk].base.attributes.get("n_copies", 0),
        unread=nodes[entry.raw_pk].base.attributes.get("unread", {}),
    )


def _elements(labels: LabelsData, configurations: ConfigurationsData) -> tuple[str, ...]:
    """Return the elements of what is labelled, which need not be all that the pool has."""
    elements = configurations.base.attributes.get("elements")
    if len(elements) == 1 or labels.base.attributes.get("n_configurations") == len(configurations):
        return tuple(elements)
    value = configurations.value()
    return tuple(value.take(value.rows_of(labels.get_array("ids"))).symbols)


def _labelled(dataset: Dataset) -> tuple[Configurations, Labels]:
    """Return the rows of a dataset that have a label."""
    labels = dataset.labels()
    rows = np.flatnonzero(labels.ok[:, 0])
    return dataset.configurations(rows.tolist()), labels.take(rows)


def _known_rows(
    configurations: Configurations, labels: Labels, known: Configurations, known_labels: Labels
) -> IntArray:
    """Return which rows of ``known`` are the same, and are labelled the same, -1 for none.

    What only looks the same and has another label is another geometry: no label is to be lost.
    """
    rows = find_known(configurations, known)
    turned = np.flatnonzero(rows >= 0)
    turned = turned[known.ids[rows[turned]] != configurations.ids[turned]]
    if len(turned):
        same = say_the_same(labels.take(turned), known_labels.take(rows[turned]))
        rows[turned[~same]] = -1
    return rows


def _per_atom(labels: Labels) -> FloatArray:
    energy: FloatArray = labels.energy[:, 0] / labels.n_atoms
    return energy


def _refuse_conflicts(pk: int, labels: Labels, earlier: Labels, owners: Sequence[int]) -> None:
    """Raise ``ValueError`` if a configuration had another energy in an earlier dataset.

    Of a turned one that may be the k-points' doing.
    """
    both = np.flatnonzero(np.isin(labels.ids, earlier.ids))
    rows = earlier.rows_of(labels.ids[both])
    differences = np.abs(_per_atom(labels)[both] - _per_atom(earlier)[rows])
    apart = differences > SAME_ENERGY
    if apart.any():
        others = ", ".join(map(str, sorted({owners[row] for row in rows[apart]})))
        raise ValueError(
            f"datasets {others} and {pk} give {apart.sum()} geometries energies that differ by up "
            f"to {differences.max():.3g} eV/atom, though their levels of theory are equal; find "
            "out which one is right, and export without the other"
        )


def _row_of(ids: list[str], prefix: str, pk: int) -> int:
    found = [row for row, name in enumerate(ids) if name.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(
            f"no configuration of dataset {pk} has an id that begins with {prefix!r}; ids are "
            f"hexadecimal, such as {ids[0]}, and `aiida-eipnn dataset export` writes them"
        )
    some = ", ".join(ids[row][: len(prefix) + 4] for row in found[:5])
    raise ValueError(
        f"{len(found)} ids of dataset {pk} begin with {prefix!r}, such as {some}; give more digits"
    )


def _origin(dataset: Dataset, name: str) -> dict[str, Any]:
    """Return where the label of a configuration comes from, as fields of :class:`Trace`."""
    source = dataset.source
    if source.file_pk is not None:
        return {"origin": dataset, **_file_facts(dataset, name)}
    if source.kind is Kind.RUNS:
        return {"origin": dataset, **_run_facts(dataset, name)}
    inputs = inputs_of(source.process_pk)
    stored = inputs.get("stored")
    if stored is not None and name in stored.value().labelled().ids:
        return _stored_origin(dataset, stored, name)
    points = read_points(source.process_pk, source.batch)
    point = next(point for point in points if point.id == name)
    return {"origin": dataset, "point": point, **_code_facts(inputs, point)}


def _file_facts(dataset: Dataset, name: str) -> dict[str, str]:
    """Return which file a label is from, and its MD5, as fields of :class:`Trace`."""
    file = load_node(dataset.source.file_pk)
    kind = {"file_kind": type(file).__name__}
    if isinstance(file, SinglefileData):
        return {"file": file.filename, "md5": md5_of(file.get_content(mode="rb")), **kind}
    reader = load_node(dataset.source.process_pk)
    path = reader.outputs.labels.base.attributes.get("files")[name]
    content = file.base.repository.get_object_content(path, mode="rb")
    return {"file": path, "md5": md5_of(content), **kind}


def _run_facts(dataset: Dataset, name: str) -> dict[str, Any]:
    """Return which PwCalculation a label is of, as fields of :class:`Trace`."""
    labels = dataset.labels()
    uuid = str(labels.origins[labels.rows_of([name])[0]])
    run: CalcJobNode = load_node(uuid)
    caller = run.caller
    point = DftPoint(
        id=name,
        batch="",
        config_type="",
        n_atoms=0,
        pw_pk=run.pk,
        pw_uuid=uuid,
        base_pk=None if caller is None else caller.pk,
    )
    return {"point": point, **_code_facts({"pw_base__pw__code": run.inputs.code}, point)}


def _stored_origin(dataset: Dataset, stored: LabelsData, name: str) -> dict[str, Any]:
    """Return where a label comes from that a DftLabelWorkChain took instead of making it."""
    for entry in _entries():
        if stored.pk in (entry.raw_pk, entry.pk):
            return _origin(_dataset(entry, _nodes({entry.pk, entry.raw_pk})), name)
    labels = stored.value()
    uuid = str(labels.origins[labels.rows_of([name])[0]])
    return {"origin": dataset, "stored_pk": stored.pk, "process_uuid": uuid}


def _code_facts(inputs: dict[str, Data], point: DftPoint) -> dict[str, str]:
    """Return the code that ran pw.x, and the version that this run gave of itself."""
    if (code := inputs.get("pw_base__pw__code")) is None:
        return {}
    version = ""
    if point.pw_pk is not None:
        run: CalcJobNode = load_node(point.pw_pk)
        results = outputs_of_calculation(run).get("output_parameters")
        version = "" if results is None else results.base.attributes.get("creator_version", "")
    return {"code": code.full_label, "code_version": version}
