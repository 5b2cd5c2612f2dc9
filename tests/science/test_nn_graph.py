"""Neighbours of a set, and batches cut from them."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111
from ase.neighborlist import neighbor_list

from aiida_eipnn.science.configurations import Configurations

torch = pytest.importorskip("torch")

from aiida_eipnn.science.nn import graph as graphs  # noqa: E402
from aiida_eipnn.science.nn.graph import GraphTable, find_neighbours  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch")

CUTOFF = 3.0


@pytest.fixture(scope="module")
def mixed():
    """Return crystals, a slab, a molecule and a lone atom, of different sizes."""
    rng = np.random.default_rng(0)
    frames = [
        bulk("Si", "diamond", a=5.43),
        bulk("SiC", "zincblende", a=4.36, cubic=True),
        fcc111("Si", (2, 1, 2), a=5.4, vacuum=4.0),
        Atoms("Si", pbc=False),
        Atoms("SiCSi", [[0, 0, 0], [0, 0, 1.8], [0, 1.9, 0]], pbc=False),
    ]
    for atoms in frames:
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
    return Configurations.from_atoms(frames)


def pairs_of(graph):
    """Return every pair as configuration, elements and rounded vector, sorted."""
    found = []
    for atom, place in torch.nonzero(graph.vectors.any(dim=-1)).tolist():
        partner = int(graph.partners[atom, place])
        assert graph.owner[atom] == graph.owner[partner]
        key = int(graph.owner[atom]), int(graph.species[atom]), int(graph.species[partner])
        found.append((*key, *np.round(graph.vectors[atom, place].numpy(), 6)))
    return sorted(found)


def test_a_batch_has_the_pairs_that_ase_finds(mixed):
    rows = np.array([4, 1, 3, 2, 1, 0])
    batch = GraphTable(find_neighbours(mixed, (6, 14), CUTOFF)).batch(rows)
    expected = []
    for owner, row in enumerate(rows):
        atoms = mixed.atoms(row)
        species = (atoms.numbers == 14).astype(int)
        for i, j, vector in zip(*neighbor_list("ijD", atoms, CUTOFF), strict=True):
            key = owner, int(species[i]), int(species[j])
            expected.append((*key, *np.round(vector, 6)))
    assert pairs_of(batch) == sorted(expected)
    assert batch.n_atoms.tolist() == mixed.n_atoms[rows].tolist()
    periodic = mixed.pbc.all(axis=1)[rows]
    assert torch.isfinite(batch.volumes).tolist() == periodic.tolist()
    assert (batch.partners[batch.vectors.any(dim=-1).logical_not()] == 0).all()


def test_lone_atoms_have_empty_places_only(mixed):
    lone = mixed.take([3, 3])
    batch = GraphTable(find_neighbours(lone, (14,), CUTOFF)).batch(np.array([0, 1]))
    assert batch.vectors.shape == (2, 1, 3)
    assert not batch.vectors.any()


def test_several_threads_find_what_one_finds(mixed, monkeypatch):
    many = mixed.take(np.tile(np.arange(len(mixed)), 7))
    one = find_neighbours(many, (6, 14), CUTOFF)
    monkeypatch.setattr(graphs, "_MIN_FOR_A_THREAD", 4)
    torch.set_num_threads(3)
    several = find_neighbours(many, (6, 14), CUTOFF)
    for name in ("pair_offsets", "partners", "vectors"):
        np.testing.assert_array_equal(getattr(several, name), getattr(one, name))


def test_an_error_in_a_thread_is_told(mixed, monkeypatch):
    double = Configurations.from_atoms([Atoms("Si2", [[0, 0, 0], [0, 0, 0]])])
    monkeypatch.setattr(graphs, "_MIN_FOR_A_THREAD", 1)
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="two atoms in the same place"):
        find_neighbours(double.take([0, 0, 0]), (14,), CUTOFF)
