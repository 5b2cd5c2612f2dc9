"""``aiida-eipnn dataset``: DFT labels into the database through the gate, and out again."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aiida_eipnn.cli.loop import load, profile_option, use_profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from aiida_eipnn.reports.dataset import Dataset, Facts, Shared, Trace
    from aiida_eipnn.reports.points import DftPoint
    from aiida_eipnn.science.configurations import Configurations
    from aiida_eipnn.science.labels import Failure, Labels

DATASETS = "`aiida-eipnn dataset list` shows the datasets"
LEVEL_EXAMPLE = "--level code=vasp --level functional=PBE --level encut=520"
MOST_ROWS = 10
SHORT = 8

dataset_argument = click.argument("identifier", metavar="PK")


@click.group("dataset")
def cmd_dataset() -> None:
    """Import, list, show, export and trace datasets of DFT labels."""


@cmd_dataset.command("import")
@click.argument(
    "path", metavar="[PATH]", required=False, type=click.Path(exists=True, path_type=Path)
)
@click.option(
    "-N",
    "--node",
    "nodes",
    metavar="PK",
    multiple=True,
    help="A PwCalculation, or a work chain that ran some; repeat it for each.",
)
@click.option(
    "-G", "--group", "groups", metavar="LABEL", multiple=True, help="A group of those; repeat it."
)
@click.option(
    "--level",
    "facts",
    metavar="KEY=VALUE",
    multiple=True,
    help="Level of theory; repeat it for code, functional, cutoff, k-points, pseudopotentials.",
)
@click.option("--label", metavar="NAME", help="What to call the dataset.  [default: its source]")
@click.option(
    "--eips", metavar="A,B", help="EIPs for the gate to judge by.  [default: the protocol's]"
)
@click.option("--no-gate", is_flag=True, help="Store the labels as they are, unchecked.")
@profile_option
def cmd_import(
    path: Path | None,
    nodes: tuple[str, ...],
    groups: tuple[str, ...],
    facts: tuple[str, ...],
    label: str | None,
    eips: str | None,
    no_gate: bool,
    profile: str | None,
) -> None:
    """Store DFT labels as a dataset, once the gate has checked them.

    PATH is a file that ASE reads, extended XYZ for instance, with energy (eV, total) and forces
    (eV/Å) of each frame under the bare keys or under dft_energy and dft_forces; its level of theory
    must be given. Or it is output of pw.x: an XML file, standard output, or a folder with many of
    these at any depth. Instead of PATH, -N and -G name calculations of the profile. Runs of pw.x
    say their level of theory themselves; what --level adds must fit.
    """
    if (path is None) == (not nodes and not groups):
        raise ValueError("give a file, a folder, or calculations of the profile (-N, -G): one kind")
    if eips and no_gate:
        raise ValueError("--eips and --no-gate exclude one another: without a gate no EIP is asked")
    if path is None or is_pw_output(path):
        use_profile(profile)
        from aiida_eipnn.cli import dataset_runs

        level = parse_level(facts) if facts else {}
        lines = dataset_runs.import_runs(path, [*nodes], [*groups], level, label, eips, not no_gate)
        click.echo("\n".join(lines))
        return
    level = parse_level(facts)
    use_profile(profile)
    from aiida_eipnn.reports.dataset import datasets_of_file

    # One that was stored unchecked may be checked now.
    known = [item for item in datasets_of_file(path.read_bytes(), level) if no_gate or item.gate]
    if known:
        click.echo("\n".join(known_lines(path.name, known[0])))
        return
    names = check(path, eips) if not no_gate else []
    dataset = store(path, level, names, label or path.name)
    click.echo("\n".join(import_lines(dataset)))


@cmd_dataset.command("list")
@click.option("--element", metavar="SYMBOL", help="Those that hold this element.")
@click.option("--level", metavar="FINGERPRINT", help="Those whose level of theory begins so.")
@click.option(
    "--source", type=click.Choice(["file", "runs", "loop", "dft"]), help="Those from there."
)
@click.option("--iteration", metavar="NAME", help="Those asked for then: test, initial, i001, ...")
@profile_option
def cmd_list(
    element: str | None,
    level: str | None,
    source: str | None,
    iteration: str | None,
    profile: str | None,
) -> None:
    """List the datasets of the profile, the oldest first."""
    use_profile(profile)
    from aiida_eipnn.reports.dataset import find_datasets

    wanted = [
        dataset
        for dataset in find_datasets()
        if (element is None or element in dataset.elements)
        and (level is None or dataset.fingerprint.startswith(level))
        and (source is None or dataset.source.kind == source)
        and (iteration is None or dataset.source.batch == iteration)
    ]
    click.echo("\n".join(table(wanted)) if wanted else "no such dataset")


@cmd_dataset.command("show")
@dataset_argument
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw energies, forces and volumes to a file such as dataset.png.",
)
@profile_option
def cmd_show(identifier: str, plot: Path | None, profile: str | None) -> None:
    """Show statistics, refused labels, level of theory and duplicates."""
    dataset = find(identifier, profile)
    from aiida_eipnn.reports.dataset import read_facts

    facts = read_facts(dataset)
    click.echo("\n".join(show_lines(dataset, facts)))
    if plot is not None:
        draw(facts, plot)
        click.echo(f"\nthe figure is in {plot}")


@cmd_dataset.command("export")
@click.argument("identifiers", metavar="PK...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Extended XYZ file to write.",
)
@profile_option
def cmd_export(identifiers: tuple[str, ...], output: Path, profile: str | None) -> None:
    """Write the labels of datasets of one level of theory to one file."""
    datasets = [find(identifier, profile) for identifier in dict.fromkeys(identifiers)]
    from aiida_eipnn.reports.dataset import join_datasets
    from aiida_eipnn.science.io import write_labelled

    configurations, labels, n_left_out = join_datasets(datasets)
    write_labelled(output, configurations, [labels])
    lines = export_lines(datasets, labels, n_left_out)
    lines.append(f"  sha256       {hashlib.sha256(output.read_bytes()).hexdigest()}")
    click.echo("\n".join([f"{len(labels)} labels are in {output}", *lines]))


@cmd_dataset.command("trace")
@dataset_argument
@click.argument("prefix", metavar="ID")
@profile_option
def cmd_trace(identifier: str, prefix: str, profile: str | None) -> None:
    """Say where one label comes from: a file, or a pw.x run and who asked.

    ID is how the id of the configuration begins; `dataset export` writes the ids.
    """
    dataset = find(identifier, profile)
    from aiida_eipnn.reports.dataset import trace_row

    click.echo("\n".join(trace_lines(trace_row(dataset, prefix))))


def find(identifier: str, profile: str | None) -> "Dataset":
    """Return the dataset with this PK or UUID."""
    node = load(identifier, profile, DATASETS)
    from aiida_eipnn.reports.dataset import find_dataset

    return find_dataset(node)


def parse_level(facts: Sequence[str]) -> dict[str, Any]:
    """Return a level of theory from ``KEY=VALUE``.

    Raises
    ------
    ValueError
        If nothing is said, or not in this form, or two things of one key.
    """
    if not facts:
        raise ValueError(
            "no level of theory: say how these labels were computed, since labels of different "
            f"levels must not be mixed; for instance {LEVEL_EXAMPLE}"
        )
    level: dict[str, Any] = {}
    for fact in facts:
        key, equals, value = fact.partition("=")
        if not (key and equals and value) or key == "fingerprint":
            raise ValueError(
                f"--level {fact}: write KEY=VALUE, for instance {LEVEL_EXAMPLE} (any key but "
                "fingerprint, which is computed)"
            )
        if key in level and level[key] != typed(value):
            raise ValueError(f"--level {key} is given twice, {level[key]} and {value}: give one")
        level[key] = typed(value)
    return level


def typed(text: str) -> bool | int | float | str:
    """Return a number or logical value where the text is one."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        # No name, such as nan or infinity, is taken for a number.
        # Nor is 4_4_4, though Python reads it as 444.
        if "_" not in text and (text[-1].isdigit() or text[-1] == "."):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def check(path: Path, eips: str | None) -> list[str]:
    """Hold the labels of a file against EIPs, before anything is stored; return their names.

    Raises
    ------
    ValueError
        If the whole set has wrong units or signs, or if no EIP can judge.
    """
    from aiida_eipnn.science.io import read_labelled

    return check_labels(path, *read_labelled(path), eips)


def check_labels(
    what: object, configurations: "Configurations", labels: "Labels", eips: str | None
) -> list[str]:
    """Hold labels against EIPs as :func:`check` does; ``what`` is how an error names them."""
    from aiida_eipnn.science.gate import refuse_labels

    names, judged = ask_eips(configurations, eips)
    _, report = refuse_labels(configurations, labels, judged)
    if report.problem:
        raise ValueError(f"{what}: {report.problem}; nothing was stored")
    return names


def is_pw_output(path: Path) -> bool:
    """Return whether a path is a folder or a file that pw.x wrote."""
    if path.is_dir():
        return True
    from aiida_eipnn.science.io import pw_mark

    return pw_mark(path) is not None


def ask_eips(configurations: "Configurations", eips: str | None) -> "tuple[list[str], Labels]":
    """Return the EIPs that the gate judges by, and what they say.

    Raises
    ------
    ValueError
        If there is none, or none gave a label.
    """
    from aiida_eipnn.calculations.dataset import eip_labels
    from aiida_eipnn.cli.eip_rank import default_eips, refuse_silence
    from aiida_eipnn.science.eip.names import split_names

    try:
        names = list(split_names(eips)) if eips else default_eips(configurations.symbols, None)
        labels = eip_labels(configurations, names)
        refuse_silence(labels)
    except ValueError as error:
        raise ValueError(
            f"the gate has no EIP to judge by: {error}; name some with --eips, or import the "
            "labels unchecked with --no-gate"
        ) from error
    return names, labels


def store(path: Path, level: Mapping[str, Any], eips: Sequence[str], label: str) -> "Dataset":
    """Read the file into the database, through the gate if there are EIPs to judge by."""
    from aiida.orm import Dict, SinglefileData

    from aiida_eipnn.calculations.dataset import read_dataset

    made = read_dataset(SinglefileData(path.absolute()), Dict(dict(level)))
    return pass_gate(path, made, eips, label)


def pass_gate(what: object, made: Mapping[str, Any], eips: Sequence[str], label: str) -> "Dataset":
    """Send labels that were read through the gate, if there are EIPs to judge by, and name them."""
    from aiida.orm import List

    from aiida_eipnn.calculations.dataset import label_here
    from aiida_eipnn.calculations.loop import check_given_labels
    from aiida_eipnn.reports.dataset import find_dataset

    configurations, labels = made["configurations"], made["labels"]
    if eips:
        judged = label_here(configurations, List(list(eips)))
        checked, node = check_given_labels.run_get_node(configurations, labels, judged)
        if not node.is_finished_ok:
            raise ValueError(f"{what}: {node.exit_message}; see `verdi process show {node.pk}`")
        labels = checked["labels"]
    labels.label = label
    return find_dataset(labels)


def known_lines(what: str, dataset: "Dataset") -> list[str]:
    """Say which dataset a file, or runs, are already."""
    return [
        f"{what} at this level of theory is dataset {dataset.pk} already; nothing was stored",
        f"  name         {dataset.name}",
        f"  gate         {gate_text(dataset)}",
    ]


def import_lines(dataset: "Dataset") -> list[str]:
    """Say what was imported, what was refused, and what is elsewhere too."""
    return [
        f"dataset {dataset.pk}: {dataset.n_labels} labels of {'-'.join(dataset.elements)} from "
        f"{dataset.source.file_name or dataset.source.text}",
        *fact_lines(dataset),
        *missing_lines(dataset.labels().failures()),
        *unread_lines(dataset.unread),
        *shared_lines(dataset),
    ]


def table(datasets: Sequence["Dataset"]) -> list[str]:
    """Return datasets as rows of a table."""
    rows = [("PK", "name", "source", "elements", "labels", "missing", "level", "checksum", "made")]
    rows += [
        (
            str(item.pk),
            item.name or "-",
            item.source.text,
            "-".join(item.elements),
            str(item.n_labels),
            str(item.n_missing),
            item.fingerprint[:SHORT] or "-",
            item.checksum[:SHORT],
            f"{item.created:%Y-%m-%d}",
        )
        for item in datasets
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def show_lines(dataset: "Dataset", facts: "Facts") -> list[str]:
    """Return what is in a dataset, line by line."""
    name = f": {dataset.name}" if dataset.name else ""
    return [
        f"dataset {dataset.pk}{name}",
        f"  source       {dataset.source.text}",
        f"  created      {dataset.created:%Y-%m-%d %H:%M}",
        f"  elements     {'-'.join(dataset.elements)}",
        f"  labels       {dataset.n_labels} of {dataset.n_labels + dataset.n_missing} rows",
        *fact_lines(dataset),
        "",
        *statistics(facts),
        *missing_lines(dataset.labels().failures()),
        *unread_lines(dataset.unread),
        *shared_lines(dataset),
    ]


def fact_lines(dataset: "Dataset") -> list[str]:
    """Return level of theory, gate, copies and checksum."""
    copies = f"frames left out because they repeat an earlier one: {dataset.n_copies}"
    return [
        f"  level        {level_text(dataset)}",
        f"  gate         {gate_text(dataset)}",
        *([f"  copies       {copies}"] if dataset.n_copies else []),
        f"  checksum     sha256 {dataset.checksum}",
    ]


def level_text(dataset: "Dataset") -> str:
    """Return the level of theory on one line."""
    if not dataset.level:
        return "none declared"
    facts = ", ".join(f"{key} {value}" for key, value in sorted(dataset.level.items()))
    return f"{dataset.fingerprint[:SHORT]} ({facts})"


def gate_text(dataset: "Dataset") -> str:
    """Return what the gate said."""
    return dataset.gate or "not asked"


def statistics(facts: "Facts") -> list[str]:
    """Return the ranges of energies, forces and volumes, of all and by type."""
    groups = {"all": facts, **facts.by_type()}
    width = max(len(name) for name in groups)
    lines = [
        f"  {'':{width}}                   energy (eV/atom)                   force (eV/Å)      "
        "volume (Å³/atom)",
        f"  {'type':{width}}  labels  atoms    lowest    median   highest      rms   largest    "
        "smallest   largest",
    ]
    return lines + [f"  {name:{width}}  {group_text(group)}" for name, group in groups.items()]


def group_text(facts: "Facts") -> str:
    """Return the numbers of one row of the statistics."""
    import numpy as np

    if not len(facts.energy):
        return f"{0:6d}"
    sizes = sorted({int(facts.n_atoms.min()), int(facts.n_atoms.max())})
    atoms = "-".join(map(str, sizes))
    low, median, high = np.quantile(facts.energy, (0.0, 0.5, 1.0))
    rms, volume = np.sqrt(np.mean(facts.forces**2)), facts.volume[np.isfinite(facts.volume)]
    return (
        f"{len(facts.energy):6d}  {atoms:>5}  {low:8.3f}  {median:8.3f}  {high:8.3f}  "
        f"{rms:7.3f}  {facts.forces.max():8.3f}    "
        + (f"{volume.min():8.2f}  {volume.max():8.2f}" if len(volume) else "   not periodic")
    ).rstrip()


def missing_lines(failures: Sequence["Failure"]) -> list[str]:
    """Return which rows have no label and why: a reason that several share once, then the rest."""
    if not failures:
        return []
    shared = Counter(failure.reason for failure in failures)
    first = {failure.reason: failure.id for failure in reversed(failures)}
    lines = [
        f"  {first[reason][:SHORT] if count == 1 else f'{count} rows':<11}  {reason}"
        for reason, count in shared.most_common()
    ]
    more = len(lines) - MOST_ROWS
    rest = [f"  and {more} more reasons"] if more > 0 else []
    return ["", f"rows without a label ({len(failures)})", *lines[:MOST_ROWS], *rest]


def unread_lines(reasons: Mapping[str, str]) -> list[str]:
    """Return which runs of pw.x gave no label and no configuration, and why."""
    if not reasons:
        return []
    lines = [f"  {name}: {reason}" for name, reason in sorted(reasons.items())]
    more = len(lines) - MOST_ROWS
    rest = [f"  and {more} more"] if more > 0 else []
    return ["", f"runs without a label ({len(reasons)})", *lines[:MOST_ROWS], *rest]


def shared_lines(dataset: "Dataset") -> list[str]:
    """Return which geometries other datasets label too."""
    from aiida_eipnn.reports.dataset import find_datasets, shared_geometries

    shared = shared_geometries(dataset, find_datasets())
    if not shared:
        return ["", "geometries in other datasets: none"]
    return ["", "geometries in other datasets", *(shared_text(item) for item in shared)]


def shared_text(shared: "Shared") -> str:
    """Return one line about geometries of another dataset."""
    other = shared.other
    if shared.fault:
        return f"  dataset {other.pk} cannot be read: {shared.fault}"
    level = f"another level of theory ({other.fingerprint[:SHORT] or 'none declared'})"
    if shared.is_same_level:
        difference = f"{1000 * shared.difference:.3g} meV/atom"
        level = f"the same level of theory; energies differ by up to {difference}"
    return f"  {shared.n} in dataset {other.pk} ({other.name or other.source.text}), {level}"


def draw(facts: "Facts", path: Path) -> None:
    """Draw the distributions of energies, forces and volumes, by type."""
    import numpy as np

    from aiida_eipnn.reports.figures import histogram, save_figure

    groups = facts.by_type()
    if not groups:
        raise ValueError("no figure was drawn: not one row of this dataset has a label")

    def paint(axes: "Sequence[Axes]") -> None:
        energy = {name: group.energy for name, group in groups.items()}
        histogram(axes[0], energy, "energy (eV/atom)", "configurations").legend()
        forces = {name: np.asarray(group.forces) for name, group in groups.items()}
        histogram(axes[1], forces, "force (eV/Å)", "atoms")
        volume = {name: group.volume for name, group in groups.items()}
        histogram(axes[2], volume, "volume (Å³/atom)", "configurations")

    save_figure(path, paint, n_axes=3)


def export_lines(datasets: Iterable["Dataset"], labels: "Labels", n_left_out: int) -> list[str]:
    """Say what was exported."""
    from aiida_eipnn.science.labels import checksum

    datasets = list(datasets)
    declared = next((item for item in datasets if item.level), datasets[0])
    lines = [f"  level        {level_text(declared)}"]
    if n_left_out:
        lines.append(
            "  duplicates   labels left out because an earlier dataset has the geometry: "
            f"{n_left_out}"
        )
    if n_missing := sum(item.n_missing for item in datasets):
        lines.append(f"  missing      rows left out because they have no label: {n_missing}")
    silent = [str(item.pk) for item in datasets if not item.level]
    if silent and declared.level:
        lines.append(
            f"  note         {', '.join(silent)} declares no level of theory: that it is the same "
            "was taken for granted"
        )
    return [*lines, f"  checksum     sha256 {checksum(labels)} (labels)"]


def trace_lines(trace: "Trace") -> list[str]:
    """Return where a label comes from, line by line."""
    energy = "none" if trace.energy is None else f"{trace.energy:.6f} eV"
    return [
        f"configuration  {trace.id} ({trace.config_type}, {trace.n_atoms} atoms)",
        f"energy         {energy}",
        *([f"reason         {trace.reason}"] if trace.reason else []),
        f"dataset        {trace.dataset.pk} {trace.dataset.name}".rstrip(),
        f"level          {level_text(trace.dataset)}",
        *origin_lines(trace),
    ]


def origin_lines(trace: "Trace") -> list[str]:
    """Return the file, the run of pw.x, or the labels from outside behind a label."""
    origin, source = trace.origin, trace.origin.source
    lines = []
    if origin.pk != trace.dataset.pk:
        lines.append(f"taken from     dataset {origin.pk} {origin.name}".rstrip())
    if trace.point is not None:
        return lines + run_lines(trace, trace.point)
    if trace.md5:
        stored = f"{trace.file_kind} {source.file_pk}, read by {source.process_pk}"
        lines.append(f"file           {trace.file} md5 {trace.md5} ({stored})")
        return lines
    made = f", made by {trace.process_uuid}" if trace.process_uuid else ""
    return [*lines, f"taken from     labels {trace.stored_pk}, given by the user{made}"]


def run_lines(trace: "Trace", point: "DftPoint") -> list[str]:
    """Return the run of pw.x behind a label, and who asked for it."""
    source = trace.origin.source
    run = f"PwCalculation {point.pw_pk} {point.pw_uuid}" if point.pw_pk else "never ran"
    chain = f"PwBaseWorkChain {point.base_pk}, " if point.base_pk else ""
    lines = [
        f"pw.x           {run}",
        f"code           {trace.code} {trace.code_version}".rstrip(),
    ]
    if source.kind == "runs":
        above = [f"work chain     {point.base_pk}"] if point.base_pk else []
        return [*lines, *above, f"read by        {source.process_pk}"]
    lines += [
        f"work chain     {chain}DftLabelWorkChain {source.process_pk}",
    ]
    if source.loop_pk is None:
        return [*lines, "asked by       nobody: DftLabelWorkChain was run by itself"]
    why = "" if point.uncertainty is None else f", uncertainty {point.uncertainty:.3f} eV/Å"
    return [*lines, f"asked by       {asked_by(source.batch)} of loop {source.loop_pk}{why}"]


def asked_by(batch: str) -> str:
    """Return who asked for a batch of a loop."""
    if batch.startswith("i") and batch[1:].isdigit():
        return f"iteration {int(batch[1:])}"
    return {"test": "the test set", "initial": "the first DFT points"}.get(batch, batch)
