"""A committee as an ASE calculator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.nn.committee import Committee


class CommitteeCalculator(Calculator):
    """Mean prediction of a committee, with the spread of its members.

    Besides energy (eV), forces (eV/Å) and stress (eV/Å³, where all directions are periodic),
    ``results`` has ``energy_std`` (eV/atom) and ``forces_std`` (eV/Å, one number for each atom).

    Parameters
    ----------
    committee
        The committee.
    settings
        Passed on to ASE's calculator.

    Examples
    --------
    >>> atoms.calc = CommitteeCalculator.from_folder("committee")
    >>> atoms.get_potential_energy()
    >>> atoms.calc.uncertainty
    """

    implemented_properties: list[str] = [  # noqa: RUF012 - as ASE declares it
        "energy",
        "free_energy",
        "forces",
        "stress",
        "energy_std",
        "forces_std",
    ]

    def __init__(self, committee: Committee, **settings: Any) -> None:
        super().__init__(**settings)  # type: ignore[no-untyped-call]
        self.committee = committee

    @classmethod
    def from_folder(cls, folder: Path | str, **settings: Any) -> Self:
        """Read the committee from the folder that it was saved in."""
        return cls(Committee.load(Path(folder)), **settings)

    @property
    def uncertainty(self) -> float:
        """Largest force disagreement of the last calculation, in eV/Å.

        Raises
        ------
        ValueError
            If nothing was calculated yet.
        """
        if "forces_std" not in self.results:
            raise ValueError("nothing was calculated yet: ask the atoms for energy or forces first")
        return float(self.results["forces_std"].max())

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fill ``results``; everything comes at once, whatever ``properties`` asks for."""
        super().calculate(atoms, properties, system_changes)  # type: ignore[no-untyped-call]
        configuration = Configurations.from_atoms([self.atoms])  # type: ignore[list-item]
        predicted = self.committee.predict(configuration)
        self.results: dict[str, Any] = {
            "energy": float(predicted.energy[0]),
            "free_energy": float(predicted.energy[0]),
            "forces": predicted.forces,
            "energy_std": float(predicted.energy_std[0]),
            "forces_std": predicted.forces_std,
        }
        # Without it ASE says that the stress is not implemented, which is what it is there.
        if configuration.pbc.all():
            self.results["stress"] = predicted.stress[0]
