"""From a protocol to the inputs of the loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from aiida.common.exceptions import NotExistent
from aiida.engine import ProcessBuilder
from aiida.orm import (
    AbstractCode,
    Computer,
    Dict,
    Float,
    Int,
    List,
    Str,
    StructureData,
    load_computer,
    load_group,
)
from aiida_quantumespresso.workflows.protocols.utils import recursive_merge
from aiida_quantumespresso.workflows.pw.base import PwBaseWorkChain
from ase import Atoms

from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData

# One core, no MPI: on a busy machine two runs on one core each beat one run on two.
ONE_CORE: dict[str, Any] = {
    "resources": {"num_machines": 1, "num_mpiprocs_per_machine": 1},
    "withmpi": False,
}


PROTOCOLS = Path(__file__).parent / "protocols" / "active_learning.yaml"

TRAININGS = ("pretrain", "classify", "finetune", "scratch")
# Those of them that learn DFT.
FINETUNINGS = ("finetune", "scratch")

# What may run in places of its own, each on its computer and in its queue.
EXPLORE, LABEL, DFT, TRAIN, EVALUATE = "explore", "label", "dft", "train", "evaluate"
STAGES = (EXPLORE, LABEL, DFT, TRAIN, EVALUATE)

# Where a code runs that belongs to no computer, among the options.
COMPUTER = "computer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """The codes of a loop.

    Parameters
    ----------
    job
        Runs ``eipnn-job``.
    pw
        Runs pw.x; not needed where all DFT labels are stored.
    stages
        Codes of single stages instead of these: of ``explore``, ``label``, ``train``, ``evaluate``
        one that runs ``eipnn-job``, of ``dft`` one that runs pw.x.

    Raises
    ------
    ValueError
        If there is no such stage.
    """

    job: AbstractCode
    pw: AbstractCode | None = None
    stages: Mapping[str, AbstractCode] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.stages) - set(STAGES)):
            raise ValueError(f"there are no stages {unknown} with a code, only {list(STAGES)}")

    def of(self, stage: str) -> AbstractCode:
        """Return the code of a stage that ``eipnn-job`` runs."""
        return self.stages.get(stage, self.job)

    @property
    def dft(self) -> AbstractCode | None:
        """The code that runs pw.x, if there is one."""
        return self.stages.get(DFT, self.pw)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a loop starts from.

    Parameters
    ----------
    structures
        Seed structures, from which a pool is made; not needed with a pool.
    pool
        A pool that is there already.
    eips
        Names of the EIPs; the protocol's list for the element where it is empty.
    known_configurations, known_labels
        Configurations with DFT labels that are there already.
    stored_labels
        DFT labels of configurations of the pool: they are looked up when they are asked for.
    """

    structures: Sequence[StructureData] = ()
    pool: ConfigurationsData | None = None
    eips: Sequence[str] = ()
    known_configurations: ConfigurationsData | None = None
    known_labels: LabelsData | None = None
    stored_labels: LabelsData | None = None

    def __post_init__(self) -> None:
        if not self.structures and self.pool is None:
            raise ValueError("give seed structures to make a pool from, or a pool")

    @property
    def elements(self) -> list[str]:
        """Chemical symbols that occur, in alphabetical order."""
        found = {symbol for item in self.structures for symbol in item.get_symbols_set()}
        for node in (self.pool, self.known_configurations):
            if node is not None:
                found |= set(node.base.attributes.get("elements"))
        return sorted(found)


def fill_builder(
    builder: ProcessBuilder,
    inputs: dict[str, Any],
    codes: Codes,
    start: Start,
    options: Mapping[str, Any],
) -> ProcessBuilder:
    """Fill in every input of the loop; see :func:`options_of` for ``options``."""
    of = {stage: options_of(stage, options) for stage in STAGES}
    if start.pool is not None:
        builder.pool = start.pool
    else:
        builder.explore = explore_inputs(
            inputs, codes.of(EXPLORE), start.structures, start.eips, of[EXPLORE]
        )
    if inputs["extend"]["recipes"]:
        builder.extend = extend_inputs(inputs, codes.of(EXPLORE), start, of[EXPLORE])
    if start.known_labels is not None:
        builder.known = {
            "configurations": start.known_configurations,
            "labels": start.known_labels,
        }
    builder.label.job = label_inputs(inputs, codes.of(LABEL), start.elements, start.eips, of[LABEL])
    builder.dft = labeller_inputs(inputs["dft"], codes.dft, start, of[DFT])
    builder.train.job = train_inputs(inputs, codes.of(TRAIN), of[TRAIN])
    builder.evaluate = {
        "parameters": Dict(inputs["evaluate"]),
        **job_inputs(codes.of(EVALUATE), of[EVALUATE]),
    }
    inputs = with_heads(inputs)
    for name in (*TRAININGS, "split", "label_model", "gate", "acquisition", "extension", "stop"):
        builder[name] = Dict(inputs[name])
    builder.seed = Int(inputs["seed"])
    n_pretrained = min(inputs["n_pretrained"], inputs["n_members"])
    builder.pretrain_seeds = List(member_seeds(inputs["seed"], n_pretrained))
    builder.upload_above = Float(inputs["upload_above"])
    for place in (builder, builder.label, builder.train):
        place.clean_workdir = inputs["clean_workdir"]
    builder.train_scratch = inputs["train_scratch"]
    builder.use_pseudo_labels = inputs["use_pseudo_labels"]
    return builder


def options_of(stage: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``metadata.options`` of a stage: those for all, and over them its own.

    Parameters
    ----------
    stage
        One of ``explore``, ``label``, ``dft``, ``train``, ``evaluate``.
    options
        Options for every job, and below the name of a stage those of its jobs alone. Among them
        ``computer``, the label of where portable codes run.

    Raises
    ------
    ValueError
        If what is below the name of a stage are no options.
    """
    own = options.get(stage) or {}
    if not isinstance(own, Mapping):
        # The launch scripts show these to the user in one line.
        raise ValueError(  # noqa: TRY004
            f"options of {stage} are given by name, not as {own!r}"
        )
    common = {name: value for name, value in options.items() if name not in STAGES}
    merged: dict[str, Any] = recursive_merge(common, dict(own))
    return merged


def labeller_inputs(
    inputs: Mapping[str, Any],
    code: AbstractCode | None,
    start: Start,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the inputs of DftLabelWorkChain that runs pw.x, looks labels up, or both.

    Raises
    ------
    ValueError
        If there is neither a code nor a stored label.
    """
    if start.stored_labels is None and code is None:
        raise ValueError("nothing to label with: give a code for pw.x, or stored DFT labels")
    stored = {} if start.stored_labels is None else {"stored": start.stored_labels}
    if code is None:
        fraction = Float(inputs["min_success_fraction"])
        return {"n_lanes": Int(inputs["n_lanes"]), "min_success_fraction": fraction, **stored}
    return {**dft_inputs(inputs, code, start.elements, options), **stored}


def dft_inputs(
    inputs: Mapping[str, Any],
    code: AbstractCode,
    elements: Sequence[str],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the inputs of DftLabelWorkChain, less the configurations.

    Raises
    ------
    ValueError
        If the family of pseudopotentials is not installed or lacks an element.
    """
    try:
        pw_base = PwBaseWorkChain.get_builder_from_protocol(
            code,
            StructureData(ase=all_elements(elements)),
            protocol=inputs["protocol"],
            overrides=_with_cutoffs(inputs, elements),
            options={**ONE_CORE, **with_mpi(options)},
        )
    except (ValueError, NotExistent) as error:
        family = inputs["pw_base"]["pseudo_family"]
        raise ValueError(
            f"{error} -- the loop needs a family of pseudopotentials with the cutoffs "
            f"{inputs['stringency']!r} for {', '.join(elements)}, and takes {family!r}: install it "
            "(`aiida-eipnn setup` does), or name another one"
        ) from error
    given = pw_base._inputs(prune=True)
    del given["pw"]["structure"]
    return {
        "pw_base": given,
        "scaling": Dict(inputs["scaling"]),
        "n_lanes": Int(inputs["n_lanes"]),
        "min_success_fraction": Float(inputs["min_success_fraction"]),
    }


def with_mpi(options: Mapping[str, Any]) -> dict[str, Any]:
    """Let pw.x run by MPI where it gets several processes, unless the options say otherwise."""
    # Its code has a computer.
    options = {name: value for name, value in options.items() if name != COMPUTER}
    resources = options.get("resources", {})
    names = ("num_machines", "num_mpiprocs_per_machine", "tot_num_mpiprocs")
    several = any(int(resources.get(name) or 1) > 1 for name in names)
    return {"withmpi": True, **options} if several else options


def _with_cutoffs(inputs: Mapping[str, Any], elements: Sequence[str]) -> dict[str, Any]:
    """Return the overrides of PwBaseWorkChain, with the cutoffs of the stringency asked for."""
    family = load_group(inputs["pw_base"]["pseudo_family"])
    cutoff_wfc, cutoff_rho = family.get_recommended_cutoffs(
        elements=tuple(elements), stringency=inputs["stringency"], unit="Ry"
    )
    cutoffs = {"pw": {"parameters": {"SYSTEM": {"ecutwfc": cutoff_wfc, "ecutrho": cutoff_rho}}}}
    return recursive_merge(cutoffs, dict(inputs["pw_base"]))


def all_elements(elements: Sequence[str]) -> Atoms:
    """Return a structure with one atom of each element, to look up pseudopotentials with."""
    return Atoms(
        list(elements),
        positions=[(4.0 * row, 0.0, 0.0) for row in range(len(elements))],
        cell=[4.0 * len(elements), 4.0, 4.0],
        pbc=True,
    )


def default_eips(table: Mapping[str, Sequence[str]], elements: Sequence[str]) -> list[str]:
    """Return the EIPs of the protocol for these elements.

    Raises
    ------
    ValueError
        If the protocol has none.
    """
    key = "-".join(sorted(elements))
    if key not in table:
        raise ValueError(
            f"the protocol names EIPs for {sorted(table)}, not for {key}: name them yourself, at "
            "least one model that knows each element"
        )
    return list(table[key])


def member_seeds(seed: int, n_members: int) -> list[int]:
    """Return one seed for each member of the committee."""
    children = np.random.SeedSequence(seed).spawn(n_members)
    return [int(child.generate_state(1)[0]) for child in children]


def with_heads(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with the number of heads in the settings of both fine-tunings."""
    if not inputs["n_heads"]:
        return dict(inputs)
    heads = {"n_heads": inputs["n_heads"]}
    return {**inputs, **{name: {**heads, **inputs[name]} for name in FINETUNINGS}}


def job_inputs(
    code: AbstractCode, options: Mapping[str, Any], n_workers: int = 1
) -> dict[str, Any]:
    """Return code and options of a job, with a core for each of its workers."""
    resources = {**ONE_CORE["resources"], "num_cores_per_mpiproc": n_workers}
    given = {**ONE_CORE, "resources": resources, **options}
    place = given.pop(COMPUTER, None)
    metadata = {"options": given}
    if code.computer is None:
        metadata["computer"] = _computer(code, place)
    return {"code": code, "metadata": metadata}


def _computer(code: AbstractCode, label: str | None) -> Computer:
    """Return where a code runs that belongs to no computer."""
    if label is None:
        raise ValueError(
            f"the code {code.full_label} belongs to no computer: name the one to run it on as "
            f"{COMPUTER!r} in the options"
        )
    try:
        return load_computer(label)
    except NotExistent as error:
        raise ValueError(
            f"the options name the computer {label!r}, which is not there: see `verdi computer "
            "list`"
        ) from error


def explore_inputs(
    inputs: Mapping[str, Any],
    code: AbstractCode,
    structures: Sequence[StructureData],
    eips: Sequence[str],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the inputs of ExploreCalculation."""
    elements = sorted({symbol for item in structures for symbol in item.get_symbols_set()})
    seeds = ConfigurationsData.from_structures(list(structures), "seed")
    return {
        "configurations": {"seeds": seeds},
        "recipes": List(inputs["explore"]["recipes"]),
        "seed": Int(inputs["seed"]),
        # The first of the list is the one that is trusted most.
        "eip": Str((list(eips) or default_eips(inputs["eips"], elements))[0]),
        **_side_by_side(inputs["explore"]["n_workers"], code, options),
    }


def extend_inputs(
    inputs: Mapping[str, Any],
    code: AbstractCode,
    start: Start,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the inputs of ExploreCalculation while the loop runs: from the seeds, or the pool."""
    seeds = (
        ConfigurationsData.from_structures(list(start.structures), "seed")
        if start.structures
        else start.pool
    )
    eips = list(start.eips) or default_eips(inputs["eips"], start.elements)
    return {
        "configurations": {"seeds": seeds},
        "recipes": List(inputs["extend"]["recipes"]),
        "seed": Int(inputs["seed"]),
        "eip": Str(eips[0]),
        **_side_by_side(inputs["extend"]["n_workers"], code, options),
    }


def _side_by_side(n_workers: int, code: AbstractCode, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an exploration with that many processes needs."""
    return {
        "parameters": Dict({"n_workers": n_workers}),
        **job_inputs(code, options, n_workers),
    }


def label_inputs(
    inputs: Mapping[str, Any],
    code: AbstractCode,
    elements: Sequence[str],
    eips: Sequence[str],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the inputs of LabelCalculation, less the configurations."""
    return {
        "eips": List(list(eips) or default_eips(inputs["eips"], elements)),
        "parameters": Dict(inputs["label"]),
        **job_inputs(code, options, inputs["label"].get("n_workers", 1)),
    }


def train_inputs(
    inputs: Mapping[str, Any], code: AbstractCode, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the inputs of TrainCalculation, less stage and data."""
    return {
        "seeds": List(member_seeds(inputs["seed"], inputs["n_members"])),
        "network": Dict(inputs["network"]),
        "classes": Dict(inputs["classes"]),
        "parameters": Dict(inputs["train"]),
        **job_inputs(code, options, inputs["train"].get("n_workers", 1)),
    }
