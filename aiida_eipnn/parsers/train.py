"""Parser of ``eipnn.train``."""

from pathlib import Path

from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.data.selection import SelectionData
from aiida_eipnn.jobs import spec as files
from aiida_eipnn.jobs.spec import Stage
from aiida_eipnn.parsers.base import JobParser


class TrainParser(JobParser):
    """Emit the committee, and after classification the selection of EIPs."""

    def parse_output(self, output: Path) -> None:
        """Emit the nodes of a finished job."""
        self.out("committee", CommitteeData.from_folder(output / files.COMMITTEE))
        if self.node.inputs.training["stage"] == Stage.CLASSIFY:
            self.out("selection", SelectionData.from_folder(output / files.SELECTION))
