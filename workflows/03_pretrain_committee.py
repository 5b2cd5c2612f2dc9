"""Pre-train a committee on EIP labels.

verdi run workflows/03_pretrain_committee.py --pool PK --eip-labels PK
"""

from aiida_eipnn.cli import launch
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.workflows.active_learning import ActiveLearningWorkChain
from aiida_eipnn.workflows.builder import train_builder

options = launch.parser(__doc__)
launch.add_job_code(options)
launch.add_protocol(options)
options.add_argument("--pool", required=True, help="PK of the configurations")
options.add_argument("--eip-labels", required=True, help="PK of their EIP labels")
given = options.parse_args()

inputs = launch.checked(
    ActiveLearningWorkChain.get_protocol_inputs,
    given.protocol,
    launch.overrides_of(given.overrides),
)
builder = train_builder(inputs, launch.code_of(given.job_code), "pretrain")
builder.job.configurations = {"pool": launch.node_of(given.pool, ConfigurationsData)}
builder.job.eip_labels = {"pool": launch.node_of(given.eip_labels, LabelsData)}
trained = launch.launch(builder, given)
if not given.submit:
    print(f"committee {trained.outputs.committee.pk}")
