"""Fine-tune a committee on DFT labels; without a pre-trained one, train it from scratch.

verdi run workflows/04_finetune_committee.py --pool PK --labels PK --committee PK \
  --eip-labels PK
"""

from aiida_eipnn.cli import launch
from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.workflows.builder import TRAIN
from aiida_eipnn.workflows.restart import TrainBaseWorkChain

options = launch.parser(__doc__)
launch.add_job_code(options)
launch.add_protocol(options)
launch.add_options(options)
options.add_argument("--pool", required=True, help="PK of the configurations")
options.add_argument("--labels", required=True, help="PK of their DFT labels")
options.add_argument("--committee", help="PK of the pre-trained committee")
options.add_argument("--eip-labels", help="PK of the EIP labels that hold what it learnt from them")
given = options.parse_args()

data = {
    "configurations": {"pool": launch.node_of(given.pool, ConfigurationsData)},
    "labels": {"dft": launch.node_of(given.labels, LabelsData)},
}
if given.eip_labels:
    data["eip_labels"] = {"eips": launch.node_of(given.eip_labels, LabelsData)}
if given.committee:
    data["committee"] = launch.node_of(given.committee, CommitteeData)
builder = launch.checked(
    TrainBaseWorkChain.get_builder_from_protocol,
    launch.code_of(given.job_code),
    "finetune" if given.committee else "scratch",
    data,
    given.protocol,
    launch.overrides_of(given.overrides),
    launch.options_for(TRAIN, given),
)
trained = launch.launch(builder, given)
if not given.submit:
    print(f"committee {trained.outputs.committee.pk}")
