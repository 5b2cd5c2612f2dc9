"""From a protocol to the inputs of the loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from aiida.common.exceptions import NotExistent
from aiida.engine import ProcessBuilder
from aiida.orm import AbstractCode, Dict, Float, Int, List, Str, StructureData, load_group
from aiida_quantumespresso.workflows.protocols.utils import recursive_merge
from aiida_quantumespresso.workflows.pw.base import PwBaseWorkChain
from ase import Atoms

from aiida_eipnn.calculations.explore import ExploreCalculation
from aiida_eipnn.data.choice import Choice, ChoiceData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.workflows.label_dft import DftLabelWorkChain
from aiida_eipnn.workflows.restart import LabelBaseWorkChain, TrainBaseWorkChain

# One core, no MPI: on a busy machine two runs on one core each beat one run on two.
ONE_CORE = {"resources": {"num_machines": 1, "num_mpiprocs_per_machine": 1}, "withmpi": False}


TRAININGS = ("pretrain", "classify", "finetune", "scratch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """The codes of a loop.

    Parameters
    ----------
    pw
        Runs pw.x.
    job
        Runs ``eipnn-job``.
    """

    pw: AbstractCode
    job: AbstractCode


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
    """

    structures: Sequence[StructureData] = ()
    pool: ConfigurationsData | None = None
    eips: Sequence[str] = ()
    known_configurations: ConfigurationsData | None = None
    known_labels: LabelsData | None = None

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
    """Fill in every input of the loop."""
    if start.pool is not None:
        builder.pool = start.pool
    else:
        builder.explore = _explore(inputs, codes.job, start.structures, start.eips, options)
    if start.known_labels is not None:
        builder.known = {
            "configurations": start.known_configurations,
            "labels": start.known_labels,
        }
    builder.label.job = _label(inputs, codes.job, start.elements, start.eips, options)
    builder.dft = fill_dft(inputs["dft"], codes.pw, start.elements, options)
    builder.train.job = _train(inputs, codes.job, options)
    builder.evaluate = {"parameters": Dict(inputs["evaluate"]), **_job(codes.job, options)}
    for name in (*TRAININGS, "split", "gate", "acquisition", "stop"):
        builder[name] = Dict(inputs[name])
    builder.seed = Int(inputs["seed"])
    builder.train_scratch = inputs["train_scratch"]
    builder.use_pseudo_labels = inputs["use_pseudo_labels"]
    return builder


def explore_builder(
    inputs: Mapping[str, Any],
    code: AbstractCode,
    structures: Sequence[StructureData],
    eips: Sequence[str] = (),
) -> ProcessBuilder:
    """Return a builder that makes the pool of a protocol."""
    builder = ExploreCalculation.get_builder()
    builder._update(_explore(inputs, code, structures, eips, {}))
    return builder


def label_builder(
    inputs: Mapping[str, Any],
    code: AbstractCode,
    pool: ConfigurationsData,
    eips: Sequence[str] = (),
) -> ProcessBuilder:
    """Return a builder that labels ``pool`` with the EIPs of a protocol, or with those given."""
    elements = pool.base.attributes.get("elements")
    builder = LabelBaseWorkChain.get_builder()
    builder.job = {"configurations": {"pool": pool}, **_label(inputs, code, elements, eips, {})}
    return builder


def dft_builder(
    inputs: Mapping[str, Any],
    code: AbstractCode,
    pool: ConfigurationsData,
    n_chosen: int | None,
    seed: int,
) -> ProcessBuilder:
    """Return a builder that labels ``n_chosen`` configurations of ``pool`` with pw.x, or all.

    Raises
    ------
    ValueError
        If the pool has fewer configurations.
    """
    ids = pool.value().ids
    if n_chosen is not None:
        if not 0 < n_chosen <= len(ids):
            raise ValueError(f"cannot pick {n_chosen} of {len(ids)} configurations")
        ids = np.random.default_rng(seed).permutation(ids)[:n_chosen]
    builder = DftLabelWorkChain.get_builder()
    builder._update(
        {
            "configurations": pool,
            "choice": ChoiceData.from_value(Choice.from_ids(ids), strategy="given"),
            **fill_dft(inputs["dft"], code, pool.base.attributes.get("elements"), {}),
        }
    )
    return builder


def train_builder(inputs: Mapping[str, Any], code: AbstractCode, name: str) -> ProcessBuilder:
    """Return a builder with the settings of the training ``name``, less the data."""
    builder = TrainBaseWorkChain.get_builder()
    builder.job = {"training": Dict(inputs[name]), **_train(inputs, code, {})}
    return builder


def fill_dft(
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
            options={**ONE_CORE, **options},
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


def _job(code: AbstractCode, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"code": code, "metadata": {"options": {**ONE_CORE, **options}}}


def _explore(
    inputs: Mapping[str, Any],
    code: AbstractCode,
    structures: Sequence[StructureData],
    eips: Sequence[str],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    elements = sorted({symbol for item in structures for symbol in item.get_symbols_set()})
    seeds = ConfigurationsData.from_structures(list(structures), "seed")
    return {
        "configurations": {"seeds": seeds},
        "recipes": List(inputs["explore"]["recipes"]),
        "seed": Int(inputs["seed"]),
        # The first of the list is the one that is trusted most.
        "eip": Str((list(eips) or default_eips(inputs["eips"], elements))[0]),
        **_job(code, options),
    }


def _label(
    inputs: Mapping[str, Any],
    code: AbstractCode,
    elements: Sequence[str],
    eips: Sequence[str],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "eips": List(list(eips) or default_eips(inputs["eips"], elements)),
        "parameters": Dict(inputs["label"]),
        **_job(code, options),
    }


def _train(
    inputs: Mapping[str, Any], code: AbstractCode, options: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "seeds": List(member_seeds(inputs["seed"], inputs["n_members"])),
        "network": Dict(inputs["network"]),
        "classes": Dict(inputs["classes"]),
        "parameters": Dict(inputs["train"]),
        **_job(code, options),
    }
