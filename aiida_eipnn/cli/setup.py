"""``aiida-eipnn setup``: a profile that runs the launch scripts, here or on another computer."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from aiida_eipnn.cli.stage_needs import Finding

STAGES = ("explore", "label", "dft", "train", "evaluate")
PROFILE = "eipnn"
# Each way to call the command has options that mean nothing in the other.
FOR_PROFILE = ("pseudo_family", "pseudo_folder")
FOR_COMPUTER = (
    "pw_label", "job_label", "pw_prepend_text", "job_prepend_text", "options", "stages", "eips",
    "gpu", "n_lanes", "wait",
)  # fmt: skip


@click.command("setup")
@click.option(
    "--profile-name",
    default=PROFILE,
    show_default="eipnn; with --computer AiiDA's default",
    help="Profile to make, or that has the computer.",
)
@click.option(
    "--pseudo-family",
    metavar="LABEL",
    default="PseudoDojo/0.4/PBE/SR/standard",
    show_default=True,
    help="Family of pseudopotentials to make.",
)
@click.option(
    "--pseudo-folder",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Take the UPF files from here instead of fetching them with pip.",
)
@click.option("--pw", metavar="PATH", help="pw.x to use.  [default: the one on PATH]")
@click.option("--job", metavar="PATH", help="eipnn-job to use.  [default: beside this Python]")
@click.option(
    "--computer",
    metavar="LABEL",
    help="Register codes on this computer of a profile of yours and check what stages need there.",
)
@click.option("--pw-label", default="pw", show_default=True, help="--computer: label of pw.x.")
@click.option(
    "--job-label", default="eipnn-job", show_default=True, help="--computer: label of eipnn-job."
)
@click.option(
    "--pw-prepend-text", metavar="TEXT", help="--computer: before pw.x, such as 'module load qe'."
)
@click.option("--job-prepend-text", metavar="TEXT", help="--computer: the same before eipnn-job.")
@click.option(
    "--options",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="--computer: YAML with metadata.options of all jobs, and of stages below their names.",
)
@click.option(
    "--stage",
    "stages",
    multiple=True,
    type=click.Choice(STAGES),
    help="--computer: check this stage; repeat for each.  [default: all]",
)
@click.option(
    "--eip", "eips", metavar="NAME", multiple=True, help="--computer: an EIP that is to label."
)
@click.option("--gpu", is_flag=True, help="--computer: networks are to run on a GPU.")
@click.option(
    "--lanes", "n_lanes", type=click.IntRange(1), default=2, show_default=True,
    help="--computer: DFT runs at a time, for the slots of the daemon.",
)  # fmt: skip
@click.option(
    "--wait", type=click.FloatRange(0, min_open=True), default=30, show_default=True,
    metavar="MINUTES", help="--computer: end jobs that have not ended by then.",
)  # fmt: skip
def cmd_setup(computer: str | None, **given: Any) -> None:
    """Make a profile with codes and pseudopotentials.

    The profile keeps its data in the folder that AIIDA_PATH names, needs no services, and has the
    codes pw@localhost and eipnn-job@localhost. What is there already stays as it is.

    With --computer nothing of this is made. The codes are registered on that computer, where --pw
    and --job are paths there; short jobs then go through its scheduler, as those of a loop will,
    and say of each stage what is missing and how to get it there. The exit code is 1 if a stage
    cannot run.
    """
    context = click.get_current_context()
    explicit = {
        name
        for name in context.params
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    }
    if refused := sorted(explicit & set(FOR_PROFILE if computer else FOR_COMPUTER)):
        names = ", ".join(_option(context, name) for name in refused)
        raise click.UsageError(f"{names}: only {'without' if computer else 'with'} --computer")
    with warnings.catch_warnings():
        # Importing AiiDA makes its folder and warns of it, which is what the user asked for.
        warnings.filterwarnings("ignore", message="Creating AiiDA configuration folder")
        if computer is None:
            make_profile(given)
        else:
            if "profile_name" not in explicit:
                given["profile_name"] = None
            set_up_computer(computer, given)


def _option(context: click.Context, name: str) -> str:
    return next(item.opts[0] for item in context.command.params if item.name == name)


def make_profile(given: dict[str, Any]) -> None:
    """Make the profile, its computer, its codes and its pseudopotentials."""
    from aiida_eipnn.cli import environment, pseudos

    profile, family = given["profile_name"], given["pseudo_family"]
    pw_path, job_path = environment.find_pw(given["pw"]), environment.find_job(given["job"])
    _tell(f"profile {profile}", made=environment.ensure_profile(profile))
    _tell(f"computer {environment.COMPUTER}", made=environment.ensure_computer())
    made = environment.ensure_code(
        "pw", pw_path, plugin=environment.PW_PLUGIN, prepend=environment.pw_prepend()
    )
    _tell(f"code pw@{environment.COMPUTER} ({pw_path})", made=made)
    made = environment.ensure_code("eipnn-job", job_path, prepend=environment.ONE_THREAD)
    _tell(f"code eipnn-job@{environment.COMPUTER} ({job_path})", made=made)
    made = pseudos.ensure_family(family, pseudos.read_table(), folder=given["pseudo_folder"])
    _tell(f"pseudopotentials {family}", made=made)


def set_up_computer(label: str, given: dict[str, Any]) -> None:
    """Register the codes of a computer, and check what stages need there."""
    from aiida.manage.configuration import load_profile

    from aiida_eipnn.cli import computer as there
    from aiida_eipnn.cli.launch import overrides_of

    load_profile(given["profile_name"])
    check = there.Check(
        stages=[stage for stage in STAGES if not given["stages"] or stage in given["stages"]],
        options=overrides_of(given["options"], "options"),
        eips=given["eips"],
        gpu=given["gpu"],
        n_lanes=given["n_lanes"],
        seconds=60 * given["wait"],
    )
    computer = there.find_computer(label)
    connection = there.check_connection(computer)
    codes = {}
    for kind, name in ((there.PW, "pw"), (there.JOB, "job")):
        code, made = there.ensure_code(
            kind, given[f"{name}_label"], computer, given[name], given[f"{name}_prepend_text"]
        )
        codes[kind] = code
        if code is not None:
            _tell(f"code {code.full_label}", made=made)
    rows = [(there.COMPUTER, finding) for finding in connection]
    _show(rows)
    if all(finding.state != "missing" for finding in connection):
        found = there.check_computer(computer, codes, check, click.echo)
        for row in found:
            _show([row])
            rows.append(row)
    rows.append((there.DAEMON, there.check_daemon(check.n_lanes)))
    _show(rows[-1:])
    _conclude(label, rows, check.stages)


def _show(rows: "Iterable[tuple[str, Finding]]") -> None:
    for part, finding in rows:
        click.echo(f"{part:9} {finding.state:8} {finding.text}")
        if finding.remedy:
            click.echo(f"{'':18} -> {finding.remedy}")


def _conclude(label: str, rows: "Iterable[tuple[str, Finding]]", stages: Iterable[str]) -> None:
    broken = {part for part, finding in rows if finding.state == "missing"}
    # Where the computer itself lacks something, nothing runs.
    able = [stage for stage in stages if stage not in broken and "computer" not in broken]
    unable = [stage for stage in stages if stage not in able]
    if not unable:
        click.echo(f"{label} can run {', '.join(able)}")
        return
    can = f"{label} can run {', '.join(able)}; " if able else ""
    click.echo(f"{can}{label} cannot run {', '.join(unable)}")
    raise SystemExit(1)


def _tell(what: str, *, made: bool) -> None:
    click.echo(f"{'made' if made else 'there already':13}  {what}")
