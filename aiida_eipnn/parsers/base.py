"""What the parsers of ``eipnn-job`` share."""

import hashlib
import json
from pathlib import Path
from typing import Any

from aiida.engine import ExitCode
from aiida.orm import Dict
from aiida.parsers import Parser

from aiida_eipnn.data.finite import finite
from aiida_eipnn.jobs import spec as files
from aiida_eipnn.jobs.spec import State


class JobParser(Parser):
    """Turn the status and the arrays of a job into nodes.

    The parser trusts ``status.json`` and the scheduler's exit code; it reads no log. A subclass
    says which nodes the output folder makes (:meth:`parse_output`).
    """

    # As JobCalculation.CACHE_VERSION, for what is parsed out of equal results.
    CACHE_VERSION = 1

    def parse_output(self, output: Path) -> ExitCode | None:
        """Emit the nodes of a finished job."""
        raise NotImplementedError

    def parse(self, retrieved_temporary_folder: str, **_: Any) -> ExitCode | None:
        """Parse the outcome of one job."""
        folder = Path(retrieved_temporary_folder)
        try:
            status = json.loads(self.retrieved.base.repository.get_object_content(files.STATUS))
            state = State(status["state"])
        except (OSError, ValueError, KeyError):
            return self._scheduler_or(self.exit_codes.ERROR_NO_STATUS)
        if state is State.FAILED:
            return self.exit_codes.ERROR_JOB_FAILED.format(reason=status["reason"])
        if state is State.OUT_OF_MEMORY:
            self._attach_checkpoint(folder)
            return self.exit_codes.ERROR_OUT_OF_MEMORY.format(reason=status["reason"])
        if state is State.INPUTS_GONE:
            return self.exit_codes.ERROR_INPUTS_GONE.format(reason=status["reason"])
        if state is State.DONE:
            return self._parse_done(folder / files.OUTPUT)
        return self._parse_unfinished(folder)

    def _parse_done(self, output: Path) -> ExitCode | None:
        try:
            self.out("metrics", Dict(finite(json.loads((output / files.METRICS).read_text()))))
            return self.parse_output(output)
        except (OSError, ValueError, KeyError) as error:
            return self.exit_codes.ERROR_OUTPUT.format(reason=str(error))

    def _parse_unfinished(self, folder: Path) -> ExitCode:
        """Attach the checkpoint, where there is one: it decides whether a restart makes sense."""
        if not self._attach_checkpoint(folder):
            return self._scheduler_or(self.exit_codes.ERROR_KILLED)
        return self.exit_codes.ERROR_INTERRUPTED

    def _attach_checkpoint(self, folder: Path) -> bool:
        """Say how far the checkpoint is, which stays where the job was; False without one."""
        marks = sorted(path for pattern in files.CHECKPOINT_MARKS for path in folder.glob(pattern))
        if not marks:
            return False
        checksums = {
            path.relative_to(folder).as_posix(): hashlib.blake2b(
                path.read_bytes(), digest_size=16
            ).hexdigest()
            for path in marks
        }
        self.out("checkpoint", Dict({"checksums": checksums}))
        return True

    def _scheduler_or(self, exit_code: ExitCode) -> ExitCode:
        """Prefer what the scheduler found (walltime, memory, node failure) to our own guess."""
        if self.node.exit_status:
            return ExitCode(self.node.exit_status, self.node.exit_message, invalidates_cache=True)
        return exit_code
