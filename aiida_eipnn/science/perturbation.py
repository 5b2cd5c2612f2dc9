"""Make new configurations out of a seed: rattle, strain, take an atom out, cut, scatter its atoms.

Each function takes a seed, a random generator and its settings, and returns new atoms. Nothing here
refuses atoms that came too close: that is for the caller, :mod:`aiida_eipnn.science.pool`, who may
try again.
"""

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.cell import Cell
from ase.data import covalent_radii

from aiida_eipnn.science.arrays import FloatArray, IntArray

# Of a cell with vectors of length 1: flatter ones are few atoms between far too many images.
MIN_SQUARED_VOLUME = 0.1
MAX_CELLS = 1000

Range = tuple[float, float]
Supercell = tuple[int, ...] | tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rattle:
    """Displace every atom.

    Parameters
    ----------
    amplitude
        Standard deviation of each component, drawn from this range, in Å.
    """

    amplitude: Range = (0.02, 0.25)

    def __post_init__(self) -> None:
        check_range("amplitude", self.amplitude, lowest=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strain:
    """Scale the volume, shear the cell, and displace the atoms a little.

    Parameters
    ----------
    volume
        Volume relative to the seed, drawn from this range.
    shear
        Largest component of the symmetric strain that comes on top.
    amplitude
        As for :class:`Rattle`.
    """

    volume: Range = (0.85, 1.15)
    shear: float = 0.05
    amplitude: Range = (0.0, 0.05)

    def __post_init__(self) -> None:
        check_range("volume", self.volume, lowest=0.1)
        check_range("amplitude", self.amplitude, lowest=0.0)
        if not 0 <= self.shear < 0.5:
            raise ValueError(f"shear is {self.shear}; it must lie in [0, 0.5)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vacancy:
    """Take atoms out and displace the others.

    Parameters
    ----------
    n_vacancies
        How many to take out.
    amplitude
        As for :class:`Rattle`.
    """

    n_vacancies: int = 1
    amplitude: Range = (0.02, 0.15)

    def __post_init__(self) -> None:
        check_range("amplitude", self.amplitude, lowest=0.0)
        if self.n_vacancies < 1:
            raise ValueError(f"n_vacancies is {self.n_vacancies}; take out at least one atom")


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """Cut a slab, put vacuum above it, and displace the atoms.

    Parameters
    ----------
    miller
        Planes to cut along, in terms of the seed's own cell vectors; one is drawn.
    max_atoms
        As many layers as fit into that many atoms, but at least the thinnest slab there is, which
        has as many atoms as the seed.
    vacuum
        Thickness of the vacuum, in Å. The cell stays periodic in all directions.
    amplitude
        As for :class:`Rattle`.
    """

    miller: tuple[tuple[int, int, int], ...] = ((1, 0, 0), (1, 1, 0), (1, 1, 1))
    max_atoms: int = 8
    vacuum: float = 8.0
    amplitude: Range = (0.02, 0.15)

    def __post_init__(self) -> None:
        check_range("amplitude", self.amplitude, lowest=0.0)
        if not self.miller or any(len(plane) != 3 or not any(plane) for plane in self.miller):
            raise ValueError(f"miller is {self.miller}; give planes such as [[1, 0, 0], [1, 1, 1]]")
        if self.max_atoms < 1:
            raise ValueError(f"max_atoms is {self.max_atoms}; a slab has at least one atom")
        if not self.vacuum > 0:
            raise ValueError(f"vacuum is {self.vacuum} Å; it must be above zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimer:
    """Put two atoms of the seed's elements into an otherwise empty box.

    Parameters
    ----------
    distance
        Distance of the two relative to the sum of their covalent radii, drawn from this range.
    box
        Edge of the cubic, periodic box, in Å; larger where the pair would be nearer to its images
        than to each other.
    """

    distance: Range = (0.75, 1.8)
    box: float = 8.0

    def __post_init__(self) -> None:
        check_range("distance", self.distance, lowest=0.1)
        if not self.box > 0:
            raise ValueError(f"box is {self.box} Å; it must be above zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interstitial:
    """Put one more atom into the largest of several random holes, and displace all.

    Parameters
    ----------
    n_tries
        Places to compare.
    amplitude
        As for :class:`Rattle`.
    """

    n_tries: int = 50
    amplitude: Range = (0.02, 0.1)

    def __post_init__(self) -> None:
        check_range("amplitude", self.amplitude, lowest=0.0)
        if self.n_tries < 1:
            raise ValueError(f"n_tries is {self.n_tries}; try at least one place")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """Scatter atoms of the seed over a cell of random shape [1]_.

    Parameters
    ----------
    n_atoms
        Number of atoms, drawn from this range: all of the seed before one comes again.
    volume
        Volume of an atom relative to the seed's, drawn from this range.
    shortest
        Shortest cell vector relative to the longest one, at least.
    angle
        Angles between cell vectors, drawn from this range, in degrees.
    n_tries
        Places to compare for each atom: it gets the one that is furthest from all others.

    References
    ----------
    .. [1] Pickard & Needs, J. Phys.: Condens. Matter 23, 053201 (2011).
    """

    n_atoms: tuple[int, int] = (2, 8)
    volume: Range = (0.9, 1.5)
    shortest: float = 0.5
    angle: Range = (60.0, 120.0)
    n_tries: int = 10

    def __post_init__(self) -> None:
        check_range("n_atoms", self.n_atoms, lowest=1)
        check_range("volume", self.volume, lowest=0.1)
        check_range("angle", self.angle, lowest=30.0)
        if not self.angle[1] <= 150:
            raise ValueError(f"angle is {list(self.angle)}; it must not exceed 150 degrees")
        if not 0 < self.shortest <= 1:
            raise ValueError(f"shortest is {self.shortest}; it must be above 0, and at most 1")
        if self.n_tries < 1:
            raise ValueError(f"n_tries is {self.n_tries}; try at least one place")


def rattled(atoms: Atoms, rng: np.random.Generator, settings: Rattle) -> Atoms:
    """Return a copy with every atom displaced."""
    new = _bare(atoms)
    _displace(new, rng, settings.amplitude)
    return new


def strained(atoms: Atoms, rng: np.random.Generator, settings: Strain) -> Atoms:
    """Return a copy under a random strain, the volume change and the shear apart."""
    strain = rng.uniform(-settings.shear, settings.shear, size=(3, 3))
    stretch = np.eye(3) + (strain + strain.T) / 2
    volume = rng.uniform(*settings.volume)
    stretch *= (volume / np.linalg.det(stretch)) ** (1 / 3)
    new = _bare(atoms)
    new.set_cell(atoms.cell.array @ stretch, scale_atoms=True)
    _displace(new, rng, settings.amplitude)
    return new


def vacancy(atoms: Atoms, rng: np.random.Generator, settings: Vacancy) -> Atoms:
    """Return a copy that lacks random atoms.

    Raises
    ------
    ValueError
        If nothing would be left.
    """
    if settings.n_vacancies >= len(atoms):
        raise ValueError(
            f"cannot take {settings.n_vacancies} of {len(atoms)} atoms out; use a larger supercell"
        )
    new = _bare(atoms)
    del new[np.sort(rng.choice(len(atoms), size=settings.n_vacancies, replace=False))]
    _displace(new, rng, settings.amplitude)
    return new


def cut_surface(atoms: Atoms, rng: np.random.Generator, settings: Surface) -> Atoms:
    """Return a slab of the seed with vacuum along the third cell vector, cut at a random height.

    Raises
    ------
    ValueError
        If the seed is not a crystal.
    """
    # Slow to import; the daemon, which reads recipes, makes nothing of them.
    from ase.build import surface

    if not atoms.pbc.all():
        raise ValueError("only a seed that is periodic in all directions has surfaces")
    plane = settings.miller[rng.integers(len(settings.miller))]
    seed = _bare(atoms)
    # Shifting the crystal before the cut gives each of its terminations a chance.
    seed.positions += rng.uniform(size=3) @ atoms.cell.array
    seed.wrap()
    slab = surface(seed, plane, layers=max(1, settings.max_atoms // len(atoms)))
    slab.center(vacuum=settings.vacuum / 2, axis=2)
    slab.pbc = True
    new = _bare(slab)
    _displace(new, rng, settings.amplitude)
    return new


def dimer(atoms: Atoms, rng: np.random.Generator, settings: Dimer) -> Atoms:
    """Return two atoms in a box, their elements drawn from those of the seed."""
    numbers = rng.choice(np.unique(atoms.numbers), size=2)
    distance = rng.uniform(*settings.distance) * covalent_radii[numbers].sum()
    box = max(settings.box, 2 * distance)
    # Along a cell vector: another direction would be the same molecule.
    half = np.array([distance / 2, 0.0, 0.0])
    centre = np.full(3, box / 2)
    return Atoms(
        numbers=numbers,
        positions=[centre - half, centre + half],
        cell=np.full(3, box),
        pbc=True,
    )


def interstitial(atoms: Atoms, rng: np.random.Generator, settings: Interstitial) -> Atoms:
    """Return a copy with one more atom of the seed's elements."""
    number = int(rng.choice(np.unique(atoms.numbers)))
    places = rng.uniform(size=(settings.n_tries, 3)) @ atoms.cell.array
    widest = int(np.argmax([_clearance(atoms, place) for place in places]))
    new = _bare(atoms)
    new += Atoms(numbers=[number], positions=[places[widest]])
    _displace(new, rng, settings.amplitude)
    return new


def scattered(atoms: Atoms, rng: np.random.Generator, settings: Scatter) -> Atoms:
    """Return atoms at random places in a cell of random shape.

    Raises
    ------
    ValueError
        If the seed is not a crystal, whose atoms have a volume.
    """
    if not atoms.pbc.all():
        raise ValueError("only a seed that is periodic in all directions says how dense atoms are")
    n_atoms = int(rng.integers(settings.n_atoms[0], settings.n_atoms[1] + 1))
    volume = n_atoms * rng.uniform(*settings.volume) * atoms.get_volume() / len(atoms)
    cell = _random_cell(rng, settings)
    cell *= (volume / abs(np.linalg.det(cell))) ** (1 / 3)
    numbers = rng.permutation(np.resize(rng.permutation(atoms.numbers), n_atoms))
    new = Atoms(numbers=numbers[:1], positions=[rng.uniform(size=3) @ cell], cell=cell, pbc=True)
    for number in numbers[1:]:
        places = rng.uniform(size=(settings.n_tries, 3)) @ cell
        widest = int(np.argmax([_clearance(new, place) for place in places]))
        new += Atoms(numbers=[number], positions=[places[widest]])
    return new


def _random_cell(rng: np.random.Generator, settings: Scatter) -> FloatArray:
    """Return cell vectors of random lengths and angles; three angles may not fit together.

    Raises
    ------
    ValueError
        If none do.
    """
    for _ in range(MAX_CELLS):
        lengths = rng.uniform(settings.shortest, 1.0, 3)
        angles = rng.uniform(*settings.angle, 3)
        cosines = np.cos(np.radians(angles))
        if 1 - (cosines**2).sum() + 2 * cosines.prod() > MIN_SQUARED_VOLUME:
            cell: FloatArray = Cell.fromcellpar([*lengths, *angles]).array
            return cell
    raise ValueError(
        f"no cell has three angles of {list(settings.angle)} degrees; allow some near 90"
    )


def repeat(atoms: Atoms, supercell: Supercell) -> Atoms:
    """Return a supercell: three repetitions, or the 3 × 3 integer matrix that makes it.

    Raises
    ------
    ValueError
        If it is neither, or if it has no volume.
    """
    # As in cut_surface.
    from ase.build import make_supercell

    larger: Atoms = make_supercell(_bare(atoms), repetition_matrix(supercell))
    return larger


def repetition_matrix(supercell: Supercell) -> IntArray:
    """Return the 3 × 3 integer matrix of a supercell.

    Raises
    ------
    ValueError
        If ``supercell`` is neither three repetitions nor a matrix, or if it has no volume.
    """
    try:
        matrix = np.array(supercell, dtype=float)
        matrix = np.diag(matrix) if matrix.shape == (3,) else matrix
    except (TypeError, ValueError):
        matrix = np.zeros(0)
    if matrix.shape != (3, 3) or (matrix != matrix.round()).any() or np.linalg.det(matrix) < 0.5:
        raise ValueError(
            f"supercell is {supercell}; give three integers above zero, or a 3 × 3 integer "
            "matrix with a positive determinant"
        )
    return matrix.astype(np.int64)


def enlarge(atoms: Atoms, min_atoms: int) -> Atoms:
    """Return ``atoms`` repeated until there are at least ``min_atoms``.

    Each step adds one repetition along the cell vector that is the shortest by then, the first
    one of equals, so that the cell stays compact: two atoms become 4, then 8. Only periodic
    directions count; what has none, a molecule, stays as it is.
    """
    repetitions = np.ones(3, dtype=np.int64)
    # Rounded, so that the last digit of a file does not decide which vector is the shortest.
    lengths = np.where(atoms.pbc, atoms.cell.lengths().round(4), np.inf)
    while atoms.pbc.any() and 0 < len(atoms) * repetitions.prod() < min_atoms:
        repetitions[np.argmin(lengths * repetitions)] += 1
    return repeat(atoms, tuple(repetitions.tolist()))


def check_range(name: str, limits: Range, lowest: float) -> None:
    """Raise ``ValueError`` unless ``limits`` is a rising pair from ``lowest`` or above."""
    if not isinstance(limits, tuple) or len(limits) != 2:
        raise ValueError(f"{name} is {limits}; give its lowest and its highest value")
    if not lowest <= limits[0] <= limits[1] < np.inf:
        raise ValueError(f"{name} is {list(limits)}; it must rise, from {lowest} at least")


def _bare(atoms: Atoms) -> Atoms:
    """Copy the geometry only: no calculator, constraints, velocities or notes of the seed."""
    return Atoms(
        numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc
    )


def _displace(atoms: Atoms, rng: np.random.Generator, amplitude: Range) -> None:
    atoms.positions += rng.normal(scale=rng.uniform(*amplitude), size=(len(atoms), 3))


def _clearance(atoms: Atoms, place: FloatArray) -> float:
    probe = _bare(atoms) + Atoms("H", positions=[place])
    return float(probe.get_distances(-1, np.arange(len(atoms)), mic=True).min())
