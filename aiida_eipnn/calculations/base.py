"""What the four CalcJobs of ``eipnn-job`` share."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from aiida.common.datastructures import CalcInfo, CodeInfo
from aiida.common.folders import Folder
from aiida.engine import CalcJob, CalcJobProcessSpec
from aiida.orm import AbstractCode, ArrayData, Dict, RemoteData, load_node

from aiida_eipnn.data.committee import CONFIG, WEIGHTS, CommitteeData
from aiida_eipnn.jobs import spec as files
from aiida_eipnn.jobs.spec import Job
from aiida_eipnn.jobs.stop import HEED_SIGNALS

LocalCopies = list[tuple[str, str, str]]
RemoteCopies = list[tuple[str, str, str]]

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
        spec.input(
            "uploaded",
            valid_type=dict,
            required=False,
            non_db=True,
            help="What need not be sent again: by any name, the uuid of a remote folder that "
            "eipnn.upload made of an input. The graph shows the inputs themselves.",
        )
        spec.input(
            files.PARENT_FOLDER,
            valid_type=RemoteData,
            required=False,
            help="The folder of an interrupted job of the same inputs, on the same computer: its "
            "checkpoint is taken over there.",
        )
        spec.output(
            "checkpoint",
            valid_type=Dict,
            required=False,
            help="Where the job was interrupted, the checksums of what tells how far its "
            "checkpoint is. The checkpoint itself stays in the remote folder.",
        )
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
        spec.exit_code(
            403,
            "ERROR_INPUTS_GONE",
            message="Inputs that were on that computer already are gone: {reason}",
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
        info.prepend_text = HEED_SIGNALS
        info.local_copy_list, info.remote_symlink_list = split_copies(
            self.copies(), folders_of(self.inputs.get("uploaded"))
        )
        if files.PARENT_FOLDER in self.inputs:
            info.remote_copy_list = [copy_of_checkpoint(self.inputs[files.PARENT_FOLDER])]
        info.retrieve_list = [files.STATUS, files.LOG]
        # The parser makes nodes of these; kept as raw files too they would be there twice. Of the
        # checkpoint only what tells how far it is comes home: a restart takes it from there.
        info.retrieve_temporary_list = [
            files.OUTPUT,
            *((pattern, ".", pattern.count("/") + 1) for pattern in files.CHECKPOINT_MARKS),
        ]
        return info

    def _max_seconds(self) -> float | None:
        walltime = self.inputs.metadata.options.get("max_wallclock_seconds")
        if walltime is None:
            return None
        return max(WALLTIME_FRACTION * walltime - WALLTIME_MARGIN, 0.5 * walltime)


def copies_of_arrays(node: ArrayData, folder: str) -> LocalCopies:
    """Return the copy that puts the arrays of ``node`` into ``folder``."""
    # AiiDA takes half the time for a folder that it takes for its files one by one.
    return [(node.uuid, ".", folder)]


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


def copy_of_checkpoint(node: RemoteData) -> tuple[str, str, str]:
    """Return the copy, on the computer itself, of what an interrupted job left in its folder."""
    path = PurePosixPath(node.get_remote_path(), files.CHECKPOINT)
    return (node.computer.uuid, str(path), files.CHECKPOINT)


def folders_of(uploaded: Mapping[str, str] | None) -> dict[str, RemoteData]:
    """Return the remote folders with what was uploaded, by the uuid of the node that it is of."""
    folders = [load_node(uuid) for uuid in (uploaded or {}).values()]
    return {folder.creator.inputs.node.uuid: folder for folder in folders}


def split_copies(
    copies: LocalCopies, folders: Mapping[str, RemoteData]
) -> tuple[LocalCopies, RemoteCopies]:
    """Return what to send, and which files to link to where they are on the computer already."""
    links = [
        (
            folder.computer.uuid,
            str(PurePosixPath(folder.get_remote_path(), name)),
            f"{target}/{name}",
        )
        for uuid, _, target in copies
        if (folder := folders.get(uuid))
        for name in load_node(uuid).base.repository.list_object_names()
    ]
    return [copy for copy in copies if copy[0] not in folders], links


def copies_of_inputs(inputs: Any) -> LocalCopies:
    """Return the copies of every input node that the jobs read under one and the same name."""
    copies: LocalCopies = []
    for name in (files.CONFIGURATIONS, files.LABELS, files.EIP_LABELS, files.EXCLUDE):
        copies += copies_of_namespace(inputs.get(name), name)
    if files.SELECTION in inputs:
        copies += copies_of_arrays(inputs[files.SELECTION], files.SELECTION)
    if files.COMMITTEE in inputs:
        copies += copies_of_committee(inputs[files.COMMITTEE])
    return copies
