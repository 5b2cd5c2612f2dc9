"""CalcJob that labels configurations with empirical interatomic potentials."""

from aiida.engine import CalcJobProcessSpec
from aiida.orm import CalcJobNode, Dict

from aiida_eipnn.calculations import ports
from aiida_eipnn.calculations.base import JobCalculation, LocalCopies, copies_of_inputs
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.jobs.spec import LabelJob


class LabelCalculation(JobCalculation):
    """Label sets of configurations with all EIPs in one job."""

    # Since 2: forces and stress in single precision, energies within robust limits.
    CACHE_VERSION = 2

    @classmethod
    def define(cls, spec: CalcJobProcessSpec) -> None:
        """Define the process specification."""
        super().define(spec)
        spec.inputs["metadata"]["options"]["parser_name"].default = "eipnn.label"
        ports.add_configurations(spec)
        ports.add_exclude(spec)
        ports.add_eips(spec)
        ports.add_dict(
            spec, "parameters", "n_workers, timeout (s) and memory (MB) of an EIP, atomic_energies."
        )
        spec.output("labels", valid_type=LabelsData, help="Energy, forces and stress by each EIP.")
        spec.output(
            "metrics", valid_type=Dict, help="Counts, failures, times and citations by EIP."
        )
        spec.default_output_node = "metrics"
        spec.exit_code(
            410,
            "ERROR_NO_LABELS",
            message="Not one EIP labelled a configuration; the labels output has the reasons.",
        )

    @classmethod
    def is_valid_cache(cls, node: CalcJobNode) -> bool:
        """Do not reuse labels where an EIP gave none at all: it may have been installed since."""
        if not super().is_valid_cache(node):
            return False
        eips = node.outputs.metrics["eips"] if "metrics" in node.outputs else {}
        return all(facts["n_ok"] for facts in eips.values())

    def job(self, max_seconds: float | None) -> LabelJob:
        """Return the job to run."""
        return LabelJob(
            eips=tuple(self.inputs.eips.get_list()),
            max_seconds=max_seconds,
            **self.inputs.parameters.get_dict(),
        )

    def copies(self) -> LocalCopies:
        """Return the files of input nodes that the job reads."""
        return copies_of_inputs(self.inputs)
