"""Analytic potentials: for tests and examples where no KIM model is installed."""

import re
from dataclasses import dataclass, fields

import numpy as np
from ase import Atoms
from vesin import NeighborList

from aiida_eipnn.science.eip.potential import (
    ANALYTIC,
    Label,
    PotentialDescription,
    virial_stress,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LennardJones:
    r"""Lennard-Jones with energy and force shifted to zero at the cutoff, the same for all pairs.

    :math:`V(r) = u(r) - u(r_c) - (r - r_c)\, u'(r_c)` with
    :math:`u(r) = 4 \epsilon \left[ (\sigma / r)^{12} - (\sigma / r)^6 \right]`.

    Parameters
    ----------
    epsilon
        Depth of the unshifted well, in eV.
    sigma
        Distance at which the unshifted energy is zero, in Å.
    cutoff
        In Å.
    """

    epsilon: float = 0.2
    sigma: float = 2.1
    cutoff: float = 5.0

    def __post_init__(self) -> None:
        if min(self.epsilon, self.sigma, self.cutoff) <= 0:
            raise ValueError(f"epsilon, sigma and cutoff must be positive; got {self}")

    @property
    def name(self) -> str:
        """The name that opens it."""
        settings = ",".join(f"{item.name}={getattr(self, item.name):g}" for item in fields(self))
        return f"{ANALYTIC}[{settings}]"

    @property
    def elements(self) -> frozenset[int]:
        """Every element: no parameter depends on it."""
        return frozenset(range(1, 119))

    @property
    def description(self) -> PotentialDescription:
        """Where it comes from."""
        return PotentialDescription(
            name=self.name, title="Lennard-Jones potential, shifted force", family="LJ"
        )

    def label(self, atoms: Atoms) -> Label:
        """Return energy, forces and stress of one configuration."""
        neighbours = NeighborList(cutoff=self.cutoff, full_list=False)
        # vesin's second name for an ASE cell is "box"; rows are cell vectors there too.
        i, j, distance, vector = neighbours.compute(
            points=atoms.positions,
            box=atoms.cell.complete().array,
            periodic=atoms.pbc,
            quantities="ijdD",
        )
        energy, slope = self._pair(distance)
        pair_forces = (slope / distance)[:, None] * vector
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, i, pair_forces)
        np.add.at(forces, j, -pair_forces)
        stress = np.full(6, np.nan)
        if atoms.pbc.all():
            stress = virial_stress(vector, -pair_forces, atoms.cell.volume)
        return Label(float(energy.sum()), forces, stress)

    def _pair(self, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return energy and its derivative at each distance."""
        u, slope = self._unshifted(r)
        u_cut, slope_cut = self._unshifted(np.array(self.cutoff))
        return u - u_cut - (r - self.cutoff) * slope_cut, slope - slope_cut

    def _unshifted(self, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        s6 = (self.sigma / r) ** 6
        return 4 * self.epsilon * (s6**2 - s6), 4 * self.epsilon * (6 * s6 - 12 * s6**2) / r


def open_lennard_jones(name: str) -> LennardJones:
    """Open ``lennard-jones`` or ``lennard-jones[epsilon=...,sigma=...,cutoff=...]``.

    Raises
    ------
    ValueError
        If a setting is unknown or not a number.
    """
    matched = re.fullmatch(re.escape(ANALYTIC) + r"(?:\[(.*)\])?", name)
    if not matched:
        raise ValueError(f"cannot read {name!r}; write {ANALYTIC}[epsilon=0.2,sigma=2.1,cutoff=5]")
    pairs = [item.split("=") for item in (matched[1] or "").split(",") if item]
    try:
        return LennardJones(**{key.strip(): float(value) for key, value in pairs})
    except TypeError as error:
        known = [item.name for item in fields(LennardJones)]
        raise ValueError(f"cannot open {name!r}: it has only the settings {known}") from error
    except ValueError as error:
        raise ValueError(
            f"cannot open {name!r}: {error}; write {ANALYTIC}[sigma=2.1,...]"
        ) from error
