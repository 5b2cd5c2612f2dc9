"""Find configurations that say the same: moved, turned, mirrored, reordered or repeated."""

import numpy as np

from aiida_eipnn.science.arrays import BoolArray, FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations, join_configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.neighbour_list import NeighborList
from aiida_eipnn.science.reference import element_fractions

# Neighbours up to here, in Å, tell two geometries apart.
CUTOFF = 5.0
# Gaussians over the distance, their width equal to their spacing.
N_RADIAL = 8
# Largest difference of two fingerprints, relative to their size, that still counts as equal.
# In mlearn_Si and mvl_W this finds all 45 and 90 twins (strains that a rotation maps on one
# another) and nothing else; with 1e-4 strains that differ by 2 meV/atom are taken for one.
TOLERANCE = 1e-5
# Energies of one EIP for equal geometries differ by rounding only, in eV/atom.
SAME_EIP_ENERGY = 1e-6
# The same geometry labelled twice may differ by this much and still count as one: in eV/atom, in
# eV/Å of the strongest force, and in eV/Å³.
SAME_ENERGY, SAME_FORCE, SAME_STRESS = 1e-3, 5e-3, 2e-4
# Shares of elements, and volumes in Å³/atom, of equal geometries: files round positions and cells.
SAME_CELL = 1e-3


def find_duplicates(configurations: Configurations, tolerance: float = TOLERANCE) -> IntArray:
    """Return for each configuration the first row with the same geometry, its own if it is first.

    Translation, rotation, reflection, the order of atoms, the choice of the cell and repetition
    of the cell make no difference: energies per atom do not see them.

    Parameters
    ----------
    configurations
        Finite geometries; one without neighbours within ``CUTOFF`` equals only others of that
        kind with the same composition.
    tolerance
        Largest relative difference of two fingerprints that count as one.

    Returns
    -------
    IntArray
        Shape ``(n,)``.
    """
    prints = np.array([fingerprint(configurations, row) for row in range(len(configurations))])
    first = np.arange(len(configurations), dtype=np.int64)
    if len(first) < 2:
        return first
    size = np.maximum(np.linalg.norm(prints, axis=1), 1e-12)
    # Equal prints have equal sums, up to the tolerance: only neighbours in that order are compared.
    order = np.argsort(size, kind="stable")
    ends = np.searchsorted(size[order], size[order] * (1 + tolerance), side="right")
    for place, row in enumerate(order.tolist()):
        near = order[place + 1 : ends[place]]
        distance = np.linalg.norm(prints[near] - prints[row], axis=1)
        same = near[distance <= tolerance * size[row]]
        if len(same):
            group = np.append(same, row)
            first[group] = np.minimum(first[group], first[group].min())
    # Chains of near duplicates end at one first row.
    while not np.array_equal(first[first], first):
        first = first[first]
    return first


def find_twins(configurations: Configurations, eip_labels: Labels) -> IntArray:
    """Return what :func:`find_duplicates` does, much faster where EIPs have labelled already.

    Energies of EIPs do not see what makes no difference: only configurations to which every EIP
    gives the same energy per atom are compared. Where no EIP gave one, nothing is known.

    Parameters
    ----------
    configurations
        The configurations.
    eip_labels
        What EIPs say of them or some of them, in any order; others may be among them.

    Returns
    -------
    IntArray
        For each configuration the first row with the same geometry. Shape ``(n,)``.
    """
    first = np.arange(len(configurations), dtype=np.int64)
    rows = np.flatnonzero(np.isin(configurations.ids, eip_labels.ids))
    found = eip_labels.take(eip_labels.rows_of(configurations.ids[rows]))
    energies = np.where(found.ok, found.energy, np.nan) / configurations.n_atoms[rows, None]
    told = np.isfinite(energies).any(axis=1)
    rows, group = rows[told], _groups(energies[told], SAME_EIP_ENERGY)
    order = np.argsort(group, kind="stable")
    for alike in np.split(rows[order], np.flatnonzero(np.diff(group[order])) + 1):
        if len(alike) > 1:
            first[alike] = alike[find_duplicates(configurations.take(alike))]
    return first


def find_known(configurations: Configurations, known: Configurations) -> IntArray:
    """Return for each configuration the row of ``known`` with the same geometry, -1 for none.

    What counts as the same is what :func:`find_duplicates` says; only configurations of equal
    composition and density are compared.
    """
    place = {str(name): row for row, name in enumerate(known.ids)}
    found = np.array([place.get(str(name), -1) for name in configurations.ids], dtype=np.int64)
    new = configurations.take(np.flatnonzero(found < 0))
    if not len(new):
        return found
    both = join_configurations([known, new])
    group = _groups(_cells(both), SAME_CELL)
    # The first ones of each group are known, the last ones are not.
    order = np.argsort(group, kind="stable")
    match = np.full(len(both), -1)
    for alike in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if alike[0] < len(known) <= alike[-1]:
            first = alike[find_duplicates(both.take(alike))]
            match[alike] = np.where(first < len(known), first, -1)
    found[found < 0] = match[len(known) :]
    return found


def say_the_same(labels: Labels, others: Labels) -> BoolArray:
    """Return which labels agree with those in the same row of ``others``, of the first source each.

    Compared is what turning, moving and repeating leave as it is: the energy per atom, the
    strongest force, pressure and size of the stress, as far as both tell. Two geometries that
    :func:`fingerprint` cannot tell apart (molecules beyond its cutoff, one atom of hundreds that
    moved a little) mostly do not agree. Shape ``(n,)``.
    """
    told = np.array([_unturned(labels), _unturned(others)])
    apart = np.abs(told[0] - told[1])
    limits = np.array([SAME_ENERGY, SAME_FORCE, SAME_STRESS, SAME_STRESS])
    agree: BoolArray = ((apart <= limits) | ~np.isfinite(apart)).all(axis=1)
    return agree


def _unturned(labels: Labels) -> FloatArray:
    """Return what no turning changes, a column for each. Shape ``(n, 4)``."""
    strength = np.linalg.norm(labels.forces[0], axis=1)
    stress = labels.stress[:, 0]
    # The last three stand for two elements each.
    size = np.sqrt(stress**2 @ np.array([1.0, 1, 1, 2, 2, 2]))
    return np.column_stack(
        [
            labels.energy[:, 0] / labels.n_atoms,
            np.maximum.reduceat(strength, labels.offsets[:-1]),
            stress[:, :3].mean(axis=1),
            size,
        ]
    )


def _cells(configurations: Configurations) -> FloatArray:
    """Return what equal geometries have in common: shares of elements, and volume of an atom."""
    elements = np.array(configurations.elements, dtype=np.int64)
    volume = np.abs(np.linalg.det(configurations.cells)) / configurations.n_atoms
    volume = np.where(configurations.pbc.all(axis=1), volume, np.nan)
    return np.column_stack([element_fractions(configurations, elements), volume])


def _groups(values: FloatArray, tolerance: float) -> IntArray:
    """Return a number for each row, equal where all columns are equal up to rounding."""
    group = np.zeros(len(values), dtype=np.int64)
    for column in values.T:
        # What is missing is missing for twins too.
        told = np.where(np.isfinite(column), column, np.finfo(np.float64).max)
        order = np.lexsort((told, group))
        with np.errstate(over="ignore"):
            apart = np.diff(told[order]) > tolerance
        begins = apart | (np.diff(group[order]) != 0)
        group[order] = np.concatenate([[0], np.cumsum(begins)])[: len(order)]
    return group


def fingerprint(configurations: Configurations, row: int) -> FloatArray:
    """Return numbers that are equal for equal geometries and smooth in the positions.

    For each element: mean, mean square and mean cube over its atoms of the radial density of each
    neighbouring element and of the lengths of its first and second moments (a power spectrum up to
    l = 2, with few functions), and the share of the element.
    """
    elements = np.array(configurations.elements)
    part = slice(int(configurations.offsets[row]), int(configurations.offsets[row + 1]))
    kind = np.searchsorted(elements, configurations.numbers[part])
    features = _atom_features(configurations, row, kind, len(elements))
    means = []
    for element in range(len(elements)):
        own = features[kind == element]
        count = len(kind) or 1
        means += [own.sum(axis=0) / count, (own**2).sum(axis=0) / count]
        means += [(own**3).sum(axis=0) / count, np.array([len(own) / count])]
    return np.concatenate(means) if means else np.zeros(1)


def _atom_features(
    configurations: Configurations, row: int, kind: IntArray, n_elements: int
) -> FloatArray:
    atoms = configurations.atoms(row)
    first, second, distance, vector = NeighborList(cutoff=CUTOFF, full_list=True).compute(
        points=atoms.positions,
        box=np.asarray(atoms.cell.complete()),
        periodic=atoms.pbc,
        quantities="ijdD",
    )
    centres = np.linspace(1.0, CUTOFF, N_RADIAL)
    width = centres[1] - centres[0]
    # The cosine lets a neighbour at the cutoff come and go smoothly.
    fade = 0.5 * (1 + np.cos(np.pi * distance / CUTOFF))
    radial = fade[:, None] * np.exp(-0.5 * ((distance[:, None] - centres) / width) ** 2)
    unit = vector / np.maximum(distance, 1e-12)[:, None]
    square = (unit[:, :, None] * unit[:, None, :]).reshape(-1, 9)
    angular = np.hstack([np.ones((len(unit), 1)), unit, square])
    slot = first.astype(np.int64) * n_elements + kind[second.astype(np.int64)]
    density = np.zeros((len(kind) * n_elements, N_RADIAL, 13))
    for column in range(13):
        products = radial * angular[:, column, None]
        for k in range(N_RADIAL):
            density[:, k, column] = np.bincount(slot, products[:, k], minlength=len(density))
    lengths = [
        density[:, :, 0],
        np.linalg.norm(density[:, :, 1:4], axis=2),
        np.linalg.norm(density[:, :, 4:], axis=2),
    ]
    return np.concatenate(lengths, axis=1).reshape(len(kind), -1)
