"""Write the report of an active-learning loop, finished or not.

verdi run workflows/05_report.py PK --output report.html
"""

import argparse
from pathlib import Path

from aiida.orm import WorkChainNode

from aiida_eipnn.cli import launch
from aiida_eipnn.reports.report import write_report

options = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
options.add_argument("loop", help="PK of the loop")
options.add_argument("--output", type=Path, default=Path("report.html"), help="where to write it")
given = options.parse_args()

write_report(launch.node_of(given.loop, WorkChainNode), given.output)
print(f"the report is in {given.output}")
