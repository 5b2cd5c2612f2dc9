"""Strangeness by features, against the linear models that it stands for."""

import numpy as np
import pytest

from aiida_eipnn.science.feature_uncertainty import (
    RIDGE,
    last_layer_uncertainty,
    mahalanobis_distance,
)


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    return rng.normal(size=(50, 4)), rng.normal(size=(12, 4))


def test_the_last_layer_is_the_spread_of_linear_fits_to_noisy_labels(features):
    pool, known = features
    rng = np.random.default_rng(1)
    ridge = RIDGE * (known**2).sum(axis=1).mean()
    # Drawing labels and weights from their priors and fitting gives the posterior's spread.
    inverse = np.linalg.inv(known.T @ known + ridge * np.eye(4))
    fits = [
        inverse @ (known.T @ rng.normal(size=12) + np.sqrt(ridge) * rng.normal(size=4))
        for _ in range(20_000)
    ]
    spread = (pool @ np.array(fits).T).std(axis=1)

    np.testing.assert_allclose(last_layer_uncertainty(pool, known), spread, rtol=0.03)


def test_a_label_makes_its_configuration_less_strange_and_others_not_more(features):
    pool, known = features
    pool[0] *= 30.0
    before = last_layer_uncertainty(pool, known)
    after = last_layer_uncertainty(pool, np.concatenate([known, pool[:1]]))

    assert after[0] < 0.5 * before[0]
    # But for the ridge, which grows with what is labelled.
    assert (after[1:] < 1.001 * before[1:]).all()


def test_distances_grow_from_the_centre_faster_where_labels_are_narrow():
    rng = np.random.default_rng(2)
    known = rng.normal(size=(500, 2)) * [1.0, 0.1] + [3.0, 0.0]
    at_centre, along, across = mahalanobis_distance(
        np.array([[3.0, 0.0], [4.0, 0.0], [3.0, 1.0]]), known
    )

    assert at_centre < 0.1
    assert along == pytest.approx(1.0, abs=0.1)
    assert across > 3 * along


def test_fewer_labels_than_features_are_enough():
    rng = np.random.default_rng(3)
    known = rng.normal(size=(3, 20))
    for measure in (last_layer_uncertainty, mahalanobis_distance):
        found = measure(rng.normal(size=(5, 20)), known)
        assert np.isfinite(found).all()
        assert (found > measure(known, known).max()).all()
