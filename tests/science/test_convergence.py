import numpy as np
import pytest

from aiida_eipnn.science.convergence import (
    IterationRecord,
    StopCriteria,
    StopReason,
    predicted_gain,
    stop_reason,
)


def after(iteration=1, n_dft_labels=20, n_candidates=100, **facts):
    return [
        IterationRecord(
            iteration=iteration, n_dft_labels=n_dft_labels, n_candidates=n_candidates, **facts
        )
    ]


def test_nothing_stops_before_the_first_iteration():
    assert stop_reason([], StopCriteria()) is None


def test_without_a_reason_the_loop_goes_on():
    criteria = StopCriteria(
        target_forces_mae=0.1, uncertainty_threshold=0.2, dft_budget=50, max_iterations=5
    )

    assert stop_reason(after(forces_mae=0.3, max_uncertainty=1.0), criteria) is None


def test_both_targets_must_be_reached():
    criteria = StopCriteria(target_forces_mae=0.1, target_energy_mae=0.01)

    assert stop_reason(after(forces_mae=0.05, energy_mae=0.02), criteria) is None
    stop = stop_reason(after(forces_mae=0.05, energy_mae=0.01), criteria)
    assert stop.reason is StopReason.CONVERGED
    assert "forces MAE 0.05 <= 0.1 eV/Å" in stop.text


def test_an_error_that_may_be_luck_is_no_convergence():
    criteria = StopCriteria(target_forces_mae=0.1)

    assert stop_reason(after(forces_mae=0.09, forces_mae_high=0.11), criteria) is None
    stop = stop_reason(after(forces_mae=0.08, forces_mae_high=0.1), criteria)
    assert stop.reason == "converged"
    assert "forces MAE 0.08 (with 95 % confidence below 0.1) <= 0.1 eV/Å" in stop.text


def test_an_uncertainty_is_taken_for_the_error_that_it_stands_for():
    criteria = StopCriteria(uncertainty_threshold=0.2)

    assert stop_reason(after(max_uncertainty=0.15, uncertainty_scale=2.0), criteria) is None
    stop = stop_reason(after(max_uncertainty=0.3, uncertainty_scale=0.5), criteria)
    assert stop.reason == "certain"
    assert "at most 0.15 eV/Å" in stop.text


def curve(exponent, noise=0.0, n=(20, 40, 60, 80)):
    rng = np.random.default_rng(0)
    return [
        after(
            iteration=number + 1,
            # Ten of them are for the test.
            n_dft_labels=size + 10,
            n_training_labels=size,
            forces_mae=0.3 * size**-exponent * float(np.exp(noise * rng.normal())),
        )[0]
        for number, size in enumerate(n)
    ]


def test_the_learning_curve_says_what_more_points_would_bring():
    # From 80 to 100 points.
    assert predicted_gain(curve(0.5)) == pytest.approx(1 - 0.8**0.5)
    assert predicted_gain(curve(-0.1)) < 0
    assert predicted_gain(curve(0.5, noise=0.05)) == pytest.approx(1 - 0.8**0.5, abs=0.04)


def test_points_that_bring_nothing_stop_the_loop():
    criteria = StopCriteria(min_gain=0.05)

    assert stop_reason(curve(0.5), criteria) is None
    stop = stop_reason(curve(0.1), criteria)
    assert stop.reason is StopReason.NO_GAIN
    assert "20 more DFT points would lower the error of the forces by 2.2 % only" in stop.text
    # Two points are no curve, and nobody asked.
    assert stop_reason(curve(0.1)[:2], criteria) is None
    assert stop_reason(curve(0.1), StopCriteria()) is None


@pytest.mark.parametrize("value", [None, float("nan")])
def test_without_all_errors_there_is_no_curve(value):
    history = [*curve(0.1), *after(iteration=5, n_training_labels=100, forces_mae=value)]
    assert predicted_gain(history) is None
    stuck = [*curve(0.1), *after(iteration=5, n_training_labels=80, forces_mae=0.1)]
    assert predicted_gain(stuck) is None
    unknown = [*curve(0.1), *after(iteration=5, forces_mae=0.1)]
    assert predicted_gain(unknown) is None


@pytest.mark.parametrize("value", [None, float("nan")])
def test_an_unknown_error_is_no_convergence(value):
    assert stop_reason(after(forces_mae=value), StopCriteria(target_forces_mae=0.1)) is None


def test_certainty_stops_only_where_there_are_candidates():
    criteria = StopCriteria(uncertainty_threshold=0.2)

    sure = after(max_uncertainty=0.2, uncertainty_scale=1.0)
    assert stop_reason(sure, criteria).reason == "certain"
    assert stop_reason(after(n_candidates=0), criteria).reason == "no_candidates"


def test_one_network_that_is_sure_of_everything_is_no_certainty():
    single = after(max_uncertainty=0.0, uncertainty_scale=None)

    assert stop_reason(single, StopCriteria(uncertainty_threshold=0.2)) is None


def test_candidates_outside_the_window_are_told_from_none_at_all():
    assert stop_reason(after(n_candidates=0), StopCriteria()).text.endswith("left in the pool")
    outside = stop_reason(after(n_candidates=0, n_outside=7), StopCriteria())
    assert "7 are outside the window" in outside.text


def test_a_loop_must_end():
    with pytest.raises(ValueError, match="max_iterations is null; give a number"):
        StopCriteria(max_iterations=None)


def test_a_spent_budget_stops():
    stop = stop_reason(after(n_dft_labels=50), StopCriteria(dft_budget=50))

    assert stop.reason is StopReason.BUDGET
    assert "50 of 50" in stop.text


def test_the_last_iteration_stops():
    assert stop_reason(after(iteration=2), StopCriteria(max_iterations=3)) is None
    assert stop_reason(after(iteration=3), StopCriteria(max_iterations=3)).reason == (
        "max_iterations"
    )


def test_a_goal_that_was_reached_counts_before_what_ran_out():
    criteria = StopCriteria(target_forces_mae=0.1, dft_budget=20, max_iterations=1)

    assert stop_reason(after(forces_mae=0.1, n_candidates=0), criteria).reason == "converged"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"target_force_mae": 0.1}, "no setting .*only .*target_forces_mae"),
        ({"dft_budget": 0}, "dft_budget is 0; it must be above zero"),
        ({"target_forces_mae": float("nan")}, "must be above zero"),
        ({"max_iterations": "ten"}, "wrong type"),
    ],
)
def test_wrong_criteria_say_what_is_allowed(content, words):
    with pytest.raises(ValueError, match=words):
        StopCriteria.from_dict(content)
