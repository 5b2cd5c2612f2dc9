"""Refuse what cannot be right, before anyone trains on it or pays DFT for it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from vesin import NeighborList

from aiida_eipnn.science.arrays import BoolArray, FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Failure, Labels
from aiida_eipnn.science.uncertainty import spearman

GATE = "gate"

# Below 0.6 of the sum of the covalent radii (1.3 Å for silicon) EIPs are extrapolating and
# pseudopotential cores overlap.
MIN_CONTACT = 0.6


def geometry_fault(atoms: Atoms, min_contact: float = MIN_CONTACT) -> str | None:
    """Return what is wrong with a configuration, or ``None``.

    Parameters
    ----------
    atoms
        The configuration.
    min_contact
        Smallest distance of two atoms, periodic images included, as a fraction of the sum of
        their covalent radii; 0 allows any.
    """
    if len(atoms) == 0:
        return "it has no atoms"
    if not np.isfinite(atoms.positions).all():
        return "a position is not a finite number"
    if not np.isfinite(atoms.cell.array).all():
        return "a cell vector is not a finite number"
    if _is_flat(atoms):
        return "its periodic cell has no volume; set the cell vectors, or pbc to false"
    if min_contact > 0 and (distance := _overlap(atoms, min_contact)) is not None:
        return (
            f"two atoms overlap: their distance {distance:.3g} Å is below {min_contact} times the "
            "sum of their covalent radii"
        )
    return None


def refuse_invalid(
    configurations: Configurations, min_contact: float = MIN_CONTACT
) -> tuple[Failure, ...]:
    """Return the configurations that cannot be right, with the reason.

    A geometry that occurs again is named too; :func:`keep_valid` keeps its first occurrence.
    """
    failures, seen = [], set()
    for row, name in enumerate(configurations.ids.tolist()):
        fault = geometry_fault(configurations.atoms(row), min_contact)
        if fault is None and name in seen:
            fault = "it has the same geometry as an earlier one"
        seen.add(name)
        if fault is not None:
            failures.append(Failure(name, GATE, fault))
    return tuple(failures)


def keep_valid(
    configurations: Configurations, min_contact: float = MIN_CONTACT
) -> tuple[Configurations, tuple[Failure, ...]]:
    """Return the configurations that may stay, each geometry once, and those refused."""
    failures = refuse_invalid(configurations, min_contact)
    first = np.sort(np.unique(configurations.ids, return_index=True)[1])
    kept = [
        row
        for row in first.tolist()
        if geometry_fault(configurations.atoms(row), min_contact) is None
    ]
    return configurations.take(kept), failures


def _is_flat(atoms: Atoms) -> bool:
    vectors = atoms.cell.array[atoms.pbc]
    if not len(vectors):
        return False
    lengths = np.linalg.norm(vectors, axis=1)
    if (lengths == 0).any():
        return True
    directions = vectors / lengths[:, None]
    return bool(np.sqrt(max(np.linalg.det(directions @ directions.T), 0.0)) < 1e-6)


def _overlap(atoms: Atoms, min_contact: float) -> float | None:
    """Return the distance of a pair that is too close, in Å, or ``None``."""
    radii = covalent_radii[atoms.numbers]
    if atoms.pbc.all():
        # Spheres that fill more than a close packing overlap for sure. Asked first, because a
        # collapsed cell has so many images that listing the pairs would exhaust the memory.
        filling = 4 / 3 * np.pi * ((min_contact * radii) ** 3).sum() / atoms.get_volume()
        if filling > 0.7405:
            return float((atoms.get_volume() / len(atoms)) ** (1 / 3))
    cutoff = float(2 * min_contact * radii.max())
    first, second, distance = NeighborList(cutoff=cutoff, full_list=False).compute(
        points=atoms.positions,
        box=np.asarray(atoms.cell.complete()),
        periodic=atoms.pbc,
        quantities="ijd",
    )
    close = distance < min_contact * (radii[first] + radii[second])
    return float(distance[close].min()) if close.any() else None


class Verdict(StrEnum):
    """What :func:`check_labels` found."""

    PASSED = "passed"
    TOO_FEW = "too few to judge"
    NO_AGREEMENT = "no EIP to judge by"
    WRONG_SIGN = "wrong sign"
    WRONG_UNIT = "wrong unit"
    PER_ATOM = "energy per atom"


PROBLEMS = (Verdict.WRONG_SIGN, Verdict.WRONG_UNIT, Verdict.PER_ATOM)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What the EIPs say about a set of reference labels.

    Parameters
    ----------
    verdict
        In one word; only some verdicts are problems.
    text
        The same for people: what was found and what to do.
    refused
        Labels to leave out: not finite, or far from what every EIP says.
    n_judged
        Configurations that the verdict rests on.
    forces_agreement
        Median cosine between the force vectors of a configuration, reference against the EIP
        that agrees best; NaN where it could not be had.
    forces_ratio
        Median ratio of the lengths of these vectors: near 1 if the units are right.
    energy_agreement
        Rank correlation of the energies per atom, for the EIP that agrees best.
    energy_ratio
        Ratio of the spreads of the energies per atom.
    """

    verdict: Verdict
    text: str
    refused: tuple[Failure, ...]
    n_judged: int
    forces_agreement: float
    forces_ratio: float
    energy_agreement: float
    energy_ratio: float

    @property
    def problem(self) -> str | None:
        """The text where the whole set must be refused, else ``None``."""
        return self.text if self.verdict in PROBLEMS else None


# Value found where the true value is 1 eV/Å, or 1 eV.
FORCE_UNITS = {
    "hartree/bohr": 1 / 51.422,
    "hartree/Å": 1 / 27.2114,
    "rydberg/bohr": 1 / 25.711,
    "rydberg/Å": 1 / 13.6057,
    "kcal/mol/Å": 23.0605,
    "kJ/mol/Å": 96.485,
    "meV/Å": 1000.0,
    "eV/Å taken for hartree/bohr": 51.422,
    "eV/Å taken for hartree/Å": 27.2114,
    "eV/Å taken for rydberg/bohr": 25.711,
    "eV/Å taken for rydberg/Å": 13.6057,
}
ENERGY_UNITS = {
    "hartree": 1 / 27.2114,
    "rydberg": 1 / 13.6057,
    "kcal/mol": 23.0605,
    "kJ/mol": 96.485,
    "meV": 1000.0,
    "eV taken for hartree": 27.2114,
    "eV taken for rydberg": 13.6057,
}

MIN_JUDGED = 5
# EIPs of sound data agree to a factor of two or three; the smallest unit mistake is 13.6.
MAX_RATIO = 6.0
MIN_AGREEMENT = 0.3
CLEAR_AGREEMENT = 0.5
# An EIP beyond this force is in its repulsive wall, and no yardstick.
MAX_EIP_FORCE = 50.0
MIN_EIP_FORCE = 0.05
