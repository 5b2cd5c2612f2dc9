"""Pairs of atoms without vesin: the same as with it."""

import subprocess
import sys

import numpy as np
import pytest
from ase.build import bulk
from vesin import NeighborList as VesinNeighborList

from aiida_eipnn.science import neighbour_list
from aiida_eipnn.science.neighbour_list import TreeNeighborList

QUANTITIES = "ijSdD"


def box(rng):
    """Return a cell that is skew but not flat, atoms in and out of it, and where it is periodic."""
    cell = rng.normal(0, 1.5, (3, 3)) + 5 * np.eye(3)
    return {
        "points": rng.normal(0, 6, (rng.integers(1, 12), 3)),
        "box": cell,
        "periodic": rng.random(3) < 0.6,
    }


def ordered(found):
    """Return quantities of pairs in the order of the points and the shift."""
    first, second, shift = (np.asarray(array, dtype=np.int64) for array in found[:3])
    order = np.lexsort((*shift.T, second, first))
    return [np.asarray(array)[order] for array in (first, second, shift, *found[3:])]


def test_vesin_is_used_where_it_is_installed():
    kind = neighbour_list.NeighborList
    assert (kind.__name__, kind.__module__) == ("NeighborList", VesinNeighborList.__module__)


def test_to_whoever_else_imports_vesin_it_knows_torch(torch):
    code = (
        "import aiida_eipnn.science.neighbour_list\n"
        "import torch, vesin\n"
        "ones = torch.eye(3, dtype=torch.float64)\n"
        "found = vesin.NeighborList(cutoff=1.1, full_list=True).compute(ones, ones, True, 'd')\n"
        "assert isinstance(found[0], torch.Tensor) and len(found[0])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("seed", range(20))
def test_pairs_vectors_and_distances_are_those_of_vesin_to_the_last_bit(seed):
    rng = np.random.default_rng(seed)
    asked, cutoff = box(rng), rng.uniform(1, 7)

    ours = TreeNeighborList(cutoff=cutoff, full_list=True).compute(**asked, quantities=QUANTITIES)

    theirs = VesinNeighborList(cutoff=cutoff, full_list=True).compute(
        **asked, quantities=QUANTITIES
    )
    for mine, other in zip(ordered(ours), ordered(theirs), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("seed", range(5))
def test_half_a_list_has_each_pair_once(seed):
    rng = np.random.default_rng(seed)
    asked = box(rng)

    (ours,) = TreeNeighborList(cutoff=5.0, full_list=False).compute(**asked, quantities="d")

    (theirs,) = VesinNeighborList(cutoff=5.0, full_list=False).compute(**asked, quantities="d")
    np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))


def test_a_pair_at_the_cutoff_is_out_for_both():
    silicon = bulk("Si", cubic=True)
    asked = {"points": silicon.positions, "box": silicon.cell.array, "periodic": silicon.pbc}
    cutoff = silicon.cell[0, 0]

    found = [
        kind(cutoff=cutoff, full_list=True).compute(**asked, quantities="i")[0]
        for kind in (TreeNeighborList, VesinNeighborList)
    ]

    # 4, 12 and 12 neighbours; the six at one lattice constant are not nearer than that.
    assert [len(first) for first in found] == [28 * 8, 28 * 8]


def test_two_atoms_in_one_place_are_a_pair():
    first, second, distance = TreeNeighborList(cutoff=2.0, full_list=True).compute(
        points=np.zeros((2, 3)), box=5 * np.eye(3), periodic=[True] * 3, quantities="ijd"
    )

    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 1), (1, 0)]
    assert distance.tolist() == [0.0, 0.0]


def test_no_atoms_have_no_pairs():
    found = TreeNeighborList(cutoff=2.0, full_list=True).compute(
        points=np.zeros((0, 3)), box=5 * np.eye(3), periodic=[True] * 3, quantities=QUANTITIES
    )

    assert [array.shape for array in found] == [(0,), (0,), (0, 3), (0,), (0, 3)]
