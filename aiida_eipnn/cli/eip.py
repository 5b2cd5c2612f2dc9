"""Commands about empirical potentials; none needs a profile."""

import click

from aiida_eipnn.cli.eip_check import cmd_check
from aiida_eipnn.cli.eip_list import cmd_list
from aiida_eipnn.cli.eip_rank import cmd_rank


@click.group("eip")
def cmd_eip() -> None:
    """List, check and rank empirical potentials."""


cmd_eip.add_command(cmd_list)
cmd_eip.add_command(cmd_check)
cmd_eip.add_command(cmd_rank)
