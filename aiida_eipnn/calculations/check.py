"""CalcJob that looks at the place where jobs run."""

from aiida.engine import CalcJobProcessSpec
from aiida.orm import Dict

from aiida_eipnn.calculations.base import JobCalculation, LocalCopies
from aiida_eipnn.jobs.spec import CheckJob


class CheckCalculation(JobCalculation):
    """Say which packages, KIM models and GPUs a job finds."""

    @classmethod
    def define(cls, spec: CalcJobProcessSpec) -> None:
        """Define the process specification."""
        super().define(spec)
        spec.inputs["metadata"]["options"]["parser_name"].default = "eipnn.check"
        spec.inputs["metadata"]["options"]["max_wallclock_seconds"].default = 600
        spec.output("metrics", valid_type=Dict, help="Versions, KIM models, GPUs, cores.")
        spec.default_output_node = "metrics"

    def job(self, max_seconds: float | None) -> CheckJob:
        """Return the job to run."""
        return CheckJob(max_seconds=max_seconds)

    def copies(self) -> LocalCopies:
        """Return the files of input nodes that the job reads: none."""
        return []
