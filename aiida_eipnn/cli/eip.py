"""Commands about empirical potentials; none needs a profile."""

import click

from aiida_eipnn.cli.eip_rank import cmd_rank


@click.group("eip")
def cmd_eip() -> None:
    """Rank empirical potentials."""


cmd_eip.add_command(cmd_rank)
