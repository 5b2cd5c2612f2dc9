"""Commands about empirical potentials; none needs a profile."""

import click

from aiida_eipnn.cli.eip_check import cmd_check
from aiida_eipnn.cli.eip_list import cmd_list


@click.group("eip")
def cmd_eip() -> None:
    """List and check empirical potentials."""


cmd_eip.add_command(cmd_list)
cmd_eip.add_command(cmd_check)
