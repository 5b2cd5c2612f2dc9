"""Commands about a loop: status, lineage, report, export."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiida.orm import Node

    from aiida_eipnn.reports.history import History
    from aiida_eipnn.reports.lineage import Lineage
    from aiida_eipnn.science.labels import Labels

# Often enough to feel live, rarely enough not to disturb the database.
FOLLOW_SECONDS = 3.0

# Failed DFT points that the status lists; the report has them all.
MOST_FAILED = 10

# The mark that `--submit` of the launch scripts leaves on a process.
SUBMITTED = "eipnn_submitted"

LOOPS = "`verdi process list -a -L ActiveLearningWorkChain` shows the loops"

README = """\
A committee of neural-network potentials for {elements}, trained by the loop {uuid}.

{summary}

  config.json, weights.safetensors   the committee
  dataset.extxyz                     the pool with all DFT and EIP labels: <source>_energy (eV),
                                     <source>_forces (eV/Å), <source>_stress (eV/Å³), where
                                     <source> is one of
                                     {sources}

    from ase.build import bulk
    from aiida_eipnn.science.nn.calculator import CommitteeCalculator
    atoms = bulk("{symbol}")
    atoms.calc = CommitteeCalculator.from_folder("{folder}")
    print(atoms.get_potential_energy(), atoms.calc.results["forces_std"])
"""

identifier = click.argument("identifier", metavar="PK")
profile_option = click.option("-p", "--profile", help="AiiDA profile, in place of the default one.")


@click.command("status", help="Say how far an active-learning loop came.")
@identifier
@click.option("-f", "--follow", is_flag=True, help="Show it until the loop has ended.")
@profile_option
def cmd_status(identifier: str, follow: bool, profile: str | None) -> None:
    """Say how far a loop came, once or until it ends."""
    node = load(identifier, profile)
    history = read(node)
    lines = status_lines(history)
    click.echo("\n".join(lines))
    while not history.is_over:
        if hint := daemon_hint(node, history):
            raise click.ClickException(hint)
        if not follow:
            break
        time.sleep(FOLLOW_SECONDS)
        history = read(node)
        lines = show_again(lines, status_lines(history))


@click.command("lineage", help="Say what a committee was made of, down to each DFT calculation.")
@identifier
@click.option("--json", "as_json", is_flag=True, help="Write everything as JSON.")
@profile_option
def cmd_lineage(identifier: str, as_json: bool, profile: str | None) -> None:
    """Say where a committee, or the last one of a loop, comes from."""
    node = load(identifier, profile)
    from aiida_eipnn.reports.lineage import trace

    lineage = trace(node)
    if as_json:
        click.echo(json.dumps(lineage.to_dict(), indent=1, ensure_ascii=False))
    else:
        click.echo("\n".join(lineage_lines(lineage)))


@click.command("report", help="Write the report of a loop as one HTML page.")
@identifier
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="Where to write it.",
)
@profile_option
def cmd_report(identifier: str, output: Path, profile: str | None) -> None:
    """Write the report of a loop: finished, broken or still running."""
    node = load(identifier, profile)
    from aiida_eipnn.reports.report import write_report

    click.echo(f"the report is in {write_report(node, output)}")


@click.command("export", help="Write the committee and the labels of a loop to a folder.")
@identifier
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder, made if it is not there.  [default: export-PK]",
)
@profile_option
def cmd_export(identifier: str, output: Path | None, profile: str | None) -> None:
    """Write the last committee of a loop, its labels, and how to use them."""
    node = load(identifier, profile)
    history = read(node)
    output = output or Path(f"export-{node.pk}")
    from aiida_eipnn.reports.lineage import committee_of
    from aiida_eipnn.reports.report import summary

    committee_of(node).save(output)
    sources = write_dataset(node, output / "dataset.extxyz")
    text = README.format(
        elements="-".join(history.elements),
        uuid=history.uuid,
        summary=" ".join(summary(history)),
        symbol=history.elements[0],
        folder=output,
        sources=f"\n{' ' * 37}".join(sources),
    )
    (output / "README.txt").write_text(text, encoding="utf-8")
    click.echo(f"committee, dataset and README.txt are in {output}")


def load(identifier: str, profile: str | None, hint: str = LOOPS) -> "Node":
    """Return the node with this PK or UUID, after loading the profile.

    Raises
    ------
    ValueError
        If there is no such profile or no such node; ``hint`` says where to look.
    """
    use_profile(profile)
    return load_stored(identifier, hint)


def load_stored(identifier: str, hint: str) -> "Node":
    """Return the node with this PK or UUID of the profile that is loaded; see :func:`load`."""
    from aiida.common.exceptions import MultipleObjectsError, NotExistent
    from aiida.orm import load_node

    try:
        return load_node(identifier)
    except (NotExistent, MultipleObjectsError, ValueError) as error:
        raise ValueError(
            f"there is no node {identifier!r} in this profile ({error}); {hint}"
        ) from error


def use_profile(profile: str | None) -> None:
    """Load a profile, or the default one.

    Raises
    ------
    ValueError
        If there is no such profile.
    """
    from aiida.common.exceptions import ConfigurationError
    from aiida.manage.configuration import load_profile

    try:
        load_profile(profile)
    except ConfigurationError as error:
        raise ValueError(f"no profile to work with: {error}; {profiles_text()}") from error


def profiles_text() -> str:
    """Return which profiles there are, or how to make one."""
    from aiida.common.exceptions import ConfigurationError
    from aiida.manage.configuration import get_config

    try:
        names = get_config().profile_names
    except ConfigurationError:
        names = []
    return f"there are {', '.join(names)}" if names else "`aiida-eipnn setup` makes one"


def read(node: "Node") -> "History":
    """Return the history of a loop as it is now."""
    from aiida_eipnn.reports.history import read_history

    return read_history(node)


def status_lines(history: "History") -> list[str]:
    """Return what to say about a loop, line by line."""
    from aiida_eipnn.reports.report import duration

    lines = [
        f"loop {history.pk}: {history.stage}",
        f"  elapsed      {duration(history.seconds)}",
        f"  iteration    {len(history.iterations)} of at most {history.max_iterations}",
        *(f"  {text}" for text in point_lines(history)),
        *(f"  {text}" for text in failed_lines(history)),
        *(f"  {text}" for text in error_lines(history)),
    ]
    if history.stop_text:
        lines.append(f"  stopped      {history.stop_text}")
    return lines


def point_lines(history: "History") -> list[str]:
    """Return the DFT points by state, of all and of the batch at work."""
    from aiida_eipnn.reports.points import PointState

    if not history.points:
        return ["DFT points   none yet"]
    lines = [f"DFT points   {counts(history, None)}"]
    batch = history.points[-1].batch
    if history.count(PointState.RUNNING, batch) or history.count(PointState.WAITING, batch):
        lines.append(f"  {batch:<11}{counts(history, batch)}")
    return lines


def failed_lines(history: "History") -> list[str]:
    """Return which DFT points have no label, and why."""
    failed = history.failures
    lines = [
        f"  {point.id[:12]} {point.config_type} ({point.batch}): {point.reason}"
        for point in failed[:MOST_FAILED]
    ]
    if len(failed) > MOST_FAILED:
        more = len(failed) - MOST_FAILED
        lines.append(f"  and {more} more: `aiida-eipnn report {history.pk}` lists them all")
    return ["without a label", *lines] if lines else []


def counts(history: "History", batch: str | None) -> str:
    """Return how many DFT points are in each state."""
    from aiida_eipnn.reports.points import PointState

    order = (PointState.DONE, PointState.FAILED, PointState.RUNNING, PointState.WAITING)
    found = {state: history.count(state, batch) for state in order}
    return ", ".join(f"{n} {state}" for state, n in found.items() if n)


def error_lines(history: "History") -> list[str]:
    """Return the errors of the last iteration that has any."""
    from aiida_eipnn.reports.report import both

    if not history.assessed:
        return []
    last = history.assessed[-1]
    rows = (
        ("test error", last.committee),
        ("  scratch", last.scratch),
        ("  best EIP", last.best_eip),
    )
    return [f"{name:<13}{both(errors)}" for name, errors in rows if errors is not None]


def show_again(before: list[str], lines: list[str]) -> list[str]:
    """Replace what is on the terminal; elsewhere add only what is new but the clock."""
    if click.get_text_stream("stdout").isatty():
        click.echo(f"\x1b[{len(before)}F\x1b[0J" + "\n".join(lines))
    else:
        new = [line for line in lines if line not in before and "elapsed" not in line]
        if new:
            click.echo("\n".join(new))
    return lines


def daemon_hint(node: "Node", history: "History") -> str | None:
    """Return how to start the daemon, if a loop waits for it."""
    from aiida.common.exceptions import AiidaException
    from aiida.engine.daemon.client import get_daemon_client

    # Of a loop that has begun only the mark of `--submit` tells whether a script or the daemon
    # runs it.
    if history.state != "created" and not node.base.extras.get(SUBMITTED, False):
        return None
    try:
        if get_daemon_client().is_daemon_running:
            return None
    except AiidaException:
        return "this profile has no daemon, and nothing runs the loop: start it from a script"
    return "the loop waits for the daemon, which is not running: `verdi daemon start`"


def lineage_lines(lineage: "Lineage") -> list[str]:
    """Return the lineage for people."""
    where = f", {lineage.iteration} of loop {lineage.loop_pk}" if lineage.loop_pk else ""
    lines = [f"committee {lineage.committee_pk} ({lineage.committee_uuid}){where}", "", "trainings"]
    lines += [
        f"  {item.stage:<10} calculation {item.pk}  {item.uuid}  seeds {seeds_text(item.seeds)}"
        + heads_text(item.training)
        for item in lineage.stages
    ]
    lines += ["", "EIPs"]
    lines += [
        f"  {eip.name}" + (f"\n    {eip.citation} {eip.doi}".rstrip() if eip.citation else "")
        for eip in lineage.eips
    ]
    lines += ["", f"DFT points in training ({len(lineage.points)})", *point_table(lineage.points)]
    if lineage.test_points:
        n = len(lineage.test_points)
        lines += ["", f"DFT points held out ({n})", *point_table(lineage.test_points)]
    level = {key: value for key, value in lineage.level.items() if key != "pseudos"}
    lines += ["", "level of theory  " + ", ".join(f"{k} {v}" for k, v in level.items())]
    lines += [
        f"pseudopotential  {item.element}: {item.filename} md5 {item.md5}"
        for item in lineage.pseudos
    ]
    lines += [f"code             {item.label} {item.version}".rstrip() for item in lineage.codes]
    lines += ["versions         " + ", ".join(f"{k} {v}" for k, v in lineage.versions.items())]
    return lines


def point_table(points: Any) -> list[str]:
    """Return DFT points as rows of a table."""
    rows = ["  configuration  asked by  type         uncertainty  state    energy (eV)     pw.x"]
    for point in points:
        uncertainty = "" if point.uncertainty is None else f"{point.uncertainty:.3f}"
        energy = "" if point.energy is None else f"{point.energy:.4f}"
        rows.append(
            f"  {point.id[:12]:<13}  {point.batch:<8}  {point.config_type:<11}  {uncertainty:<11}  "
            f"{point.state:<7}  {energy:<14}  {point.pw_pk or point.pw_uuid or ''}"
            + (f"  {point.reason}" if point.reason else "")
        )
    return rows


def seeds_text(seeds: Any) -> str:
    """Return the seeds of the members."""
    return ", ".join(str(seed) for seed in seeds)


def heads_text(training: "Mapping[str, Any]") -> str:
    """Return how many heads were drawn for each member, if any were."""
    n_heads = training.get("n_heads", 0)
    return f"  {n_heads} heads each" if n_heads else ""


def write_dataset(node: "Node", path: Path) -> list[str]:
    """Write the configurations of a loop with every label that there is; return the keys."""
    from aiida_eipnn.reports.points import inputs_of, known_labels, latest, loop_outputs
    from aiida_eipnn.science.configurations import join_configurations
    from aiida_eipnn.science.io import source_key, write_labelled

    inputs, outputs, known = inputs_of(node.pk), loop_outputs(node.pk), known_labels(node.pk)
    sets = [latest(outputs, inputs, "pool"), *(configurations for configurations, _ in known)]
    labels = [*dft_labels([node.value() for _, node in known], outputs)]
    if (eip_labels := latest(outputs, {}, "eip_labels")) is not None:
        labels.append(eip_labels.value())
    write_labelled(path, join_configurations([item.value() for item in sets]), labels)
    return [source_key(str(name)) for part in labels for name in part.sources]


def dft_labels(known: "list[Labels]", outputs: dict[str, Any]) -> "list[Labels]":
    """Return the DFT labels of a loop, those made and those known, as one table if there are any.

    Where a configuration was labelled here and given too, the label made here counts.
    """
    from aiida_eipnn.science.labels import join_labels

    names = ("test_labels", "initial_labels")
    made = [
        outputs[name].value()
        for name in sorted(outputs)
        if name in names or (name.startswith("iterations__") and name.endswith("__labels"))
    ]
    for part in known:
        here = {str(name) for item in made for name in item.ids}
        made.append(part.take([row for row, name in enumerate(part.ids) if str(name) not in here]))
    return [join_labels(made)] if made else []
