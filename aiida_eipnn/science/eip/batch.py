"""Configurations that many EIPs label together, and what one EIP says about them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ase import Atoms
from ase.cell import Cell
from ase.data import covalent_radii

from aiida_eipnn.science.arrays import BoolArray, FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.potential import Label
from aiida_eipnn.science.gate import CLOSE_PACKING, MIN_CONTACT, geometry_fault, overlap

if TYPE_CHECKING:
    from aiida_eipnn.science.eip.neighbours import Pairs

# Without numba, KIM models still run, on kimpy's own neighbour lists: slower, the same labels.
# So too from an archive: it lies in another folder for each job, and numba, which keeps what it
# compiled by the path, would compile for a quarter of a minute in each and keep that for ever.
COMPILED = find_spec("numba") is not None and Path(__file__).is_file()

OVERLAP = f"two atoms are closer than {MIN_CONTACT:g} of the sum of their covalent radii"

# A list that reaches further than an EIP needs is walked through in vain: no more than this.
_LARGEST_EXCESS = 1.35
# Å³ per atom; far below any crystal. Cells this small are looked at one by one.
_SMALL_VOLUME = 3.0


class Reach(NamedTuple):
    """What an EIP needs to know about the surroundings of an atom.

    Parameters
    ----------
    influence
        Distance beyond which an atom has no influence on another, in Å.
    of_images
        Whether it also asks for the neighbours of periodic images.
    """

    influence: float
    of_images: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLabels:
    """What one EIP says about the ``n`` configurations of a batch, with ``N`` atoms in all.

    Parameters
    ----------
    energy
        In eV, NaN where there is no label. Shape ``(n,)``.
    forces
        In eV/Å. Shape ``(N, 3)``.
    stress
        In eV/Å³, ASE's sign and order, NaN where the configuration is not periodic in all
        directions. Shape ``(n, 6)``.
    atomic_energy
        Energy of each atom, in eV; NaN where the EIP tells none. Shape ``(N,)``.
    errors
        Why there is no label, by row.
    """

    energy: FloatArray
    forces: FloatArray
    stress: FloatArray
    atomic_energy: FloatArray
    errors: dict[int, str]

    @classmethod
    def empty(cls, configurations: Configurations) -> "BatchLabels":
        """Return labels of which not one is there yet."""
        n, n_atoms = len(configurations), len(configurations.numbers)
        return cls(
            energy=np.full(n, np.nan),
            forces=np.full((n_atoms, 3), np.nan),
            stress=np.full((n, 6), np.nan),
            atomic_energy=np.full(n_atoms, np.nan),
            errors={},
        )

    def ask(self, label: Callable[[Atoms], Label], part: Configurations, row: int) -> None:
        """Take in what a potential that knows no batches says about a row of ``part``."""
        try:
            energy, forces, stress = label(part.atoms(row))
            self.energy[row], self.stress[row] = energy, stress
            self.forces[part.offsets[row] : part.offsets[row + 1]] = forces
        except Exception as error:  # whatever a potential raises is a reason, not a crash
            self.errors[row] = reason_of(error)


class Batch:
    """Configurations whose images and pairs are found once for all EIPs that reach as far.

    Parameters
    ----------
    configurations
        Finite positions, and cells with a volume along the periodic directions; what :meth:`faults`
        names must not be labelled.
    reaches
        What the EIPs need that will label this batch.
    """

    def __init__(self, configurations: Configurations, reaches: Iterable[Reach] = ()) -> None:
        self.configurations = configurations
        self._shared = share_reaches(reaches)
        self._pairs: dict[Reach, Pairs] = {}
        self._cells: FloatArray | None = None
        self._radii = MIN_CONTACT * covalent_radii[configurations.numbers]
        self._ordinary = self._find_ordinary()
        self._extraordinary_faults = self._look_closer()
        # Whose positions are numbers and whose cells have a volume, and not too little of it.
        self._sound = np.ones(len(self), dtype=bool)
        self._sound[list(self._extraordinary_faults)] = False

    def __len__(self) -> int:
        return len(self.configurations)

    def faults(self) -> dict[int, str]:
        """Return the rows that no EIP is to be asked about, with the reason."""
        return self._extraordinary_faults | dict.fromkeys(self._find_overlapping(), OVERLAP)

    def pairs(self, reach: Reach) -> "Pairs":
        """Return images and pairs for an EIP; what has no geometry has none."""
        from aiida_eipnn.science.eip.neighbours import find_pairs

        shared = self._shared.get(reach, reach)
        if shared not in self._pairs:
            part, positions = self.configurations, self.configurations.positions
            if not self._sound.all():
                # What has no geometry gets one that does no harm: it is never labelled.
                lost = ~np.repeat(self._sound, part.n_atoms)
                positions = np.where(lost[:, None], 0.0, positions)
            self._pairs[shared] = find_pairs(
                self._complete_cells(),
                part.pbc & self._sound[:, None],
                np.ascontiguousarray(positions),
                part.offsets,
                shared.influence,
                of_images=shared.of_images,
            )
        return self._pairs[shared]

    def _complete_cells(self) -> FloatArray:
        """Return cells that can be inverted, whatever is periodic."""
        if self._cells is None:
            part, cells = self.configurations, np.array(self.configurations.cells)
            for row in np.flatnonzero(~self._ordinary):
                # Only vectors along which it is periodic count; clusters may come without any.
                keep = part.pbc[row] & self._sound[row]
                cells[row] = Cell(np.where(keep[:, None], cells[row], 0.0)).complete().array
            self._cells = cells
        return self._cells

    def _find_ordinary(self) -> BoolArray:
        """Return where a glance says that there is a geometry, periodic and with enough room."""
        part = self.configurations
        spheres = np.concatenate([[0.0], np.cumsum(4 / 3 * np.pi * self._radii**3)])
        filled = spheres[part.offsets[1:]] - spheres[part.offsets[:-1]]
        with np.errstate(invalid="ignore"):
            volumes = np.abs(np.linalg.det(part.cells))
            ordinary = (volumes > _SMALL_VOLUME * part.n_atoms) & (part.n_atoms > 0)
            # Collapsed cells have more images than the memory holds: they must not get into a list.
            ordinary &= (filled < CLOSE_PACKING * volumes) & np.isfinite(volumes)
        lost = np.flatnonzero(~np.isfinite(part.positions).all(axis=1))
        ordinary[np.searchsorted(part.offsets, lost, side="right") - 1] = False
        return np.asarray(ordinary & part.pbc.all(axis=1))

    def _look_closer(self) -> dict[int, str]:
        """Return which of those that are not ordinary must not be labelled, and why."""
        faults = {}
        for row in map(int, np.flatnonzero(~self._ordinary)):
            atoms = self.configurations.atoms(row)
            if fault := geometry_fault(atoms, min_contact=0.0):
                faults[row] = fault
            elif overlap(atoms) is not None:
                faults[row] = OVERLAP
        return faults

    def _find_overlapping(self) -> list[int]:
        """Return which of the ordinary ones have two atoms that are too close."""
        reach = self._reach_for(2 * float(self._radii.max(initial=0.0)))
        part = self.configurations
        if reach is None:
            rows = map(int, np.flatnonzero(self._ordinary))
            return [row for row in rows if overlap(part.atoms(row)) is not None]
        from aiida_eipnn.science.eip.neighbours import find_close

        close = find_close(self.pairs(reach), part.offsets, self._radii)
        return np.flatnonzero(close & self._ordinary).tolist()

    def _reach_for(self, distance: float) -> Reach | None:
        """Return a list that is needed anyway and reaches so far, if there is one."""
        fitting = [reach for reach in self._shared.values() if reach.influence >= distance]
        return min(fitting, default=None) if COMPILED else None


def share_reaches(reaches: Iterable[Reach]) -> dict[Reach, Reach]:
    """Return for each reach the one whose list it takes a share of.

    A list may reach further than needed, but not so much that walking through it costs more than
    making another one.
    """
    shared: dict[Reach, Reach] = {}
    distinct = set(reaches)
    for of_images in (False, True):
        alike = sorted((reach for reach in distinct if reach.of_images == of_images), reverse=True)
        longest = alike[0] if alike else None
        for reach in alike:
            if longest is None or reach.influence * _LARGEST_EXCESS < longest.influence:
                longest = reach
            shared[reach] = longest
    return shared


def cut_batches(offsets: IntArray, most_rows: int, most_atoms: int) -> Sequence[slice]:
    """Cut rows into consecutive batches of so many configurations and atoms at most."""
    batches, start = [], 0
    for row in range(1, len(offsets)):
        n_atoms = offsets[row] - offsets[start]
        if row - start > most_rows or (n_atoms > most_atoms and row - start > 1):
            batches.append(slice(start, row - 1))
            start = row - 1
    if len(offsets) - 1 > start:
        batches.append(slice(start, len(offsets) - 1))
    return batches


def reason_of(error: Exception) -> str:
    """Return what an exception says, on one line."""
    text = " ".join(str(error).split())
    # A ValueError is how potentials say that they were asked for the wrong thing.
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
