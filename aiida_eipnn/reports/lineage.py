"""Where a committee comes from: every DFT point, EIP, seed, code and version behind it."""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from aiida.common.links import LinkType
from aiida.orm import (
    CalcJobNode,
    CalculationNode,
    Data,
    Node,
    ProcessNode,
    QueryBuilder,
)

from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.jobs.spec import STATUS
from aiida_eipnn.reports.history import LOOP, TEST, require_loop
from aiida_eipnn.reports.points import (
    DftPoint,
    PointState,
    called,
    inputs_of,
    label_process,
    loop_outputs,
    loops_of,
    outputs_of,
    read_points,
)

# Its own name is that of runs made before there was ours, which starts killed runs again.
PW_BASE = ("PwBaseWorkChain", "DftRun")
# Of LaTeX, as combining characters.
ACCENTS = {"~": "\u0303", "'": "\u0301", "`": "\u0300", "^": "\u0302", '"': "\u0308"}
EIP_METADATA = ("kim_id", "title", "citation", "doi", "year", "machine_learned")


@dataclass(frozen=True, slots=True, kw_only=True)
class Eip:
    """An EIP whose labels the committee learned from.

    Parameters
    ----------
    name
        The name that opens it.
    kim_id, title, citation, doi, year, machine_learned
        Where it comes from; empty where nobody recorded it.
    n_labels, n_failures
        Configurations that it labelled, and that it did not.
    seconds
        Wall time of all its labels.
    """

    name: str
    kim_id: str = ""
    title: str = ""
    citation: str = ""
    doi: str = ""
    year: int | None = None
    machine_learned: bool = False
    n_labels: int | None = None
    n_failures: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStage:
    """A training calculation behind the committee.

    Parameters
    ----------
    stage
        ``pretrain``, ``classify`` or ``finetune``.
    pk, uuid
        The calculation.
    seeds
        One for each member.
    training
        Its settings.
    versions
        Versions of the packages that ran it, by name.
    """

    stage: str
    pk: int
    uuid: str
    seeds: tuple[int, ...]
    training: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pseudo:
    """A pseudopotential of the DFT labels."""

    element: str
    filename: str
    md5: str
    uuid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeFacts:
    """A code that ran jobs, and the version it gave of itself (empty if it gave none)."""

    label: str
    uuid: str
    version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What a committee was made of.

    Parameters
    ----------
    committee_pk, committee_uuid
        The committee.
    loop_pk, loop_uuid
        The loop that made it; ``None`` where it was trained by itself.
    iteration
        The iteration whose committee it is; ``pretrained`` before the first.
    points
        The DFT points asked for to train it, those that failed among them.
    test_points
        The DFT points that it was tested on.
    eips
        The EIPs that it was pre-trained on.
    stages
        The trainings behind it, first to last.
    pseudos
        The pseudopotentials of the DFT labels.
    level
        Level of theory of the DFT labels.
    codes
        The codes that ran the jobs.
    versions
        Versions of the packages behind the last training, AiiDA's among them.
    """

    committee_pk: int
    committee_uuid: str
    loop_pk: int | None
    loop_uuid: str | None
    iteration: str
    points: tuple[DftPoint, ...] = ()
    test_points: tuple[DftPoint, ...] = ()
    eips: tuple[Eip, ...] = ()
    stages: tuple[TrainingStage, ...] = ()
    pseudos: tuple[Pseudo, ...] = ()
    level: dict[str, Any] = field(default_factory=dict)
    codes: tuple[CodeFacts, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, ready for JSON."""
        return asdict(self)


def trace(node: Node) -> Lineage:
    """Return where a committee comes from.

    Parameters
    ----------
    node
        A committee, or a loop, which stands for its last committee.

    Raises
    ------
    ValueError
        If it is neither, if the loop has no committee yet, or if no training made the committee.
    """
    committee = committee_of(node)
    training = committee.creator
    if training is None:
        raise ValueError(
            f"committee {committee.pk} was made by no calculation, so nothing is known about it"
        )
    loop = loop_of(training)
    labels = labels_behind(training)
    label_pks = {
        name: pk for name, node in labels.items() if (pk := label_process(node)) is not None
    }
    test_pk = _test_process(loop)
    trainings = trainings_behind(committee, loop)
    return Lineage(
        committee_pk=committee.pk,
        committee_uuid=committee.uuid,
        loop_pk=loop.pk if loop else None,
        loop_uuid=loop.uuid if loop else None,
        iteration=_iteration_of(committee, loop),
        points=tuple(
            point
            for name, node in labels.items()
            for point in (
                read_points(label_pks[name], name, node) if name in label_pks else given(node, name)
            )
        ),
        test_points=read_points(test_pk, TEST) if test_pk is not None else (),
        eips=eips_behind(trainings),
        stages=tuple(_stage(item) for item in trainings),
        pseudos=_pseudos(label_pks.values() or [test_pk]),
        level=_level(labels.values(), loop),
        codes=_codes(trainings, [*label_pks.values(), test_pk]),
        versions=_versions(training),
    )


def committee_of(node: Node) -> CommitteeData:
    """Return the committee itself, or the last one of a loop.

    Raises
    ------
    ValueError
        If the node is neither, or if the loop has none yet.
    """
    if isinstance(node, CommitteeData):
        return node
    require_loop(node, "a committee or a loop")
    outputs = loop_outputs(node.pk)
    names = sorted(
        label for label in outputs if label.startswith("iterations__i") and "__committee" in label
    )
    found = outputs.get("committee") or (outputs[names[-1]] if names else outputs.get("pretrained"))
    if found is None:
        raise ValueError(
            f"loop {node.pk} has no committee yet: see how far it is with "
            f"`aiida-eipnn status {node.pk}`"
        )
    return found


def loop_of(process: ProcessNode) -> ProcessNode | None:
    """Return the loop that called ``process``, however deep; ``None`` if none did."""
    caller = process.caller
    while caller is not None and caller.process_label != LOOP:
        caller = caller.caller
    return caller


def labels_behind(training: ProcessNode) -> dict[str, LabelsData]:
    """Return the DFT labels that a training read, by the name of the batch.

    Labels that the user gave were checked first: what was checked is returned.
    """
    found = {}
    for label, node in sorted(inputs_of(training.pk).items()):
        if not label.startswith("labels__"):
            continue
        creator = node.creator
        checked = creator is not None and creator.process_label == "check_given_labels"
        found[label.removeprefix("labels__")] = creator.inputs.labels if checked else node
    return dict(sorted(found.items(), key=lambda item: (item[0].startswith("i0"), item[0])))


def trainings_behind(committee: CommitteeData, loop: ProcessNode | None) -> list[CalcJobNode]:
    """Return the trainings that led to a committee, first to last.

    The classification of the same iteration is one of them, though it hands no weights on: it
    chose the EIPs.
    """
    chain = []
    start: CommitteeData | None = committee
    while start is not None and start.creator is not None:
        chain.append(start.creator)
        start = inputs_of(start.creator.pk).get("committee")
    chain.reverse()
    if loop is not None and (classifying := _classification(committee, loop)) is not None:
        chain.insert(len(chain) - 1, classifying)
    return chain


def eips_behind(trainings: Iterable[CalcJobNode]) -> tuple[Eip, ...]:
    """Return the EIPs whose labels the trainings read."""
    labels = {
        node.pk: node
        for training in trainings
        for label, node in inputs_of(training.pk).items()
        if label.startswith("eip_labels__")
    }
    eips: dict[str, Eip] = {}
    for node in labels.values():
        metrics = {}
        if node.creator is not None and "metrics" in node.creator.outputs:
            metrics = node.creator.outputs.metrics.get_dict().get("eips", {})
        for name in node.base.attributes.get("sources"):
            eips.setdefault(name, _eip(name, metrics.get(name, {})))
    return tuple(eips.values())


def given(labels: LabelsData, batch: str) -> tuple[DftPoint, ...]:
    """Return the points of labels that no DftLabelWorkChain here made: the user brought them."""
    value = labels.value()
    return tuple(
        DftPoint(
            id=str(name),
            batch=batch,
            config_type="given",
            n_atoms=int(value.n_atoms[row]),
            state=PointState.DONE if value.ok[row, 0] else PointState.FAILED,
            energy=float(value.energy[row, 0]) if value.ok[row, 0] else None,
            pw_uuid=str(value.origins[row]) or None,
        )
        for row, name in enumerate(value.ids)
    )


def unexplained_inputs(committee: CommitteeData, loop: ProcessNode) -> list[Node]:
    """Return the data behind a committee that neither a process made nor the user gave.

    Parameters
    ----------
    committee
        Where to walk back from.
    loop
        The top-level loop; its inputs, and those of the loops that it continues, are what the user
        gave, but for what it took from these.

    Returns
    -------
    list
        Empty for a complete lineage.
    """
    of_user = {
        node.pk
        for pk in loops_of(loop.pk)
        for label, node in inputs_of(pk).items()
        if not label.startswith("previous__")
    }
    unexplained: dict[int, Node] = {}
    seen: set[int] = set()
    waiting: list[Node] = [committee]
    while waiting:
        node = waiting.pop()
        if node.pk in seen or node.pk in of_user:
            continue
        seen.add(node.pk)
        if node.creator is None:
            unexplained[node.pk] = node
        else:
            waiting += _origins(node.creator)
    return [unexplained[pk] for pk in sorted(unexplained)]


def _origins(creator: CalculationNode) -> list[Data]:
    """Return what went into a calculation.

    PwBaseWorkChain edits the ``parameters`` and ``settings`` of a calculation in Python and hands
    it copies that no process made. What it was given itself is the origin of these.
    """
    caller = creator.caller
    process = caller if caller is not None and caller.process_label in PW_BASE else creator
    return list(inputs_of(process.pk).values())


def _iteration_of(committee: CommitteeData, loop: ProcessNode | None) -> str:
    """Return the name of the iteration, or of the output of the loop, that the committee is."""
    if loop is None:
        return ""
    links = committee.base.links.get_incoming(link_type=LinkType.RETURN).all()
    names = sorted(link.link_label for link in links if link.node.pk == loop.pk)
    numbered = [name.split("__")[1] for name in names if name.startswith("iterations__")]
    return next(iter([*numbered, *names]), "")


def _classification(committee: CommitteeData, loop: ProcessNode) -> CalcJobNode | None:
    """Return the classification of the iteration that made the committee, if one did."""
    selection = outputs_of(loop.pk).get(f"iterations__{_iteration_of(committee, loop)}__selection")
    return None if selection is None else selection.creator


def _test_process(loop: ProcessNode | None) -> int | None:
    if loop is None:
        return None
    # A loop that continues another one has its test set.
    calls = [call for pk in reversed(loops_of(loop.pk)) for call in called(pk)]
    return next((call.pk for call in calls if call.label == f"dft_{TEST}"), None)


def _stage(training: CalcJobNode) -> TrainingStage:
    inputs = inputs_of(training.pk)
    settings = inputs["training"].get_dict() if "training" in inputs else {}
    return TrainingStage(
        stage=settings.pop("stage", ""),
        pk=training.pk,
        uuid=training.uuid,
        seeds=tuple(inputs["seeds"].get_list()) if "seeds" in inputs else (),
        training=settings,
        versions=job_versions(training),
    )


def job_versions(job: CalcJobNode) -> dict[str, str]:
    """Return the versions that a job wrote into its status; empty where it left none."""
    retrieved = outputs_of_calculation(job).get("retrieved")
    if retrieved is None or STATUS not in retrieved.base.repository.list_object_names():
        return {}
    content = json.loads(retrieved.base.repository.get_object_content(STATUS))
    return dict(content.get("versions", {}))


def outputs_of_calculation(job: CalculationNode) -> dict[str, Data]:
    """Return what a calculation created, by link label."""
    links = job.base.links.get_outgoing(link_type=LinkType.CREATE).all()
    return {link.link_label: link.node for link in links}


def _versions(training: CalcJobNode) -> dict[str, str]:
    aiida = training.base.attributes.get("version", {}).get("core")
    return {**job_versions(training), **({"aiida-core": aiida} if aiida else {})}


def _eip(name: str, metrics: Mapping[str, Any]) -> Eip:
    metadata = metrics.get("metadata", {})
    facts = {key: metadata[key] for key in EIP_METADATA if metadata.get(key) is not None}
    if "citation" in facts:
        facts["citation"] = without_latex(facts["citation"])
    return Eip(
        name=name,
        n_labels=metrics.get("n_ok"),
        n_failures=metrics.get("n_failed"),
        seconds=metrics.get("seconds"),
        **facts,
    )


def without_latex(text: str) -> str:
    """Return a line of BibTeX, as OpenKIM has it, as plain text."""

    def accented(found: re.Match[str]) -> str:
        return unicodedata.normalize("NFC", found[2] + ACCENTS[found[1]])

    text = re.sub(r"\\([~'`^\"])\{?(\w)\}?", accented, text).replace("--", "–")
    return text.replace("{", "").replace("}", "")


def _pseudos(label_pks: Iterable[int | None]) -> tuple[Pseudo, ...]:
    found = {
        (label.removeprefix("pw_base__pw__pseudos__"), node.pk): node
        for pk in label_pks
        if pk is not None
        for label, node in inputs_of(pk).items()
        if label.startswith("pw_base__pw__pseudos__")
    }
    return tuple(
        Pseudo(
            element=element,
            filename=node.base.attributes.get("filename", ""),
            md5=node.base.attributes.get("md5", ""),
            uuid=node.uuid,
        )
        for (element, _), node in sorted(found.items())
    )


def _level(labels: Iterable[LabelsData], loop: ProcessNode | None) -> dict[str, Any]:
    test = [] if loop is None else [outputs_of(loop.pk).get("test_labels")]
    return next((node.level for node in [*labels, *test] if node is not None and node.level), {})


def _codes(
    trainings: Iterable[CalcJobNode], label_pks: Iterable[int | None]
) -> tuple[CodeFacts, ...]:
    codes: dict[str, CodeFacts] = {}
    for training in trainings:
        code = inputs_of(training.pk).get("code")
        if code is not None:
            version = job_versions(training).get("aiida-eipnn", "")
            codes[code.uuid] = CodeFacts(label=code.full_label, uuid=code.uuid, version=version)
    for pk in label_pks:
        code = None if pk is None else inputs_of(pk).get("pw_base__pw__code")
        if code is not None and code.uuid not in codes:
            codes[code.uuid] = CodeFacts(
                label=code.full_label, uuid=code.uuid, version=_pw_version(code)
            )
    return tuple(codes.values())


def _pw_version(code: Data) -> str:
    """Return the version that pw.x wrote into the results of a run of this code."""
    query = QueryBuilder()
    query.append(Data, filters={"id": code.pk}, tag="code")
    query.append(CalcJobNode, with_incoming="code", tag="run")
    query.append(
        Data,
        with_incoming="run",
        edge_filters={"label": "output_parameters"},
        filters={"attributes": {"has_key": "creator_version"}},
        project="attributes.creator_version",
    )
    found = query.limit(1).all(flat=True)
    return f"pw.x {found[0]}" if found else ""
