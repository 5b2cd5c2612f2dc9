"""Active learning: EIPs label a pool, DFT labels a few points of it, a committee learns from both.

verdi run workflows/active_learning.py --protocol demo
verdi run workflows/active_learning.py --protocol fast --pool pool.xyz --eip ID --eip ID
verdi run workflows/active_learning.py --protocol fast --stored labelled.xyz  # without pw.x
verdi run workflows/active_learning.py --continue PK --overrides more.yaml
verdi run -- workflows/active_learning.py --help
"""

from pathlib import Path

from aiida.orm import StructureData, WorkChainNode
from ase.io import read

from aiida_eipnn.cli import launch
from aiida_eipnn.cli.dry_run import describe_loop
from aiida_eipnn.reports.report import write_report
from aiida_eipnn.workflows.active_learning import ActiveLearningWorkChain
from aiida_eipnn.workflows.builder import Codes, Start
from aiida_eipnn.workflows.label_dft import slots_needed

# What a loop that goes on has of its own.
OWN = ("structure", "pool", "stored", "eip", "protocol", "code", "options")

options = launch.parser(__doc__)
launch.add_pw_code(options)
launch.add_job_code(options)
launch.add_places(options)
launch.add_protocol(options)
options.set_defaults(protocol=None)  # demo, but --continue takes none
options.add_argument("--structure", type=Path, help="seed structure (any format of ASE)")
options.add_argument("--pool", type=Path, help="extended XYZ file with a pool of your own")
options.add_argument("--known", help="DFT labels you have: extended XYZ file, or PK of a dataset")
options.add_argument(
    "--stored",
    help="DFT labels to look up: extended XYZ file, or PK of a dataset; pw.x is not run",
)
options.add_argument("--eip", action="append", default=[], help="name of an EIP; repeat for each")
options.add_argument(
    "--continue", dest="loop", metavar="PK", help="go on where this loop ended or broke"
)
options.add_argument(
    "--lost", action="store_true", help="--continue, though the loop seems to run: nothing runs it"
)
options.add_argument("--report", type=Path, help="write the report here when it is done")
options.add_argument(
    "--again", action="store_true", help="run it even if a loop with these inputs has finished"
)
options.add_argument(
    "--dry-run", action="store_true", help="say what would be done, and what DFT would cost"
)
given = options.parse_args()

known = launch.labelled_of(given.known) if given.known else (None, None)
if known[1] is not None and (note := launch.undeclared(given.known, known[1])):
    print(note)
overrides = launch.overrides_of(given.overrides)
if given.loop:
    launch.refuse_beside(given, "--continue", *OWN)
    earlier = launch.node_of(given.loop, WorkChainNode)
    builder = launch.checked(
        ActiveLearningWorkChain.get_builder_continue, earlier, overrides, *known, given.lost
    )
else:
    if given.structure:
        structures = [StructureData(ase=launch.checked(read, given.structure))]
    else:
        structures = launch.silicon() if not (given.pool or given.stored) else []
    stages = launch.stage_codes(given.code)
    stored = launch.labelled_of(given.stored) if given.stored else (None, None)
    builder = launch.checked(
        lambda: ActiveLearningWorkChain.get_builder_from_protocol(
            Codes(
                job=launch.code_of(given.job_code),
                pw=None if given.stored or "dft" in stages else launch.code_of(given.pw_code),
                stages=stages,
            ),
            Start(
                structures=structures,
                pool=launch.configurations_of(given.pool) if given.pool else stored[0],
                eips=given.eip,
                known_configurations=known[0],
                known_labels=known[1],
                stored_labels=stored[1],
            ),
            protocol=given.protocol or "demo",
            overrides=overrides,
            options=launch.overrides_of(given.options, "options"),
        )
    )
if given.dry_run:
    print(launch.checked(describe_loop, builder))
    raise SystemExit(0)
loop = None if given.again else launch.finished_before(builder)
if loop is not None:
    print(f"loop {loop.pk} finished with these inputs: nothing to do (--again runs it anew)")
else:
    slots = slots_needed(builder.dft.n_lanes.value)
    loop = launch.launch(builder, given, slots=slots, must_finish=False)
if given.report and not given.submit:
    write_report(loop, given.report)  # of a broken loop too: it says how far it came
    print(f"the report is in {given.report}")
if loop.is_failed or loop.is_excepted:
    raise SystemExit(1)
