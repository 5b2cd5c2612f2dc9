"""The panel of uncertainties, on errors that were planted."""

import math

import numpy as np
import pytest

from aiida_eipnn.science.uncertainty import (
    conformal_factor,
    judge_conformal,
    judge_uncertainties,
    normal_quantile,
    uncertainty_curves,
)


@pytest.fixture
def honest():
    rng = np.random.default_rng(0)
    sigma = rng.uniform(0.1, 1.0, 20_000)
    return sigma, sigma * rng.normal(size=len(sigma))


def test_honest_uncertainties_are_calibrated(honest):
    panel = judge_uncertainties(*honest)

    assert panel.miscalibration_area < 0.01
    assert panel.ence < 0.05
    assert panel.coverage == pytest.approx({"0.68": 0.68, "0.9": 0.9, "0.95": 0.95}, abs=0.01)
    assert 0.3 < panel.rejection < 1
    assert panel.spearman > 0.4


def test_no_other_scale_is_likelier_than_the_honest_one(honest):
    sigma, error = honest
    nll = {
        factor: judge_uncertainties(factor * sigma, error).nll for factor in (0.5, 0.9, 1, 1.1, 2)
    }

    assert min(nll, key=nll.get) == 1


@pytest.mark.parametrize(("factor", "ence"), [(0.5, 1.0), (2.0, 0.5)])
def test_a_wrong_scale_shows(honest, factor, ence):
    sigma, error = honest
    panel = judge_uncertainties(factor * sigma, error)

    assert panel.ence == pytest.approx(ence, abs=0.05)
    assert panel.miscalibration_area > 0.1
    assert panel.coverage["0.68"] == pytest.approx(
        math.erf(factor * normal_quantile(0.68) / math.sqrt(2)), abs=0.02
    )


def test_rejection_is_one_where_the_order_is_right_and_nothing_by_chance(honest):
    _, error = honest
    rng = np.random.default_rng(1)

    assert judge_uncertainties(np.abs(error) ** 3 + 1e-9, error).rejection == pytest.approx(1)
    assert judge_uncertainties(rng.uniform(1, 2, len(error)), error).rejection == pytest.approx(
        0, abs=0.03
    )
    assert judge_uncertainties(1 / (np.abs(error) + 1e-3), error).rejection < -0.5


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="1 of 2 uncertainties are not above 0"):
        judge_uncertainties(np.array([0.0, 1.0]), np.ones(2))


def test_conformal_intervals_hold_for_errors_that_are_not_normal():
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(400):
        # Far tails, and a scale that is off.
        sigma = rng.uniform(0.1, 1.0, 80)
        error = 7 * sigma * rng.standard_t(2, 80)
        factor = conformal_factor(sigma[:40], error[:40], 0.9)
        inside.append(np.mean(np.abs(error[40:]) <= factor * sigma[40:]))
    # At least 0.9, and at most 1 / 41 more.
    assert 0.89 < np.mean(inside) < 0.935


def test_a_conformal_factor_is_an_order_statistic():
    error = np.array([4.0, -1.0, 3.0, -2.0])
    assert conformal_factor(np.ones(4), error, 0.5) == 3.0
    assert conformal_factor(np.full(4, 2.0), error, 0.8) == 2.0
    # Nine pairs would be needed for a tenth of them to be outside.
    assert conformal_factor(np.ones(4), error, 0.9) == math.inf


def test_conformal_intervals_are_judged_on_other_configurations():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(100), 20)
    # All atoms of a configuration err alike.
    error = np.repeat(rng.standard_t(3, 100), 20)
    judged = judge_conformal(np.ones(2000), error, groups)
    assert judged.n == 2000
    assert 0.8 < judged.coverage < 0.97
    assert judged.factor == pytest.approx(np.quantile(np.abs(error), 0.9), rel=0.15)
    assert judge_conformal(np.ones(20), error[:20], groups[:20]) is None
    assert judge_conformal(np.ones(8), rng.normal(size=8), np.arange(8)) is None


@pytest.mark.parametrize(("sigma", "level"), [([1.0, 0.0], 0.5), ([1.0, 1.0], 1.0)])
def test_conformal_intervals_of_nothing_are_refused(sigma, level):
    with pytest.raises(ValueError, match=r"not above 0|between 0 and 1"):
        conformal_factor(np.array(sigma), np.ones(2), level)


def test_curves_of_honest_uncertainties_lie_on_the_diagonals(honest):
    sigma, error = honest
    curves = uncertainty_curves(sigma, error)

    np.testing.assert_allclose(curves.observed, curves.expected, atol=0.02)
    np.testing.assert_allclose(curves.bin_error, curves.bin_sigma, rtol=0.1)
    assert (
        curves.kept_error[0] == curves.least_error[0] == pytest.approx(np.abs(error).mean(), 1e-4)
    )
    assert np.all(np.array(curves.least_error[1:]) < curves.kept_error[1:])
    assert curves.kept_error[-1] < 0.5 * curves.kept_error[0]
    half = np.abs(error)[np.argsort(sigma)[: len(error) // 2]].mean()
    assert curves.kept_error[curves.kept.index(0.5)] == pytest.approx(half, 1e-4)
