"""The checks pass a potential that is right and name what is wrong with one that is not."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from ase import Atoms

from aiida_eipnn.science.eip.analytic import LennardJones
from aiida_eipnn.science.eip.checks import CRYSTALS, crystals, faults_of, measure
from aiida_eipnn.science.eip.potential import Label, PotentialDescription


@dataclass
class Spoilt:
    """Lennard-Jones whose labels are spoilt."""

    spoil: Callable[[int, Atoms, Label], Label]
    name: str = "spoilt"
    elements: frozenset[int] = frozenset({13})
    cutoff: float = 5.0
    calls: int = 0

    @property
    def description(self) -> PotentialDescription:
        return PotentialDescription(name=self.name, species=("Al",))

    def label(self, atoms: Atoms) -> Label:
        self.calls += 1
        return self.spoil(self.calls, atoms, LennardJones(sigma=2.5).label(atoms))


def faults(spoil):
    return faults_of(dict(measure(lambda: Spoilt(spoil), crystals("Al"))))


def raise_error(calls, atoms, label):
    raise RuntimeError("density outside the table")


def test_a_right_potential_has_no_fault():
    assert faults(lambda calls, atoms, label: label) == ()


@pytest.mark.parametrize(
    ("fault", "spoil"),
    [
        (
            "a used potential differs from a new one",
            lambda calls, atoms, label: label._replace(energy=label.energy + 1e-8 * calls),
        ),
        (
            "forces are not minus the slope of the energy",
            lambda calls, atoms, label: label._replace(forces=1.001 * label.forces),
        ),
        (
            "stress is not the slope of the energy by strain",
            lambda calls, atoms, label: label._replace(stress=-label.stress),
        ),
        (
            "2x2x2 cells have another energy per atom than one",
            lambda calls, atoms, label: label._replace(energy=label.energy + 1e-3),
        ),
        (
            "the turned crystal has another energy",
            lambda calls, atoms, label: label._replace(
                energy=label.energy + 1e-4 * atoms.cell[0, 0]
            ),
        ),
        (
            "the forces do not turn with the crystal",
            lambda calls, atoms, label: label._replace(forces=label.forces + 1e-6),
        ),
        (
            "energy, forces or stress are not finite",
            lambda calls, atoms, label: label._replace(forces=np.nan * label.forces),
        ),
        ("RuntimeError: density outside the table", raise_error),
    ],
)
def test_what_is_wrong_is_named_with_the_crystals(fault, spoil):
    assert f"{fault} ({', '.join(CRYSTALS)})" in faults(spoil)


def test_the_crystals_are_the_same_each_time():
    first, again = crystals("Ta"), crystals("Ta")

    assert list(first) == list(CRYSTALS)
    assert all(first[name] == again[name] for name in first)


def test_an_element_without_a_crystal_is_refused():
    with pytest.raises(ValueError, match="there is no crystal of 'Xx' to check on"):
        crystals("Xx")
