"""What an EIP is, how to open one by name, and how to drive molecular dynamics with it.

A name is one of

- a KIM model id, ``SW_StillingerWeber_1985_Si__MO_405512056662_005`` (needs ``kimpy``);
- an analytic potential, ``lennard-jones[epsilon=0.2,sigma=2.1,cutoff=5]`` or
  ``stillinger-weber``, ``stillinger-weber[hauch-1999]``, ``stillinger-weber[lambda=50]``;
- ``ase:module:callable``: an ASE calculator, made by a class or function with the settings in
  brackets: ``ase:ase.calculators.emt:EMT[asap_cutoff=True]``;
- ``python:module:callable``: what the callable returns, for potentials of your own.

All but the first need no KIM. :mod:`~aiida_eipnn.science.eip.names` reads the brackets.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.data import chemical_symbols

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.eip.names import ASE, LENNARD_JONES, PYTHON, STILLINGER_WEBER


class Label(NamedTuple):
    """What an EIP says about one configuration.

    ``energy`` in eV; ``forces`` in eV/Å, shape ``(n_atoms, 3)``; ``stress`` in eV/Å³, ASE's sign
    and order, shape ``(6,)``, NaN where the configuration is not periodic in all directions.
    """

    energy: float
    forces: FloatArray
    stress: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class PotentialDescription:
    """Where an EIP comes from.

    Parameters
    ----------
    name
        The name that opens it.
    kim_id
        Short KIM id, ``MO_405512056662_005``; empty for other potentials.
    title
        One line for people.
    species
        Symbols of the elements it knows.
    family
        Its functional form: the KIM model driver without its id, or the potential's own word.
    citation
        The publication in one line, empty where none is recorded.
    doi
        DOI of the publication, else of the KIM model itself; empty where none is recorded.
    year
        Year of the publication.
    machine_learned
        Whether it was fitted by machine learning (SNAP, neural networks) and so is no EIP in the
        strict sense: such models may have been fitted to the very data a benchmark tests on.
    """

    name: str
    kim_id: str = ""
    title: str = ""
    species: tuple[str, ...] = ()
    family: str = ""
    citation: str = ""
    doi: str = ""
    year: int | None = None
    machine_learned: bool = False


@runtime_checkable
class EmpiricalPotential(Protocol):
    """A potential that labels configurations."""

    @property
    def name(self) -> str:
        """The name that opens it."""

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers it knows."""

    @property
    def cutoff(self) -> float:
        """Distance beyond which an atom has no influence on another, in Å; infinite if unknown."""

    @property
    def description(self) -> PotentialDescription:
        """Where it comes from."""

    def label(self, atoms: Atoms) -> Label:
        """Return energy, forces and stress of one configuration.

        Raises
        ------
        ValueError
            If it does not know an element of the configuration.
        """


def open_potential(name: str) -> EmpiricalPotential:
    """Open the EIP of that name; the module docstring says which names there are.

    Raises
    ------
    ValueError
        If there is no such potential, or if it cannot be used.
    ModuleNotFoundError
        If it is a KIM model and ``kimpy`` is not installed.
    """
    # Each kind is loaded only when it is asked for: kimpy is an optional dependency.
    if name.startswith(PYTHON):
        return _call(name)
    if name.startswith(LENNARD_JONES):
        from aiida_eipnn.science.eip.analytic import open_lennard_jones

        return open_lennard_jones(name)
    if name.startswith(STILLINGER_WEBER):
        from aiida_eipnn.science.eip.analytic import open_stillinger_weber

        return open_stillinger_weber(name)
    if name.startswith(ASE):
        from aiida_eipnn.science.eip.ase_calculator import open_ase_calculator

        return open_ase_calculator(name)
    _require_kimpy(name)
    from aiida_eipnn.science.eip.kim import open_kim_potential

    return open_kim_potential(name)


def describe_potential(name: str) -> PotentialDescription:
    """Say where the EIP of that name comes from, without the network.

    A KIM model is not opened for it: what is installed beside the model is read. Nor is an ASE
    calculator made, which may load much.

    Raises
    ------
    ValueError
        If there is no such potential.
    ModuleNotFoundError
        If it is a KIM model and ``kimpy`` is not installed.
    """
    if name.startswith((PYTHON, LENNARD_JONES, STILLINGER_WEBER)):
        return open_potential(name).description
    if name.startswith(ASE):
        from aiida_eipnn.science.eip.ase_calculator import describe_ase_calculator

        return describe_ase_calculator(name)
    _require_kimpy(name)
    from aiida_eipnn.science.eip.kim import describe_kim_model

    return describe_kim_model(name)


def refuse_unknown_elements(name: str, numbers: IntArray, known: Iterable[int]) -> None:
    """Raise ``ValueError`` if a configuration has an element that the potential lacks."""
    known = set(known)
    if missing := sorted({int(number) for number in np.unique(numbers)} - known):
        raise ValueError(
            f"{name} does not know {symbols_of(missing)}; drop these configurations or choose a "
            f"potential for them (it knows {symbols_of(sorted(known))})"
        )


def symbols_of(numbers: Iterable[int]) -> str:
    """Return the chemical symbols as one readable string."""
    return ", ".join(chemical_symbols[number] for number in numbers)


def virial_stress(positions: FloatArray, forces: FloatArray, volume: float) -> FloatArray:
    r"""Return the stress of forces that are still on the atoms' periodic images, in eV/Å³.

    :math:`\sigma = -\frac{1}{V} \sum_i r_i \otimes F_i` over atoms and images, which is
    :math:`\partial E / \partial \varepsilon / V` where each :math:`F_i` is minus the derivative of
    the cell's energy by the place of that image.

    Parameters
    ----------
    positions, forces
        Of atoms and images, in Å and eV/Å. Shape ``(n, 3)``.
    volume
        In Å³.
    """
    s = -(positions.T @ forces) / volume
    shear = (s[1, 2] + s[2, 1], s[0, 2] + s[2, 0], s[0, 1] + s[1, 0])
    return np.array([s[0, 0], s[1, 1], s[2, 2], *(0.5 * pair for pair in shear)])


class EipCalculator(Calculator):
    """ASE calculator of an EIP, for molecular dynamics and relaxations.

    Parameters
    ----------
    potential
        The EIP that gives energy, forces and stress.
    """

    implemented_properties: list[str] = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012

    def __init__(self, potential: EmpiricalPotential) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.potential = potential

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Label ``atoms``: all properties come out of one call."""
        super().calculate(atoms, properties, system_changes)  # type: ignore[no-untyped-call]
        energy, forces, stress = self.potential.label(self.atoms)  # type: ignore[arg-type]
        self.results: dict[str, Any] = {"energy": energy, "free_energy": energy, "forces": forces}
        # ASE says "not there" by leaving a property out, never by NaN.
        if np.isfinite(stress).all():
            self.results["stress"] = stress


def find_callable(name: str, target: str) -> Callable[..., Any]:
    """Return the callable of a name, given its part ``module:callable``.

    Raises
    ------
    ValueError
        If there is no such module, or nothing of that name in it.
    TypeError
        If it cannot be called.
    """
    try:
        module, attribute = target.split(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(
            f"cannot open {name}: {error}; write {name.partition(':')[0]}:module:callable"
        ) from error
    if not callable(found):
        raise TypeError(f"cannot open {name}: {attribute} cannot be called; name what can")
    return found


def _require_kimpy(name: str) -> None:
    try:
        importlib.import_module("kimpy")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} must be a KIM model, and these need {error.name}, which is not installed; "
            f"pip install aiida-eipnn[kim], or name an EIP without KIM: {LENNARD_JONES}, "
            f"{STILLINGER_WEBER}, {ASE}module:callable or {PYTHON}module:callable",
            name=error.name,
        ) from error


def _call(name: str) -> EmpiricalPotential:
    """Open ``python:module:callable``."""
    make = find_callable(name, name.removeprefix(PYTHON))
    try:
        potential = make()
    except Exception as error:  # what others wrote may raise anything
        raise ValueError(f"cannot open {name}: {type(error).__name__}: {error}") from error
    if not isinstance(potential, EmpiricalPotential):
        raise TypeError(
            f"{name} returned a {type(potential).__name__}, which lacks part of EmpiricalPotential "
            "(name, elements, cutoff, description, label)"
        )
    return potential
