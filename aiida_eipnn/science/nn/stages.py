"""The stages by name; see :mod:`aiida_eipnn.science.nn.stage` for what they have in common."""

from dataclasses import replace

from aiida_eipnn.science.nn.classification import Classification
from aiida_eipnn.science.nn.device import check_mixed_precision
from aiida_eipnn.science.nn.finetuning import Finetuning
from aiida_eipnn.science.nn.pretraining import Pretraining
from aiida_eipnn.science.nn.stage import (
    Stage,
    StageInputs,
    StageSettings,
    check_known,
    network_parameters,
)

STAGES: dict[str, type[Pretraining | Classification | Finetuning]] = {
    "pretrain": Pretraining,
    "classify": Classification,
    "finetune": Finetuning,
}


def prepare(name: str, inputs: StageInputs, settings: StageSettings) -> Stage:
    """Prepare a stage: ``pretrain``, ``classify`` or ``finetune``.

    Raises
    ------
    ValueError
        If labels that the stage needs are missing, if labels are of unknown configurations, if
        the networks cannot compute in the precision that is asked for, or if heads are to be drawn
        in another stage than ``finetune``.
    """
    for what, labels in (("DFT", inputs.labels), ("EIP", inputs.eip_labels)):
        if labels is not None:
            check_known(inputs.configurations, labels, what)
    n_heads = settings.training.n_heads
    if n_heads > 1 and name != "finetune":
        raise ValueError(
            f"n_heads is {n_heads}, but stage {name} trains no head of DFT to draw heads about; "
            "set it in stage finetune"
        )
    parameters = network_parameters(inputs, settings)
    check_mixed_precision(parameters, settings.training.mixed_precision)
    # The networks to start from may be used on, where they are.
    members = tuple(member.on(settings.device) for member in inputs.members)
    stage: Stage = STAGES[name](replace(inputs, members=members), settings)
    return stage
