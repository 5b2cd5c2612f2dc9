"""What the launch scripts share: their options, and how a builder is run or submitted."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from aiida.common.exceptions import NotExistent
from aiida.common.hashing import make_hash
from aiida.common.links import LinkType
from aiida.engine import ProcessBuilder, submit
from aiida.engine.daemon.client import get_daemon_client
from aiida.manage import get_config_option, get_manager
from aiida.manage.caching import get_use_cache
from aiida.orm import (
    AbstractCode,
    Data,
    ProcessNode,
    QueryBuilder,
    StructureData,
    WorkChainNode,
    load_code,
    load_node,
)
from ase.build import bulk

from aiida_eipnn import __version__
from aiida_eipnn.calculations.label import LabelCalculation
from aiida_eipnn.cli.loop import SUBMITTED
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.reports.dataset import find_dataset
from aiida_eipnn.reports.progress import show_progress
from aiida_eipnn.science.io import read_configurations, read_labelled
from aiida_eipnn.workflows.builder import STAGES, options_of

# Work chains that run here ask after their children so often. The second that AiiDA waits makes two
# for each DFT point: more than all the rest where pw.x comes from the cache.
POLL_SECONDS = 0.1


def parser(text: str | None) -> argparse.ArgumentParser:
    """Return the parser that every launch script starts from."""
    options = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--submit", action="store_true", help="leave it to the daemon instead of waiting here"
    )
    return options


def add_job_code(options: argparse.ArgumentParser) -> None:
    """Add the code that runs ``eipnn-job``."""
    options.add_argument("--job-code", default="eipnn-job@localhost", help="code for eipnn-job")


def add_pw_code(options: argparse.ArgumentParser) -> None:
    """Add the code that runs pw.x."""
    options.add_argument("--pw-code", default="pw@localhost", help="code for pw.x")


def add_protocol(options: argparse.ArgumentParser) -> None:
    """Add the protocol and what replaces its values."""
    options.add_argument("--protocol", default="demo", help="demo, fast, balanced or stringent")
    options.add_argument(
        "--overrides", type=Path, help="YAML file with values that replace those of the protocol"
    )


def add_places(options: argparse.ArgumentParser) -> None:
    """Add where single stages run, and how."""
    options.add_argument(
        "--code",
        action="append",
        default=[],
        metavar="STAGE=CODE",
        help=f"code of one stage ({', '.join(STAGES)}); repeat for each",
    )
    add_options(options)


def add_options(options: argparse.ArgumentParser) -> None:
    """Add what the scheduler is told."""
    options.add_argument(
        "--options",
        type=Path,
        help="YAML file with metadata.options of all jobs (queue_name, account, resources, ...), "
        "and below the name of a stage those of its jobs",
    )


def stage_codes(given: Sequence[str]) -> dict[str, AbstractCode]:
    """Return the codes of single stages; exit with one line if one cannot be read."""
    found = {}
    for item in given:
        stage, equals, name = item.partition("=")
        if not equals or stage not in STAGES:
            raise SystemExit(
                f"--code takes STAGE=CODE with one of {', '.join(STAGES)}, not {item!r}"
            )
        found[stage] = code_of(name)
    return found


def options_for(stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the scheduler is told of the jobs of one stage."""
    found: dict[str, Any] = checked(options_of, stage, overrides_of(options.options, "options"))
    return found


def refuse_beside(options: argparse.Namespace, option: str, *names: str) -> None:
    """Exit with one line if any of the options ``names`` is given beside ``option``."""
    if given := [f"--{name}" for name in names if getattr(options, name)]:
        raise SystemExit(f"{', '.join(given)} cannot be given with {option}: the loop has its own")


def code_of(name: str) -> AbstractCode:
    """Return the code ``name``; exit with one line if there is none."""
    try:
        return load_code(name)
    except (NotExistent, ValueError) as error:
        raise SystemExit(
            f"there is no code {name!r}: see `verdi code list`, make one with `aiida-eipnn setup` "
            f"or `verdi code create` ({error})"
        ) from error


def node_of(identifier: str, kind: type[Data]) -> Data:
    """Return the node with this PK or UUID; exit with one line if it is none or of another kind."""
    try:
        node = load_node(identifier)
    except (NotExistent, ValueError) as error:
        raise SystemExit(f"there is no node {identifier!r}: {error}") from error
    if not isinstance(node, kind):
        raise SystemExit(f"node {identifier} is a {type(node).__name__}, not a {kind.__name__}")
    return node


def overrides_of(path: Path | None, what: str = "overrides") -> dict[str, Any]:
    """Return the values of a YAML file; exit with one line if it cannot be read."""
    if path is None:
        return {}
    try:
        return dict(yaml.safe_load(path.read_text()) or {})
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise SystemExit(f"cannot read the {what} in {path}: {error}") from error


def configurations_of(path: Path) -> ConfigurationsData:
    """Return the configurations of an extended XYZ file."""
    return ConfigurationsData.from_value(checked(read_configurations, path))


def labelled_of(name: str) -> tuple[ConfigurationsData, LabelsData]:
    """Return the configurations and the DFT labels of an extended XYZ file, or of a dataset."""
    if name.isdecimal() and not Path(name).exists():
        dataset = checked(find_dataset, node_of(name, LabelsData))
        return load_node(dataset.configurations_pk), load_node(dataset.pk)
    configurations, labels = checked(read_labelled, Path(name))
    return (
        ConfigurationsData.from_value(configurations),
        LabelsData.from_value(labels, level={}),
    )


def undeclared(name: str, labels: LabelsData) -> str:
    """Return what to say of labels that declare no level of theory: they are mixed with others."""
    if labels.level:
        return ""
    return (
        f"{name} declares no level of theory: its labels are taken for labels of the level of this "
        "loop. `aiida-eipnn dataset import` declares one; then give the PK of the dataset"
    )


def checked(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``call`` returns; a ``ValueError`` is for the user: one line, no traceback."""
    try:
        return call(*arguments)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


def silicon() -> list[StructureData]:
    """Return the primitive and the conventional cell of silicon."""
    return [StructureData(ase=bulk("Si")), StructureData(ase=bulk("Si", cubic=True))]


def launch(
    builder: ProcessBuilder,
    options: argparse.Namespace,
    *,
    slots: int = 1,
    must_finish: bool = True,
) -> ProcessNode:
    """Run the process here, or submit it to the daemon.

    Parameters
    ----------
    builder
        The process.
    options
        What the script was called with; ``submit`` counts here.
    slots
        Slots of the daemon that the process needs at most.
    must_finish
        Exit if the process failed.
    """
    if options.submit:
        if problem := too_few_slots(slots):
            raise SystemExit(problem)
        node = checked(submit, builder)
        # Without the daemon it stands still, and nothing else in the database tells.
        node.base.extras.set(SUBMITTED, True)
        print(f"submitted: `aiida-eipnn status {node.pk} --follow` shows how far it is")  # noqa: T201
        return node
    runner = get_manager().create_runner(communicator=None, poll_interval=POLL_SECONDS)
    with show_progress():
        _, node = checked(runner.run_get_node, builder)
    print(f"{node.process_label} {node.pk}: {outcome(node)}")  # noqa: T201
    if must_finish and not node.is_finished_ok:
        raise SystemExit(1)
    return node


def finished_before(builder: ProcessBuilder) -> ProcessNode | None:
    """Return the newest process that finished with equal inputs, if there is one.

    AiiDA reuses finished calculations but no work chains: to run one again means a process for each
    of its steps, although every result is there. Asked only where caching is enabled, and only of
    processes that this version made.
    """
    process = builder.process_class
    if not get_use_cache(identifier=LabelCalculation.build_process_type()):
        return None
    wanted = hashes(process.spec().inputs.pre_process(builder._inputs(prune=True)))
    query = QueryBuilder().append(
        WorkChainNode,
        filters={
            "process_type": process.build_process_type(),
            "attributes.exit_status": 0,
            "attributes.version.plugin": __version__,
        },
        project="*",
    )
    for node in query.order_by({WorkChainNode: {"id": "desc"}}).all(flat=True):
        incoming = node.base.links.get_incoming(link_type=LinkType.INPUT_WORK).all()
        if wanted == {entry.link_label: hash_of(entry.node) for entry in incoming}:
            return node
    return None


def hashes(inputs: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the hash of every node among nested inputs, by the label of its link."""
    found: dict[str, str] = {}
    for name, value in inputs.items():
        label = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found |= hashes(value, f"{label}__")
        elif isinstance(value, Data):
            found[label] = hash_of(value)
    return found


def hash_of(node: Data) -> str:
    """Return the hash of a node, also of one that is not stored yet."""
    caching = node.base.caching
    known = caching.get_hash() if node.is_stored else None
    return str(known or make_hash(caching.get_objects_to_hash()))


def outcome(node: ProcessNode) -> str:
    """Return in one line how a process ended."""
    if node.is_finished_ok:
        return "finished"
    return f"failed with exit code {node.exit_status}: {node.exit_message or node.exception}"


def too_few_slots(slots: int) -> str | None:
    """Return what to type if the daemon has fewer free slots than needed, or ``None``.

    A work chain that waits keeps its slot. With fewer slots than waiting parents and children
    need, all wait for ever.
    """
    client = get_daemon_client()
    if not client.is_daemon_running:
        return (
            "the daemon is not running: start it with `verdi daemon start`, or leave out --submit"
        )
    workers = int(client.get_numprocesses()["numprocesses"])
    per_worker = int(get_config_option("daemon.worker_process_slots"))
    free = workers * per_worker - active_processes()
    if free >= slots:
        return None
    more = -(-(slots - free) // per_worker)
    return (
        f"the daemon has {free} free slots ({workers} workers with {per_worker}), but this needs "
        f"{slots}: add workers with `verdi daemon incr {more}`, or use fewer lanes"
    )


def active_processes() -> int:
    """Return how many processes are waiting or running."""
    query = QueryBuilder().append(
        ProcessNode,
        filters={"attributes.process_state": {"in": ["created", "running", "waiting"]}},
    )
    return query.count()
