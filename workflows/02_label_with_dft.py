"""Label configurations with pw.x, a few at a time; what fails is recorded.

verdi run workflows/02_label_with_dft.py --pool pool.xyz
verdi run workflows/02_label_with_dft.py --pool PK --n 10 --seed 1
verdi run workflows/02_label_with_dft.py --pool PK --dry-run
"""

from pathlib import Path

from aiida.orm import Int

from aiida_eipnn.calculations.loop import choose_random, draw_choice
from aiida_eipnn.cli import launch
from aiida_eipnn.cli.dry_run import describe_labelling
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.workflows.builder import DFT
from aiida_eipnn.workflows.label_dft import DftLabelWorkChain, slots_needed

options = launch.parser(__doc__)
launch.add_pw_code(options)
launch.add_protocol(options)
launch.add_options(options)
options.add_argument("--pool", required=True, help="extended XYZ file, or PK of configurations")
options.add_argument("--n", type=int, help="label so many of them, drawn by chance (all)")
options.add_argument("--seed", type=int, default=0, help="seed of that draw")
options.add_argument(
    "--dry-run", action="store_true", help="say what would be done, and what it would cost"
)
given = options.parse_args()

path = Path(given.pool)
if path.exists():
    pool = launch.configurations_of(path)
else:
    pool = launch.node_of(given.pool, ConfigurationsData)
code = launch.code_of(given.pw_code)
n_chosen = len(pool) if given.n is None else given.n
if given.dry_run:
    choice = launch.checked(draw_choice, pool, n_chosen, given.seed)
else:
    choice = launch.checked(choose_random, pool, Int(n_chosen), Int(given.seed))
builder = launch.checked(
    DftLabelWorkChain.get_builder_from_protocol,
    code,
    pool,
    choice,
    given.protocol,
    launch.overrides_of(given.overrides),
    launch.options_for(DFT, given),
)
if given.dry_run:
    print(launch.checked(describe_labelling, builder))
    raise SystemExit(0)
labelled = launch.launch(builder, given, slots=slots_needed(builder.n_lanes.value))
if not given.submit:
    labels = labelled.outputs.labels
    print(f"pool {pool.pk}, DFT labels {labels.pk}")
    for failure in labels.value().failures():
        print(f"failed: {failure.id}: {failure.reason}")
