"""Calcfunctions between configurations and pw.x: out to structures, home as labels."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from aiida.engine import calcfunction
from aiida.orm import (
    ArrayData,
    Bool,
    CalcJobNode,
    Data,
    Dict,
    Float,
    FolderData,
    Int,
    KpointsData,
    ProcessNode,
    StructureData,
    TrajectoryData,
)
from ase.units import GPa

from aiida_eipnn.data.choice import Choice, ChoiceData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import CORE_SECONDS, LabelsData
from aiida_eipnn.science.arrays import FloatArray, StrArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.dft_cost import estimate_cost
from aiida_eipnn.science.labels import DFT, Labels, join_labels

# Gathering costs O(N^2) in the number of input nodes, so a process takes no more than these.
MAX_NODES = 50

# pw.x converges for atoms on top of one another too; such a label is no physics to learn from.
MAX_FORCE = 200.0

# Why a configuration has no label where labels are looked up only.
NOT_STORED = "no stored DFT label is of this configuration"

# A link label may not start with a digit, as ids may.
LABELLED = "labelled_"
FAILED = "failed_"

# What in SYSTEM says how large a configuration is, or how the work is done; all else is physics.
NOT_THE_LEVEL = ("ibrav", "nat", "ntyp", "nbnd", "nosym", "noinv")

FINGERPRINT = "fingerprint"

# Cell vectors whose lengths (Å) differ by less are of one length.
SAME_LENGTH = 1e-5

NO_OUTPUT = "pw.x left no output: see the report of the work chain"


@calcfunction
def prepare_runs(
    configurations: ConfigurationsData,
    choice: ChoiceData,
    parameters: Dict,
    scaling: Dict,
    kpoints_distance: Float,
    parity: Bool,
    **pseudos: Data,
) -> dict[str, Any]:
    """Return what pw.x needs to run on each chosen configuration.

    The structures are ``structure_<id>``. Meshes and parameters have the names that `mesh_name`
    and `parameters_name` give them: configurations of one mesh or composition share the node,
    which spares a process for each of them.
    """
    ids = choice.ids()
    chosen = configurations.value().take(configurations.value().rows_of(ids))
    outputs: dict[str, Data] = {}
    for row, name in enumerate(ids):
        structure = outputs[f"structure_{name}"] = StructureData(ase=chosen.atoms(row))
        mesh = mesh_of(structure, kpoints_distance.value, parity.value)
        outputs.setdefault(mesh_name(mesh), kpoints_node(mesh))
        outputs.setdefault(
            parameters_name(structure),
            Dict(scaled_parameters(parameters.get_dict(), scaling.get_dict(), structure, pseudos)),
        )
    return outputs


def kpoints_node(mesh: Sequence[int]) -> KpointsData:
    """Return a mesh as a node."""
    kpoints = KpointsData()
    kpoints.set_kpoints_mesh(mesh)
    return kpoints


def mesh_of(structure: StructureData, distance: float, parity: bool) -> list[int]:
    """Return the k-points along each axis, no further apart than ``distance`` (1/Å).

    As in PwBaseWorkChain: one point along an axis that is not periodic, an even number where
    ``parity`` asks for it, and axes of one length have one number.
    """
    kpoints = KpointsData()
    kpoints.set_cell_from_structure(structure)
    kpoints.set_kpoints_mesh_from_density(distance, force_parity=parity)
    mesh: list[int] = kpoints.get_kpoints_mesh()[0]
    if np.ptp(structure.cell_lengths) < SAME_LENGTH:
        mesh = [max(mesh) if periodic else 1 for periodic in structure.pbc]
    return mesh


def mesh_name(mesh: Sequence[int]) -> str:
    """Return the link label of a mesh."""
    return "mesh_" + "_".join(str(number) for number in mesh)


def scaled_parameters(
    parameters: dict[str, Any],
    scaling: Mapping[str, float],
    structure: StructureData,
    pseudos: Mapping[str, Data],
) -> dict[str, Any]:
    """Return the parameters of pw.x with what grows with the configuration.

    The number of bands is ``bands_factor`` times the occupied ones plus ``extra_bands``: with too
    few, PwBaseWorkChain adds some and runs a second time. The threshold is
    ``conv_thr_per_atom`` (Ry/atom) times the atoms.
    """
    kinds = [site.kind_name for site in structure.sites]
    occupied = sum(pseudos[kind].base.attributes.get("z_valence") for kind in kinds) / 2
    n_bands = math.ceil(scaling["bands_factor"] * occupied) + scaling["extra_bands"]
    threshold = scaling["conv_thr_per_atom"] * len(kinds)
    return {
        **parameters,
        "SYSTEM": {**parameters["SYSTEM"], "nbnd": n_bands},
        "ELECTRONS": {**parameters["ELECTRONS"], "conv_thr": threshold},
    }


def parameters_name(structure: StructureData) -> str:
    """Return the link label of the parameters of a composition."""
    return f"parameters_{structure.get_formula()}"


@calcfunction
def deal_lanes(
    configurations: ConfigurationsData, choice: ChoiceData, n_lanes: Int
) -> dict[str, Any]:
    """Deal the chosen configurations to lanes of about equal cost, longest first.

    No lane gets more than ``MAX_NODES`` configurations: there are more lanes then, and they run
    one after another in ``n_lanes`` rows.
    """
    ids = choice.ids()
    chosen = configurations.value().take(configurations.value().rows_of(ids))
    lanes = deal(estimate_cost(chosen), n_lanes.value, MAX_NODES)
    return {
        f"lane_{number:03d}": ChoiceData.from_value(
            Choice(ids=ids[rows], scores=choice.value().scores[rows]), strategy="lane"
        )
        for number, rows in enumerate(lanes)
    }


def deal(cost: FloatArray, n_lanes: int, most: int) -> list[list[int]]:
    """Deal rows to lanes, dearest first, each to the lane that has least to do."""
    n_lanes = max(min(n_lanes, len(cost)), -(-len(cost) // most))
    lanes: list[list[int]] = [[] for _ in range(n_lanes)]
    load = np.zeros(n_lanes)
    for row in np.argsort(-cost, kind="stable"):
        open_lanes = [lane for lane in range(n_lanes) if len(lanes[lane]) < most]
        lane = min(open_lanes, key=lambda number: load[number])
        lanes[lane].append(int(row))
        load[lane] += cost[row]
    return [lane for lane in lanes if lane]


@calcfunction
def level_of_theory(
    parameters: Dict, kpoints_distance: Float, parity: Bool, **pseudos: Data
) -> Dict:
    """Return the fingerprint of a DFT calculation: labels may be mixed only where it is equal."""
    mesh = {"kpoints_distance": kpoints_distance.value, "kpoints_force_parity": parity.value}
    return Dict(with_fingerprint(level_of(parameters.get_dict(), pseudos, mesh)))


def level_of(
    parameters: Mapping[str, Any], pseudos: Mapping[str, Data], mesh: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the level of theory of pw.x with these parameters, pseudopotentials and k-points."""
    system = parameters.get("SYSTEM", {})
    return {
        "code": "quantumespresso.pw",
        "pseudos": {kind: pseudo.base.attributes.get("md5") for kind, pseudo in pseudos.items()},
        **mesh,
        **{key: value for key, value in system.items() if key not in NOT_THE_LEVEL},
    }


def with_fingerprint(level: Mapping[str, Any]) -> dict[str, Any]:
    """Return a level of theory with its fingerprint: levels that are equal have the same one."""
    facts = {key: value for key, value in level.items() if key != FINGERPRINT}
    text = json.dumps(_comparable(facts), sort_keys=True)
    return {**facts, FINGERPRINT: hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()}


def _comparable(value: Any) -> Any:
    """Return ``value`` with real numbers only: cutoffs of 40 and of 40.0 Ry are equal."""
    if isinstance(value, Mapping):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@calcfunction
def gather_dft_labels(
    configurations: ConfigurationsData, choice: ChoiceData, level: Dict, **runs: Data
) -> LabelsData:
    """Gather what pw.x said about the chosen configurations.

    ``runs`` holds ``labelled_<id>``, the trajectory of a finished run, or ``failed_<id>``, the
    retrieved files of one that failed. What failed is a row without a label, with its reason. The
    attribute ``core_seconds`` is what all runs took, those that were repeated and failed included.
    """
    return _labels_of_runs(configurations.value(), choice.ids(), level, runs)


def _labels_of_runs(
    sets: Configurations, ids: StrArray, level: Dict, runs: Mapping[str, Data]
) -> LabelsData:
    chosen = sets.take(sets.rows_of(ids))
    rows = [_label(chosen.take([row]), name, runs) for row, name in enumerate(ids)]
    seconds = sum(core_seconds(node.creator) for node in runs.values())
    return LabelsData.from_value(
        join_labels(rows), level=level.get_dict(), **{CORE_SECONDS: seconds}
    )


def core_seconds(run: CalcJobNode) -> float:
    """Return what pw.x took for one configuration: this run, and others of its work chain.

    A run that came from the cache counts as what it took when it ran: what is decided by it shall
    not depend on what else is in the profile. A run that left no parameters counts as nothing.
    """
    chain = run.caller
    runs = [run] if chain is None else [n for n in chain.called if isinstance(n, CalcJobNode)]
    return sum(_core_seconds_of_one(one) for one in runs)


def _core_seconds_of_one(run: CalcJobNode) -> float:
    if "output_parameters" not in run.outputs:
        return 0.0
    wall = float(run.outputs.output_parameters.get_dict().get("wall_time_seconds") or 0.0)
    options = run.get_options()
    return wall * n_cores(options.get("resources"), options.get("withmpi", True))


def n_cores(resources: Mapping[str, Any] | None, withmpi: bool | None) -> int:
    """Return the MPI processes of a job; schedulers name them in more than one way."""
    if not withmpi:
        return 1
    given = resources or {}
    machines = given.get("num_machines") or 1
    per_machine = given.get("num_mpiprocs_per_machine") or 1
    return int(given.get("tot_num_mpiprocs") or machines * per_machine)


def _label(configuration: Configurations, name: str, runs: Mapping[str, Data]) -> Labels:
    if f"{LABELLED}{name}" in runs:
        return _label_of_run(configuration, runs[f"{LABELLED}{name}"])
    reason = NO_OUTPUT
    if f"{FAILED}{name}" in runs:
        reason = failure_of(runs[f"{FAILED}{name}"])
    return Labels.missing(configuration, [DFT], reason)


def _label_of_run(configuration: Configurations, trajectory: TrajectoryData) -> Labels:
    energy = trajectory.get_array("energy")[-1]
    forces = trajectory.get_array("forces")[-1]
    stress = stress_of(trajectory)
    if not (np.isfinite(energy) and np.isfinite(forces).all()):
        return Labels.missing(
            configuration, [DFT], "pw.x gave an energy or force that is no number"
        )
    if np.abs(forces).max(initial=0.0) > MAX_FORCE:
        reason = f"pw.x gave a force of more than {MAX_FORCE:.0f} eV/Å: atoms overlap"
        return Labels.missing(configuration, [DFT], reason)
    return Labels(
        ids=configuration.ids,
        offsets=configuration.offsets,
        sources=np.array([DFT]),
        energy=np.array([[float(energy)]]),
        forces=np.asarray(forces, dtype=float)[None],
        stress=stress[None, None],
        status=np.zeros((1, 1), dtype=np.int64),
        reasons=np.array([], dtype="<U1"),
        origins=np.array([trajectory.creator.uuid], dtype="<U36"),
    )


def stress_of(trajectory: ArrayData) -> FloatArray:
    """Return the stress in eV/Å³ in ASE's sign and order; NaN where pw.x computed none.

    pw.x writes GPa with the sign of a pressure: positive means compressed.
    """
    if "stress" not in trajectory.get_arraynames():
        return np.full(6, np.nan)
    return voigt_stress(trajectory.get_array("stress")[-1])


def voigt_stress(pressure: Any) -> FloatArray:
    """Return a tensor, ``(3, 3)`` in GPa as pw.x writes it, in eV/Å³ in ASE's sign and order."""
    tensor = -np.asarray(pressure, dtype=float) * GPa
    return tensor[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


def failure_of(retrieved: FolderData) -> str:
    """Return why the calculation that left these files failed."""
    creator: ProcessNode = retrieved.creator
    if creator.is_finished_ok and creator.caller is not None:
        # pw.x itself was content; the work chain around it was not.
        caller = creator.caller
        return f"pw.x: {caller.process_label} exit {caller.exit_status}: {caller.exit_message}"
    return f"pw.x exit {creator.exit_status}: {creator.exit_message or 'no message'}"


@calcfunction
def take_runs(
    configurations: ConfigurationsData, choice: ChoiceData, level: Dict, **runs: Data
) -> dict[str, Any]:
    """Take runs of pw.x that are there already, and say what of the choice is left to label.

    ``runs`` are those of `gather_dft_labels`: one that failed is a row with its reason, and not run
    again. The output ``rest`` holds what no run is of, if anything is left.
    """
    ids = choice.ids()
    here = np.isin(ids, [name.partition("_")[2] for name in runs])
    left = Choice(ids=ids[~here], scores=choice.value().scores[~here])
    return {
        "labels": _labels_of_runs(configurations.value(), ids[here], level, runs),
        **({"rest": ChoiceData.from_value(left, strategy="rest")} if len(left.ids) else {}),
    }


@calcfunction
def look_up(
    configurations: ConfigurationsData, choice: ChoiceData, stored: LabelsData, **level: Dict
) -> dict[str, Any]:
    """Take the labels that are there already, and say what is left to label.

    With a ``level``, that of the runs to come, the output ``rest`` holds what has no stored label,
    if anything does; without one nothing will run, and what has none is a row with that reason.

    Raises
    ------
    ValueError
        If the stored labels are of another level of theory.
    """
    labels = stored.value().labelled()
    here = np.isin(choice.ids(), labels.ids)
    found = labels.take(labels.rows_of(choice.ids()[here]))
    if level:
        compare_levels([stored.level, level["level"].get_dict()])
        left = Choice(ids=choice.ids()[~here], scores=choice.value().scores[~here])
        rest = {"rest": ChoiceData.from_value(left, strategy="rest")} if len(left.ids) else {}
        return {"labels": LabelsData.from_value(found, level=stored.level), **rest}
    sets = configurations.value()
    missing = sets.take(sets.rows_of(choice.ids()[~here]))
    rows = join_labels([found, Labels.missing(missing, found.sources.tolist(), NOT_STORED)])
    return {"labels": LabelsData.from_value(rows, level=stored.level)}


@calcfunction
def merge_labels(**parts: LabelsData) -> LabelsData:
    """Put labels of one level of theory one after the other.

    Raises
    ------
    ValueError
        If the levels of theory differ.
    """
    nodes = [parts[key] for key in sorted(parts)]
    level = same_level(nodes)
    seconds = sum(node.core_seconds for node in nodes)
    return LabelsData.from_value(
        join_labels([node.value() for node in nodes]), level=level, **{CORE_SECONDS: seconds}
    )


def same_level(nodes: list[LabelsData]) -> dict[str, Any]:
    """Return the level of theory of all nodes; ``ValueError`` says where they differ.

    Labels that declare no level, as those read from a file, are taken at their user's word.
    """
    return compare_levels([node.level for node in nodes])


def compare_levels(given: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the one level of theory that is declared; ``ValueError`` says where they differ."""
    levels = [dict(level) for level in given if level]
    for level in levels[1:]:
        if differing := differences(levels[0], level):
            raise ValueError(
                f"these labels are of different levels of theory, they differ in {differing}; "
                "label again with one set-up, or train on one of the sets only"
            )
    return levels[0] if levels else {}


def differences(level: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what two levels of theory differ in, by key."""
    return {
        key: (level.get(key), other.get(key))
        for key in sorted({*level, *other})
        if level.get(key) != other.get(key) and key != FINGERPRINT
    }
