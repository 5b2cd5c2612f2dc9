"""Label configurations with empirical interatomic potentials, all in one job.

verdi run workflows/01_label_with_eips.py                  (a pool of silicon is made first)
verdi run workflows/01_label_with_eips.py --pool pool.xyz --eip ID --eip ID
"""

from pathlib import Path

from aiida_eipnn.cli import launch
from aiida_eipnn.workflows.active_learning import ActiveLearningWorkChain
from aiida_eipnn.workflows.builder import explore_builder, label_builder

options = launch.parser(__doc__)
launch.add_job_code(options)
launch.add_protocol(options)
options.add_argument("--pool", type=Path, help="extended XYZ file with the configurations")
options.add_argument("--eip", action="append", default=[], help="KIM id; repeat for each EIP")
given = options.parse_args()

code = launch.code_of(given.job_code)
inputs = launch.checked(
    ActiveLearningWorkChain.get_protocol_inputs,
    given.protocol,
    launch.overrides_of(given.overrides),
)
if given.pool:
    pool = launch.configurations_of(given.pool)
else:
    given_submit, given.submit = given.submit, False  # the labels need the pool
    explored = launch.launch(
        launch.checked(explore_builder, inputs, code, launch.silicon(), given.eip), given
    )
    pool, given.submit = explored.outputs.pool, given_submit
labelled = launch.launch(launch.checked(label_builder, inputs, code, pool, given.eip), given)
if not given.submit:
    labels = labelled.outputs.labels
    print(
        f"pool {pool.pk}, EIP labels {labels.pk}: {labels.base.attributes.get('n_labels')} labels"
    )
