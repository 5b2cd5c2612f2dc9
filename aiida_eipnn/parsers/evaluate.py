"""Parser of ``eipnn.evaluate``."""

from pathlib import Path

from aiida_eipnn.data.predictions import PredictionsData
from aiida_eipnn.jobs import spec as files
from aiida_eipnn.parsers.base import JobParser


class EvaluateParser(JobParser):
    """Emit the predictions."""

    def parse_output(self, output: Path) -> None:
        """Emit the nodes of a finished job."""
        self.out("predictions", PredictionsData.from_folder(output / files.PREDICTIONS))
