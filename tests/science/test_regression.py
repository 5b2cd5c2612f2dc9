"""Errors on parts that were not seen, without repeating a fit."""

import numpy as np
import pytest

from aiida_eipnn.science.regression import (
    fit_kernels,
    fit_linear,
    gaussian_kernels,
    learn_linear,
    linear_kernel,
    regress_on_kernels,
)

PARTS = np.arange(30) % 5


@pytest.fixture
def points():
    rng = np.random.default_rng(0)
    return rng.normal(size=(30, 4)), rng.normal(size=(30,)), rng.normal(size=(7, 4))


def test_held_out_errors_of_a_kernel_are_those_of_fits_without_the_part(points):
    train, values, test = points
    kernel = gaussian_kernels(train, test, [1.0])[0]

    fit = fit_kernels([kernel], values, PARTS, [0.1])

    for part in range(5):
        rest, own = np.flatnonzero(part != PARTS), np.flatnonzero(part == PARTS)
        matrix = kernel.train[np.ix_(rest, rest)] + 0.1 * np.eye(len(rest))
        predicted = kernel.train[np.ix_(own, rest)] @ np.linalg.solve(matrix, values[rest])
        np.testing.assert_allclose(fit.held_out[own], np.abs(values[own] - predicted))


def test_the_kernel_that_fits_is_chosen(points):
    train, _, test = points
    kernels = [
        *gaussian_kernels(train, test, [0.01]),
        linear_kernel(train, test),
    ]

    fit = fit_kernels(kernels, train @ [1.0, 2.0, 0.0, -1.0], PARTS, [1e-6])

    np.testing.assert_allclose(fit.predicted, test @ [1.0, 2.0, 0.0, -1.0], atol=1e-4)


def test_a_column_that_never_varies_does_not_count(points):
    train, _, test = points
    with_constant = np.column_stack([train, np.full(30, 7.0)])
    test_with = np.column_stack([test, np.full(7, 8.0)])

    kernel = gaussian_kernels(with_constant, test_with, [1.0])[0]

    np.testing.assert_allclose(kernel.test, gaussian_kernels(train, test, [1.0])[0].test)


def test_planted_weights_are_found_and_a_few_absurd_values_ignored(points):
    train, _, test = points
    values = train @ [1.0, 2.0, 0.0, -1.0]
    values[[3, 17]] += 100.0

    fit = fit_linear(train, values, PARTS, test, [1e-6])

    np.testing.assert_allclose(fit.predicted, test @ [1.0, 2.0, 0.0, -1.0], atol=1e-2)
    assert np.median(fit.held_out) < 1e-2


def test_noise_is_given_no_weight(points):
    train, values, test = points

    fit = fit_linear(train, values, PARTS, test, [1e-5, 1e6])

    assert np.abs(fit.predicted).max() < 1e-3
    np.testing.assert_allclose(fit.held_out, np.abs(values), rtol=1e-3)


def test_nothing_but_zeros_predicts_zero():
    fit = fit_linear(np.zeros((5, 2)), np.ones(5), np.arange(5), np.ones((3, 2)), [0.1])

    assert fit.predicted.tolist() == [0, 0, 0]


def test_a_column_hardly_seen_in_training_does_not_run_away():
    rng = np.random.default_rng(0)
    train = np.column_stack([rng.normal(size=30), 1e-7 * rng.normal(size=30)])
    values = train[:, 0] + 0.1 * rng.normal(size=30)

    fit = fit_linear(train, values, PARTS, np.array([[1.0, 0.01], [0.0, -0.01]]), [1e-5])

    np.testing.assert_allclose(fit.predicted, [1, 0], atol=0.1)


def test_no_prediction_goes_beyond_twice_what_was_learnt(points):
    train, _, _ = points

    fit = fit_linear(train, train[:, 0], PARTS, 1000 * train, [1e-5])

    assert np.abs(fit.predicted).max() <= 2 * np.abs(train[:, 0]).max()


def test_quantities_that_share_a_kernel_are_learnt_as_if_alone(points):
    train, values, test = points
    kernel = gaussian_kernels(train, test, [1.0])
    both = np.column_stack([values, train[:, 0]])

    together = regress_on_kernels(kernel, both, PARTS, [0.1])

    for column in range(2):
        alone = regress_on_kernels(kernel, both[:, column], PARTS, [0.1])
        np.testing.assert_allclose(together.predicted[:, column], alone.predicted)
        np.testing.assert_allclose(together.residual[:, column], alone.residual)


def test_residuals_have_the_sign_of_what_is_above_the_prediction(points):
    train, _, test = points
    kernel = gaussian_kernels(train, test, [0.01])

    found = regress_on_kernels(kernel, np.where(PARTS == 0, 1.0, -1.0), PARTS, [1.0])

    assert (found.residual[PARTS == 0] > 0).all()
    assert (found.residual[PARTS != 0] < 0).all()


def test_a_linear_function_says_no_more_than_twice_what_it_learnt(points):
    train, _, _ = points
    values = train @ [1.0, 2.0, 0.0, -1.0]

    found = learn_linear(train, values, PARTS, [1e-6])

    assert found.predict(np.full((1, 4), 1e3))[0] == pytest.approx(2 * np.abs(values).max())
