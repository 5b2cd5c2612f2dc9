import pytest

from aiida_eipnn.science.convergence import (
    IterationRecord,
    StopCriteria,
    StopReason,
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


@pytest.mark.parametrize("value", [None, float("nan")])
def test_an_unknown_error_is_no_convergence(value):
    assert stop_reason(after(forces_mae=value), StopCriteria(target_forces_mae=0.1)) is None


def test_certainty_stops_only_where_there_are_candidates():
    criteria = StopCriteria(uncertainty_threshold=0.2)

    assert stop_reason(after(max_uncertainty=0.2), criteria).reason == "certain"
    assert stop_reason(after(n_candidates=0), criteria).reason == "no_candidates"


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
