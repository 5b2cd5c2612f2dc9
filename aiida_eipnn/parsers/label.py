"""Parser of ``eipnn.label``."""

from pathlib import Path

from aiida.engine import ExitCode

from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.jobs import spec as files
from aiida_eipnn.parsers.base import JobParser


class LabelParser(JobParser):
    """Emit the EIP labels, those that failed with their reasons among them."""

    def parse_output(self, output: Path) -> ExitCode | None:
        """Emit the nodes of a finished job."""
        labels = LabelsData.from_folder(output / files.LABELS, level={})
        self.out("labels", labels)
        if labels.base.attributes.get("n_labels") == 0:
            return self.exit_codes.ERROR_NO_LABELS
        return None
