"""``eipnn-job``: run the job that ``job.json`` describes, in the folder where it lies."""

import argparse
import logging
import sys
from pathlib import Path

from aiida_eipnn import __version__
from aiida_eipnn.jobs.run import run_job
from aiida_eipnn.jobs.spec import JOB, State


def main(arguments: list[str] | None = None) -> int:
    """Run one job; exit 0 unless it failed."""
    parser = argparse.ArgumentParser(prog="eipnn-job", description=__doc__)
    parser.add_argument("job", nargs="?", type=Path, default=Path(JOB), help="the job description")
    parser.add_argument("--version", action="version", version=__version__)
    job = parser.parse_args(arguments).job
    logging.basicConfig(
        level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s"
    )
    return 1 if run_job(job.resolve().parent) is State.FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
