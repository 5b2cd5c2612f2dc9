"""Pre-train a committee on EIP labels.

verdi run workflows/03_pretrain_committee.py --pool PK --eip-labels PK
"""

from aiida_eipnn.cli import launch
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.workflows.builder import TRAIN
from aiida_eipnn.workflows.restart import TrainBaseWorkChain

options = launch.parser(__doc__)
launch.add_job_code(options)
launch.add_protocol(options)
launch.add_options(options)
options.add_argument("--pool", required=True, help="PK of the configurations")
options.add_argument("--eip-labels", required=True, help="PK of their EIP labels")
given = options.parse_args()

data = {
    "configurations": {"pool": launch.node_of(given.pool, ConfigurationsData)},
    "eip_labels": {"pool": launch.node_of(given.eip_labels, LabelsData)},
}
builder = launch.checked(
    TrainBaseWorkChain.get_builder_from_protocol,
    launch.code_of(given.job_code),
    "pretrain",
    data,
    given.protocol,
    launch.overrides_of(given.overrides),
    launch.options_for(TRAIN, given),
)
trained = launch.launch(builder, given)
if not given.submit:
    print(f"committee {trained.outputs.committee.pk}")
