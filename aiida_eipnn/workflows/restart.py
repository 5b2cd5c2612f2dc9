"""Jobs that go on after an interruption."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from aiida.common import AttributeDict
from aiida.engine import (
    BaseRestartWorkChain,
    CalcJob,
    ProcessBuilder,
    ProcessHandlerReport,
    ProcessSpec,
    process_handler,
    while_,
)
from aiida.orm import AbstractCode, CalcJobNode, Dict, Int
from aiida_quantumespresso.workflows.protocols.utils import ProtocolMixin

from aiida_eipnn.calculations.base import JobCalculation
from aiida_eipnn.calculations.label import LabelCalculation
from aiida_eipnn.calculations.train import TrainCalculation, halve_batches
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.jobs.spec import PARENT_FOLDER
from aiida_eipnn.workflows.builder import PROTOCOLS, label_inputs, train_inputs
from aiida_eipnn.workflows.folders import clean_folders
from aiida_eipnn.workflows.once import SubmitsOnce

# A long training is cut into slices by the walltime: far more of them than the five of the default.
MAX_SLICES = 20

# A job that dies more often than this does so by itself, not because its machine went down.
MAX_DEATHS = 2

# Where a batch in so many parts does not fit, it is not the batch that takes the memory.
MAX_BATCH_PARTS = 32

# What a job leaves that died before its first checkpoint, or before it wrote anything at all.
DEATHS = (
    JobCalculation.spec().exit_codes.ERROR_NO_STATUS,
    JobCalculation.spec().exit_codes.ERROR_KILLED,
    JobCalculation.spec().exit_codes.ERROR_NO_RETRIEVED_FOLDER,
    JobCalculation.spec().exit_codes.ERROR_SCHEDULER_NODE_FAILURE,
)


def died(node: CalcJobNode) -> bool:
    """Return whether a job of ``eipnn-job`` was killed and left nothing to go on from."""
    return node.exit_status in {code.status for code in DEATHS}


def lacked_inputs(node: CalcJobNode) -> bool:
    """Return whether inputs were gone that a job of ``eipnn-job`` should find on its computer."""
    gone: int = JobCalculation.spec().exit_codes.ERROR_INPUTS_GONE.status
    return bool(node.exit_status == gone)


def was_interrupted(node: CalcJobNode) -> bool:
    """Return whether a job of ``eipnn-job`` left a checkpoint to go on from."""
    interrupted: int = JobCalculation.spec().exit_codes.ERROR_INTERRUPTED.status
    return bool(node.exit_status == interrupted)


class JobBaseWorkChain(SubmitsOnce, BaseRestartWorkChain):
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
    def go_on_from_checkpoint(self, node: CalcJobNode) -> ProcessHandlerReport | None:
        """Start again from where the job was interrupted, as long as that leads anywhere."""
        reached = node.outputs.checkpoint.get_dict()
        if self.ctx.get("reached") == reached:
            self.report(f"{node.process_label} {node.pk} came no further than its checkpoint")
            return None
        self._go_on_from(node)
        self.report(
            f"{node.process_label} {node.pk} was interrupted: it goes on from its checkpoint"
        )
        return ProcessHandlerReport(do_break=True)

    @process_handler(priority=95, exit_codes=[JobCalculation.spec().exit_codes.ERROR_INPUTS_GONE])
    def send_inputs_again(self, node: CalcJobNode) -> ProcessHandlerReport:
        """Start a job again with all of its inputs: those on its computer are gone."""
        self.ctx.inputs.pop("uploaded", None)
        self.report(f"{node.process_label} {node.pk} lacked inputs: they are sent with it now")
        return ProcessHandlerReport(do_break=True)

    @process_handler(priority=90, exit_codes=list(DEATHS))
    def start_again(self, node: CalcJobNode) -> ProcessHandlerReport | None:
        """Start a job again that died before it left a checkpoint, but not for ever."""
        self.ctx.deaths = self.ctx.get("deaths", 0) + 1
        if self.ctx.deaths > MAX_DEATHS:
            return None
        self.report(f"{node.process_label} {node.pk} was killed: it starts again")
        return ProcessHandlerReport(do_break=True)

    def _go_on_from(self, node: CalcJobNode) -> None:
        """Let the next job take over the checkpoint where it is."""
        self.ctx.reached = node.outputs.checkpoint.get_dict()
        self.ctx.inputs[PARENT_FOLDER] = node.outputs.remote_folder

    def on_terminated(self) -> None:
        """Remove the folders of the jobs where that was asked for, and where all went well."""
        # BaseRestartWorkChain would also remove what somebody may want to look into or go on from.
        super(BaseRestartWorkChain, self).on_terminated()
        if self.inputs.clean_workdir and self.node.is_finished_ok:
            clean_folders(self)


class LabelBaseWorkChain(ProtocolMixin, JobBaseWorkChain):
    """Label with EIPs; an interruption loses no label that was there."""

    _process_class = LabelCalculation

    @classmethod
    def get_protocol_filepath(cls) -> Path:
        """Return the file that defines the protocols."""
        return PROTOCOLS

    @classmethod
    def get_builder_from_protocol(
        cls,
        code: AbstractCode,
        configurations: ConfigurationsData,
        eips: Sequence[str] = (),
        protocol: str | None = None,
        overrides: Mapping[str, Any] | Path | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> ProcessBuilder:
        """Return a builder that labels ``configurations`` with ``eips``, or with the protocol's."""
        inputs = cls.get_protocol_inputs(protocol, overrides)
        elements = configurations.base.attributes.get("elements")
        builder = cls.get_builder()
        builder.job = {
            "configurations": {"pool": configurations},
            **label_inputs(inputs, code, elements, eips, options or {}),
        }
        return builder


class TrainBaseWorkChain(ProtocolMixin, JobBaseWorkChain):
    """Train a committee; an interruption loses no epoch that has a checkpoint."""

    _process_class = TrainCalculation

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        """Define the process specification."""
        super().define(spec)
        spec.exit_code(
            430,
            "ERROR_OUT_OF_MEMORY",
            message="The memory does not do, though batches are computed in {n_parts} parts: ask "
            "the scheduler for more, or set a smaller `n_workers`, `width` or `cutoff`. The last "
            "job said: {reason}",
        )

    @process_handler(
        priority=110,
        exit_codes=[
            JobCalculation.spec().exit_codes.ERROR_OUT_OF_MEMORY,
            JobCalculation.spec().exit_codes.ERROR_SCHEDULER_OUT_OF_MEMORY,
        ],
    )
    def go_on_with_half_the_batch(self, node: CalcJobNode) -> ProcessHandlerReport:
        """Compute each batch in twice as many parts: in less memory, with the same result."""
        n_parts = node.inputs.parameters.get_dict().get("batch_parts", 1)
        if n_parts >= MAX_BATCH_PARTS:
            error = self.exit_codes.ERROR_OUT_OF_MEMORY
            return ProcessHandlerReport(
                do_break=True,
                exit_code=error.format(n_parts=n_parts, reason=node.exit_message),
            )
        self.ctx.inputs.parameters = halve_batches(node.inputs.parameters)
        if "checkpoint" in node.outputs:
            self._go_on_from(node)
        self.report(
            f"{node.process_label} {node.pk} ran out of memory: batches in {2 * n_parts} parts now"
        )
        return ProcessHandlerReport(do_break=True)

    @classmethod
    def get_protocol_filepath(cls) -> Path:
        """Return the file that defines the protocols."""
        return PROTOCOLS

    @classmethod
    def get_builder_from_protocol(
        cls,
        code: AbstractCode,
        training: str,
        data: Mapping[str, Any],
        protocol: str | None = None,
        overrides: Mapping[str, Any] | Path | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> ProcessBuilder:
        """Return a builder of a training with the settings of a protocol.

        Parameters
        ----------
        code
            Runs ``eipnn-job``.
        training
            ``pretrain``, ``classify``, ``finetune`` or ``scratch``.
        data
            What it learns from, by the names of the inputs of ``eipnn.train``: configurations,
            and labels, eip_labels, committee, selection, exclude as the stage needs them.
        protocol, overrides, options
            As for the loop.
        """
        inputs = cls.get_protocol_inputs(protocol, overrides)
        builder = cls.get_builder()
        builder.job = {
            "training": Dict(inputs[training]),
            **data,
            **train_inputs(inputs, code, options or {}),
        }
        return builder
