"""Images and neighbours of periodic configurations, compiled by numba.

KIM models know no periodic cell: the images of the atoms within the model's reach become further
particles, and a callback tells the model each particle's neighbours. kimpy's own functions for
that take as long as a fast model itself. Here images and pairs of a whole set of configurations
are found once, for the model that reaches furthest (:func:`find_pairs`); each model then gets its
own share of them (:func:`make_particles`), which is only a walk over the pairs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import cfunc, njit, types
from numpy.typing import NDArray

from aiida_eipnn.science.arrays import FloatArray, IntArray

# Atoms closer than this, in Å, are one and the same: KIM's own limit.
COLLISION = 1e-5

# Images in a cube of the cutoff's size from which finer cells pay.
CROWDED = 8.0

# Length of the header of the lists that the callback reads: how many particles, where the list is.
_HEADER = 2


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function, and keep that for the next process where there is a place for it."""
    try:
        kept: Callable[..., Any] = njit(cache=True)(function)
    except RuntimeError:
        # Neither this package nor the home folder can be written to.
        kept = njit(function)
    return kept


class Pairs(NamedTuple):
    """Images and pairs of ``n`` configurations with ``N`` atoms, ``M`` images and ``P`` pairs.

    Atoms are images of themselves: the first images of a configuration are its atoms.

    Parameters
    ----------
    image_offsets
        The images of configuration ``i`` are rows ``image_offsets[i]`` to ``image_offsets[i + 1]``.
        Shape ``(n + 1,)``.
    positions
        Of the images, in Å. Shape ``(M, 3)``.
    atom_of
        Which atom, counted within its configuration, each image is of. Shape ``(M,)``.
    pair_offsets
        The pairs of image ``i`` are rows ``pair_offsets[i]`` to ``pair_offsets[i + 1]``.
        Shape ``(M + 1,)``.
    neighbour
        The other image of each pair, counted within its configuration. Shape ``(P,)``.
    squared
        Squared distance of each pair, in Å². Shape ``(P,)``.
    """

    image_offsets: IntArray
    positions: FloatArray
    atom_of: NDArray[np.int32]
    pair_offsets: IntArray
    neighbour: NDArray[np.int32]
    squared: FloatArray


class Particles(NamedTuple):
    """What a KIM model reads and writes, for ``n`` configurations with ``P`` particles in all.

    Parameters
    ----------
    offsets
        The particles of configuration ``i`` are rows ``offsets[i]`` to ``offsets[i + 1]``.
        Shape ``(n + 1,)``.
    number, energy
        KIM's compute arguments of these names. Shape ``(n,)``.
    codes, contributing, positions, forces, atomic_energy
        As well. Shape ``(P,)`` or ``(P, 3)``.
    atom_of
        Which atom each particle is or is an image of. Shape ``(P,)``.
    lists
        For the callback, from ``2 * (i + offsets[i])`` on: the number of particles, the address of
        ``neighbours``, and then for each particle how many neighbours it has and where they begin.
    neighbours
        The neighbours of all particles, one after the other.
    collided
        Where two atoms are in one place. Shape ``(n,)``.
    """

    offsets: IntArray
    number: NDArray[np.int32]
    energy: FloatArray
    codes: NDArray[np.int32]
    contributing: NDArray[np.int32]
    positions: FloatArray
    forces: FloatArray
    atomic_energy: FloatArray
    atom_of: NDArray[np.int64]
    lists: IntArray
    neighbours: NDArray[np.int32]
    collided: NDArray[np.bool_]


def find_pairs(
    cells: FloatArray,
    pbc: NDArray[np.bool_],
    positions: FloatArray,
    offsets: IntArray,
    cutoff: float,
    *,
    of_images: bool,
) -> Pairs:
    """Find the images within ``cutoff`` of an atom, and all pairs that are no further apart.

    Parameters
    ----------
    cells
        Cell vectors in rows, in Å; a configuration that is not periodic along all three needs
        linearly independent ones all the same. Shape ``(n, 3, 3)``.
    pbc
        Shape ``(n, 3)``.
    positions
        In Å. Shape ``(N, 3)``.
    offsets
        The atoms of configuration ``i`` are rows ``offsets[i]`` to ``offsets[i + 1]``.
    cutoff
        In Å.
    of_images
        Also find the pairs of images that are not atoms: some models ask for them.
    """
    reach, fractional, wrapped = _wrap(cells, np.linalg.inv(cells), pbc, positions, offsets, cutoff)
    image_offsets, image_positions, atom_of = _find_images(
        cells, reach, fractional, wrapped, offsets, cutoff
    )
    pair_offsets, neighbour, squared = _find_neighbours(
        image_offsets, image_positions, np.diff(offsets), cutoff, of_images
    )
    return Pairs(image_offsets, image_positions, atom_of, pair_offsets, neighbour, squared)


@_compiled
def _wrap(cells, inverse, pbc, positions, offsets, cutoff):
    """Return the cutoff in cells, and fractional and Cartesian positions within the cell."""
    fractional = np.empty_like(positions)
    wrapped = np.empty_like(positions)
    reach = np.zeros((len(cells), 3))
    for row in range(len(cells)):
        for axis in range(3):
            if pbc[row, axis]:
                square = 0.0
                for k in range(3):
                    square += inverse[row, k, axis] ** 2
                reach[row, axis] = cutoff * np.sqrt(square)
        for atom in range(offsets[row], offsets[row + 1]):
            for axis in range(3):
                wrapped[atom, axis] = positions[atom, axis]
                value = 0.0
                for k in range(3):
                    value += positions[atom, k] * inverse[row, k, axis]
                fractional[atom, axis] = value
            for axis in range(3):
                if pbc[row, axis]:
                    shift = np.floor(fractional[atom, axis])
                    if shift != 0.0:
                        fractional[atom, axis] -= shift
                        for k in range(3):
                            wrapped[atom, k] -= shift * cells[row, axis, k]
    return reach, fractional, wrapped


@_compiled
def _grown(array, count, room):
    """Return an array with room for more rows, and the first of them as they were."""
    more = np.empty((room, *array.shape[1:]), array.dtype)
    more[:count] = array[:count]
    return more


@_compiled
def _find_images(cells, reach, fractional, wrapped, offsets, cutoff):
    """Return the atoms of each configuration, and after them the images within the cutoff."""
    n = len(cells)
    image_offsets = np.zeros(n + 1, dtype=np.int64)
    room = 24 * len(wrapped) + 4096
    positions, atom_of = np.empty((room, 3)), np.empty(room, dtype=np.int32)
    lo, hi = np.empty(3), np.empty(3)
    bottom, top = np.empty(3), np.empty(3)
    here = np.empty(3)
    count = 0
    for row in range(n):
        start, stop = offsets[row], offsets[row + 1]
        for k in range(3):
            lo[k], hi[k], bottom[k], top[k] = np.inf, -np.inf, np.inf, -np.inf
        for atom in range(start, stop):
            for k in range(3):
                lo[k] = min(lo[k], fractional[atom, k] - reach[row, k])
                hi[k] = max(hi[k], fractional[atom, k] + reach[row, k])
                bottom[k] = min(bottom[k], wrapped[atom, k] - cutoff)
                top[k] = max(top[k], wrapped[atom, k] + cutoff)
        nx = int(np.ceil(reach[row, 0]))
        ny = int(np.ceil(reach[row, 1]))
        nz = int(np.ceil(reach[row, 2]))
        most = (2 * nx + 1) * (2 * ny + 1) * (2 * nz + 1) * (stop - start)
        if count + most > len(positions):
            positions = _grown(positions, count, 2 * (count + most))
            atom_of = _grown(atom_of, count, 2 * (count + most))
        for atom in range(start, stop):
            positions[count] = wrapped[atom]
            atom_of[count] = atom - start
            count += 1
        for x in range(-nx, nx + 1):
            for y in range(-ny, ny + 1):
                for z in range(-nz, nz + 1):
                    if x == 0 and y == 0 and z == 0:
                        continue
                    for k in range(3):
                        here[k] = x * cells[row, 0, k] + y * cells[row, 1, k] + z * cells[row, 2, k]
                    for atom in range(start, stop):
                        # In reach of the cell along each vector, and of the atoms along each axis.
                        near = (
                            lo[0] <= fractional[atom, 0] + x <= hi[0]
                            and lo[1] <= fractional[atom, 1] + y <= hi[1]
                            and lo[2] <= fractional[atom, 2] + z <= hi[2]
                            and bottom[0] <= wrapped[atom, 0] + here[0] <= top[0]
                            and bottom[1] <= wrapped[atom, 1] + here[1] <= top[1]
                            and bottom[2] <= wrapped[atom, 2] + here[2] <= top[2]
                        )
                        if near:
                            for k in range(3):
                                positions[count, k] = wrapped[atom, k] + here[k]
                            atom_of[count] = atom - start
                            count += 1
        image_offsets[row + 1] = count
    return image_offsets, positions[:count], atom_of[:count]


class _Cells(NamedTuple):
    """Images of one configuration, sorted into cells.

    ``order`` and ``positions`` are the images and where they are, cell by cell; those of cell ``c``
    begin at ``first[c]``. ``cell_of`` is the cell of each image, ``size`` the number of cells along
    each axis, and no pair within the cutoff is more than ``reach`` cells apart.
    """

    first: IntArray
    order: NDArray[np.int32]
    positions: FloatArray
    cell_of: IntArray
    size: IntArray
    reach: int


@_compiled
def _sort_into_cells(positions, cutoff):
    n = len(positions)
    lo, size = np.empty(3), np.empty(3, dtype=np.int64)
    span, volume = np.empty(3), 1.0
    for k in range(3):
        low, high = positions[0, k], positions[0, k]
        for image in range(1, n):
            value = positions[image, k]
            if value < low:
                low = value
            if value > high:
                high = value
        lo[k], span[k] = low, high - low
        volume *= high - low + 1e-3
    # Small cells leave out more pairs that are too far apart; empty ones cost more than that.
    reach = 2 if n * cutoff**3 > CROWDED * volume else 1
    # A little wider, so that rounding puts no pair into cells further apart than that.
    width = cutoff / reach * (1 + 1e-9)
    per_width = 1.0 / width
    for k in range(3):
        # The last cell is wider where there would be too many.
        size[k] = max(1, min(64, int(span[k] / width) + 1))
    cell_of = np.empty(n, dtype=np.int64)
    first = np.zeros(size[0] * size[1] * size[2] + 1, dtype=np.int64)
    for image in range(n):
        x = min(size[0] - 1, np.int64((positions[image, 0] - lo[0]) * per_width))
        y = min(size[1] - 1, np.int64((positions[image, 1] - lo[1]) * per_width))
        z = min(size[2] - 1, np.int64((positions[image, 2] - lo[2]) * per_width))
        cell_of[image] = (x * size[1] + y) * size[2] + z
        first[cell_of[image] + 1] += 1
    for cell in range(len(first) - 1):
        first[cell + 1] += first[cell]
    order, ordered = np.empty(n, dtype=np.int32), np.empty((3, n))
    cursor = first[:-1].copy()
    for image in range(n):
        at = cursor[cell_of[image]]
        cursor[cell_of[image]] += 1
        order[at] = image
        for k in range(3):
            ordered[k, at] = positions[image, k]
    return _Cells(first, order, ordered, cell_of, size, reach)


@_compiled
def _find_neighbours(image_offsets, positions, n_atoms, cutoff, of_images):
    """Return the pairs of atoms with images, and of images with images where they are asked for."""
    n_images = len(positions)
    pair_offsets = np.zeros(n_images + 1, dtype=np.int64)
    room = 48 * (n_images if of_images else n_atoms.sum()) + n_images
    neighbour, squared = np.empty(room, dtype=np.int32), np.empty(room)
    used = np.empty(n_images, dtype=np.bool_)
    # Unsigned, as all indices of the innermost loop: numba looks whether others are negative.
    count = np.uint64(0)
    for row in range(len(n_atoms)):
        start, stop = image_offsets[row], image_offsets[row + 1]
        if start == stop:
            continue
        cells = _sort_into_cells(positions[start:stop], cutoff)
        used[start:stop] = False
        used[start : start + n_atoms[row]] = True
        for image in range(start, stop):
            if image == start + n_atoms[row] and of_images:
                # From here on images that are not atoms: no model sees those that no atom reaches.
                for at in range(pair_offsets[start], np.int64(count)):
                    used[start + neighbour[at]] = True
            if used[image]:
                if np.int64(count) + stop - start >= len(neighbour):
                    room = 2 * (np.int64(count) + stop - start) + 1
                    neighbour = _grown(neighbour, np.int64(count), room)
                    squared = _grown(squared, np.int64(count), room)
                count = _add_neighbours(
                    cells, image - start, positions[image], cutoff, neighbour, squared, count
                )
            pair_offsets[image + 1] = count
    return pair_offsets, neighbour[:count], squared[:count]


@_compiled
def _add_neighbours(cells, image, position, cutoff, neighbour, squared, begin):
    """Write what is within the cutoff of an image from ``begin`` on; return where that ends."""
    limit, count = cutoff * cutoff, begin
    px, py, pz = position[0], position[1], position[2]
    first, order, ordered, size, reach = (
        cells.first,
        cells.order,
        cells.positions,
        cells.size,
        cells.reach,
    )
    cell = cells.cell_of[image]
    cz = cell % size[2]
    cy = (cell // size[2]) % size[1]
    cx = cell // (size[2] * size[1])
    z_from, z_to = max(0, cz - reach), min(size[2] - 1, cz + reach)
    for x in range(max(0, cx - reach), min(size[0] - 1, cx + reach) + 1):
        for y in range(max(0, cy - reach), min(size[1] - 1, cy + reach) + 1):
            line = (x * size[1] + y) * size[2]
            from_here = np.uint64(first[line + z_from])
            for at in range(from_here, np.uint64(first[line + z_to + 1])):
                dx = ordered[0, at] - px
                dy = ordered[1, at] - py
                dz = ordered[2, at] - pz
                distance = dx * dx + dy * dy + dz * dz
                # Written in any case and kept by counting: a branch here costs more.
                neighbour[count] = order[at]
                squared[count] = distance
                count += np.uint64(distance < limit)
    # It has found itself too; the last one takes that place.
    count -= np.uint64(1)
    for at in range(begin, count):
        if neighbour[at] == image:
            neighbour[at], squared[at] = neighbour[count], squared[count]
            break
    return count


def make_particles(
    pairs: Pairs,
    offsets: IntArray,
    codes: NDArray[np.int32],
    cutoff: float,
    influence: float,
    *,
    of_images: bool,
) -> Particles:
    """Return what a model reads: images within its influence, and pairs within its cutoff.

    Parameters
    ----------
    pairs
        From :func:`find_pairs`, which may reach further.
    offsets
        The atoms of configuration ``i`` are rows ``offsets[i]`` to ``offsets[i + 1]``.
    codes
        The model's species code of each atom. Shape ``(N,)``.
    cutoff, influence
        Of the model, in Å.
    of_images
        Whether it asks for neighbours of images that are not atoms.
    """
    return Particles(*_make_particles(pairs, offsets, codes, cutoff, influence, of_images))


@_compiled
def _make_particles(pairs, offsets, codes, cutoff, influence, of_images):
    n = len(offsets) - 1
    starts = np.zeros(n + 1, dtype=np.int64)
    collided = np.zeros(n, dtype=np.bool_)
    limit, reach = cutoff * cutoff, influence * influence
    most = len(pairs.positions)
    place = np.full(most, -1, dtype=np.int32)
    source = np.empty(most, dtype=np.int64)
    lists = np.empty(_HEADER * (n + most), dtype=np.int64)
    neighbours = np.empty(len(pairs.neighbour) + 1, dtype=np.int32)
    count = 0
    for row in range(n):
        start = pairs.image_offsets[row]
        first = starts[row]
        head = _HEADER * (row + first)
        n_atoms = offsets[row + 1] - offsets[row]
        for atom in range(n_atoms):
            place[start + atom] = atom
            source[first + atom] = start + atom
        n_particles = n_atoms
        for atom in range(n_atoms):
            begin = count
            for at in range(pairs.pair_offsets[start + atom], pairs.pair_offsets[start + atom + 1]):
                squared = pairs.squared[at]
                if squared < reach:
                    image = start + pairs.neighbour[at]
                    if place[image] < 0:
                        place[image] = n_particles
                        source[first + n_particles] = image
                        n_particles += 1
                    neighbours[count] = place[image]
                    count += squared < limit
                    collided[row] |= squared < COLLISION * COLLISION
            lists[head + _HEADER + 2 * atom] = count - begin
            lists[head + _HEADER + 2 * atom + 1] = begin
        for particle in range(n_atoms, n_particles):
            begin = count
            if of_images:
                at_image = source[first + particle]
                for at in range(pairs.pair_offsets[at_image], pairs.pair_offsets[at_image + 1]):
                    other = place[start + pairs.neighbour[at]]
                    neighbours[count] = other
                    count += (other >= 0) & (pairs.squared[at] < limit)
            lists[head + _HEADER + 2 * particle] = count - begin
            lists[head + _HEADER + 2 * particle + 1] = begin
        lists[head] = n_particles
        starts[row + 1] = first + n_particles
    total = starts[n]
    positions = np.empty((total, 3))
    kinds = np.empty(total, dtype=np.int32)
    contributing = np.empty(total, dtype=np.int32)
    atom_of = np.empty(total, dtype=np.int64)
    number = np.empty(n, dtype=np.int32)
    for row in range(n):
        lists[_HEADER * (row + starts[row]) + 1] = neighbours.ctypes.data
        number[row] = starts[row + 1] - starts[row]
        for particle in range(starts[row], starts[row + 1]):
            image = source[particle]
            atom = offsets[row] + pairs.atom_of[image]
            atom_of[particle] = atom
            kinds[particle] = codes[atom]
            contributing[particle] = particle - starts[row] < offsets[row + 1] - offsets[row]
            for k in range(3):
                positions[particle, k] = pairs.positions[image, k]
    # Some models add to what is there, or leave out what is not an atom: so it begins with zeros.
    return (
        starts,
        number,
        np.zeros(n),
        kinds,
        contributing,
        positions,
        np.zeros((total, 3)),
        np.zeros(total),
        atom_of,
        lists,
        neighbours,
        collided,
    )


@_compiled
def fold(particles, n_atoms, cells, pbc):
    """Return forces and energies of atoms, with what belongs to their images, and the stress."""
    forces = np.zeros((n_atoms, 3))
    atomic_energy = np.zeros(n_atoms)
    stress = np.full((len(particles.number), 6), np.nan)
    virial = np.empty((3, 3))
    for row in range(len(particles.number)):
        virial[:] = 0.0
        for particle in range(particles.offsets[row], particles.offsets[row + 1]):
            atom = particles.atom_of[particle]
            atomic_energy[atom] += particles.atomic_energy[particle]
            for k in range(3):
                force = particles.forces[particle, k]
                forces[atom, k] += force
                for axis in range(3):
                    virial[axis, k] += particles.positions[particle, axis] * force
        if pbc[row, 0] and pbc[row, 1] and pbc[row, 2]:
            volume = abs(np.linalg.det(cells[row]))
            for k in range(3):
                i, j = (k + 1) % 3, (k + 2) % 3
                stress[row, k] = -virial[k, k] / volume
                stress[row, 3 + k] = -0.5 * (virial[i, j] + virial[j, i]) / volume
    return forces, atomic_energy, stress


@_compiled
def find_close(pairs, offsets, radii):
    """Return where two atoms are closer than the sum of their radii. Shape ``(n,)``."""
    close = np.zeros(len(offsets) - 1, dtype=np.bool_)
    for row in range(len(offsets) - 1):
        start = pairs.image_offsets[row]
        for atom in range(offsets[row + 1] - offsets[row]):
            radius = radii[offsets[row] + atom]
            for at in range(pairs.pair_offsets[start + atom], pairs.pair_offsets[start + atom + 1]):
                other = radii[offsets[row] + pairs.atom_of[start + pairs.neighbour[at]]]
                if pairs.squared[at] < (radius + other) ** 2:
                    close[row] = True
    return close


_POINTER = types.CPointer


# Without a cache: it is compiled in a moment.
@cfunc(
    types.intc(
        _POINTER(types.int64),
        types.intc,
        _POINTER(types.float64),
        types.intc,
        types.intc,
        _POINTER(types.intc),
        _POINTER(types.int64),
    )
)
def _get_neighbours(lists, n_lists, cutoffs, which, particle, number, neighbours):
    """Tell a model the neighbours of a particle (KIM's GetNeighborList)."""
    if which != 0 or particle < 0 or particle >= lists[0]:
        return 1
    number[0] = lists[_HEADER + 2 * particle]
    neighbours[0] = lists[1] + 4 * lists[_HEADER + 2 * particle + 1]
    return 0


def callback_address() -> int:
    """Return where the callback is that reads :attr:`Particles.lists`."""
    address: int | None = _get_neighbours.address
    if address is None:
        raise RuntimeError("numba compiled no callback: reinstall numba")
    return address
