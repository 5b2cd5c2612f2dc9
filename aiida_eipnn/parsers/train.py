"""Parser of ``eipnn.train``."""

from pathlib import Path

from aiida.engine import CalcJob, ExitCode

from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.data.selection import SelectionData
from aiida_eipnn.jobs import spec as files
from aiida_eipnn.jobs.spec import Stage
from aiida_eipnn.parsers.base import JobParser

# What a scheduler says that killed a job for its memory.
_KILLED_FOR_MEMORY = CalcJob.spec().exit_codes.ERROR_SCHEDULER_OUT_OF_MEMORY.status


class TrainParser(JobParser):
    """Emit the committee, and after classification the selection of EIPs."""

    def _parse_unfinished(self, folder: Path) -> ExitCode:
        """Tell a job that was killed for its memory: in the same memory it would be again."""
        exit_code = super()._parse_unfinished(folder)
        if self.node.exit_status != _KILLED_FOR_MEMORY:
            return exit_code
        return self.exit_codes.ERROR_OUT_OF_MEMORY.format(reason=self.node.exit_message)

    def parse_output(self, output: Path) -> None:
        """Emit the nodes of a finished job."""
        self.out("committee", CommitteeData.from_folder(output / files.COMMITTEE))
        if self.node.inputs.training["stage"] == Stage.CLASSIFY:
            self.out("selection", SelectionData.from_folder(output / files.SELECTION))
