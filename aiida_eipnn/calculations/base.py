"""What the four CalcJobs of ``eipnn-job`` share."""

from pathlib import PurePosixPath
from typing import Any

from aiida.common.datastructures import CalcInfo, CodeInfo
from aiida.common.folders import Folder
from aiida.engine import CalcJob, CalcJobProcessSpec
from aiida.orm import AbstractCode, ArrayData, FolderData

from aiida_eipnn.data.committee import CONFIG, WEIGHTS, CommitteeData
from aiida_eipnn.jobs import spec as files
from aiida_eipnn.jobs.spec import Job

LocalCopies = list[tuple[str, str, str]]

# The job stops this early, so that its results come home before the scheduler kills it.
WALLTIME_FRACTION = 0.95
WALLTIME_MARGIN = 60.0


class JobCalculation(CalcJob):
    """A CalcJob that runs ``eipnn-job`` in a folder of arrays.

    A subclass says what the job is (:meth:`job`) and which nodes it reads (:meth:`copies`).
    """

    # The version of this package is not in the hash: raise this when equal inputs give new results.
    CACHE_VERSION = 1

    @classmethod
    def define(cls, spec: CalcJobProcessSpec) -> None:
        """Define the process specification."""
        super().define(spec)
        spec.input("code", valid_type=AbstractCode, help="The executable eipnn-job.")
        spec.inputs["metadata"]["options"]["resources"].default = {
            "num_machines": 1,
            "num_mpiprocs_per_machine": 1,
        }
        spec.inputs["metadata"]["options"]["withmpi"].default = False
        spec.inputs["metadata"]["options"]["max_wallclock_seconds"].default = 12 * 3600
        spec.exit_code(
            300,
            "ERROR_NO_STATUS",
            message="The job left no readable status.json: look at the scheduler's output, and "
            "whether eipnn-job starts on that computer.",
            invalidates_cache=True,
        )
        spec.exit_code(
            302,
            "ERROR_OUTPUT",
            message="The results of the job are missing or unreadable: {reason}",
            invalidates_cache=True,
        )
        spec.exit_code(
            310,
            "ERROR_JOB_FAILED",
            message="The job failed: {reason}",
            # A package that was missing, memory or disk that ran out: all may be mended by now.
            invalidates_cache=True,
        )
        spec.exit_code(
            400,
            "ERROR_INTERRUPTED",
            message="The job was interrupted and left a checkpoint: start it again from there.",
            invalidates_cache=True,
        )
        spec.exit_code(
            401,
            "ERROR_KILLED",
            message="The job was killed before it left a checkpoint.",
            invalidates_cache=True,
        )
        spec.exit_code(
            402,
            "ERROR_OUT_OF_MEMORY",
            message="The memory did not do: {reason}",
            invalidates_cache=True,
        )

    def job(self, max_seconds: float | None) -> Job:
        """Return the job to run."""
        raise NotImplementedError

    def copies(self) -> LocalCopies:
        """Return the files of input nodes that the job reads."""
        raise NotImplementedError

    def prepare_for_submission(self, folder: Folder) -> CalcInfo:
        """Write ``job.json`` and say what to copy, run and bring home."""
        with folder.open(files.JOB, "w") as stream:
            stream.write(files.job_to_json(self.job(self._max_seconds())))
        code_info = CodeInfo()
        code_info.code_uuid = self.inputs.code.uuid
        code_info.cmdline_params = [files.JOB]
        code_info.stdout_name = files.LOG
        code_info.join_files = True
        info = CalcInfo()
        info.codes_info = [code_info]
        info.local_copy_list = self.copies()
        info.retrieve_list = [files.STATUS, files.LOG]
        # The parser makes nodes of these; kept as raw files too they would be there twice.
        info.retrieve_temporary_list = [files.OUTPUT, files.CHECKPOINT]
        return info

    def _max_seconds(self) -> float | None:
        walltime = self.inputs.metadata.options.get("max_wallclock_seconds")
        if walltime is None:
            return None
        return max(WALLTIME_FRACTION * walltime - WALLTIME_MARGIN, 0.5 * walltime)


def copies_of_arrays(node: ArrayData, folder: str) -> LocalCopies:
    """Return the copies that put the arrays of ``node`` into ``folder``."""
    return [
        (node.uuid, f"{name}.npy", str(PurePosixPath(folder, f"{name}.npy")))
        for name in node.get_arraynames()
    ]


def copies_of_namespace(nodes: Any, folder: str) -> LocalCopies:
    """Return the copies that put each node of a namespace into a folder of its own."""
    return [
        copy
        for key, node in sorted(dict(nodes or {}).items())
        for copy in copies_of_arrays(node, f"{folder}/{key}")
    ]


def copies_of_committee(node: CommitteeData) -> LocalCopies:
    """Return the copies that put a committee where a job reads it."""
    return [(node.uuid, name, f"{files.COMMITTEE}/{name}") for name in (CONFIG, WEIGHTS)]


def copies_of_checkpoint(node: FolderData) -> LocalCopies:
    """Return the copy that puts a checkpoint where a job reads it."""
    return [(node.uuid, ".", files.CHECKPOINT)]


def copies_of_inputs(inputs: Any) -> LocalCopies:
    """Return the copies of every input node that the jobs read under one and the same name."""
    copies: LocalCopies = []
    for name in (files.CONFIGURATIONS, files.LABELS, files.EIP_LABELS, files.EXCLUDE):
        copies += copies_of_namespace(inputs.get(name), name)
    if files.SELECTION in inputs:
        copies += copies_of_arrays(inputs[files.SELECTION], files.SELECTION)
    if files.COMMITTEE in inputs:
        copies += copies_of_committee(inputs[files.COMMITTEE])
    if files.CHECKPOINT in inputs:
        copies += copies_of_checkpoint(inputs[files.CHECKPOINT])
    return copies
