"""CalcJob that makes a pool of configurations."""

from aiida.engine import CalcJobProcessSpec
from aiida.orm import Dict, List, Str, to_aiida_type

from aiida_eipnn.calculations import ports
from aiida_eipnn.calculations.base import JobCalculation, LocalCopies, copies_of_inputs
from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.jobs.spec import ExploreJob


class ExploreCalculation(JobCalculation):
    """Rattle, strain, cut and heat the seed configurations into a pool."""

    @classmethod
    def define(cls, spec: CalcJobProcessSpec) -> None:
        """Define the process specification."""
        super().define(spec)
        spec.inputs["metadata"]["options"]["parser_name"].default = "eipnn.explore"
        ports.add_configurations(spec)
        spec.input(
            "recipes",
            valid_type=List,
            serializer=to_aiida_type,
            help="What to make: a list of {config_type, count, settings of that type}.",
        )
        ports.add_seed(spec)
        spec.input(
            "eip",
            valid_type=Str,
            serializer=to_aiida_type,
            required=False,
            help="The EIP that drives molecular dynamics.",
        )
        spec.input(
            "committee",
            valid_type=CommitteeData,
            required=False,
            help="The committee that drives molecular dynamics, in place of the EIP.",
        )
        ports.add_dict(
            spec,
            "parameters",
            "n_workers: runs of molecular dynamics side by side; device: cpu, cuda, or auto, for "
            "the committee.",
        )
        spec.output("pool", valid_type=ConfigurationsData, help="The pool.")
        spec.output("metrics", valid_type=Dict, help="Counts, notes and times.")
        spec.default_output_node = "metrics"

    def job(self, max_seconds: float | None) -> ExploreJob:
        """Return the job to run."""
        return ExploreJob(
            recipes=tuple(self.inputs.recipes.get_list()),
            seed=self.inputs.seed.value,
            eip=self.inputs.eip.value if "eip" in self.inputs else None,
            max_seconds=max_seconds,
            **self.inputs.parameters.get_dict(),
        )

    def copies(self) -> LocalCopies:
        """Return the files of input nodes that the job reads."""
        return copies_of_inputs(self.inputs)
