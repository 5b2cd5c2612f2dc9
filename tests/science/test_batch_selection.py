"""Batches of points, against what their definitions say word by word."""

import numpy as np
import pytest

from aiida_eipnn.science.batch_selection import (
    NOISE,
    farthest_points,
    largest_cluster_points,
    most_informative_points,
    representative_points,
)

METHODS = [
    farthest_points,
    most_informative_points,
    largest_cluster_points,
    representative_points,
]


@pytest.fixture
def points():
    rng = np.random.default_rng(3)
    return rng.normal(size=(40, 4)), rng.normal(size=(6, 4))


def test_farthest_points_begin_with_the_extremes():
    line = np.array([[0.0], [1.0], [2.0], [3.9], [9.0]])

    assert farthest_points(line, 3).tolist() == [0, 4, 3]
    assert farthest_points(line, 2, known=np.array([[8.0]])).tolist() == [0, 3]


def test_most_informative_points_have_the_largest_determinant_step_by_step(points):
    pool, known = points
    noise = NOISE * (pool**2).sum(axis=1).mean()

    def volume(rows):
        taken = np.concatenate([known, pool[rows]])
        return np.linalg.slogdet(taken @ taken.T + noise * np.eye(len(taken)))[1]

    chosen = most_informative_points(pool, 5, known).tolist()

    for step in range(5):
        free = [row for row in range(len(pool)) if row not in chosen[:step]]
        assert chosen[step] == max(free, key=lambda row: volume([*chosen[:step], row]))


def test_clusters_are_those_of_the_definition(points):
    pool, known = points
    chosen = largest_cluster_points(pool, 6, known).tolist()

    for step in range(6):
        centres = np.concatenate([known, pool[chosen[:step]]])
        squared = ((pool[:, None] - centres) ** 2).sum(axis=2)
        owner, distance = squared.argmin(axis=1), squared.min(axis=1)
        sizes = [distance[owner == centre].sum() for centre in range(len(centres))]
        members = np.flatnonzero(owner == int(np.argmax(sizes)))
        assert chosen[step] == members[distance[members].argmax()]


def test_a_lonely_point_far_off_waits_until_the_dense_part_is_covered():
    rng = np.random.default_rng(0)
    crowd = np.concatenate([rng.normal(0, 1, size=(200, 2)), [[12.0, 0.0]]])
    known = np.array([[0.0, 0.0], [11.0, 0.0]])

    assert farthest_points(crowd, 1, known).tolist() != [200]
    assert 200 not in largest_cluster_points(crowd, 20, known)
    assert 200 in farthest_points(crowd, 60, known)


def test_representative_points_lower_the_sum_of_distances_most_step_by_step(points):
    pool, known = points
    everything = np.concatenate([known, pool])
    distance = np.linalg.norm(everything[:, None] - pool, axis=2)
    for first in ([], list(range(len(known)))):
        chosen = representative_points(pool, 5, known if first else None) + len(known)
        for step in range(5):
            before = [*first, *chosen[:step]]
            free = [row for row in range(len(known), len(everything)) if row not in before]
            assert chosen[step] == min(
                free, key=lambda row: distance[[*before, row]].min(axis=0).sum()
            )


def test_representative_points_are_typical_where_farthest_ones_are_not():
    line = np.array([[0.0], [1.0], [2.0], [3.0], [4.0], [40.0], [41.0], [42.0], [90.0]])

    assert representative_points(line, 2).tolist() == [4, 6]
    assert 8 in farthest_points(line, 2)


@pytest.mark.parametrize("method", METHODS[:3])
def test_a_point_that_is_worth_little_waits(method):
    pool, known = np.array([[1.0, 0.0], [0.0, 1.1], [0.9, 0.1]]), np.array([[0.1, 0.1]])

    assert method(pool, 1, known).tolist() == [1]
    assert method(pool, 1, known, np.array([1.0, 0.01, 1.0])).tolist() == [0]


def test_a_representative_point_that_is_dear_waits():
    line = np.array([[0.0], [1.0], [2.0], [9.0]])

    assert representative_points(line, 1).tolist() == [1]
    assert representative_points(line, 1, None, np.array([1.0, 0.1, 1.0, 1.0])).tolist() == [2]


@pytest.mark.parametrize("method", METHODS)
def test_no_point_is_chosen_twice_even_where_all_are_the_same(method):
    assert sorted(method(np.zeros((5, 2)), 5).tolist()) == [0, 1, 2, 3, 4]
    assert sorted(method(np.ones((5, 2)), 5, np.ones((2, 2))).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", METHODS)
def test_more_points_than_there_are_cannot_be_chosen(method):
    with pytest.raises(ValueError, match="cannot pick 5 of 4 points"):
        method(np.zeros((4, 2)), 5)
