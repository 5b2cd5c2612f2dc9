from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.metrics import (
    error_scale,
    errors,
    errors_by_type,
    prediction_errors,
    upper_bounds,
    worst_forces,
)
from aiida_eipnn.science.predictions import Predictions
from aiida_eipnn.science.uncertainty import (
    calibrate,
    calibration_scale,
    coverage,
    ranks,
    spearman,
)


@pytest.fixture
def reference():
    """Three configurations of 1, 2 and 1 atoms; the last has no label."""
    return Labels(
        ids=np.array(["a", "b", "c"]),
        offsets=np.array([0, 1, 3, 4]),
        sources=np.array(["dft"]),
        energy=np.array([[-1.0], [-4.0], [np.nan]]),
        forces=np.zeros((1, 4, 3)),
        stress=np.full((3, 1, 6), np.nan),
        status=np.array([[0], [0], [1]]),
        reasons=np.array(["not run"]),
        origins=np.full(3, ""),
    )


def test_energy_errors_are_per_atom_and_force_errors_per_component(reference):
    forces = np.zeros((4, 3))
    forces[1, 0] = 0.9

    found = errors(reference, np.array([-0.9, -4.6, 7.0]), forces)

    assert found.energy_mae == pytest.approx((0.1 + 0.3) / 2)
    assert found.energy_rmse == pytest.approx(np.sqrt((0.01 + 0.09) / 2))
    assert found.forces_mae == pytest.approx(0.1)
    assert found.forces_rmse == pytest.approx(0.3)
    assert (found.n_configurations, found.n_components) == (2, 9)


def test_a_configuration_without_a_prediction_is_left_out(reference):
    forces = np.zeros((4, 3))
    forces[0, 2] = np.nan

    assert errors(reference, np.array([-1.0, -4.0, 0.0]), forces).n_configurations == 1


def test_errors_are_told_apart_by_type(reference):
    found = errors_by_type(
        reference,
        np.array([-1.1, -4.0, 0.0]),
        np.zeros((4, 3)),
        np.array(["md", "dimer", "surface"]),
    )

    assert sorted(found) == ["dimer", "md"]
    assert found["md"].energy_mae == pytest.approx(0.1)
    assert found["dimer"].energy_mae == 0


def test_predictions_are_matched_by_id(reference):
    predictions = Predictions(
        ids=np.array(["c", "b", "other", "a"]),
        offsets=np.array([0, 1, 3, 4, 5]),
        energy=np.array([0.0, -4.0, 99.0, -1.0]),
        forces=np.array([[9.0] * 3, [0.3] * 3, [0.3] * 3, [99.0] * 3, [0.0] * 3]),
        stress=np.zeros((4, 6)),
        energy_std=np.zeros(4),
        forces_std=np.zeros(5),
        features=np.zeros((4, 1)),
    )

    found = prediction_errors(reference, predictions)

    assert found.energy_mae == 0
    assert found.forces_mae == pytest.approx(0.2)


def test_upper_bounds_are_above_the_true_mean_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    n, true, above = 40, 0.3, []
    for _ in range(300):
        sizes = rng.exponential(true, n)
        frames = [Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]])] * n
        labels = replace(
            Labels.missing(Configurations.from_atoms(frames), ["dft"]),
            ids=np.array([str(row) for row in range(n)]),
            energy=np.zeros((n, 1)),
            forces=np.zeros((1, 2 * n, 3)),
            status=np.zeros((n, 1), dtype=np.int64),
        )
        off = np.repeat(sizes, 2)[:, None] * np.ones(3)
        predicted = Predictions(
            ids=labels.ids,
            offsets=labels.offsets,
            energy=2 * sizes,
            forces=off,
            stress=np.zeros((n, 6)),
            energy_std=np.zeros(n),
            forces_std=np.zeros(2 * n),
            features=np.zeros((n, 1)),
        )
        bounds = upper_bounds(labels, predicted)
        assert bounds.energy_mae == pytest.approx(bounds.forces_mae)
        above.append(bounds.forces_mae > true)
    assert 0.89 < np.mean(above) < 0.98


def test_nothing_to_compare_is_an_error(reference):
    nothing = replace(reference, status=np.ones((3, 1), dtype=int))

    with pytest.raises(ValueError, match="nothing to compare: none of the 3"):
        errors(nothing, np.zeros(3), np.zeros((4, 3)))


def test_shapes_that_do_not_fit_are_refused(reference):
    with pytest.raises(ValueError, match="do not fit"):
        errors(reference, np.zeros(2), np.zeros((4, 3)))


def test_spearman_sees_order_only():
    x = np.array([0.1, 0.2, 0.5, 3.0])

    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)


def test_ties_share_their_rank():
    assert ranks(np.array([5.0, 1.0, 5.0, 9.0])).tolist() == [1.5, 0, 1.5, 3]
    # By hand: ranks (0, 1.5, 1.5, 3) and (0, 1, 2, 3).
    found = spearman(np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert found == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_a_constant_uncertainty_has_no_rank_correlation():
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))


def test_the_scale_of_an_uncertainty_that_is_three_times_too_small_is_three():
    rng = np.random.default_rng(0)
    true = rng.uniform(0.1, 1.0, size=20000)
    error = rng.normal(size=20000) * true

    found = calibrate(true / 3, error)

    assert found.scale == pytest.approx(3, rel=0.02)
    assert found.coverage == pytest.approx(0.683, abs=0.01)
    assert found.spearman > 0.4
    assert coverage(true / 3, error, n_sigma=6) == pytest.approx(0.954, abs=0.01)


def test_a_committee_without_disagreement_cannot_be_calibrated():
    with pytest.raises(ValueError, match="all 4 uncertainties are zero"):
        calibration_scale(np.zeros(4), np.ones(4))


def test_pairs_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="must be finite"):
        spearman(np.array([1.0, np.nan]), np.ones(2))


def spread_and_error(spread, error):
    """Return labels of single atoms, and predictions of such spreads and errors."""
    configurations = Configurations.from_atoms(
        [Atoms("Si", cell=[5, 5, 5 + 0.1 * number], pbc=True) for number in range(len(spread))]
    )
    missing = Labels.missing(configurations, ["dft"])
    labels = replace(
        missing,
        energy=np.zeros_like(missing.energy),
        forces=np.zeros_like(missing.forces),
        status=np.zeros_like(missing.status),
        reasons=np.array([], dtype="<U1"),
    )
    n = len(spread)
    said = Predictions(
        ids=labels.ids[::-1],
        offsets=labels.offsets,
        energy=np.zeros(n),
        forces=np.array(error)[::-1, None] * [0.6, 0.0, 0.8],
        stress=np.zeros((n, 6)),
        energy_std=np.zeros(n),
        forces_std=np.array(spread, dtype=float)[::-1],
        features=np.zeros((n, 1)),
    )
    return labels, said


def test_the_error_to_expect_is_that_of_most_configurations():
    spread = [0.1, 0.2, 0.1, 0.3, 0.0, 0.1]
    labels, said = spread_and_error(spread, [0.3, 0.6, 0.3, 0.9, 5.0, 90.0])
    assert worst_forces(labels, said).error == pytest.approx([0.3, 0.6, 0.3, 0.9, 5.0, 90.0])
    assert error_scale(labels, said) == pytest.approx(3.0)
    # Too few say nothing.
    assert error_scale(labels.take(range(5)), said) is None
    assert error_scale(labels.take([]), said) is None
