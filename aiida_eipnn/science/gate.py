"""Refuse what cannot be right, before anyone trains on it or pays DFT for it."""

from collections import Counter
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.data import covalent_radii

from aiida_eipnn.science.arrays import BoolArray, FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.duplicates import SAME_ENERGY, find_duplicates
from aiida_eipnn.science.labels import Failure, Labels
from aiida_eipnn.science.neighbour_list import NeighborList
from aiida_eipnn.science.outliers import (
    NOT_FINITE,
    mark_refused,
    residual,
    spread,
    stray_energies,
    strongest_forces,
    too_strong,
)
from aiida_eipnn.science.reference import MAD_TO_SIGMA, element_fractions
from aiida_eipnn.science.uncertainty import spearman

GATE = "gate"

# Below 0.6 of the sum of the covalent radii (1.3 Å for silicon) EIPs are extrapolating and
# pseudopotential cores overlap.
MIN_CONTACT = 0.6
# Spheres that fill more than a close packing overlap for sure.
CLOSE_PACKING = 0.7405
# What is judged all at once: cells of few atoms, no more pairs at a time, and of a volume that is
# no small part of that of a box.
_LARGEST_AT_ONCE = 64
_PAIRS_AT_ONCE = 2**18
_SURELY_NOT_FLAT = 1e-3
_MANY = 2


def geometry_fault(atoms: Atoms, min_contact: float = MIN_CONTACT) -> str | None:
    """Return what is wrong with a configuration, or ``None``.

    Parameters
    ----------
    atoms
        The configuration.
    min_contact
        Smallest distance of two atoms, periodic images included, as a fraction of the sum of
        their covalent radii; 0 allows any.
    """
    if len(atoms) == 0:
        return "it has no atoms"
    if not np.isfinite(atoms.positions).all():
        return "a position is not a finite number"
    if not np.isfinite(atoms.cell.array).all():
        return "a cell vector is not a finite number"
    if _is_flat(atoms):
        return "its periodic cell has no volume; set the cell vectors, or pbc to false"
    if min_contact > 0 and (distance := overlap(atoms, min_contact)) is not None:
        return (
            f"two atoms overlap: their distance {distance:.3g} Å is below {min_contact} times the "
            "sum of their covalent radii"
        )
    return None


def overlap(atoms: Atoms, min_contact: float = MIN_CONTACT) -> float | None:
    """Return the distance of a pair that is too close, in Å, or ``None``.

    Parameters
    ----------
    atoms
        Finite positions and, where periodic, a cell with a volume.
    min_contact
        As for :func:`geometry_fault`.
    """
    radii = covalent_radii[atoms.numbers]
    if atoms.pbc.all():
        # Asked first, because a collapsed cell has so many images that listing the pairs would
        # exhaust the memory.
        filling = 4 / 3 * np.pi * ((min_contact * radii) ** 3).sum() / atoms.get_volume()
        if filling > CLOSE_PACKING:
            return float((atoms.get_volume() / len(atoms)) ** (1 / 3))
    cutoff = float(2 * min_contact * radii.max())
    first, second, distance = NeighborList(cutoff=cutoff, full_list=False).compute(
        points=atoms.positions,
        box=np.asarray(atoms.cell.complete()),
        periodic=atoms.pbc,
        quantities="ijd",
    )
    close = distance < min_contact * (radii[first] + radii[second])
    return float(distance[close].min()) if close.any() else None


def refuse_invalid(
    configurations: Configurations, min_contact: float = MIN_CONTACT
) -> tuple[Failure, ...]:
    """Return the configurations that cannot be right, with the reason.

    A geometry that occurs again is named too; :func:`keep_valid` keeps its first occurrence.
    """
    return _refused(configurations, _faults(configurations, min_contact))


def keep_valid(
    configurations: Configurations, min_contact: float = MIN_CONTACT
) -> tuple[Configurations, tuple[Failure, ...]]:
    """Return the configurations that may stay, each geometry once, and those refused."""
    faults = _faults(configurations, min_contact)
    first = np.sort(np.unique(configurations.ids, return_index=True)[1])
    kept = [row for row in first.tolist() if row not in faults]
    return configurations.take(kept), _refused(configurations, faults)


def _refused(configurations: Configurations, faults: dict[int, str]) -> tuple[Failure, ...]:
    failures, seen = [], set()
    for row, name in enumerate(configurations.ids.tolist()):
        fault = faults.get(row)
        if fault is None and name in seen:
            fault = "it has the same geometry as an earlier one"
        seen.add(name)
        if fault is not None:
            failures.append(Failure(name, GATE, fault))
    return tuple(failures)


def _faults(configurations: Configurations, min_contact: float) -> dict[int, str]:
    """Return what is wrong, by row."""
    faults = {}
    for row in np.flatnonzero(~surely_valid(configurations, min_contact)).tolist():
        if fault := geometry_fault(configurations.atoms(row), min_contact):
            faults[row] = fault
    return faults


def surely_valid(configurations: Configurations, min_contact: float = MIN_CONTACT) -> BoolArray:
    """Return which configurations have no :func:`geometry_fault`, as far as that is seen at once.

    Of the others nothing is known. A pool of small periodic cells is judged a hundred times faster
    than one by one.

    Returns
    -------
    BoolArray
        Shape ``(n,)``.
    """
    sure = np.zeros(len(configurations), dtype=bool)
    if not len(configurations):
        return sure
    # Twice the largest radius: no pair of any elements is in contact further apart.
    reach = 2 * min_contact * float(covalent_radii[configurations.numbers].max(initial=0.0))
    images, sizes = _images_within(configurations, reach), configurations.n_atoms
    small = (sizes > 0) & (sizes <= _LARGEST_AT_ONCE)
    for size in np.unique(sizes[small]).tolist():
        for n_images in (0, 1):
            same = np.flatnonzero((sizes == size) & (images == n_images))
            step = max(1, _PAIRS_AT_ONCE // (size**2 * (1 + 2 * n_images) ** 3))
            for start in range(0, len(same), step):
                block = same[start : start + step]
                sure[block] = _without_contact(configurations, block, size, n_images, min_contact)
    return sure


def _images_within(configurations: Configurations, reach: float) -> IntArray:
    """Return how many cells away, along any axis, the image of an atom may be within reach.

    Beyond the image that is nearest by its fractional coordinates; -1 where a cell is not sound.
    """
    cells = configurations.cells
    with np.errstate(all="ignore"):
        volume = np.abs(np.linalg.det(cells))
        across = np.cross(np.roll(cells, -1, axis=1), np.roll(cells, -2, axis=1))
        height = (volume[:, None] / np.linalg.norm(across, axis=2)).min(axis=1)
        shape = volume / np.linalg.norm(cells, axis=2).prod(axis=1)
        # A comparison with NaN is False.
        sound = (shape > _SURELY_NOT_FLAT) & np.isfinite(reach / height)
        images = np.floor(reach / height + 0.5)
    sound &= configurations.pbc.all(axis=1)
    return np.where(sound, np.where(sound, np.minimum(images, _MANY), 0), -1).astype(np.int64)


def _without_contact(
    configurations: Configurations, rows: IntArray, size: int, n_images: int, min_contact: float
) -> BoolArray:
    """Return which of these rows, all of ``size`` atoms, are finite and have no two too close."""
    atoms = configurations.offsets[rows][:, None] + np.arange(size)
    radii = min_contact * covalent_radii[configurations.numbers[atoms]]
    positions, cells = configurations.positions[atoms], configurations.cells[rows]
    filling = 4 / 3 * np.pi * (radii**3).sum(axis=1) / np.abs(np.linalg.det(cells))
    first, second = np.triu_indices(size)
    steps = np.arange(-n_images, n_images + 1)
    shifts = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    itself = (first == second)[:, None] & ~shifts.any(axis=1)
    with np.errstate(invalid="ignore"):
        apart = (positions[:, first] - positions[:, second]) @ np.linalg.inv(cells)
        apart = (apart - np.round(apart))[:, :, None] + shifts
        distance = np.linalg.norm(apart @ cells[:, None], axis=3)
        close = (distance < (radii[:, first] + radii[:, second])[:, :, None]) & ~itself
    finite = np.isfinite(positions).all(axis=(1, 2))
    valid: BoolArray = finite & ~close.any(axis=(1, 2)) & (filling <= CLOSE_PACKING)
    return valid


def _is_flat(atoms: Atoms) -> bool:
    vectors = atoms.cell.array[atoms.pbc]
    if not len(vectors):
        return False
    lengths = np.linalg.norm(vectors, axis=1)
    if (lengths == 0).any():
        return True
    directions = vectors / lengths[:, None]
    return bool(np.sqrt(max(np.linalg.det(directions @ directions.T), 0.0)) < 1e-6)


class GateVerdict(StrEnum):
    """What :func:`check_labels` found."""

    PASSED = "passed"
    TOO_FEW = "too few to judge"
    NO_AGREEMENT = "no EIP to judge by"
    WRONG_SIGN = "wrong sign"
    WRONG_UNIT = "wrong unit"
    PER_ATOM = "energy per atom"


PROBLEMS = (GateVerdict.WRONG_SIGN, GateVerdict.WRONG_UNIT, GateVerdict.PER_ATOM)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What the EIPs say about a set of reference labels.

    Parameters
    ----------
    verdict
        In one word; only some verdicts are problems.
    text
        The same for people: what was found and what to do.
    refused
        Labels to leave out, with the reason.
    n_judged
        Configurations that the verdict rests on.
    forces_agreement
        Median cosine between the force vectors of a configuration, reference against the EIP
        that agrees best; NaN where it could not be had.
    forces_ratio
        Median ratio of the lengths of these vectors: near 1 if the units are right.
    energy_agreement
        Rank correlation of the energies per atom, for the EIP that agrees best.
    energy_ratio
        Ratio of the spreads of the energies per atom.
    """

    verdict: GateVerdict
    text: str
    refused: tuple[Failure, ...]
    n_judged: int
    forces_agreement: float
    forces_ratio: float
    energy_agreement: float
    energy_ratio: float

    @property
    def summary(self) -> str:
        """How many labels were refused, by kind, on one line."""
        if not self.refused:
            return "no label refused"
        kinds = Counter(_kind(failure.reason) for failure in self.refused)
        counted = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        return f"{len(self.refused)} labels refused ({counted})"

    @property
    def problem(self) -> str | None:
        """The text where the whole set must be refused, else ``None``."""
        return self.text if self.verdict in PROBLEMS else None


# Words by which the reasons of the gate are counted, the first that occurs decides.
KINDS = {
    "conflict": "conflicting duplicates",
    "same geometry": "duplicates",
    "overlap": "overlapping atoms",
    "not finite": "not finite",
    "force": "strong forces",
    "energy": "stray energies",
}


def _kind(reason: str) -> str:
    return next((kind for word, kind in KINDS.items() if word in reason), "invalid geometries")


# Value found where the true value is 1 eV/Å, or 1 eV.
FORCE_UNITS = {
    "hartree/bohr": 1 / 51.422,
    "hartree/Å": 1 / 27.2114,
    "rydberg/bohr": 1 / 25.711,
    "rydberg/Å": 1 / 13.6057,
    "kcal/mol/Å": 23.0605,
    "kJ/mol/Å": 96.485,
    "meV/Å": 1000.0,
    "eV/Å taken for hartree/bohr": 51.422,
    "eV/Å taken for hartree/Å": 27.2114,
    "eV/Å taken for rydberg/bohr": 25.711,
    "eV/Å taken for rydberg/Å": 13.6057,
}
ENERGY_UNITS = {
    "hartree": 1 / 27.2114,
    "rydberg": 1 / 13.6057,
    "kcal/mol": 23.0605,
    "kJ/mol": 96.485,
    "meV": 1000.0,
    "eV taken for hartree": 27.2114,
    "eV taken for rydberg": 13.6057,
}

MIN_JUDGED = 5
# Sound data gave median ratios of 0.07 (crushed random crystals against a poor EIP; 0.4 and more
# with good ones) to 1.3; a unit mistake is a factor of 13.6 at least.
RATIO_RANGE = (0.08, 5.0)
# Where three EIPs or more agree in direction, the median of their ratios is less scattered: 0.25 to
# 1.3 on sound sets, at most 0.1 or at least 3.4 with a mistaken unit.
MEDIAN_RANGE = (0.12, 3.0)
MEDIAN_EIPS = 3
# Ratio of the forces' ratio to the energies', with the same EIP: 0.4 to 1.4 on sound sets.
TOGETHER_RANGE = (0.15, 4.0)
# The usual ratio of a sound set: EIPs are too stiff. Units are named after division by it.
USUAL_RATIO = 0.75
CLEAR_AGREEMENT = 0.5
# Forces in eV/Å of an EIP that say something: below they are noise, above it is in its
# repulsive wall.
EIP_FORCES = (0.05, 50.0)

# Energies per atom that vary less, in eV, say nothing about units.
MIN_SPREAD = 1e-5

OUTLIER_SIGMA = 6.0
# Near equilibrium sound labels lay up to 0.13 eV/atom from where good EIPs expected them.
OUTLIER_ENERGY = 0.25
OUTLIER_SPREAD = 2.0
OUTLIER_EIPS = 3
OUTLIER_CONFIGURATIONS = 20


def check_labels(configurations: Configurations, labels: Labels, eip_labels: Labels) -> GateReport:
    """Compare reference labels with what EIPs say, to find wrong units, signs and stray labels.

    EIPs are wrong by some ten per cent, a unit or a sign is wrong by far more. No sound set may
    be refused, so a set passes where there are fewer than five configurations to judge by, or
    where no EIP agrees with it in either sense.

    Parameters
    ----------
    configurations
        The configurations of ``labels``, in any order.
    labels
        The reference; its first source counts.
    eip_labels
        Labels by EIPs; they are matched by id and need not cover everything.
    """
    broken = _not_finite(labels)
    # Strings of other widths compare equal, which a set of ids needs.
    refused = {failure.id for failure in broken}
    both = [
        name
        for name in np.intersect1d(labels.ids[labels.ok[:, 0]], eip_labels.ids).tolist()
        if name not in refused
    ]
    configurations = configurations.take(configurations.rows_of(both))
    labels = labels.take(labels.rows_of(both))
    eip_labels = eip_labels.take(eip_labels.rows_of(both))

    forces, energy = _fit_together(
        [_compare_forces(labels, eip_labels, source) for source in _sources(eip_labels)],
        _compare_energies(configurations, labels, eip_labels, labels.n_atoms),
    )
    as_they_are = _best(_compare_energies(configurations, labels, eip_labels, np.ones(len(labels))))
    verdict, text = _judge(forces, energy, as_they_are, labels)
    return GateReport(
        verdict=verdict,
        text=text,
        refused=broken + _outliers(configurations, labels, eip_labels),
        n_judged=max(forces.n, energy.n),
        forces_agreement=forces.agreement,
        forces_ratio=forces.ratio,
        energy_agreement=energy.agreement,
        energy_ratio=energy.ratio,
    )


def refuse_labels(
    configurations: Configurations,
    labels: Labels,
    eip_labels: Labels | None = None,
    *,
    min_contact: float = MIN_CONTACT,
    force_limit: float = np.inf,
) -> tuple[Labels, GateReport]:
    """Refuse every label that must not enter a data set, and say why.

    Refused are labels that are not finite; of invalid geometries (:func:`geometry_fault`); with a
    force above the limit; with an energy per atom far out of its own set on either side
    (:func:`~.outliers.stray_energies`) or far from what three EIPs say (:func:`check_labels`); and
    of a geometry that came before (:func:`~.duplicates.find_duplicates`), with a note where the
    two energies differ. Units and signs of the whole set are judged by the verdict of the report;
    where that is a problem (:attr:`GateReport.problem`) use no label of the set.

    Parameters
    ----------
    configurations
        Must contain every configuration of ``labels``.
    labels
        Of any number of sources; verdict and comparison with EIPs are about the first.
    eip_labels
        Labels by EIPs, where there are some.
    min_contact
        As for :func:`geometry_fault`.
    force_limit
        In eV/Å; by default any, for DFT of strongly compressed crystals is sound.

    Returns
    -------
    tuple of Labels and GateReport
        The rows as they came, refused ones missing with the reason, and the report, whose
        ``refused`` lists them.
    """
    part = configurations.take(configurations.rows_of(labels.ids))
    shape = labels.energy.shape
    strongest = strongest_forces(labels)
    finite = np.isfinite(labels.energy) & np.isfinite(strongest)
    faults: list[tuple[BoolArray, str]] = [(~finite, NOT_FINITE)]
    sound = np.ones(len(labels), dtype=bool)
    for row in range(len(labels)):
        if fault := geometry_fault(part.atoms(row), min_contact):
            sound[row] = False
            faults.append((_cells(shape, row), fault))
    strong = finite & (strongest > force_limit)
    faults.append((strong, too_strong(force_limit)))
    stray = stray_energies(part, labels.energy, labels.ok & finite & ~strong & sound[:, None])
    faults += [
        (
            _cells(shape, int(row), int(column)),
            f"its energy is {stray[row, column]:+.3g} eV/atom from the median of its set",
        )
        for row, column in np.argwhere(stray != 0)
    ]
    kept = mark_refused(labels, faults)
    report = check_labels(part, kept, kept.take([]) if eip_labels is None else eip_labels)
    rows = {str(name): row for row, name in enumerate(labels.ids.tolist())}
    alone = [(_cells(shape, rows[item.id], 0), item.reason) for item in report.refused]
    kept = mark_refused(kept, alone)
    kept = mark_refused(kept, _duplicate_faults(part, kept))
    before = set(labels.failures())
    refused = tuple(item for item in kept.failures() if item not in before)
    return kept, replace(report, refused=refused)


def _duplicate_faults(
    configurations: Configurations, labels: Labels
) -> list[tuple[BoolArray, str]]:
    """Return what says again, or says otherwise, what an earlier row says."""
    rows = np.flatnonzero(labels.ok.any(axis=1))
    first = rows[find_duplicates(configurations.take(rows))]
    per_atom = labels.energy / labels.n_atoms[:, None]
    faults = []
    for row, earlier in zip(rows.tolist(), first.tolist(), strict=True):
        if row == earlier:
            continue
        both = labels.ok[row] & labels.ok[earlier]
        difference = np.abs(per_atom[row] - per_atom[earlier])
        for column in np.flatnonzero(both).tolist():
            text = f"it has the same geometry as {labels.ids[earlier]}, which came earlier"
            if difference[column] > SAME_ENERGY:
                text += (
                    f", and conflicts with it: the energies differ by {difference[column]:.3g} "
                    "eV/atom; find out which of the two is right"
                )
            faults.append((_cells(labels.energy.shape, row, column), text))
    return faults


def _cells(shape: tuple[int, ...], row: int, column: int | slice = slice(None)) -> BoolArray:
    cells = np.zeros(shape, dtype=bool)
    cells[row, column] = True
    return cells


class _Comparison(NamedTuple):
    """Reference against one EIP on ``n`` configurations.

    ``agreement`` is about directions, ``ratio`` about sizes, and ``sized`` says whether the sizes
    may be right.
    """

    n: int = 0
    agreement: float = float("nan")
    ratio: float = float("nan")
    source: str = ""
    sized: bool = False

    @property
    def clear(self) -> bool:
        return self.n >= MIN_JUDGED and abs(self.agreement) >= CLEAR_AGREEMENT

    @property
    def wrong_unit(self) -> bool:
        return self.clear and not self.sized


def _fit_together(
    of_forces: list[_Comparison], of_energies: list[_Comparison]
) -> tuple[_Comparison, _Comparison]:
    """Return the best comparisons; where forces and energies differ in unit, one is not sized.

    An EIP that exaggerates does so in both, so the ratio of the two ratios scatters far less than
    each, and a single poor EIP can tell that one of the units is wrong.
    """
    forces, energy = _best(of_forces), _best(of_energies)
    by_name = {item.source: item for item in of_energies if item.clear and item.source}
    ratios = [
        item.ratio / by_name[item.source].ratio
        for item in of_forces
        if item.clear and item.source in by_name
    ]
    if energy.n < OUTLIER_CONFIGURATIONS or not ratios or not (forces.clear and energy.clear):
        return forces, energy
    if TOGETHER_RANGE[0] <= np.median(ratios) <= TOGETHER_RANGE[1]:
        return forces, energy
    if abs(_distance(forces.ratio, 1.0)) > abs(_distance(energy.ratio, 1.0)):
        return forces._replace(sized=False), energy
    return forces, energy._replace(sized=False)


def _compare_forces(labels: Labels, eip_labels: Labels, source: int) -> _Comparison:
    reference, eip = labels.forces[0], eip_labels.forces[source]
    length, eip_length = (
        np.sqrt(_dot(reference, reference, labels)),
        np.sqrt(_dot(eip, eip, labels)),
    )
    typical = eip_length / np.sqrt(labels.n_atoms)
    used = eip_labels.ok[:, source] & (typical > EIP_FORCES[0]) & (typical < EIP_FORCES[1])
    # The unit of the reference is unknown here, so zero is judged by its own scale.
    used &= length > 1e-6 * np.max(length, initial=0.0)
    if used.sum() < MIN_JUDGED:
        return _Comparison(int(used.sum()))
    cosine = _dot(reference, eip, labels)[used] / (length * eip_length)[used]
    ratio = length[used] / eip_length[used]
    # A unit is the same factor everywhere; an EIP that exaggerates does so most where atoms are
    # crushed. So the configurations on which the two come closest must be off too.
    low, high = np.quantile(ratio, [0.2, 0.8])
    return _Comparison(
        int(used.sum()),
        float(np.median(cosine)),
        float(np.median(ratio)),
        str(eip_labels.sources[source]),
        bool(high >= RATIO_RANGE[0] and low <= RATIO_RANGE[1]),
    )


def _compare_energies(
    configurations: Configurations,
    labels: Labels,
    eip_labels: Labels,
    divisor: IntArray | FloatArray,
) -> list[_Comparison]:
    """Compare energies per atom; those of the labels are had by division by ``divisor``."""
    reference = labels.energy[:, 0] / divisor
    fractions = element_fractions(configurations, np.array(configurations.elements))
    comparisons = []
    for source in _sources(eip_labels):
        used = eip_labels.ok[:, source]
        if used.sum() < MIN_JUDGED + fractions.shape[1]:
            comparisons.append(_Comparison(int(used.sum())))
            continue
        eip = (eip_labels.energy[:, source] / labels.n_atoms)[used]
        ours = residual(fractions[used], reference[used])
        theirs = residual(fractions[used], eip)
        if min(spread(ours), spread(theirs)) < MIN_SPREAD:
            continue
        ratio = spread(ours) / spread(theirs)
        comparisons.append(
            _Comparison(
                int(used.sum()),
                spearman(ours, theirs),
                ratio,
                str(eip_labels.sources[source]),
                RATIO_RANGE[0] <= ratio <= RATIO_RANGE[1],
            )
        )
    return comparisons


def _best(comparisons: list[_Comparison]) -> _Comparison:
    usable = [item for item in comparisons if item.n >= MIN_JUDGED and item.source]
    if not usable:
        return max(comparisons, key=lambda item: item.n, default=_Comparison())
    # An EIP that agrees clears the set of a wrong sign, however many others disagree; and one that
    # agrees nearly as well as the best clears it of a wrong unit.
    usable = [item for item in usable if item.agreement >= CLEAR_AGREEMENT] or usable
    best = max(usable, key=lambda item: abs(item.agreement))
    near = [item for item in usable if abs(item.agreement) >= 0.9 * abs(best.agreement)]
    clear = [item for item in near if item.clear]
    if len(clear) >= MEDIAN_EIPS and best.n >= OUTLIER_CONFIGURATIONS:
        ratio = float(np.median([item.ratio for item in clear]))
        return best._replace(ratio=ratio, sized=MEDIAN_RANGE[0] <= ratio <= MEDIAN_RANGE[1])
    return best if best.sized or not best.clear else next((i for i in near if i.sized), best)


def _fits_per_atom(energy: _Comparison, as_they_are: _Comparison) -> bool:
    """Return whether the energies make most sense if they are energies per atom already."""
    if not (as_they_are.clear and as_they_are.sized and as_they_are.agreement > 0):
        return False
    if not (energy.wrong_unit or not energy.clear):
        return False
    if as_they_are.agreement > abs(energy.agreement) + 0.05:
        return True
    # With one number of atoms throughout, a unit explains the same: the closer factor decides.
    nearest = min(abs(_distance(energy.ratio, unit)) for unit in ENERGY_UNITS.values())
    close = abs(_distance(as_they_are.ratio, 1.0)) < nearest
    return close and as_they_are.agreement > abs(energy.agreement) - 0.05


def _distance(ratio: float, unit: float) -> float:
    """Return how far a ratio is from what a unit lets expect, as a logarithm."""
    return float(np.log(ratio / USUAL_RATIO / unit))


def _judge(
    forces: _Comparison, energy: _Comparison, as_they_are: _Comparison, labels: Labels
) -> tuple[GateVerdict, str]:
    if max(forces.n, energy.n) < MIN_JUDGED:
        return GateVerdict.TOO_FEW, (
            f"too few to judge: {max(forces.n, energy.n)} configurations can be compared with "
            f"EIPs, {MIN_JUDGED} are needed"
        )
    if forces.wrong_unit:
        return GateVerdict.WRONG_UNIT, _unit_text("forces", forces, FORCE_UNITS)
    if _per_atom(labels) or _fits_per_atom(energy, as_they_are):
        return GateVerdict.PER_ATOM, (
            "the energies fit the EIPs' energies per atom, not their total energies, so they seem "
            "to be per atom: give total energies, multiply each by its number of atoms"
        )
    if energy.wrong_unit:
        return GateVerdict.WRONG_UNIT, _unit_text("energies", energy, ENERGY_UNITS)
    if forces.clear and forces.agreement < 0:
        return GateVerdict.WRONG_SIGN, (
            f"the forces point against those of {forces.source} (median cosine "
            f"{forces.agreement:.2f}); the gradient seems to be stored: change the sign of all "
            "forces"
        )
    if energy.clear and energy.agreement < 0:
        return GateVerdict.WRONG_SIGN, (
            f"the energies rise where those of {energy.source} fall (rank correlation "
            f"{energy.agreement:.2f}); change the sign of all energies if they are stored so"
        )
    if not (forces.clear or energy.clear):
        return GateVerdict.NO_AGREEMENT, (
            "no EIP agrees with the labels in either sense (forces: median cosine "
            f"{forces.agreement:.2f}, energies: rank correlation {energy.agreement:.2f}), so "
            "units and signs could not be checked; look at them, or add an EIP that suits"
        )
    return GateVerdict.PASSED, (
        f"forces agree with {forces.source or 'no EIP'} (median cosine {forces.agreement:.2f}, "
        f"ratio {forces.ratio:.2f}), energies with {energy.source or 'no EIP'} (rank correlation "
        f"{energy.agreement:.2f}, ratio {energy.ratio:.2f})"
    )


def _unit_text(what: str, found: _Comparison, units: dict[str, float]) -> str:
    close = sorted(units, key=lambda name: abs(_distance(found.ratio, units[name])))
    # EIPs differ by more than some units do: what else it may be is named too.
    likely = [name for name in close[:4] if abs(_distance(found.ratio, units[name])) < np.log(2.2)]
    named = " or ".join(f"{name} ({_cure(units[name])})" for name in likely or close[:2])
    sign = ", and of the wrong sign" if found.agreement < 0 else ""
    expected = "eV/Å" if units is FORCE_UNITS else "eV"
    return (
        f"the {what} are {found.ratio:.3g} times those of EIPs such as {found.source}, with which "
        f"they agree in direction ({found.agreement:.2f}): they seem to be in {named}{sign}; "
        f"give {expected}"
    )


def _cure(factor: float) -> str:
    return f"multiply by {1 / factor:.4g}" if factor < 1 else f"divide by {factor:.4g}"


def _per_atom(labels: Labels) -> bool:
    energy = labels.energy[:, 0]
    if len(energy) < MIN_JUDGED or not ((energy > 0).all() or (energy < 0).all()):
        return False
    size = spread(np.log(labels.n_atoms))
    # A total energy varies as much as the number of atoms does, an energy per atom far less.
    return size > np.log(1.3) and spread(np.log(np.abs(energy))) < 0.2 * size


def _outliers(
    configurations: Configurations, labels: Labels, eip_labels: Labels
) -> tuple[Failure, ...]:
    """Return the labels whose energy lies far from where three EIPs agree that it should."""
    residuals, scales = _energy_residuals(configurations, labels, eip_labels)
    if len(scales) < OUTLIER_EIPS:
        return ()
    best = np.argsort(scales, kind="stable")[:OUTLIER_EIPS]
    residuals, scale = residuals[best], scales[best[0]]
    lowest, highest = residuals.min(axis=0), residuals.max(axis=0)
    agreed = np.minimum(np.abs(lowest), np.abs(highest))
    # Where the EIPs differ among themselves, their difference from the label proves little. A
    # comparison with NaN, an EIP that has no label there, is False.
    stray = (lowest * highest > 0) & (agreed > OUTLIER_SPREAD * (highest - lowest))
    stray &= np.abs(residuals[0]) > max(OUTLIER_SIGMA * scale, OUTLIER_ENERGY)
    return tuple(
        Failure(
            str(labels.ids[row]),
            str(labels.sources[0]),
            f"its energy is {residuals[0, row]:+.3g} eV/atom from where {OUTLIER_EIPS} EIPs "
            f"expect it, {abs(residuals[0, row]) / scale:.0f} times their usual error",
        )
        for row in np.flatnonzero(stray)
    )


def _energy_residuals(
    configurations: Configurations, labels: Labels, eip_labels: Labels
) -> tuple[FloatArray, FloatArray]:
    """Return what is left of the energies per atom after each EIP, and its usual size."""
    reference = labels.energy[:, 0] / labels.n_atoms
    fractions = element_fractions(configurations, np.array(configurations.elements))
    residuals, scales = [], []
    for source in _sources(eip_labels):
        used = eip_labels.ok[:, source]
        if used.sum() < OUTLIER_CONFIGURATIONS:
            continue
        eip = (eip_labels.energy[:, source] / labels.n_atoms)[used]
        left = residual(np.column_stack([fractions[used], eip]), reference[used])
        scales.append(_usual(left))
        # What is extreme for the EIP itself lies outside the range of the fit: not judged.
        centred = residual(fractions[used], eip)
        rest = np.full(len(labels), np.nan)
        rest[used] = np.where(np.abs(centred) > OUTLIER_SIGMA * _usual(centred), np.nan, left)
        residuals.append(rest)
    return np.array(residuals).reshape(len(scales), len(labels)), np.array(scales)


def _usual(values: FloatArray) -> float:
    """Return the standard deviation of ``values`` less its outliers, in eV."""
    size = np.abs(values - np.median(values))
    # In a mixture of kinds the median may see the quiet kind only, the 90 % quantile does not.
    # 1 meV/atom keeps a perfect EIP from calling rounding an outlier.
    return float(max(MAD_TO_SIGMA * np.median(size), np.quantile(size, 0.9) / 1.645, 1e-3))


def _not_finite(labels: Labels) -> tuple[Failure, ...]:
    return tuple(
        Failure(str(labels.ids[row]), str(labels.sources[0]), "its energy or forces are not finite")
        for row in np.flatnonzero(labels.ok[:, 0]).tolist()
        if not (np.isfinite(labels.energy[row, 0]) and np.isfinite(labels.forces_of(row)).all())
    )


def _sources(labels: Labels) -> range:
    return range(len(labels.sources) if len(labels) else 0)


def _dot(first: FloatArray, second: FloatArray, labels: Labels) -> FloatArray:
    """Sum the products of all force components of each configuration. Shape ``(n,)``."""
    return np.add.reduceat((first * second).sum(axis=1), labels.offsets[:-1])
