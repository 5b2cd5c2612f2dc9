"""Parser of ``eipnn.explore``."""

from pathlib import Path

from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.jobs import spec as files
from aiida_eipnn.parsers.base import JobParser


class ExploreParser(JobParser):
    """Emit the pool."""

    def parse_output(self, output: Path) -> None:
        """Emit the nodes of a finished job."""
        self.out("pool", ConfigurationsData.from_folder(output / files.CONFIGURATIONS))
