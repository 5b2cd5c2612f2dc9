"""``aiida-eipnn setup``: a profile that runs the launch scripts on this machine."""

import warnings
from pathlib import Path

import click


@click.command("setup")
@click.option("--profile-name", default="eipnn", show_default=True, help="Profile to make.")
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
def cmd_setup(
    profile_name: str,
    pseudo_family: str,
    pseudo_folder: Path | None,
    pw: str | None,
    job: str | None,
) -> None:
    """Make a profile with codes and pseudopotentials.

    The profile keeps its data in the folder that AIIDA_PATH names, needs no services, and has the
    codes pw@localhost and eipnn-job@localhost. What is there already stays as it is.
    """
    with warnings.catch_warnings():
        # Importing AiiDA makes its folder and warns of it, which is what the user asked for.
        warnings.filterwarnings("ignore", message="Creating AiiDA configuration folder")
        from aiida_eipnn.cli import environment, pseudos

    pw_path, job_path = environment.find_pw(pw), environment.find_job(job)
    _tell(f"profile {profile_name}", made=environment.ensure_profile(profile_name))
    _tell(f"computer {environment.COMPUTER}", made=environment.ensure_computer())
    made = environment.ensure_code(
        "pw", pw_path, plugin=environment.PW_PLUGIN, prepend=environment.pw_prepend()
    )
    _tell(f"code pw@{environment.COMPUTER} ({pw_path})", made=made)
    made = environment.ensure_code("eipnn-job", job_path, prepend=environment.ONE_THREAD)
    _tell(f"code eipnn-job@{environment.COMPUTER} ({job_path})", made=made)
    made = pseudos.ensure_family(pseudo_family, pseudos.read_table(), folder=pseudo_folder)
    _tell(f"pseudopotentials {pseudo_family}", made=made)


def _tell(what: str, *, made: bool) -> None:
    click.echo(f"{'made' if made else 'there already':13}  {what}")
