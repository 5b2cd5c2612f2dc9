"""``eipnn-job``: run the job that ``job.json`` describes, in the folder where it lies."""

import argparse
import logging
import os
import sys
from pathlib import Path

from aiida_eipnn import __version__
from aiida_eipnn.jobs.place import place_of
from aiida_eipnn.jobs.run import run_job
from aiida_eipnn.jobs.spec import JOB, State


def main(arguments: list[str] | None = None) -> int:
    """Run one job; exit 0 unless it failed.

    One of several processes that torchrun, mpirun or srun started takes its part in a training;
    any other job is that of the first one.
    """
    parser = argparse.ArgumentParser(prog="eipnn-job", description=__doc__)
    parser.add_argument("job", nargs="?", type=Path, default=Path(JOB), help="the job description")
    parser.add_argument("--version", action="version", version=__version__)
    job = parser.parse_args(arguments).job
    place = place_of(os.environ)
    level = logging.INFO if place.is_first else logging.WARNING
    logging.basicConfig(
        level=level, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s"
    )
    ended_well = run_job(job.resolve().parent, place) in (State.DONE, State.INTERRUPTED)
    return 0 if ended_well else 1


if __name__ == "__main__":
    sys.exit(main())
