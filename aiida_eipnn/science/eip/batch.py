"""Configurations that many EIPs label together, and what one EIP says about them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ase.cell import Cell
from ase.data import covalent_radii

from aiida_eipnn.science.arrays import BoolArray, FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.gate import MIN_CONTACT, geometry_fault, overlap

if TYPE_CHECKING:
    from aiida_eipnn.science.eip.neighbours import Pairs

# Without numba, KIM models still run, on kimpy's own neighbour lists: slower, the same labels.
COMPILED = find_spec("numba") is not None

OVERLAP = f"two atoms are closer than {MIN_CONTACT:g} of the sum of their covalent radii"

# A list that reaches further than an EIP needs is walked through in vain: no more than this.
_LARGEST_EXCESS = 1.35
# Spheres that fill more than a close packing overlap.
_CLOSE_PACKING = 0.7405
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
        self._sound: BoolArray | None = None
        self._roomy = self._find_roomy()

    def __len__(self) -> int:
        return len(self.configurations)

    @property
    def sound(self) -> BoolArray:
        """Where positions are numbers and cells have a volume. Shape ``(n,)``."""
        if self._sound is None:
            self._sound = ~np.isin(np.arange(len(self)), list(self._shapeless()))
        return self._sound

    def faults(self) -> dict[int, str]:
        """Return the rows that no EIP is to be asked about, with the reason."""
        faults = self._shapeless()
        self._sound = ~np.isin(np.arange(len(self)), list(faults))
        return faults | dict.fromkeys(self._overlapping(), OVERLAP)

    def pairs(self, reach: Reach) -> "Pairs":
        """Return images and pairs for an EIP; rows that are not sound have none."""
        from aiida_eipnn.science.eip.neighbours import find_pairs

        shared = self._shared.get(reach, reach)
        if shared not in self._pairs:
            part = self.configurations
            sound = self.sound
            # What has no shape gets one that does no harm: it is never labelled.
            positions = np.where(np.repeat(sound, part.n_atoms)[:, None], part.positions, 0.0)
            self._pairs[shared] = find_pairs(
                self._complete_cells(sound),
                part.pbc & sound[:, None],
                np.ascontiguousarray(positions),
                part.offsets,
                shared.influence,
                of_images=shared.of_images,
            )
        return self._pairs[shared]

    def _complete_cells(self, sound: BoolArray) -> FloatArray:
        """Return cells that can be inverted, whatever is periodic."""
        if self._cells is None:
            cells = np.array(self.configurations.cells)
            for row in np.flatnonzero(~self.configurations.pbc.all(axis=1) | ~sound):
                # Only vectors along which it is periodic count; clusters may come without any.
                keep = self.configurations.pbc[row] & sound[row]
                cells[row] = Cell(np.where(keep[:, None], cells[row], 0.0)).complete().array
            self._cells = cells
        return self._cells

    def _shapeless(self) -> dict[int, str]:
        """Return the rows without a geometry, with the reason."""
        faults = {}
        for row in np.flatnonzero(~self._roomy):
            if fault := geometry_fault(self.configurations.atoms(int(row)), min_contact=0.0):
                faults[int(row)] = fault
        return faults

    def _find_roomy(self) -> BoolArray:
        """Return where it is clear at a glance that there is a geometry. Shape ``(n,)``."""
        part = self.configurations
        finite = np.isfinite(part.cells).all(axis=(1, 2)) & (part.n_atoms > 0)
        bad_atoms = np.flatnonzero(~np.isfinite(part.positions).all(axis=1))
        finite[np.searchsorted(part.offsets, bad_atoms, side="right") - 1] = False
        volumes = np.abs(np.linalg.det(np.where(finite[:, None, None], part.cells, 0.0)))
        roomy: BoolArray = volumes > _SMALL_VOLUME * part.n_atoms
        return finite & roomy & part.pbc.all(axis=1)

    def _overlapping(self) -> list[int]:
        """Return the rows in which two atoms are too close."""
        part = self.configurations
        radii = covalent_radii[part.numbers] * MIN_CONTACT
        volumes = np.abs(np.linalg.det(np.nan_to_num(part.cells)))
        rows_of_atoms = np.repeat(np.arange(len(self)), part.n_atoms)
        filled = np.bincount(rows_of_atoms, 4 / 3 * np.pi * radii**3, minlength=len(self))
        # Collapsed cells have more images than the memory holds: they must not get into a list.
        at_ease = self.sound & self._roomy & (filled < _CLOSE_PACKING * volumes)
        close = [
            int(row)
            for row in np.flatnonzero(self.sound & ~at_ease)
            if overlap(part.atoms(int(row))) is not None
        ]
        self._sound = self.sound & ~np.isin(np.arange(len(self)), close)
        reach = self._reach_for(2 * float(radii.max(initial=0.0)))
        if reach is None:
            rows = np.flatnonzero(at_ease).tolist()
            return close + [row for row in rows if overlap(part.atoms(row)) is not None]
        from aiida_eipnn.science.eip.neighbours import find_close

        found = find_close(self.pairs(reach), part.offsets, radii) & at_ease
        return [*close, *map(int, np.flatnonzero(found))]

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
