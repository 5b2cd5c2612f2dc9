"""Parser of ``eipnn.check``."""

from pathlib import Path

from aiida_eipnn.parsers.base import JobParser


class CheckParser(JobParser):
    """Emit what was found, which is all in the metrics."""

    def parse_output(self, output: Path) -> None:
        """Emit the nodes of a finished job."""
