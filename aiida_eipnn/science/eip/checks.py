"""What a potential must hold on crystals of one element, measured.

Nothing here asks whether a potential is a good model of the element. The checks ask whether its
numbers belong together: whether forces and stress are derivatives of the energy, whether the energy
is that of an infinite crystal and not of a cell, and whether it depends on the configuration alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.build import bulk

from aiida_eipnn.science.arrays import FloatArray
from aiida_eipnn.science.eip.potential import EmpiricalPotential, Label

# Steps of finite differences, in Å, and as strain. The best of them counts: a step over a kink of a
# spline is wrong at one of them, a wrong force at all.
STEPS = (1e-2, 1e-3, 1e-4, 1e-5)
# Linear size against experiment, standard deviations of strain and of displacements in Å.
CRYSTALS = {
    "rattled": (1.00, 0.00, 0.08),
    "strained": (1.00, 0.04, 0.08),
    "compressed": (0.96, 0.01, 0.08),
    "expanded": (1.05, 0.01, 0.08),
}
_VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured of one potential on one crystal.

    Parameters
    ----------
    energy
        In eV per atom.
    force
        Largest force on an atom, in eV/Å.
    reuse
        Largest difference in energy, in eV per atom, between a new potential and one that has
        labelled other configurations before, in either order.
    forces
        Largest difference between a force component and minus the slope of the energy, in eV/Å.
    stress
        Largest difference between a stress component and the slope of the energy by strain, per
        volume, in eV/Å³.
    supercell
        Difference in energy between the cell and 2x2x2 of it, in eV per atom.
    rotation
        Difference in energy between the crystal and the turned crystal, in eV per atom.
    rotated_forces
        Largest difference between the turned forces and those of the turned crystal, in eV/Å.
    """

    energy: float
    force: float
    reuse: float
    forces: float
    stress: float
    supercell: float
    rotation: float
    rotated_forces: float


def crystals(element: str) -> dict[str, Atoms]:
    """Return the crystals of ``element`` that potentials are checked on, by name.

    The same in each call.

    Raises
    ------
    ValueError
        If ASE knows no crystal of the element.
    """
    try:
        ideal = bulk(element, cubic=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"there is no crystal of {element!r} to check on: {error}") from error
    # Atoms of a cell that all see their own images alone test little.
    ideal *= (2, 1, 1) if len(ideal) < 4 else (1, 1, 1)
    return {
        name: _perturbed(ideal, *amounts, np.random.default_rng(seed))
        for seed, (name, amounts) in enumerate(CRYSTALS.items())
    }


def _perturbed(
    ideal: Atoms, size: float, strain: float, rattle: float, rng: np.random.Generator
) -> Atoms:
    atoms = ideal.copy()
    deformation = size * (np.eye(3) + strain * rng.normal(size=(3, 3)))
    atoms.set_cell(atoms.cell @ deformation, scale_atoms=True)
    atoms.positions += rattle * rng.normal(size=atoms.positions.shape)
    return atoms


def measure(
    open_new: Callable[[], EmpiricalPotential], pool: dict[str, Atoms]
) -> Iterator[tuple[str, Measured | Exception]]:
    """Measure a potential on each crystal of ``pool``; what it raises there comes instead.

    Parameters
    ----------
    open_new
        Opens the potential anew at each call.
    pool
        Crystals by name, as of :func:`crystals`.
    """
    used = open_new()
    for atoms in [*pool.values(), *reversed(pool.values())]:
        try:
            used.label(atoms)
        except Exception:  # noqa: PERF203, S112 - it comes again below
            continue
    for name, atoms in pool.items():
        try:
            yield name, _measure_one(open_new, used, atoms)
        except Exception as error:  # noqa: PERF203 - whatever a potential raises is a finding
            yield name, error


def _measure_one(
    open_new: Callable[[], EmpiricalPotential], used: EmpiricalPotential, atoms: Atoms
) -> Measured:
    first, fresh, again = used.label(atoms), open_new().label(atoms), used.label(atoms)
    rotation, rotated_forces = _rotation(used, atoms, fresh)
    return Measured(
        energy=fresh.energy / len(atoms),
        force=float(np.linalg.norm(fresh.forces, axis=1).max()),
        reuse=max(abs(label.energy - fresh.energy) for label in (first, again)) / len(atoms),
        forces=_forces(used, atoms, fresh),
        stress=_stress(used, atoms, fresh),
        supercell=abs(used.label(atoms * (2, 2, 2)).energy / 8 - fresh.energy) / len(atoms),
        rotation=rotation,
        rotated_forces=rotated_forces,
    )


def _forces(potential: EmpiricalPotential, atoms: Atoms, label: Label) -> float:
    worst = 0.0
    for atom, axis in np.ndindex(len(atoms), 3):
        slopes = _slopes(potential, lambda by, a=atom, i=axis: _moved(atoms, a, i, by))
        worst = max(worst, np.abs(slopes + label.forces[atom, axis]).min())
    return worst


def _stress(potential: EmpiricalPotential, atoms: Atoms, label: Label) -> float:
    worst = 0.0
    for voigt, (i, j) in enumerate(_VOIGT):
        slopes = _slopes(potential, lambda by, i=i, j=j: _strained(atoms, i, j, by))
        worst = max(worst, np.abs(slopes / atoms.cell.volume - label.stress[voigt]).min())
    return worst


def _slopes(potential: EmpiricalPotential, changed: Callable[[float], Atoms]) -> FloatArray:
    """Return the slope of the energy by each of :data:`STEPS`, by central differences."""
    energies = [
        [potential.label(changed(sign * step)).energy for sign in (-1, 1)] for step in STEPS
    ]
    return np.diff(energies, axis=1)[:, 0] / (2 * np.array(STEPS))


def _moved(atoms: Atoms, atom: int, axis: int, by: float) -> Atoms:
    moved = atoms.copy()
    moved.positions[atom, axis] += by
    return moved


def _strained(atoms: Atoms, i: int, j: int, by: float) -> Atoms:
    strain = np.eye(3)
    strain[i, j] += by / 2
    strain[j, i] += by / 2
    moved = atoms.copy()
    moved.set_cell(atoms.cell @ strain, scale_atoms=True)
    return moved


def _rotation(potential: EmpiricalPotential, atoms: Atoms, label: Label) -> tuple[float, float]:
    turn = _turn(np.random.default_rng(0))
    turned = atoms.copy()
    turned.set_cell(atoms.cell @ turn)
    turned.positions = atoms.positions @ turn
    other = potential.label(turned)
    energy = abs(other.energy - label.energy) / len(atoms)
    return energy, float(np.abs(other.forces - label.forces @ turn).max())


def _turn(rng: np.random.Generator) -> FloatArray:
    """Return a random proper rotation."""
    orthogonal, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return orthogonal * np.sign(np.linalg.det(orthogonal))
