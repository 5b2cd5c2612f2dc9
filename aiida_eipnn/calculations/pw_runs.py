"""Finished runs of pw.x as labels: those of the profile, and those whose output lies in a folder.

aiida-quantumespresso reads the XML and made the trajectories, ASE reads the standard output.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import ase.io
import numpy as np
from aiida.engine import calcfunction
from aiida.orm import CalcJobNode, Data, Dict, FolderData, StructureData
from aiida_quantumespresso.data.hubbard_structure import HubbardStructureData
from aiida_quantumespresso.parsers.parse_xml.parse import parse_xml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import Ry

from aiida_eipnn.calculations.dft import (
    FINGERPRINT,
    MAX_FORCE,
    failure_of,
    level_of,
    mesh_of,
    voigt_stress,
    with_fingerprint,
)
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.science.arrays import FloatArray
from aiida_eipnn.science.configurations import Configurations, configuration_id
from aiida_eipnn.science.duplicates import SAME_ENERGY
from aiida_eipnn.science.gate import geometry_fault
from aiida_eipnn.science.io import PW_STDOUT, PW_XML, pw_mark
from aiida_eipnn.science.labels import DFT, Labels, join_labels

CODE = "quantumespresso.pw"
MESH = ("kpoints_mesh", "kpoints_offset")
DISTANCE, PARITY = "kpoints_distance", "kpoints_force_parity"
PSEUDOS = "pseudos"

# Two energies of one run, from its XML and from its standard output with ASE's constants, differ by
# less than this part.
SAME_RUN = 1e-7

# Positions (Å) that differ by less are those that pw.x was given.
SAME_POSITION = 1e-6

NO_FORCES = "pw.x computed no forces: set tprnfor"
NOT_CONVERGED = "the electronic minimization did not converge"
NO_STEP = "pw.x left no step with an energy"
NO_LEVEL = (
    "its level of theory is not read from standard output: keep the XML file "
    "(data-file-schema.xml) beside it, or say the level with --level"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """What one run of pw.x says.

    Parameters
    ----------
    name
        The file, or the PK of the calculation.
    steps
        A configuration with energy (eV), forces (eV/Å) and, where known, stress (eV/Å³) of each
        converged step.
    level
        Its level of theory.
    start
        The configuration that it began with; ``None`` where that is not known.
    reason
        Why there is no step; empty where there is one.
    origin
        UUID of the calculation; empty where it was not made here.
    """

    name: str
    steps: tuple[Atoms, ...] = ()
    level: dict[str, Any] = field(default_factory=dict)
    start: Atoms | None = None
    reason: str = ""
    origin: str = ""


@calcfunction
def read_runs(level: Dict, **runs: Data) -> dict[str, Any]:
    """Read ``configurations`` and ``labels`` of PwCalculations of one level of theory.

    ``runs`` are what they left: the trajectory, or of one that failed the retrieved files. Each
    converged step is a row; a run without one is a row of the structure that it began with, with
    the reason. ``level`` adds to what the runs say, see :func:`with_facts`.

    Raises
    ------
    ValueError
        If the levels of theory differ.
    """
    found = [with_facts(run_of(runs[key].creator), level.get_dict()) for key in sorted(runs)]
    return _as_nodes(found)


@calcfunction
def read_pw_output(files: FolderData, level: Dict) -> dict[str, Any]:
    """Read ``configurations`` and ``labels`` of one level of theory from files that pw.x left.

    The attribute ``files`` of the labels says which file each row is of, ``unread`` which file gave
    none and why. ``level`` adds to what the files say, see :func:`with_facts`.

    Raises
    ------
    ValueError
        If the levels of theory differ.
    """
    with files.as_path() as folder:
        runs = [with_facts(run, level.get_dict()) for run in runs_of_folder(folder)]
    return _as_nodes(runs)


@calcfunction
def join_runs(**parts: Data) -> dict[str, Any]:
    """Put ``configurations_*`` and ``labels_*`` of one level of theory one after the other."""
    numbers = sorted(key.partition("_")[2] for key in parts if key.startswith("labels_"))
    tables = [parts[f"labels_{number}"] for number in numbers]
    sets = [parts[f"configurations_{number}"].value() for number in numbers]
    runs = [
        run
        for node, configurations in zip(tables, sets, strict=True)
        for run in _rows(configurations, node)
    ]
    return _as_nodes(runs)


def run_of(calculation: CalcJobNode) -> Run:
    """Return what a PwCalculation says; of one that left nothing, only why."""
    if not {"output_trajectory", "retrieved"} & set(calculation.outputs):
        return Run(name=str(calculation.pk), reason=_why(calculation))
    structure = calculation.inputs.structure
    start = structure.get_ase()
    known = Run(
        name=str(calculation.pk),
        start=start,
        level=_level_of_calculation(calculation),
        origin=calculation.uuid,
    )
    if "output_trajectory" not in calculation.outputs:
        return replace(known, reason=_why(calculation))
    trajectory = calculation.outputs.output_trajectory
    arrays = {name: trajectory.get_array(name) for name in trajectory.get_arraynames()}
    facts = calculation.outputs.output_parameters.get_dict()
    control = calculation.inputs.parameters.get_dict().get("CONTROL", {})
    outputs = calculation.outputs
    last = outputs.output_structure if "output_structure" in outputs else structure
    found = with_steps(known, arrays, facts, control.get("calculation", "scf"), last.get_ase())
    if not found.steps and not calculation.is_finished_ok:
        # What aiida-quantumespresso says of a failure is more than what the files say.
        return replace(found, reason=_why(calculation))
    return found


def run_of_xml(path: Path, name: str) -> Run:
    """Return what an XML file of pw.x says."""
    known = Run(name=name)
    try:
        with path.open(encoding="utf-8") as stream:
            data, _ = parse_xml(stream)
        tree = ET.parse(path).getroot()
    except Exception as error:
        # The parser raises whatever it stumbles upon in a file that was cut.
        return replace(known, reason=f"not readable ({type(error).__name__}: {error})")
    structure = data["structure"]
    atoms = Atoms(
        [_symbol(kind) for kind, _ in structure["atoms"]],
        positions=[position for _, position in structure["atoms"]],
        cell=structure["cell"]["lattice_vectors"],
        pbc=True,
    )
    calculation = tree.findtext("input/control_variables/calculation", "scf")
    known = replace(known, level=_level_of_xml(data, tree))
    return with_steps(known, data["trajectory"], data, calculation, atoms)


def run_of_stdout(path: Path, name: str) -> Run:
    """Return what the standard output of pw.x says; its level of theory is not among it."""
    steps = []
    try:
        for atoms in ase.io.iread(path, ":", format="espresso-out"):
            results = atoms.calc.results
            if "forces" not in results:
                return Run(name=name, reason=NO_FORCES)
            atoms.info["config_type"] = "pw"
            steps.append(
                _labelled(atoms, results["energy"], results["forces"], results.get("stress"))
            )
    except Exception as error:
        # ASE raises whatever it stumbles upon in a file that was cut.
        return Run(name=name, reason=f"not readable ({type(error).__name__}: {error})")
    reason = "" if steps else NO_STEP
    return Run(name=name, steps=tuple(steps), reason=reason)


def runs_of_folder(folder: Path) -> list[Run]:
    """Return the runs of pw.x whose output is in a folder or below it, by their files."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return runs_of_files({path.relative_to(folder).as_posix(): path for path in paths})


def runs_of_files(paths: Mapping[str, Path]) -> list[Run]:
    """Return the runs of pw.x whose output is among files, given by name.

    A run that left its XML and its standard output counts once, by the XML, which says more; so
    does a copy of an XML file. What pw.x did not write is left out.
    """
    kinds = {name: pw_mark(path) for name, path in paths.items()}
    xml, seen = [], set()
    for name in (name for name, kind in kinds.items() if kind == PW_XML):
        digest = hashlib.sha256(paths[name].read_bytes()).digest()
        if digest not in seen:
            seen.add(digest)
            if digest not in _READ:
                _READ[digest] = run_of_xml(paths[name], name)
            xml.append(replace(_READ[digest], name=name))
    names = [name for name, kind in kinds.items() if kind == PW_STDOUT]
    others = [run_of_stdout(paths[name], name) for name in names]
    return [*xml, *(run for run in others if not _is_told(run, xml))]


# XML that this process has read, by its digest: all of it is read before anything is stored, then
# again by the calcfunction, and to check one file against the schema takes a third of a second.
_READ: dict[bytes, Run] = {}


def with_facts(run: Run, facts: Mapping[str, Any]) -> Run:
    """Return a run with what the user says about its level of theory.

    ``kpoints_distance`` stands for the mesh of the run if it is the one that this distance gives.
    A run that says otherwise is one without steps.
    """
    if run.reason and not run.level:
        return run
    if not run.level and not facts:
        return replace(run, steps=(), reason=NO_LEVEL)
    level = dict(run.level)
    if DISTANCE in facts and "kpoints_mesh" in level:
        mesh, offset = level.pop("kpoints_mesh"), level.pop("kpoints_offset")
        wanted = _mesh(run, facts)
        if mesh != wanted or any(offset):
            text = f"its k-points are {mesh} with offset {offset}, not {wanted} as --level says"
            return replace(run, steps=(), level={}, reason=text)
        level[PARITY] = facts.get(PARITY, False)
    for key, value in facts.items():
        if key in level and with_fingerprint({key: level[key]}) != with_fingerprint({key: value}):
            text = f"it says {key} {level[key]}, and --level {value}"
            return replace(run, steps=(), level={}, reason=text)
        level[key] = value
    return replace(run, level={"code": CODE, **level})


def by_level(runs: Iterable[Run]) -> list[list[Run]]:
    """Return the runs of each level of theory, the most first; those that say none are left out.

    Runs on different elements are of one level where they agree on the elements that both have.
    """
    groups: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        if not run.level:
            continue
        for level, members in groups:
            if _agree(level, run.level):
                level[PSEUDOS] = {**level.get(PSEUDOS, {}), **run.level.get(PSEUDOS, {})}
                members.append(run)
                break
        else:
            groups.append((dict(run.level), [run]))
    return sorted((members for _, members in groups), key=len, reverse=True)


def level_of_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the level of theory of all runs.

    Raises
    ------
    ValueError
        If there are several, or none.
    """
    groups = by_level(runs)
    if len(groups) != 1:
        raise ValueError(f"these runs are of {len(groups)} levels of theory, not of one")
    pseudos = {key: value for run in runs for key, value in run.level.get(PSEUDOS, {}).items()}
    level = groups[0][0].level
    return {**level, PSEUDOS: dict(sorted(pseudos.items()))} if pseudos else level


def table_of(runs: Sequence[Run]) -> tuple[Configurations, Labels, int, dict[str, str]]:
    """Return the configurations and labels of runs, each geometry once.

    Returns
    -------
    tuple
        Both; how many steps repeat an earlier one; and the name of the run of each row, by id.

    A geometry to which two runs give other energies is one without a label.
    """
    labelled: dict[str, tuple[Atoms, str, str]] = {}
    conflicts: dict[str, Run] = {}
    n_copies = 0
    for run in runs:
        for atoms in run.steps:
            name = configuration_id(atoms)
            if name in labelled:
                n_copies += 1
                if reason := _conflict(run, atoms, labelled[name]):
                    conflicts[name] = replace(run, steps=(), start=atoms, reason=reason)
            labelled.setdefault(name, (atoms, run.origin, run.name))
    labelled = {name: entry for name, entry in labelled.items() if name not in conflicts}
    failed = {
        configuration_id(run.start): run for run in runs if not run.steps and run.start is not None
    }
    failed |= conflicts
    failed = {name: run for name, run in failed.items() if name not in labelled}
    frames = [atoms for atoms, _, _ in labelled.values()]
    starts = [run.start for run in failed.values() if run.start is not None]
    configurations = Configurations.from_atoms([*frames, *starts])
    rows = [
        _row(configurations.take([row]), *labelled[name][:2]) for row, name in enumerate(labelled)
    ]
    for row, run in enumerate(failed.values(), start=len(rows)):
        missing = Labels.missing(configurations.take([row]), [DFT], run.reason)
        rows.append(replace(missing, origins=np.array([run.origin], dtype="<U36")))
    names = {name: entry[2] for name, entry in labelled.items()}
    names |= {name: run.name for name, run in failed.items()}
    return configurations, join_labels(rows), n_copies, names


def with_steps(
    run: Run,
    arrays: Mapping[str, Any],
    facts: Mapping[str, Any],
    calculation: str,
    last: Atoms,
) -> Run:
    """Return a run with its converged steps.

    Parameters
    ----------
    run
        What else is known.
    arrays
        The trajectory as aiida-quantumespresso reads it: energy in eV, forces in eV/Å, stress in
        GPa with the sign of a pressure; positions and cells in Å unless nothing moved.
    facts
        Its ``convergence_info``.
    calculation
        ``scf``, ``relax``, ``md``, ``vc-relax`` or ``vc-md``.
    last
        The structure that pw.x ended with: what a single step, or the final one of ``vc-relax``,
        was computed of.
    """
    energy, forces = _array(arrays, "energy"), _array(arrays, "forces")
    if not len(energy):
        return replace(run, reason=NO_STEP)
    info = facts.get("convergence_info") or {}
    is_converged = info.get("scf_conv", {}).get("convergence_achieved", True)
    if len(forces) != len(energy):
        return replace(run, reason=NO_FORCES if is_converged else NOT_CONVERGED)
    geometries = list(_geometries(arrays, last, calculation))
    if run.start is not None and _is_same(geometries[0], run.start):
        # In bohr and back it differs in the last digit: an id is of the very same numbers.
        geometries[0] = run.start
    n = min(len(energy), len(geometries))
    if calculation == "vc-relax" and len(energy) == len(geometries) + 1:
        # The last one is of a fresh basis at the relaxed cell. Where the relaxation did not come
        # that far, pw.x repeats the numbers of the step before with the cell of the next one.
        if info.get("opt_conv", {}).get("convergence_achieved"):
            geometries.append(last)
            n += 1
    elif not is_converged:
        n -= 1
    stress = _stresses(arrays, len(energy), calculation)
    steps = []
    for step in range(n):
        atoms = geometries[step].copy()
        atoms.info["config_type"] = calculation
        steps.append(_labelled(atoms, float(energy[step]), forces[step], stress[step]))
    steps = [atoms for atoms in steps if not _fault(atoms)]
    reason = "" if steps else (_fault(geometries[0]) if n else NOT_CONVERGED) or NO_STEP
    return replace(run, steps=tuple(steps), reason=reason)


def _geometries(arrays: Mapping[str, Any], last: Atoms, calculation: str) -> Iterator[Atoms]:
    """Return the configuration of each step."""
    positions, cells = _array(arrays, "positions"), _array(arrays, "cells")
    if calculation == "scf" or not len(positions):
        yield last
        return
    for step, here in enumerate(positions):
        atoms = last.copy()
        atoms.set_cell(cells[step] if len(cells) == len(positions) else last.cell)
        atoms.set_positions(here, apply_constraint=False)
        yield atoms


def _is_same(atoms: Atoms, other: Atoms) -> bool:
    return np.allclose(atoms.positions, other.positions, rtol=0.0, atol=SAME_POSITION) and bool(
        np.allclose(atoms.cell.array, other.cell.array, rtol=0.0, atol=SAME_POSITION)
    )


def _stresses(arrays: Mapping[str, Any], n: int, calculation: str) -> list[FloatArray | None]:
    """Return the stress of each step; older versions of pw.x write that of the last one only."""
    tensors = _array(arrays, "stress")
    if len(tensors) == n:
        return [voigt_stress(tensor) for tensor in tensors]
    if calculation == "vc-relax" and len(tensors) == 1:
        return [*[None] * (n - 1), voigt_stress(tensors[0])]
    return [None] * n


def _labelled(atoms: Atoms, energy: float, forces: Any, stress: Any) -> Atoms:
    results = {"energy": energy, "forces": np.asarray(forces, dtype=float)}
    if stress is not None:
        results["stress"] = stress
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _fault(atoms: Atoms) -> str:
    """Return why a step is no label; empty where it is one."""
    if fault := geometry_fault(atoms, min_contact=0.0):
        return fault
    if atoms.calc is None:
        return ""
    results = atoms.calc.results
    if not (np.isfinite(results["energy"]) and np.isfinite(results["forces"]).all()):
        return "pw.x gave an energy or force that is no number"
    if np.abs(results["forces"]).max(initial=0.0) > MAX_FORCE:
        return f"pw.x gave a force of more than {MAX_FORCE:.0f} eV/Å: atoms overlap"
    return ""


def _array(arrays: Mapping[str, Any], name: str) -> FloatArray:
    return np.asarray(arrays[name], dtype=float) if name in arrays else np.empty(0)


def _why(calculation: CalcJobNode) -> str:
    """Return why a calculation has no label."""
    if not calculation.is_terminated:
        return f"pw.x is {calculation.process_state.value}: import it when it has finished"
    if calculation.is_finished and "retrieved" in calculation.outputs:
        return failure_of(calculation.outputs.retrieved)
    return f"pw.x was {calculation.process_state.value}: {calculation.exit_message or 'no message'}"


def _level_of_calculation(calculation: CalcJobNode) -> dict[str, Any]:
    """Return the level of theory of a PwCalculation: of equal inputs the same as that of a loop."""
    inputs = calculation.base.links.get_incoming().nested()
    structure: StructureData = inputs["structure"]
    mesh: dict[str, Any] = _mesh_rule(calculation)
    if not mesh:
        points = inputs["kpoints"]
        try:
            numbers, offset = points.get_kpoints_mesh()
            mesh = {"kpoints_mesh": numbers, "kpoints_offset": offset}
        except AttributeError:
            mesh = {"kpoints": points.get_kpoints().tolist()}
    level = level_of(inputs["parameters"].get_dict(), inputs[PSEUDOS], mesh) | _hubbard(structure)
    used = set(structure.get_kind_names())
    return {**level, PSEUDOS: {kind: md5 for kind, md5 in level[PSEUDOS].items() if kind in used}}


def _hubbard(structure: StructureData) -> dict[str, Any]:
    """Return the Hubbard parameters that a structure brings, by kinds: its atoms do not matter."""
    if not isinstance(structure, HubbardStructureData) or not structure.hubbard.parameters:
        return {}
    kinds = [site.kind_name for site in structure.sites]
    terms = {
        (
            kinds[item.atom_index],
            item.atom_manifold,
            # Neighbours in other cells are counted on.
            kinds[item.neighbour_index % len(kinds)],
            item.neighbour_manifold,
            item.hubbard_type,
            item.value,
        )
        for item in structure.hubbard.parameters
    }
    return {
        "hubbard": [list(term) for term in sorted(terms)],
        "hubbard_projectors": structure.hubbard.projectors,
        "hubbard_formulation": structure.hubbard.formulation,
    }


def _mesh_rule(calculation: CalcJobNode) -> dict[str, Any]:
    """Return the rule that gave the mesh, where a work chain above had one."""
    caller, prefix = calculation.caller, ""
    while caller is not None:
        given = {entry.link_label: entry.node for entry in caller.base.links.get_incoming().all()}
        if f"{prefix}{DISTANCE}" in given:
            parity = given.get(f"{prefix}{PARITY}")
            value = given[f"{prefix}{DISTANCE}"].value
            return {DISTANCE: value, PARITY: bool(parity.value) if parity is not None else False}
        caller, prefix = caller.caller, "pw_base__"
    return {}


def _level_of_xml(data: Mapping[str, Any], tree: ET.Element) -> dict[str, Any]:
    """Return the level of theory that an XML file says, under the keys of the input of pw.x."""
    species = data["structure"]["species"]
    level: dict[str, Any] = {
        "code": CODE,
        "functional": data["dft_exchange_correlation"],
        "ecutwfc": round(data["wfc_cutoff"] / Ry, 4),
        "ecutrho": round(data["rho_cutoff"] / Ry, 4),
        "occupations": data.get("occupations"),
        PSEUDOS: dict(zip(species["type"], species["pseudo"], strict=True)),
    }
    if "smearing_type" in data:
        level |= {"smearing": data["smearing_type"], "degauss": round(data["degauss"] / Ry, 6)}
    if data["number_of_spin_components"] != 1:
        level |= {
            "nspin": data["number_of_spin_components"],
            "starting_magnetization": data["starting_magnetization"],
            "spinorbit": data["spin_orbit_calculation"],
        }
    # A neutral cell has none, as the input of pw.x has none by default.
    if charge := float(tree.findtext("input/bands/tot_charge", "0")):
        level["tot_charge"] = charge
    if "assume_isolated" in data:
        level["assume_isolated"] = data["assume_isolated"]
    if "monkhorst_pack_grid" in data:
        level["kpoints_mesh"] = data["monkhorst_pack_grid"]
        level["kpoints_offset"] = data["monkhorst_pack_offset"]
    else:
        level["number_of_k_points"] = data["number_of_k_points"]
    # Hybrids, Hubbard and van der Waals corrections, as the file has them.
    for item in tree.find("input/dft") or ():
        if item.tag != "functional":
            level[item.tag] = " ".join("".join(_texts(item)).split())
    return level


def _texts(element: ET.Element) -> Iterator[str]:
    for item in element.iter():
        yield f" {item.tag} {sorted(item.attrib.items())} {item.text or ''}"


def _symbol(kind: str) -> str:
    """Return the element of a species of pw.x, such as ``Fe1`` or ``fe_up``."""
    letters = kind[: next((n for n, char in enumerate(kind) if not char.isalpha()), len(kind))]
    return letters.capitalize()


def _is_told(run: Run, others: Sequence[Run]) -> bool:
    """Return whether another file tells of the same run: energies of one formula are equal."""
    if not run.steps:
        return False
    last = run.steps[-1]
    energy, formula = last.calc.results["energy"], last.get_chemical_formula()
    return any(
        abs(step.calc.results["energy"] - energy) <= SAME_RUN * abs(energy)
        for other in others
        for step in other.steps
        if step.get_chemical_formula() == formula
    )


def _mesh(run: Run, facts: Mapping[str, Any]) -> list[int]:
    atoms = run.start if run.start is not None else next(iter(run.steps), None)
    if atoms is None:
        return []
    parity = bool(facts.get(PARITY, False))
    return mesh_of(StructureData(ase=atoms), float(facts[DISTANCE]), parity)


def _agree(level: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    mine, theirs = level.get(PSEUDOS, {}), other.get(PSEUDOS, {})
    if any(mine[kind] != theirs[kind] for kind in mine.keys() & theirs.keys()):
        return False
    facts = [
        {key: value for key, value in item.items() if key not in (PSEUDOS, FINGERPRINT)}
        for item in (level, other)
    ]
    return with_fingerprint(facts[0])[FINGERPRINT] == with_fingerprint(facts[1])[FINGERPRINT]


def _conflict(run: Run, atoms: Atoms, earlier: tuple[Atoms, str, str]) -> str:
    """Return why a geometry that came before is not believed; empty where its energy is equal."""
    energies = [item.calc.results["energy"] for item in (earlier[0], atoms)]
    if abs(energies[0] - energies[1]) <= SAME_ENERGY * len(atoms):
        return ""
    return (
        f"runs {earlier[2]} and {run.name} give this geometry energies of {energies[0]:.6f} and "
        f"{energies[1]:.6f} eV, though their levels of theory are equal"
    )


def _row(configuration: Configurations, atoms: Atoms, origin: str) -> Labels:
    results = atoms.calc.results
    stress = np.asarray(results.get("stress", np.full(6, np.nan)), dtype=float)
    return Labels(
        ids=configuration.ids,
        offsets=configuration.offsets,
        sources=np.array([DFT]),
        energy=np.array([[float(results["energy"])]]),
        forces=np.asarray(results["forces"], dtype=float)[None],
        stress=stress[None, None],
        status=np.zeros((1, 1), dtype=np.int64),
        reasons=np.array([], dtype="<U1"),
        origins=np.array([origin], dtype="<U36"),
    )


def _rows(configurations: Configurations, node: LabelsData) -> Iterator[Run]:
    """Return each row of a table as a run with one step."""
    labels, level = node.value(), node.level
    reasons = {failure.id: failure.reason for failure in labels.failures()}
    for row, name in enumerate(labels.ids.tolist()):
        place = int(configurations.rows_of([name])[0])
        atoms = configurations.atoms(place)
        atoms.info["config_type"] = str(configurations.config_types[place])
        known = Run(name=name, start=atoms, level=level, origin=str(labels.origins[row]))
        if name in reasons:
            yield replace(known, reason=reasons[name])
        else:
            energy, forces = float(labels.energy[row, 0]), labels.forces_of(row)
            yield replace(known, steps=(_labelled(atoms, energy, forces, labels.stress[row, 0]),))


def _as_nodes(runs: Sequence[Run]) -> dict[str, Any]:
    used = [run for run in runs if run.level and (run.steps or run.start is not None)]
    level = level_of_runs(used)
    configurations, labels, n_copies, names = table_of(used)
    unread = {run.name: run.reason for run in runs if run not in used}
    facts = {
        "n_copies": n_copies,
        **({"files": names} if not runs[0].origin else {}),
        **({"unread": unread} if unread else {}),
    }
    return {
        "configurations": ConfigurationsData.from_value(configurations),
        "labels": LabelsData.from_value(labels, level=with_fingerprint(level), **facts),
    }
