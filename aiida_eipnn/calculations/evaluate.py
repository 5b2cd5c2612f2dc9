"""CalcJob that predicts labels and uncertainties with a committee."""

from aiida.engine import CalcJobProcessSpec
from aiida.orm import Dict

from aiida_eipnn.calculations import ports
from aiida_eipnn.calculations.base import JobCalculation, LocalCopies, copies_of_inputs
from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.data.predictions import PredictionsData
from aiida_eipnn.jobs.spec import EvaluateJob


class EvaluateCalculation(JobCalculation):
    """Predict energies, forces, stresses and the disagreement of the members."""

    @classmethod
    def define(cls, spec: CalcJobProcessSpec) -> None:
        """Define the process specification."""
        super().define(spec)
        spec.inputs["metadata"]["options"]["parser_name"].default = "eipnn.evaluate"
        ports.add_configurations(spec)
        ports.add_exclude(spec)
        spec.input("committee", valid_type=CommitteeData, help="The committee to ask.")
        ports.add_dict(
            spec,
            "parameters",
            "batch_size: configurations predicted at once, at most; batch_edges: neighbour pairs "
            "computed at once, at most; device.",
        )
        spec.output("predictions", valid_type=PredictionsData, help="What the committee says.")
        spec.output("metrics", valid_type=Dict, help="Counts and times.")
        spec.default_output_node = "metrics"

    def job(self, max_seconds: float | None) -> EvaluateJob:
        """Return the job to run."""
        return EvaluateJob(max_seconds=max_seconds, **self.inputs.parameters.get_dict())

    def copies(self) -> LocalCopies:
        """Return the files of input nodes that the job reads."""
        return copies_of_inputs(self.inputs)
