"""The command line: `aiida-eipnn`."""

from aiida_eipnn.cli.commands import main

__all__ = ("main",)
