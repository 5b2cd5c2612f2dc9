"""The reports of a running loop as short lines with the time: one line per event.

AiiDA logs what every work chain reports, with its PK, class and step, and prints all of it. Of a
loop that labels hundreds of configurations that is thousands of lines. Here only the loop itself
is heard, and its DFT points are counted.
"""

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from aiida.common.log import AIIDA_LOGGER, LOG_LEVEL_REPORT
from aiida.orm import load_node
from aiida.orm.utils.log import DBLogHandler

from aiida_eipnn.science.convergence import StopCriteria

# How `Process.report` begins a message: [pk|class|step]: text
REPORT = re.compile(r"^\[(?P<pk>[\w-]+)\|(?P<process>\w+)\|\w+\]: (?P<text>.*)$", re.DOTALL)

# How the work chains of this package say it.
ASKED = re.compile(r"^DFT labels: (?P<n>\d+) configurations? \((?P<batch>\w+)\)$")
POINT = re.compile(r"^DFT (?P<outcome>labelled|failed)\b.* \d+ of (?P<n>\d+) in this lane$")
ITERATION = re.compile(r"^iteration (?P<number>\d+):")

LOOP, LANE, LABELS = "ActiveLearningWorkChain", "DftLaneWorkChain", "DftLabelWorkChain"
JOBS = ("LabelBaseWorkChain", "TrainBaseWorkChain")
# Of a restarted job only an interruption is news; that it was launched is not.
JOB_NEWS = re.compile(r"interrupted|was killed")


class ProgressHandler(logging.Handler):
    """Write one short line for each event of a loop.

    Parameters
    ----------
    stream
        Where to write; standard output by default.
    clock
        Returns the time in s; the first line counts from the making of the handler.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(LOG_LEVEL_REPORT)
        self._stream = stream
        self._clock = clock
        self._start = clock()
        self._batch = ""
        self._asked: int | None = None
        self._done = self._failed = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line of a record, if it is worth one."""
        try:
            if (line := self.line(record)) is not None:
                stream = self._stream or sys.stdout
                stream.write(f"[{clock_text(self._clock() - self._start)}] {line}\n")
                stream.flush()
        except Exception:
            self.handleError(record)

    def line(self, record: logging.LogRecord) -> str | None:
        """Return what to say about a record, or ``None``."""
        found = REPORT.match(record.getMessage())
        if found is None:
            return None
        process, text = found["process"], found["text"]
        if process == LOOP:
            return self._loop_line(found["pk"], text)
        if process == LANE:
            return self._point_line(text)
        if process == LABELS or (process in JOBS and JOB_NEWS.search(text)):
            return text
        return None

    def _loop_line(self, pk: str, text: str) -> str:
        if asked := ASKED.match(text):
            self._batch, self._asked = asked["batch"], int(asked["n"])
            self._done = self._failed = 0
            return f"DFT labels ({self._batch}): {self._asked} configurations"
        if iteration := ITERATION.match(text):
            number = iteration["number"]
            return text.replace(number, f"{number} of at most {max_iterations(int(pk))}", 1)
        return text

    def _point_line(self, text: str) -> str | None:
        point = POINT.match(text)
        if point is None:
            return text
        if point["outcome"] == "labelled":
            self._done += 1
        else:
            self._failed += 1
        where = f" ({self._batch})" if self._batch else ""
        total = f" of {self._asked}" if self._asked is not None else ""
        failed = f", {self._failed} failed" if self._failed else ""
        return f"DFT labels{where}: {self._done}{total} done{failed}"


def max_iterations(pk: int) -> int:
    """Return how many iterations the loop ``pk`` may take."""
    criteria = load_node(pk).inputs["stop"].get_dict()
    return StopCriteria.from_dict(criteria).max_iterations


def clock_text(seconds: float) -> str:
    """Return a time span as ``mm:ss``, from an hour on as ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


@contextmanager
def show_progress(stream: TextIO | None = None) -> Iterator[ProgressHandler]:
    """Show the progress of loops that run inside the context, in place of AiiDA's own lines.

    AiiDA's database log stays complete: ``verdi process report`` has all of it. On the terminal
    warnings and errors remain, but those of single jobs, which the loop counts as failed.

    Parameters
    ----------
    stream
        Where to write; standard output by default.
    """
    # Loading the storage sets up logging anew, and would undo what is done here.
    from aiida.manage import get_manager

    get_manager().get_profile_storage()
    handler = ProgressHandler(stream)
    consoles = [item for item in AIIDA_LOGGER.handlers if not isinstance(item, DBLogHandler)]
    for console in consoles:
        console.addFilter(is_for_the_terminal)
    AIIDA_LOGGER.addHandler(handler)
    try:
        yield handler
    finally:
        AIIDA_LOGGER.removeHandler(handler)
        for console in consoles:
            console.removeFilter(is_for_the_terminal)


def is_for_the_terminal(record: logging.LogRecord) -> bool:
    """Return whether a record is a warning or an error, and not about one single job."""
    return record.levelno >= logging.WARNING and not record.name.endswith("CalcJobNode")
