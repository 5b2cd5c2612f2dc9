"""CalcJob that trains a committee in one stage."""

from typing import Any

from aiida.engine import CalcJobProcessSpec, calcfunction
from aiida.orm import Dict, List, to_aiida_type

from aiida_eipnn.calculations import ports
from aiida_eipnn.calculations.base import JobCalculation, LocalCopies, copies_of_inputs
from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.data.selection import SelectionData
from aiida_eipnn.jobs.spec import Stage, TrainJob


class TrainCalculation(JobCalculation):
    """Pre-train on EIP labels, classify EIPs, or fine-tune on DFT labels."""

    @classmethod
    def define(cls, spec: CalcJobProcessSpec) -> None:
        """Define the process specification."""
        super().define(spec)
        spec.inputs["metadata"]["options"]["parser_name"].default = "eipnn.train"
        ports.add_configurations(spec)
        ports.add_labels(spec, "labels", "DFT labels to learn from.")
        ports.add_labels(spec, "eip_labels", "EIP labels to learn from.")
        ports.add_exclude(spec)
        spec.input(
            "selection",
            valid_type=SelectionData,
            required=False,
            help="The EIP chosen for each configuration; its energies become pseudo-labels.",
        )
        spec.input(
            "committee",
            valid_type=CommitteeData,
            required=False,
            help="The committee to start from; without it the networks start from scratch.",
        )
        spec.input(
            "seeds",
            valid_type=List,
            serializer=to_aiida_type,
            validator=validate_seeds,
            help="One seed for each member.",
        )
        ports.add_dict(spec, "network", "Architecture: fields of NetworkParameters.")
        ports.add_training(spec, "training", None)
        ports.add_dict(spec, "classes", "Class labels of EIPs: fields of SelectionParameters.")
        spec.input(
            "pseudo_labels",
            valid_type=Dict,
            required=False,
            serializer=to_aiida_type,
            help=(
                "Fields of LabelModelParameters: stage finetune also learns what EIP and DFT "
                "labels together say of the other configurations; without it, it does not."
            ),
        )
        ports.add_dict(
            spec,
            "parameters",
            "n_workers: members that train side by side; device: cpu, cuda, or auto, the GPU "
            "where there is one; batch_parts: parts that a batch is computed in, for less memory; "
            "batch_edges: neighbour pairs that are computed at once, at most, so that batches of "
            "large configurations are computed in more parts.",
        )
        spec.output("committee", valid_type=CommitteeData, help="The trained committee.")
        spec.output(
            "selection",
            valid_type=SelectionData,
            required=False,
            help="The EIP chosen for each configuration (stage classify).",
        )
        spec.output("metrics", valid_type=Dict, help="Loss and errors by member and epoch.")
        spec.default_output_node = "metrics"

    def job(self, max_seconds: float | None) -> TrainJob:
        """Return the job to run."""
        training = self.inputs.training.get_dict()
        pseudo = self.inputs.get("pseudo_labels")
        return TrainJob(
            stage=Stage(training.pop("stage")),
            seeds=tuple(self.inputs.seeds.get_list()),
            network=self.inputs.network.get_dict(),
            training=training,
            selection=self.inputs.classes.get_dict(),
            judges=tuple(training.pop("judges", ())),
            pseudo_labels=None if pseudo is None else pseudo.get_dict(),
            max_seconds=max_seconds,
            **self.inputs.parameters.get_dict(),
        )

    def copies(self) -> LocalCopies:
        """Return the files of input nodes that the job reads."""
        return copies_of_inputs(self.inputs)


@calcfunction
def halve_batches(parameters: Dict) -> Dict:
    """Return the ``parameters`` of a training that computes parts of batches half as large."""
    content = parameters.get_dict()
    return Dict({**content, "batch_parts": 2 * content.get("batch_parts", 1)})


def validate_seeds(value: List | None, _: Any) -> str | None:
    """Refuse what is no list of distinct whole numbers."""
    seeds = value.get_list() if value is not None else []
    if not seeds or any(not isinstance(seed, int) for seed in seeds):
        return f"give one whole number as seed for each member, got {seeds}"
    if len(set(seeds)) < len(seeds):
        return f"members with equal seeds are one member twice: give distinct seeds, got {seeds}"
    return None
