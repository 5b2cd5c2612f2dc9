"""Label configurations with empirical interatomic potentials, all in one job.

verdi run workflows/01_label_with_eips.py                  (a pool of silicon is made first)
verdi run workflows/01_label_with_eips.py --pool pool.xyz --eip ID --eip ID
"""

import argparse
from pathlib import Path

from aiida_eipnn.calculations.explore import ExploreCalculation
from aiida_eipnn.cli import launch
from aiida_eipnn.workflows.active_learning import ActiveLearningWorkChain
from aiida_eipnn.workflows.builder import EXPLORE, LABEL, explore_inputs
from aiida_eipnn.workflows.restart import LabelBaseWorkChain

options = launch.parser(__doc__)
launch.add_job_code(options)
launch.add_protocol(options)
launch.add_options(options)
options.add_argument("--pool", type=Path, help="extended XYZ file with the configurations")
options.add_argument("--eip", action="append", default=[], help="name of an EIP; repeat for each")
given = options.parse_args()

code, overrides = launch.code_of(given.job_code), launch.overrides_of(given.overrides)
if given.pool:
    pool = launch.configurations_of(given.pool)
else:
    inputs = ActiveLearningWorkChain.get_protocol_inputs(given.protocol, overrides)
    explore = ExploreCalculation.get_builder()
    explore._update(
        explore_inputs(
            inputs, code, launch.silicon(), given.eip, launch.options_for(EXPLORE, given)
        )
    )
    # Here and now, also with --submit: the labels need the pool.
    pool = launch.launch(explore, argparse.Namespace(submit=False)).outputs.pool
builder = launch.checked(
    LabelBaseWorkChain.get_builder_from_protocol,
    code,
    pool,
    given.eip,
    given.protocol,
    overrides,
    launch.options_for(LABEL, given),
)
labelled = launch.launch(builder, given)
if not given.submit:
    labels = labelled.outputs.labels
    print(
        f"pool {pool.pk}, EIP labels {labels.pk}: {labels.base.attributes.get('n_labels')} labels"
    )
