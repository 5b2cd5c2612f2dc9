"""ASE calculators as EIPs: EMT, xTB, a foundation model, whatever has ASE's interface."""

import ast
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.calculators.emt import parameters as emt_parameters
from ase.data import atomic_numbers, chemical_symbols

from aiida_eipnn.science.arrays import FloatArray
from aiida_eipnn.science.eip.names import ASE, read_name
from aiida_eipnn.science.eip.potential import (
    Label,
    PotentialDescription,
    find_callable,
    refuse_unknown_elements,
)

_ALL = frozenset(range(1, len(chemical_symbols)))


@dataclass(frozen=True, slots=True, kw_only=True)
class AseCalculatorPotential:
    """An ASE calculator, made once and asked for one configuration after the other.

    Parameters
    ----------
    name
        The name that opens it.
    calculator
        It must give energy and forces; stress if it can.
    description
        Where it comes from.
    elements
        Atomic numbers it knows; all where it does not tell.
    cutoff
        In Å; infinite, because ASE has no word for it.
    """

    name: str
    calculator: Any
    description: PotentialDescription
    elements: frozenset[int] = _ALL
    cutoff: float = field(default=math.inf, init=False)

    def label(self, atoms: Atoms) -> Label:
        """Return energy, forces and stress of one configuration.

        The energy is the one that the forces belong to (``free_energy``) where there are two. The
        stress is NaN where the calculator has none. Whatever else the calculator raises is passed
        on.

        Raises
        ------
        ValueError
            If it is known not to know an element, or gives an array of another shape.
        """
        refuse_unknown_elements(self.name, atoms.numbers, self.elements)
        # A calculator may keep what it is given, and would give a constrained atom no force.
        bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        self._forget()
        forces = self._array("forces", self.calculator.get_forces(bare), (len(bare), 3))
        energy = self._energy(bare)
        stress = np.full(6, np.nan)
        if bare.pbc.all():
            stress = self._stress(bare)
        return Label(energy, forces, stress)

    def _forget(self) -> None:
        """Drop what the calculator remembers of the configuration before.

        After an error a calculator may hold the new atoms and half of their results; asked for
        these atoms again it would answer with them.
        """
        if hasattr(self.calculator, "reset"):
            self.calculator.reset()

    def _energy(self, atoms: Atoms) -> float:
        try:
            energy = self.calculator.get_potential_energy(atoms, force_consistent=True)
        except (PropertyNotImplementedError, TypeError):
            # No free energy, or no such option.
            energy = self.calculator.get_potential_energy(atoms)
        return float(energy)

    def _stress(self, atoms: Atoms) -> FloatArray:
        none = np.full(6, np.nan)
        if not hasattr(self.calculator, "get_stress"):
            return none
        try:
            stress = np.asarray(self.calculator.get_stress(atoms), dtype=float)
        except PropertyNotImplementedError:
            return none
        if stress.shape == (3, 3):
            stress = 0.5 * (stress + stress.T)
            stress = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        return self._array("stress", stress, (6,))

    def _array(self, what: str, values: Any, shape: tuple[int, ...]) -> FloatArray:
        # A copy: calculators fill the same array again for the next configuration.
        array = np.array(values, dtype=float)
        if array.shape != shape:
            raise ValueError(f"{self.name} gave {what} of shape {array.shape}, not {shape}")
        return array


def open_ase_calculator(name: str) -> AseCalculatorPotential:
    """Open ``ase:module:callable`` or ``ase:module:callable[setting=value,...]``.

    The callable, a calculator class or a function that returns a calculator, is called with the
    settings. Values are Python literals, and text where they are none:
    ``ase:tblite.ase:TBLite[method=GFN2-xTB,accuracy=0.5]``.

    Raises
    ------
    ValueError
        If there is no such callable, if it fails, or if what it returns is no calculator.
    """
    kind, settings = _read(name)
    make = find_callable(name, kind)
    try:
        calculator = make(**{key: _value(text) for key, text in settings.items()})
    except Exception as error:  # a calculator may raise anything
        raise ValueError(f"cannot open {name}: {type(error).__name__}: {error}") from error
    needed = ("get_potential_energy", "get_forces")
    if lacking := [method for method in needed if not hasattr(calculator, method)]:
        raise ValueError(
            f"{name} made a {type(calculator).__name__}, which is no ASE calculator: it lacks "
            f"{' and '.join(lacking)}"
        )
    elements = _elements_of(make, calculator)
    return AseCalculatorPotential(
        name=name,
        calculator=calculator,
        description=_describe(name, kind, elements),
        elements=elements or _ALL,
    )


def describe_ase_calculator(name: str) -> PotentialDescription:
    """Describe a calculator without making one, which may load much.

    Raises
    ------
    ValueError
        If there is no such callable.
    """
    kind, _ = _read(name)
    return _describe(name, kind, _elements_of(find_callable(name, kind)))


def _read(name: str) -> tuple[str, dict[str, str]]:
    """Return ``module:callable`` and the settings."""
    kind, words, settings = read_name(name)
    if words:
        raise ValueError(f"cannot read {name!r}: what is {words[0]!r} set to? write setting=value")
    return kind.removeprefix(ASE), settings


def _value(text: str) -> Any:
    """Return a Python literal, or the text where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _describe(name: str, kind: str, elements: frozenset[int]) -> PotentialDescription:
    return PotentialDescription(
        name=name,
        title=f"ASE calculator {kind.replace(':', '.')}",
        species=tuple(chemical_symbols[number] for number in sorted(elements)),
        family=kind.rpartition(":")[2],
    )


def _elements_of(make: Callable[..., Any], calculator: Any = None) -> frozenset[int]:
    """Return the elements that a calculator is known to be for, none where it does not tell."""
    if make is EMT:
        return frozenset(atomic_numbers[symbol] for symbol in emt_parameters)
    # EAM has symbols there, and a calculator of one's own may have too.
    symbols = getattr(calculator, "elements", ())
    known = isinstance(symbols, Collection) and all(symbol in atomic_numbers for symbol in symbols)
    return frozenset(atomic_numbers[symbol] for symbol in symbols) if known else frozenset()
