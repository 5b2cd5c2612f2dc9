"""CalcJob that puts the arrays of a node on a computer, once for all jobs that read them there."""

from aiida.common.datastructures import CalcInfo
from aiida.common.folders import Folder
from aiida.engine import CalcJob, CalcJobProcessSpec
from aiida.orm import ArrayData, ProcessNode


class UploadCalculation(CalcJob):
    """Copy the arrays of a node into a folder of a computer; nothing runs there.

    Jobs on that computer get links to them (input ``uploaded``). That goes for pools and labels of
    EIPs: a loop reads them in every training and evaluation, and its computer may be far away.
    """

    @classmethod
    def define(cls, spec: CalcJobProcessSpec) -> None:
        """Define the process specification."""
        super().define(spec)
        spec.inputs.pop("code")
        spec.inputs["metadata"]["computer"].required = True
        spec.inputs["metadata"]["options"]["resources"].default = {
            "num_machines": 1,
            "num_mpiprocs_per_machine": 1,
        }
        spec.input("node", valid_type=ArrayData, help="What to copy: a pool, labels.")

    @classmethod
    def is_valid_cache(cls, node: ProcessNode) -> bool:
        """Copy anew each time: the folder of another one may be cleaned by now."""
        return False

    def prepare_for_submission(self, folder: Folder) -> CalcInfo:
        """Say what to copy."""
        info = CalcInfo()
        info.skip_submit = True
        info.codes_info = []
        # One by one: AiiDA holds the files of a folder in its memory.
        info.local_copy_list = [
            (self.inputs.node.uuid, name, name)
            for name in self.inputs.node.base.repository.list_object_names()
        ]
        info.retrieve_list = []
        return info
