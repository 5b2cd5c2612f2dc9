"""Configurations out of molecular dynamics, with any ASE calculator."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.md.langevin import Langevin
from ase.md.langevinbaoab import LangevinBAOAB

from aiida_eipnn.science.gate import MIN_CONTACT, geometry_fault

# Where a committee says how far its members are from one another, in eV/Å, for each atom.
FORCES_STD = "forces_std"
# Period of the volume under a barostat, in fs.
PRESSURE_TIME = 200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamics:
    """One run of Langevin dynamics, at constant volume or constant pressure.

    Parameters
    ----------
    temperature
        Of the thermostat and of the first velocities, in K.
    n_snapshots
        Configurations to take.
    spacing
        Steps between two of them, and before the first.
    timestep
        Length of a step, in fs.
    friction
        Of the thermostat, per fs.
    max_temperature_factor
        The run ends when the atoms are hotter than this many times ``temperature``, averaged over
        the last few steps; small cells fluctuate by a factor of three without any fault.
    min_contact
        The run ends when two atoms are closer than this fraction of the sum of their covalent
        radii.
    pressure
        Of a barostat that scales the cell and keeps its shape, in GPa; ``None`` keeps the volume.
    max_uncertainty
        The run ends when the calculator, a committee, disagrees more than this about the force on
        an atom, in eV/Å: that configuration is the last snapshot, for it is what the committee
        does not know. ``None`` never asks.
    """

    temperature: float
    n_snapshots: int = 10
    spacing: int = 20
    timestep: float = 1.0
    friction: float = 0.01
    max_temperature_factor: float = 10.0
    min_contact: float = MIN_CONTACT
    pressure: float | None = None
    max_uncertainty: float | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "n_snapshots", "spacing", "timestep", "friction"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above zero")
        if self.max_uncertainty is not None and not self.max_uncertainty > 0:
            raise ValueError(f"max_uncertainty is {self.max_uncertainty}; it must be above zero")
        if not self.max_temperature_factor > 1:
            raise ValueError(
                f"max_temperature_factor is {self.max_temperature_factor}; it must be above 1"
            )


class Trajectory(NamedTuple):
    """The snapshots, and why there are fewer than asked for; an empty ``fault`` if all came."""

    frames: list[Atoms]
    fault: str


def run_dynamics(
    atoms: Atoms,
    calculator: Calculator,
    rng: np.random.Generator,
    settings: Dynamics,
) -> Trajectory:
    """Run dynamics and keep snapshots.

    A run that blows up keeps its frames up to the last good one and says why it ended; it does not
    raise.

    Parameters
    ----------
    atoms
        Where to start; not changed.
    calculator
        Gives energy and forces.
    rng
        Draws velocities and the thermostat's kicks: the same generator state, the same frames.
    settings
        How hot and how long.
    """
    if settings.pressure is not None and not atoms.pbc.all():
        return Trajectory([], "constant pressure needs a cell that is periodic in all directions")
    moving = Atoms(
        numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc
    )
    moving.calc = calculator
    # The Maxwell-Boltzmann distribution, written out: ASE has renamed its function.
    speed = np.sqrt(units.kB * settings.temperature / moving.get_masses())
    moving.set_velocities(speed[:, None] * rng.standard_normal((len(moving), 3)))
    integrator = _integrator(moving, settings, rng)
    frames: list[Atoms] = []
    while len(frames) < settings.n_snapshots:
        fault, is_unsure = _advance(moving, integrator, settings)
        done = len(frames) * settings.spacing
        if not fault or is_unsure:
            frames.append(
                Atoms(
                    numbers=moving.numbers,
                    positions=moving.positions,
                    cell=moving.cell.array,
                    pbc=moving.pbc,
                )
            )
        if fault:
            return Trajectory(frames, f"stopped after step {done}: {fault}")
    return Trajectory(frames, "")


def _integrator(moving: Atoms, settings: Dynamics, rng: np.random.Generator) -> Any:
    if settings.pressure is None:
        return Langevin(
            moving,
            timestep=settings.timestep * units.fs,
            temperature_K=settings.temperature,
            friction=settings.friction / units.fs,
            fixcm=False,
            rng=rng,
        )
    return LangevinBAOAB(
        moving,
        timestep=settings.timestep * units.fs,
        temperature_K=settings.temperature,
        # Stress has the sign of tension.
        externalstress=-settings.pressure * units.GPa,
        hydrostatic=True,
        T_tau=units.fs / settings.friction,
        # Runs are short: the volume must come to rest within some of them.
        P_tau=PRESSURE_TIME * units.fs,
        # ASE's own choice, which it warns of.
        P_mass=(PRESSURE_TIME / 4 / 1.66) ** 2 * len(moving) ** (1 / 3),
        rng=rng,
    )


def _advance(moving: Atoms, integrator: Any, settings: Dynamics) -> tuple[str, bool]:
    """Go on to the next snapshot; return what ends the run, if anything, and if that is doubt."""
    temperatures = []
    for _ in range(settings.spacing):
        try:
            integrator.step()
        except Exception as error:
            # A potential that is asked about exploding atoms raises whatever it likes.
            return f"the potential failed ({type(error).__name__}: {error})", False
        temperatures.append(moving.get_temperature())
        if fault := geometry_fault(moving, settings.min_contact):
            return fault, False
        if doubt := _doubt(moving, settings.max_uncertainty):
            return doubt, True
    hottest = settings.max_temperature_factor * settings.temperature
    recent = float(np.mean(temperatures[-10:]))
    if not recent <= hottest:
        return f"the atoms reached {recent:.0f} K, the guard is {hottest:.0f} K", False
    return "", False


def _doubt(moving: Atoms, most: float | None) -> str:
    """Return why the calculator is not to be trusted, if it is not."""
    if most is None:
        return ""
    # What the step has computed already.
    spread = float(np.max(moving.calc.results[FORCES_STD]))
    if spread <= most:
        return ""
    return f"the committee is unsure: the spread of a force is {spread:.3g} eV/Å, above {most:.3g}"
