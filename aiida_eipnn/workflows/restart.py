"""Jobs that go on after an interruption."""

from typing import ClassVar

from aiida.common import AttributeDict
from aiida.engine import (
    BaseRestartWorkChain,
    CalcJob,
    ProcessHandlerReport,
    ProcessSpec,
    process_handler,
    while_,
)
from aiida.orm import CalcJobNode, Int

from aiida_eipnn.calculations.base import JobCalculation
from aiida_eipnn.calculations.label import LabelCalculation
from aiida_eipnn.calculations.train import TrainCalculation

# A long training is cut into slices by the walltime: far more of them than the five of the default.
MAX_SLICES = 20


class JobBaseWorkChain(BaseRestartWorkChain):
    """Run a job of ``eipnn-job`` until it is done, from its checkpoint after each interruption."""

    _process_class: ClassVar[type[CalcJob]]

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        """Define the process specification."""
        super().define(spec)
        spec.expose_inputs(cls._process_class, namespace="job")
        spec.expose_outputs(cls._process_class)
        spec.inputs["max_iterations"].default = lambda: Int(MAX_SLICES)
        spec.outline(
            cls.setup,
            while_(cls.should_run_process)(cls.run_process, cls.inspect_process),
            cls.results,
        )

    def setup(self) -> None:
        """Take over the inputs."""
        super().setup()
        self.ctx.inputs = AttributeDict(self.exposed_inputs(self._process_class, "job"))

    @process_handler(priority=100, exit_codes=[JobCalculation.spec().exit_codes.ERROR_INTERRUPTED])
    def go_on_from_checkpoint(self, node: CalcJobNode) -> ProcessHandlerReport:
        """Start again from where the job was interrupted."""
        self.ctx.inputs.checkpoint = node.outputs.checkpoint
        self.report(
            f"{node.process_label} {node.pk} was interrupted: it goes on from its checkpoint"
        )
        return ProcessHandlerReport(do_break=True)

    @process_handler(priority=90, exit_codes=[JobCalculation.spec().exit_codes.ERROR_KILLED])
    def start_again_once(self, node: CalcJobNode) -> ProcessHandlerReport | None:
        """Start a job again that was killed before it left a checkpoint, but only once."""
        if self.ctx.get("started_again", False):
            return None
        self.ctx.started_again = True
        self.report(f"{node.process_label} {node.pk} was killed: it starts again, once")
        return ProcessHandlerReport(do_break=True)


class LabelBaseWorkChain(JobBaseWorkChain):
    """Label with EIPs; an interruption loses no label that was there."""

    _process_class = LabelCalculation


class TrainBaseWorkChain(JobBaseWorkChain):
    """Train a committee; an interruption loses no epoch that has a checkpoint."""

    _process_class = TrainCalculation
