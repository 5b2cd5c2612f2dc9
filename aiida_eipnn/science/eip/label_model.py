"""Pseudo-labels: what many EIPs and few DFT labels say of all other configurations.

Each candidate (:mod:`~.candidates`) is judged on DFT labels that it did not see, energies and
forces separately. What is used is a mix of candidates, each weighted by how well it did, or one of
them where that one is clearly better. Every pseudo-label comes with the error to expect of it
(:mod:`~.expected_error`), from which :func:`~.pseudo_labels.pseudo_weights` makes its weight.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from aiida_eipnn.science.arrays import BoolArray, IntArray
from aiida_eipnn.science.configurations import (
    Configurations,
    ragged_rows,
)
from aiida_eipnn.science.duplicates import find_duplicates
from aiida_eipnn.science.eip.candidates import (
    MEDIAN,
    MIN_TO_LEARN,
    REGRESS,
    SATURATED,
    SELECT,
    SOFT,
    energy_candidates,
    energy_disagreement,
    force_candidates,
    force_disagreement,
)
from aiida_eipnn.science.eip.predictors import BEST, STACK, LabelledSet
from aiida_eipnn.science.eip.pseudo_labels import PseudoLabels
from aiida_eipnn.science.eip.quantity_model import Quantity, QuantityModel, model_quantity
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.reference import EXPECTED_ERROR
from aiida_eipnn.science.settings import build

# Candidates that each method may use, for energies and for forces; the first that is there.
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "auto": ((), ()),
    "select": ((SELECT, BEST, MEDIAN), (SELECT, BEST)),
    "soft": ((SOFT, MEDIAN), (SOFT, BEST)),
    "stack": ((STACK, MEDIAN), (STACK, BEST)),
    "regress": ((REGRESS, MEDIAN), (SATURATED, STACK)),
}
# Expected error of forces, in eV/Å, before any label is seen.
EXPECTED_FORCE_ERROR = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelModelParameters:
    """How pseudo-labels are made.

    Parameters
    ----------
    method
        ``auto`` chooses by cross-validation; ``select`` takes the EIP of smallest expected error,
        ``soft`` weighs EIPs by their expected errors, ``stack`` is linear in the EIPs, ``regress``
        is not.
    n_folds
        Parts that are held out in turn.
    energy_floor
        Smallest error of an energy to expect, in eV/atom.
    forces_floor
        Smallest error of forces to expect, in eV/Å.
    max_labels
        Learn from at most so many DFT labels, drawn at random: time grows as the cube.
    """

    method: str = "auto"
    n_folds: int = 5
    energy_floor: float = 1e-3
    forces_floor: float = 1e-2
    max_labels: int = 1000

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"there is no method {self.method!r}; give one of {sorted(METHODS)}")
        if self.n_folds < 2:
            raise ValueError(f"at least 2 folds are needed to hold labels out, not {self.n_folds}")
        if self.max_labels < MIN_TO_LEARN:
            raise ValueError(f"max_labels must be at least {MIN_TO_LEARN}, not {self.max_labels}")
        for name in ("energy_floor", "forces_floor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build from plain values; ``ValueError`` names an unknown key."""
        return build(cls, content, "label model")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelModel:
    """What pseudo-labels rest on.

    Parameters
    ----------
    n_labels
        DFT labels that were learnt from, copies of a geometry counted once.
    n_eips
        EIPs that labelled enough to be used.
    energy, forces
        How each was made.
    """

    n_labels: int
    n_eips: int
    energy: QuantityModel
    forces: QuantityModel

    def report(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)


def make_pseudo_labels(
    configurations: Configurations,
    labels: Labels,
    eip_labels: Labels,
    parameters: LabelModelParameters,
    seed: int,
) -> tuple[PseudoLabels, LabelModel]:
    """Return pseudo-labels of all configurations that have labels of EIPs but none of DFT.

    Parameters
    ----------
    configurations
        Must contain every configuration of ``eip_labels``.
    labels
        DFT labels, of one source; those without labels of EIPs are not used.
    eip_labels
        Labels of the EIPs, some of which may be missing.
    parameters
        The method, and what errors to expect at least.
    seed
        Of the parts that are held out.

    Raises
    ------
    ValueError
        If the reference has more than one source, or no label that can be learnt from.
    """
    rng = np.random.default_rng(seed)
    eip_labels = _finite(eip_labels)
    part = configurations.take(configurations.rows_of(eip_labels.ids))
    reference = _spread_out(part, labels)
    labelled = np.flatnonzero(reference.ok[:, 0])
    wanted = np.flatnonzero(~reference.ok[:, 0])
    _check(labels, eip_labels, labelled)
    known = _rows_to_learn(part, labelled, parameters, rng)
    parts = rng.permutation(len(known)) % min(parameters.n_folds, len(known))
    everything = np.concatenate([known, wanted])
    train, pool = (
        LabelledSet(part.take(rows), reference.take(rows), eip_labels.take(rows))
        for rows in (known, everything)
    )
    quantities = _quantities(parameters)
    energy, forces = (model_quantity(train, pool, parts, quantity) for quantity in quantities)
    unknown = _unknown(pool, len(known))
    pseudo = PseudoLabels(
        ids=part.ids[wanted],
        offsets=np.concatenate([[0], np.cumsum(part.n_atoms[wanted])]).astype(np.int64),
        energy=energy.predicted * part.n_atoms[wanted],
        energy_error=np.where(unknown, np.inf, energy.expected),
        forces=forces.predicted,
        forces_error=np.where(unknown, np.inf, forces.expected),
    )
    return pseudo, LabelModel(
        n_labels=len(known),
        n_eips=int(pool.used.sum()),
        energy=energy.model,
        forces=forces.model,
    )


def _finite(labels: Labels) -> Labels:
    """Return the labels with those that are not finite missing."""
    starts = labels.offsets[:-1]
    wrong_atoms = ~np.isfinite(labels.forces).all(axis=2)
    wrong = np.logical_or.reduceat(wrong_atoms, starts, axis=1).T if len(starts) else wrong_atoms.T
    wrong = (wrong | ~np.isfinite(labels.energy)) & labels.ok
    if not wrong.any():
        return labels
    return replace(
        labels,
        status=np.where(wrong, len(labels.reasons) + 1, labels.status),
        reasons=np.append(labels.reasons, "not finite"),
    )


def _spread_out(configurations: Configurations, labels: Labels) -> Labels:
    """Return the DFT labels on the rows of the configurations, missing where there is none."""
    if len(labels.sources) != 1:
        raise ValueError(
            f"DFT labels must be of one source, not {labels.sources.tolist()}; keep only that one"
        )
    labels = _finite(labels).labelled()
    empty = Labels.missing(configurations, [str(labels.sources[0])])
    row_of = {str(name): row for row, name in enumerate(configurations.ids)}
    here = np.array([row for row, name in enumerate(labels.ids) if str(name) in row_of], dtype=int)
    labels = labels.take(here)
    rows = np.array([row_of[str(name)] for name in labels.ids], dtype=np.int64)
    energy, forces, status = empty.energy, empty.forces, empty.status
    energy[rows], status[rows] = labels.energy, 0
    forces[:, ragged_rows(empty.offsets, rows)] = labels.forces
    return empty


def _check(labels: Labels, eip_labels: Labels, labelled: IntArray) -> None:
    if not len(labelled):
        raise ValueError(
            f"none of the {len(labels)} DFT labels is of a configuration that EIPs were asked "
            "about; label the configurations of the DFT labels with the EIPs first"
        )
    if not eip_labels.ok[labelled].any():
        raise ValueError(
            f"none of {eip_labels.sources.tolist()} labelled one of the {len(labelled)} "
            "configurations with a DFT label; choose EIPs for these elements"
        )


def _rows_to_learn(
    configurations: Configurations,
    labelled: IntArray,
    parameters: LabelModelParameters,
    rng: np.random.Generator,
) -> IntArray:
    """Return the labelled rows, each geometry once: held out, a copy would be remembered."""
    first = find_duplicates(configurations.take(labelled)) == np.arange(len(labelled))
    distinct = labelled[first]
    return np.sort(rng.permutation(distinct)[: parameters.max_labels])


def _quantities(parameters: LabelModelParameters) -> tuple[Quantity, Quantity]:
    energies, forces = METHODS[parameters.method]
    return (
        Quantity(
            predict=energy_candidates,
            truth=lambda problem, rows: problem.energy[rows],
            disagreement=energy_disagreement,
            names=energies,
            floor=parameters.energy_floor,
            prior=EXPECTED_ERROR,
        ),
        Quantity(
            predict=force_candidates,
            truth=lambda problem, rows: problem.forces[problem.atoms(rows)],
            disagreement=force_disagreement,
            names=forces,
            floor=parameters.forces_floor,
            prior=EXPECTED_FORCE_ERROR,
        ),
    )


def _unknown(pool: LabelledSet, n_known: int) -> BoolArray:
    """Return which wanted rows no EIP labelled, or have an element no DFT label has."""
    seen = pool.fractions[:n_known].any(axis=0)
    strange = pool.fractions[n_known:][:, ~seen].any(axis=1)
    return np.asarray(strange | ~pool.labels.ok[n_known:][:, pool.used].any(axis=1))
