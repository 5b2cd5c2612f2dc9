"""ASE calculators with gaps and faults, opened by name as those of a user would be."""

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT


class Stressless(Calculator):
    """A spring to the origin, as stiff as it is told to be."""

    implemented_properties = ("energy", "forces")

    def __init__(self, stiffness=1.0, word="", sizes=()):
        super().__init__()
        self.stiffness, self.word, self.sizes = stiffness, word, sizes

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        x = self.atoms.positions
        self.results = {
            "energy": 0.5 * self.stiffness * float((x**2).sum()),
            "forces": -self.stiffness * x,
        }


class Raising(EMT):
    """Fails on an odd number of atoms, with its results half done."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        if len(atoms) % 2:
            self.atoms = atoms.copy()
            self.results = {"energy": 0.0, "forces": np.zeros((len(atoms), 3))}
            raise RuntimeError("it did not converge")
        super().calculate(atoms, properties, system_changes)


class Misshapen(Stressless):
    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        self.results["forces"] = self.results["forces"][1:]


def make_for_copper():
    calculator = Stressless()
    calculator.elements = ["Cu"]
    return calculator


def fails():
    raise FileNotFoundError("no model.pt")
