"""The group of commands, each imported when it runs, so that ``--help`` is instant."""

import importlib
import sys
from typing import Any

import click

from aiida_eipnn import __version__

COMMANDS = {
    "setup": ("aiida_eipnn.cli.setup:cmd_setup", "Make a profile with codes and pseudopotentials."),
    "portable-code": (
        "aiida_eipnn.cli.portable:cmd_portable_code",
        "Make a code that brings eipnn-job along.",
    ),
    "eip": ("aiida_eipnn.cli.eip:cmd_eip", "List, check and rank empirical potentials."),
    "dataset": (
        "aiida_eipnn.cli.dataset:cmd_dataset",
        "Import, list, show, export and trace datasets of DFT labels.",
    ),
    "recover": (
        "aiida_eipnn.cli.recover:cmd_recover",
        "Start the daemon after an accident, so that all goes on.",
    ),
    "status": ("aiida_eipnn.cli.loop:cmd_status", "Say how far an active-learning loop came."),
    "lineage": (
        "aiida_eipnn.cli.loop:cmd_lineage",
        "Say what a committee was made of, down to each DFT calculation.",
    ),
    "report": ("aiida_eipnn.cli.loop:cmd_report", "Write the report of a loop as one HTML page."),
    "export": (
        "aiida_eipnn.cli.loop:cmd_export",
        "Write the committee and the labels of a loop to a folder.",
    ),
}


class LazyGroup(click.Group):
    """A group that knows the names and first lines of its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command ``cmd_name``."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from :data:`COMMANDS`, which imports none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what a user can put right is one line, not a traceback."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # A reader that closed the pipe, as `head` does, is click's to handle.
            expected = isinstance(error, _user_errors()) and not isinstance(error, BrokenPipeError)
            if ctx.params["traceback"] or not expected:
                raise
            raise click.ClickException(" ".join(str(error).split())) from error


def _user_errors() -> tuple[type[Exception], ...]:
    """Return the errors that say what the user should do: ours, the system's and AiiDA's."""
    aiida = sys.modules.get("aiida.common.exceptions")
    return (ValueError, OSError, *((aiida.AiidaException,) if aiida else ()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--traceback", is_flag=True, help="Show where an error came from.")
@click.version_option(__version__, prog_name="aiida-eipnn")
def main(traceback: bool) -> None:
    """Active learning of interatomic potentials, informed by empirical potentials."""
