"""DFT labels: a few lanes, each of which runs pw.x on one configuration after another.

A step of a work chain that waits for many children keeps a slot of the daemon for each of them
and for itself, so that a wide fan-out can lock up for good. Lanes keep a fixed number of runs
going, whatever the number of configurations.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aiida.common import AttributeDict
from aiida.common.links import LinkType
from aiida.engine import (
    ExitCode,
    ProcessBuilder,
    ProcessHandlerReport,
    ProcessSpec,
    ToContext,
    append_,
    process_handler,
    while_,
)
from aiida.orm import (
    AbstractCode,
    Bool,
    CalcJobNode,
    Data,
    Dict,
    Float,
    Int,
    KpointsData,
    ProcessNode,
    StructureData,
    WorkChainNode,
    to_aiida_type,
)
from aiida_quantumespresso.calculations.pw import PwCalculation
from aiida_quantumespresso.workflows.protocols.utils import ProtocolMixin
from aiida_quantumespresso.workflows.pw.base import PwBaseWorkChain

from aiida_eipnn.calculations.dft import (
    FAILED,
    LABELLED,
    MAX_NODES,
    deal_lanes,
    gather_dft_labels,
    level_of,
    level_of_theory,
    look_up,
    merge_labels,
    mesh_name,
    mesh_of,
    parameters_name,
    prepare_runs,
    take_runs,
)
from aiida_eipnn.data.choice import ChoiceData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.workflows.builder import PROTOCOLS, dft_inputs
from aiida_eipnn.workflows.once import SubmitsOnce
from aiida_eipnn.workflows.restart import MAX_DEATHS, MAX_SLICES

# A lane, its PwBaseWorkChain and the PwCalculation each hold a slot; the parents hold a few more.
SLOTS_PER_LANE = 3
SLOTS_OF_PARENTS = 4

# What is said of a run of pw.x that was cut off: of a file that is missing or breaks off.
CUT_OFF = (100, 140, 302, 303, 305, 310, 311, 312, 320, 321)
# What pw.x leaves where it stopped by itself.
CRASH, COMPLAINT = "CRASH", "Error in routine"

# How the link from a lane to a run begins; the id of the configuration follows.
CALL_OF_RUN = "dft_"

SCALING = ("bands_factor", "extra_bands", "conv_thr_per_atom")


def slots_needed(n_lanes: int) -> int:
    """Return how many slots of the daemon a loop with ``n_lanes`` lanes occupies at most."""
    return SLOTS_PER_LANE * n_lanes + SLOTS_OF_PARENTS


def _add_inputs(spec: ProcessSpec) -> None:
    spec.input("configurations", valid_type=ConfigurationsData, help="Where the choice is from.")
    spec.input("choice", valid_type=ChoiceData, help="The configurations to label.")
    spec.expose_inputs(
        PwBaseWorkChain,
        namespace="pw_base",
        exclude=("pw.structure", "kpoints"),
        namespace_options={"help": "The set-up of every DFT run, through PwBaseWorkChain."},
    )
    spec.inputs["pw_base"].validator = None
    spec.inputs["pw_base"]["pw"].validator = None
    spec.inputs["pw_base"]["kpoints_distance"].required = True
    spec.input(
        "scaling",
        valid_type=Dict,
        serializer=to_aiida_type,
        validator=_validate_scaling,
        help="What grows with a configuration: bands_factor, extra_bands, conv_thr_per_atom (Ry).",
    )
    spec.output("labels", valid_type=LabelsData, help="The labels, missing ones with the reason.")


class DftRun(SubmitsOnce, PwBaseWorkChain):
    """PwBaseWorkChain that starts a run again whose machine went down, and counts no walltimes.

    To PwBaseWorkChain an output that breaks off is a failure of that configuration for good, and
    three runs that each stopped in good order at their walltime are three attempts that failed.
    """

    @process_handler(priority=700)
    def start_again(self, node: CalcJobNode) -> ProcessHandlerReport | None:
        """Start a run again that was killed; that is no attempt which counts."""
        if not was_cut_off(node):
            return None
        self.ctx.deaths = self.ctx.get("deaths", 0) + 1
        if self.ctx.deaths > MAX_DEATHS:
            return None
        self.report(f"{node.process_label} {node.pk} was killed: it starts again")
        self._count_no_attempt()
        return ProcessHandlerReport(do_break=True)

    @process_handler(priority=590, exit_codes=[PwCalculation.exit_codes.ERROR_OUT_OF_WALLTIME])
    def go_on_after_walltime(self, node: CalcJobNode) -> None:
        """Count no attempt; PwBaseWorkChain's own handler, which comes next, says how to go on."""
        self.ctx.slices = self.ctx.get("slices", 0) + 1
        if self.ctx.slices < MAX_SLICES:
            self.report(f"{node.process_label} {node.pk} reached its walltime: it goes on")
            self._count_no_attempt()

    def _count_no_attempt(self) -> None:
        # The last child is that of the last attempt: the two belong together.
        self.ctx.iteration -= 1
        self.ctx.children.pop()


def was_cut_off(node: CalcJobNode) -> bool:
    """Return whether a run of pw.x was killed, rather than that it stopped with a complaint."""
    if node.exit_status not in CUT_OFF:
        return False
    if "retrieved" not in node.outputs:
        return True
    files = node.outputs.retrieved.base.repository
    names, output = files.list_object_names(), node.get_option("output_filename")
    if CRASH in names:
        return False
    return output not in names or COMPLAINT not in files.get_object_content(output)


class DftLaneWorkChain(SubmitsOnce):
    """Label configurations one after another; one that fails is recorded, never fatal."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        """Define the process specification."""
        super().define(spec)
        _add_inputs(spec)
        spec.input("level", valid_type=Dict, help="Fingerprint of the level of theory.")
        spec.outline(
            cls.setup,
            while_(cls.should_run_pw)(cls.run_pw, cls.inspect_pw),
            cls.results,
        )

    def setup(self) -> None:
        """Turn the chosen configurations into what pw.x needs."""
        pw = self.inputs.pw_base.pw
        self.ctx.prepared = prepare_runs(
            self.inputs.configurations,
            self.inputs.choice,
            pw.parameters,
            self.inputs.scaling,
            *kpoints_rule(self.inputs.pw_base),
            **pw.pseudos,
        )
        self.ctx.ids = [str(name) for name in self.inputs.choice.ids()]
        self.ctx.children = []

    def should_run_pw(self) -> bool:
        """Go on until each configuration had its run."""
        return len(self.ctx.children) < len(self.ctx.ids)

    def run_pw(self) -> ToContext:
        """Run pw.x on the next configuration."""
        name = self.ctx.ids[len(self.ctx.children)]
        structure = self.ctx.prepared[f"structure_{name}"]
        inputs = pw_inputs(self.exposed_inputs(PwBaseWorkChain, namespace="pw_base"), structure)
        inputs.pw.parameters = self.ctx.prepared[parameters_name(structure)]
        inputs.kpoints = self.mesh(structure)
        inputs.metadata.call_link_label = f"{CALL_OF_RUN}{name}"
        return ToContext(children=append_(self.submit(DftRun, **inputs)))

    def mesh(self, structure: StructureData) -> KpointsData:
        """Return the k-points of this structure."""
        distance, parity = kpoints_rule(self.inputs.pw_base)
        return self.ctx.prepared[mesh_name(mesh_of(structure, distance.value, parity.value))]

    def inspect_pw(self) -> None:
        """Say how the run ended."""
        child = self.ctx.children[-1]
        name = self.ctx.ids[len(self.ctx.children) - 1]
        outcome = "labelled" if child.is_finished_ok else f"failed ({child.exit_status})"
        self.report(
            f"DFT {outcome}: configuration {name[:8]}, "
            f"{len(self.ctx.children)} of {len(self.ctx.ids)} in this lane"
        )

    def results(self) -> None:
        """Gather the labels of the lane."""
        labels = gather_dft_labels(
            self.inputs.configurations,
            self.inputs.choice,
            self.inputs.level,
            **dict(runs_of_lane(self.node)),
        )
        self.out("labels", labels)


def pw_inputs(inputs: AttributeDict, structure: StructureData) -> AttributeDict:
    """Return the inputs of one run: the common ones, the structure, its pseudopotentials."""
    kinds = structure.get_kind_names()
    pseudos = {kind: inputs.pw.pseudos[kind] for kind in kinds if kind in inputs.pw.pseudos}
    inputs.pw = AttributeDict({**inputs.pw, "structure": structure, "pseudos": pseudos})
    inputs.metadata = AttributeDict(inputs.get("metadata", {}))
    # The mesh is given instead: PwBaseWorkChain would make one, in a process, for each run.
    for rule in ("kpoints_distance", "kpoints_force_parity"):
        inputs.pop(rule, None)
    return inputs


def kpoints_rule(pw_base: Any) -> tuple[Float, Bool]:
    """Return how far k-points may be apart (1/Å), and whether their numbers must be even."""
    return pw_base["kpoints_distance"], pw_base.get("kpoints_force_parity", Bool(False))


def level_of_pw(pw_base: Any) -> dict[str, Any]:
    """Return the level of theory of the labels that a set-up of pw.x gives."""
    distance, parity = kpoints_rule(pw_base)
    mesh = {"kpoints_distance": distance.value, "kpoints_force_parity": parity.value}
    return level_of(pw_base["pw"]["parameters"].get_dict(), pw_base["pw"]["pseudos"], mesh)


def last_retrieved(child: Any) -> Any:
    """Return the retrieved files of the last pw.x that ``child`` called, if there is one."""
    for calculation in sorted(child.called, key=lambda node: node.pk, reverse=True):
        if "retrieved" in calculation.outputs:
            return calculation.outputs.retrieved
    return None


def runs_of_lane(lane: ProcessNode) -> Iterator[tuple[str, Data]]:
    """Return the finished runs of pw.x below a lane, whatever became of it, as labels take them.

    A run that was stopped from outside has not failed: it is not among them.
    """
    links = lane.base.links.get_outgoing(link_type=LinkType.CALL_WORK).all()
    for entry in sorted(links, key=lambda entry: entry.node.pk):
        name = entry.link_label.removeprefix(CALL_OF_RUN)
        if name == entry.link_label:
            continue
        if (trajectory := _trajectory(entry.node)) is not None:
            yield f"{LABELLED}{name}", trajectory
        elif entry.node.is_finished and (retrieved := last_retrieved(entry.node)) is not None:
            yield f"{FAILED}{name}", retrieved


def _trajectory(base: ProcessNode) -> Data | None:
    """Return what a PwBaseWorkChain gave, or its last pw.x if it was stopped just after that."""
    if base.is_finished:
        return base.outputs.output_trajectory if base.is_finished_ok else None
    runs = [run for run in base.called if run.is_finished_ok and "output_trajectory" in run.outputs]
    return max(runs, key=lambda run: run.pk).outputs.output_trajectory if runs else None


class DftLabelWorkChain(ProtocolMixin, SubmitsOnce):
    """Label a choice of configurations with pw.x, several at a time.

    A run that fails is a row without a label; the work chain fails only where too few succeed,
    and even then its output holds those that did.
    """

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        """Define the process specification."""
        super().define(spec)
        _add_inputs(spec)
        spec.input(
            "n_lanes",
            valid_type=Int,
            serializer=to_aiida_type,
            default=lambda: Int(2),
            validator=_validate_lanes,
            help="DFT runs at a time.",
        )
        spec.input(
            "min_success_fraction",
            valid_type=Float,
            serializer=to_aiida_type,
            default=lambda: Float(0.5),
            validator=_validate_fraction,
            help="Fewer labels than this fraction of the choice are an error.",
        )
        spec.input(
            "stored",
            valid_type=LabelsData,
            required=False,
            help="DFT labels that are there already and not made again; without `pw_base` nothing "
            "runs, and what they do not have is a row without a label.",
        )
        spec.input_namespace(
            "runs",
            dynamic=True,
            valid_type=Data,
            required=False,
            help="Runs of pw.x that are there already, by configuration: labelled_<id>, a "
            "trajectory, or failed_<id>, retrieved files. They are taken and not run again.",
        )
        for name in ("pw_base", "scaling"):
            spec.inputs[name].required = False
        spec.inputs["pw_base"].populate_defaults = False
        spec.inputs.validator = _validate_inputs
        spec.outline(
            cls.setup,
            while_(cls.should_run_lanes)(cls.run_lanes, cls.inspect_lanes),
            cls.results,
        )
        spec.exit_code(
            409,
            "ERROR_STORED_LABELS",
            message="The stored labels cannot be used: {message}",
        )
        spec.exit_code(
            410,
            "ERROR_TOO_FEW_LABELS",
            message="Only {n_labels} of {n_chosen} DFT runs gave a label; the labels output has "
            "the reasons. Correct the set-up, or lower min_success_fraction.",
        )
        spec.exit_code(
            411,
            "ERROR_NO_LABELS",
            message="Not one of {n_chosen} DFT runs gave a label. The first reason: {reason}",
        )

    @classmethod
    def get_protocol_filepath(cls) -> Path:
        """Return the file that defines the protocols."""
        return PROTOCOLS

    @classmethod
    def get_builder_from_protocol(
        cls,
        code: AbstractCode,
        configurations: ConfigurationsData,
        choice: ChoiceData,
        protocol: str | None = None,
        overrides: Mapping[str, Any] | Path | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> ProcessBuilder:
        """Return a builder that labels a choice of ``configurations`` with pw.x."""
        inputs = cls.get_protocol_inputs(protocol, overrides)
        elements = configurations.base.attributes.get("elements")
        builder = cls.get_builder()
        builder.configurations, builder.choice = configurations, choice
        for name, value in dft_inputs(inputs["dft"], code, elements, options or {}).items():
            builder[name] = value
        return builder

    def setup(self) -> ExitCode | None:
        """Look up what is stored, and deal the other configurations to lanes."""
        self.ctx.parts, self.ctx.children, self.ctx.waiting = [], [], []
        self.ctx.n_inspected = 0
        rest, broken = self._look_up()
        if broken or rest is None:
            return broken
        self.ctx.lanes = deal_lanes(self.inputs.configurations, rest, self.inputs.n_lanes)
        self.ctx.waiting = sorted(self.ctx.lanes)
        return None

    def _look_up(self) -> tuple[ChoiceData | None, ExitCode | None]:
        """Return what pw.x has to label, or why that cannot be said."""
        level = {}
        if "pw_base" in self.inputs:
            pw_base = self.inputs.pw_base
            self.ctx.level = level_of_theory(
                pw_base.pw.parameters, *kpoints_rule(pw_base), **pw_base.pw.pseudos
            )
            level = {"level": self.ctx.level}
        choice = self._take_runs(self.inputs.choice)
        if "stored" not in self.inputs or choice is None:
            return choice, None
        try:
            found = look_up(self.inputs.configurations, choice, self.inputs.stored, **level)
        except ValueError as error:
            return None, self.exit_codes.ERROR_STORED_LABELS.format(message=str(error))
        self.ctx.parts.append(found["labels"])
        n_found = found["labels"].base.attributes.get("n_labels")
        self.report(f"DFT labels: {n_found} of {len(self.inputs.choice)} are stored")
        return found.get("rest"), None

    def _take_runs(self, choice: ChoiceData | None) -> ChoiceData | None:
        """Take the runs that are there already; return what they leave to label."""
        runs = sorted(self.inputs.get("runs", {}).items())
        for start in range(0, len(runs), MAX_NODES):
            some = dict(runs[start : start + MAX_NODES])
            found = take_runs(self.inputs.configurations, choice, self.ctx.level, **some)
            self.ctx.parts.append(found["labels"])
            choice = found.get("rest")
        if runs:
            self.report(f"DFT labels: {len(runs)} runs of pw.x are there already")
        return choice

    def should_run_lanes(self) -> bool:
        """Go on until each lane has run."""
        return bool(self.ctx.waiting)

    def run_lanes(self) -> ToContext:
        """Start as many lanes as may run at a time."""
        n_lanes = self.inputs.n_lanes.value
        now, self.ctx.waiting = self.ctx.waiting[:n_lanes], self.ctx.waiting[n_lanes:]
        for key in now:
            child = self.submit(
                DftLaneWorkChain,
                configurations=self.inputs.configurations,
                choice=self.ctx.lanes[key],
                level=self.ctx.level,
                scaling=self.inputs.scaling,
                pw_base=self.exposed_inputs(PwBaseWorkChain, namespace="pw_base"),
                metadata={"call_link_label": key},
            )
            self.to_context(children=append_(child))

    def inspect_lanes(self) -> None:
        """Say which lanes broke; what pw.x had finished in them is kept."""
        for child in self.ctx.children[self.ctx.n_inspected :]:
            if not child.is_finished_ok:
                self.report(f"lane {child.pk} broke: {child.exit_message or child.process_state}")
        self.ctx.n_inspected = len(self.ctx.children)

    def results(self) -> ExitCode | None:
        """Merge the labels of the lanes and judge whether they are enough."""
        n_chosen = len(self.inputs.choice)
        made = [self._labels_of_lane(child) for child in self.ctx.children]
        labels = merge_all([*self.ctx.parts, *made])
        self.out("labels", labels)
        n_labels = labels.base.attributes.get("n_labels")
        if n_labels == 0:
            reason = labels.value().failures()[0].reason
            return self.exit_codes.ERROR_NO_LABELS.format(n_chosen=n_chosen, reason=reason)
        if n_labels < self.inputs.min_success_fraction.value * n_chosen:
            return self.exit_codes.ERROR_TOO_FEW_LABELS.format(n_labels=n_labels, n_chosen=n_chosen)
        return None

    def _labels_of_lane(self, lane: WorkChainNode) -> LabelsData:
        """Return what a lane labelled; of a lane that broke, what pw.x had finished."""
        if "labels" in lane.outputs:
            return lane.outputs.labels
        return gather_dft_labels(
            self.inputs.configurations,
            lane.inputs.choice,
            self.ctx.level,
            **dict(runs_of_lane(lane)),
        )


def merge_all(parts: list[LabelsData]) -> LabelsData:
    """Merge labels as a tree, since a process must not take too many input nodes."""
    while len(parts) > 1:
        chunks = [parts[start : start + MAX_NODES] for start in range(0, len(parts), MAX_NODES)]
        parts = [
            merge_labels(**{f"part_{number:03d}": part for number, part in enumerate(chunk)})
            for chunk in chunks
        ]
    return parts[0]


def _validate_lanes(value: Int | None, _: Any) -> str | None:
    if value is not None and value.value < 1:
        return f"at least one lane is needed, got {value.value}"
    return None


def _validate_fraction(value: Float | None, _: Any) -> str | None:
    if value is not None and not 0 <= value.value <= 1:
        return f"min_success_fraction is a fraction between 0 and 1, got {value.value}"
    return None


def _validate_scaling(value: Dict | None, _: Any) -> str | None:
    given = value.get_dict() if value is not None else {}
    if sorted(given) != sorted(SCALING):
        return f"scaling needs {sorted(SCALING)}, got {sorted(given)}"
    for name, number in given.items():
        # YAML reads 1e-6, without a point, as text.
        if isinstance(number, bool) or not isinstance(number, int | float) or number < 0:
            return f"scaling.{name} must be a number from 0 on, got {number!r}"
    return None


def _validate_inputs(inputs: Any, _: Any) -> str | None:
    """Refuse what pw.x would refuse, once, before anything runs."""
    if "configurations" not in inputs:
        return None
    if message := validate_labeller(inputs):
        return message
    if message := _validate_runs(inputs):
        return message
    return validate_pw(inputs["pw_base"], inputs["configurations"]) if runs_pw(inputs) else None


def _validate_runs(inputs: Any) -> str | None:
    runs = inputs.get("runs", {})
    if runs and not runs_pw(inputs):
        return "`runs` need `pw_base` beside them, which says of what level of theory they are"
    chosen = set(inputs["choice"].ids())
    strange = [name for name in runs if name.partition("_")[2] not in chosen]
    return f"`runs` holds {strange[:3]}, which are not of the choice" if strange else None


def runs_pw(inputs: Any) -> bool:
    """Return whether pw.x is set up to run."""
    return bool(inputs.get("pw_base"))


def validate_labeller(inputs: Any) -> str | None:
    """Return what is missing to label with, if anything is."""
    if runs_pw(inputs):
        return None if "scaling" in inputs else "`pw_base` needs `scaling` beside it"
    return None if "stored" in inputs else "give `pw_base` to run pw.x, or `stored` labels, or both"


def validate_pw(pw_base: Any, configurations: ConfigurationsData) -> str | None:
    """Return why pw.x cannot label these configurations with this set-up, if it cannot."""
    elements = set(configurations.base.attributes.get("elements"))
    missing = sorted(elements - set(pw_base["pw"].get("pseudos", {})))
    if missing:
        return (
            f"no pseudopotential for {missing}: take a family that has them, or leave out the "
            "configurations with these elements"
        )
    return validate_occupations(pw_base)


def validate_occupations(pw_base: Any) -> str | None:
    """Return what to set if the occupations of pw.x are left to its default."""
    system = pw_base["pw"]["parameters"].get_dict().get("SYSTEM", {})
    if "occupations" not in system:
        return (
            "SYSTEM.occupations must be set in the parameters of pw.x: without it, "
            "PwBaseWorkChain repeats runs that succeeded to add bands"
        )
    return None
