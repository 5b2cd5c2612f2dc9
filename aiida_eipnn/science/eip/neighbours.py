"""Images and neighbours of periodic configurations, compiled by numba.

KIM models know no periodic cell: the images of the atoms within the model's reach become further
particles, and a callback tells the model each particle's neighbours. kimpy's own functions for
that take as long as a fast model itself. Here images and pairs of a whole set of configurations
are found once, for the model that reaches furthest (:func:`find_pairs`); each model then gets its
own share of them (:func:`load`), which is only a walk over the pairs.
"""

from typing import NamedTuple

import numpy as np
from numba import cfunc, njit, types
from numpy.typing import NDArray

from aiida_eipnn.science.arrays import FloatArray, IntArray

# Atoms closer than this, in Å, are one and the same: KIM's own limit.
COLLISION = 1e-5

# Length of the header of the lists that the callback reads: how many particles, where the list is.
_HEADER = 2


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
    """What a KIM model reads and writes, in memory that stays where it is.

    Parameters
    ----------
    number, codes, contributing, positions, energy, forces, particle_energy
        KIM's compute arguments of these names.
    source
        Which image each particle is.
    place
        Which particle each image is, -1 where it is none.
    lists
        For the callback: the number of particles, the address of ``neighbours``, and then for each
        particle how many neighbours it has and where they begin.
    neighbours
        The neighbours of all particles, one after the other.
    """

    number: NDArray[np.int32]
    codes: NDArray[np.int32]
    contributing: NDArray[np.int32]
    positions: FloatArray
    energy: FloatArray
    forces: FloatArray
    particle_energy: FloatArray
    source: NDArray[np.int32]
    place: NDArray[np.int32]
    lists: IntArray
    neighbours: NDArray[np.int32]

    @classmethod
    def empty(cls, n_particles: int, n_pairs: int) -> "Particles":
        """Return memory for so many particles and pairs."""
        neighbours = np.zeros(max(n_pairs, 1), dtype=np.int32)
        lists = np.zeros(_HEADER + 2 * n_particles, dtype=np.int64)
        lists[1] = neighbours.ctypes.data
        return cls(
            number=np.zeros(1, dtype=np.int32),
            codes=np.zeros(n_particles, dtype=np.int32),
            contributing=np.zeros(n_particles, dtype=np.int32),
            positions=np.zeros((n_particles, 3)),
            energy=np.zeros(1),
            forces=np.zeros((n_particles, 3)),
            particle_energy=np.zeros(n_particles),
            source=np.zeros(n_particles, dtype=np.int32),
            place=np.zeros(n_particles, dtype=np.int32),
            lists=lists,
            neighbours=neighbours,
        )


def largest(pairs: Pairs) -> tuple[int, int]:
    """Return the most images and the most pairs of one configuration."""
    if len(pairs.image_offsets) < 2:
        return 0, 0
    n_pairs = np.diff(pairs.pair_offsets[pairs.image_offsets])
    return int(np.diff(pairs.image_offsets).max()), int(n_pairs.max())


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
    inverse = np.linalg.inv(cells)
    reach = np.where(pbc, cutoff * np.linalg.norm(inverse, axis=1), 0.0)
    fractional, wrapped = _wrap(cells, inverse, pbc, positions, offsets)
    image_offsets, image_positions, atom_of = _find_images(
        cells, reach, fractional, wrapped, offsets, cutoff
    )
    pair_offsets, neighbour, squared = _find_neighbours(
        image_offsets, image_positions, np.diff(offsets), cutoff, of_images
    )
    return Pairs(image_offsets, image_positions, atom_of, pair_offsets, neighbour, squared)


@njit(cache=True)
def _wrap(cells, inverse, pbc, positions, offsets):
    """Return fractional and Cartesian positions with every atom in its cell."""
    fractional = np.empty_like(positions)
    wrapped = np.empty_like(positions)
    for row in range(len(cells)):
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
    return fractional, wrapped


@njit(cache=True)
def _find_images(cells, reach, fractional, wrapped, offsets, cutoff):
    """Return the atoms of each configuration, and after them the images within the cutoff."""
    n = len(cells)
    image_offsets = np.zeros(n + 1, dtype=np.int64)
    room = 16 * len(wrapped) + 64
    positions = np.empty((room, 3))
    atom_of = np.empty(room, dtype=np.int32)
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
                lo[k], hi[k] = min(lo[k], fractional[atom, k]), max(hi[k], fractional[atom, k])
                bottom[k] = min(bottom[k], wrapped[atom, k] - cutoff)
                top[k] = max(top[k], wrapped[atom, k] + cutoff)
        nx = int(np.ceil(reach[row, 0]))
        ny = int(np.ceil(reach[row, 1]))
        nz = int(np.ceil(reach[row, 2]))
        most = (2 * nx + 1) * (2 * ny + 1) * (2 * nz + 1) * (stop - start)
        if count + most > room:
            room = 2 * (count + most)
            more = np.empty((room, 3))
            more[:count] = positions[:count]
            positions = more
            more_of = np.empty(room, dtype=np.int32)
            more_of[:count] = atom_of[:count]
            atom_of = more_of
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
                        fx = fractional[atom, 0] + x
                        fy = fractional[atom, 1] + y
                        fz = fractional[atom, 2] + z
                        if (
                            fx < lo[0] - reach[row, 0]
                            or fx > hi[0] + reach[row, 0]
                            or fy < lo[1] - reach[row, 1]
                            or fy > hi[1] + reach[row, 1]
                            or fz < lo[2] - reach[row, 2]
                            or fz > hi[2] + reach[row, 2]
                        ):
                            continue
                        px = wrapped[atom, 0] + here[0]
                        py = wrapped[atom, 1] + here[1]
                        pz = wrapped[atom, 2] + here[2]
                        if (
                            px < bottom[0]
                            or px > top[0]
                            or py < bottom[1]
                            or py > top[1]
                            or pz < bottom[2]
                            or pz > top[2]
                        ):
                            continue
                        positions[count, 0] = px
                        positions[count, 1] = py
                        positions[count, 2] = pz
                        atom_of[count] = atom - start
                        count += 1
        image_offsets[row + 1] = count
    return image_offsets, positions[:count].copy(), atom_of[:count].copy()


@njit(cache=True)
def _find_neighbours(image_offsets, positions, n_atoms, cutoff, of_images):
    """Return the pairs of atoms with images, and of images with images where they are asked for."""
    n_images = len(positions)
    pair_offsets = np.zeros(n_images + 1, dtype=np.int64)
    room = 64 * n_images + 64
    neighbour = np.empty(room, dtype=np.int32)
    squared = np.empty(room)
    limit = cutoff * cutoff
    width = 0.5 * cutoff
    order = np.empty(n_images, dtype=np.int32)
    ordered = np.empty((3, n_images))
    used = np.empty(n_images, dtype=np.bool_)
    cell_of = np.empty(n_images, dtype=np.int64)
    lo = np.empty(3)
    size = np.empty(3, dtype=np.int64)
    count = 0
    for row in range(len(n_atoms)):
        start, stop = image_offsets[row], image_offsets[row + 1]
        total = 1
        for k in range(3):
            lo[k], hi = np.inf, -np.inf
            for image in range(start, stop):
                lo[k], hi = min(lo[k], positions[image, k]), max(hi, positions[image, k])
            size[k] = max(1, min(64, int((hi - lo[k]) / width) + 1))
            total *= size[k]
        first = np.zeros(total + 1, dtype=np.int64)
        for image in range(start, stop):
            x = min(size[0] - 1, int((positions[image, 0] - lo[0]) / width))
            y = min(size[1] - 1, int((positions[image, 1] - lo[1]) / width))
            z = min(size[2] - 1, int((positions[image, 2] - lo[2]) / width))
            cell_of[image] = (x * size[1] + y) * size[2] + z
            first[cell_of[image] + 1] += 1
        for cell in range(total):
            first[cell + 1] += first[cell]
        cursor = first[:-1].copy()
        for image in range(start, stop):
            at = cursor[cell_of[image]]
            cursor[cell_of[image]] += 1
            order[at] = image - start
            ordered[0, at] = positions[image, 0]
            ordered[1, at] = positions[image, 1]
            ordered[2, at] = positions[image, 2]
        last = stop if of_images else start + n_atoms[row]
        used[start:stop] = False
        for image in range(start, last):
            if image == start + n_atoms[row]:
                # From here on images that are not atoms: no model sees those that no atom reaches.
                for at in range(pair_offsets[start], count):
                    used[start + neighbour[at]] = True
            if image >= start + n_atoms[row] and not used[image]:
                pair_offsets[image + 1] = count
                continue
            if count + (stop - start) >= room:
                room = 2 * (count + (stop - start)) + 1
                more = np.empty(room, dtype=np.int32)
                more[:count] = neighbour[:count]
                neighbour = more
                more_squared = np.empty(room)
                more_squared[:count] = squared[:count]
                squared = more_squared
            px, py, pz = positions[image, 0], positions[image, 1], positions[image, 2]
            cell = cell_of[image]
            cz = cell % size[2]
            cy = (cell // size[2]) % size[1]
            cx = cell // (size[2] * size[1])
            # The last cell along an axis may be wider, where there would be too many of them.
            z_from, z_to = max(0, cz - 2), min(size[2] - 1, cz + 2)
            for x in range(max(0, cx - 2), min(size[0] - 1, cx + 2) + 1):
                for y in range(max(0, cy - 2), min(size[1] - 1, cy + 2) + 1):
                    line = (x * size[1] + y) * size[2]
                    for at in range(first[line + z_from], first[line + z_to + 1]):
                        dx = ordered[0, at] - px
                        dy = ordered[1, at] - py
                        dz = ordered[2, at] - pz
                        distance = dx * dx + dy * dy + dz * dz
                        # Written in any case and kept by counting: a branch here costs more.
                        neighbour[count] = order[at]
                        squared[count] = distance
                        count += (distance < limit) & (order[at] != image - start)
            pair_offsets[image + 1] = count
        for image in range(last, stop):
            pair_offsets[image + 1] = count
    return pair_offsets, neighbour[:count].copy(), squared[:count].copy()


@njit(cache=True)
def load(pairs, row, codes, offsets, cutoff, influence, of_images, particles):
    """Put one configuration where a KIM model reads it; return whether two atoms are in one place.

    Only images within the model's influence distance of an atom become particles, and only pairs
    within its cutoff neighbours.
    """
    start, stop = pairs.image_offsets[row], pairs.image_offsets[row + 1]
    n_atoms = offsets[row + 1] - offsets[row]
    limit, reach = cutoff * cutoff, influence * influence
    place, source, lists = particles.place, particles.source, particles.lists
    neighbours = particles.neighbours
    for image in range(n_atoms):
        place[image] = image
        source[image] = image
    for image in range(n_atoms, stop - start):
        place[image] = -1
    n_particles = n_atoms
    count = 0
    for atom in range(n_atoms):
        lists[_HEADER + 2 * atom + 1] = count
        for at in range(pairs.pair_offsets[start + atom], pairs.pair_offsets[start + atom + 1]):
            squared = pairs.squared[at]
            if squared < reach:
                other = pairs.neighbour[at]
                if place[other] < 0:
                    place[other] = n_particles
                    source[n_particles] = other
                    n_particles += 1
                if squared < limit:
                    neighbours[count] = place[other]
                    count += 1
                    if squared < COLLISION * COLLISION:
                        return True
        lists[_HEADER + 2 * atom] = count - lists[_HEADER + 2 * atom + 1]
    for particle in range(n_atoms, n_particles):
        lists[_HEADER + 2 * particle + 1] = count
        if of_images:
            image = start + source[particle]
            for at in range(pairs.pair_offsets[image], pairs.pair_offsets[image + 1]):
                other = pairs.neighbour[at]
                if place[other] >= 0 and pairs.squared[at] < limit:
                    neighbours[count] = place[other]
                    count += 1
        lists[_HEADER + 2 * particle] = count - lists[_HEADER + 2 * particle + 1]
    for particle in range(n_particles):
        image = start + source[particle]
        # Some models add to what is there, or leave out what is not an atom.
        particles.particle_energy[particle] = 0.0
        for k in range(3):
            particles.forces[particle, k] = 0.0
            particles.positions[particle, k] = pairs.positions[image, k]
        particles.codes[particle] = codes[offsets[row] + pairs.atom_of[image]]
        particles.contributing[particle] = 1 if particle < n_atoms else 0
    particles.number[0] = n_particles
    lists[0] = n_particles
    return False


@njit(cache=True)
def fold(pairs, row, offsets, particles, forces, virial, atomic_energy):
    """Add what belongs to images to their atoms; sum up positions times forces."""
    start = pairs.image_offsets[row]
    for atom in range(offsets[row], offsets[row + 1]):
        forces[atom] = 0.0
        atomic_energy[atom] = 0.0
    virial[:] = 0.0
    for particle in range(particles.number[0]):
        atom = offsets[row] + pairs.atom_of[start + particles.source[particle]]
        atomic_energy[atom] += particles.particle_energy[particle]
        for k in range(3):
            force = particles.forces[particle, k]
            forces[atom, k] += force
            for axis in range(3):
                virial[axis, k] += particles.positions[particle, axis] * force


@njit(cache=True)
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


@cfunc(
    types.intc(
        _POINTER(types.int64),
        types.intc,
        _POINTER(types.float64),
        types.intc,
        types.intc,
        _POINTER(types.intc),
        _POINTER(types.int64),
    ),
    cache=True,
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
