"""The history of a loop, read from the graph."""

import numpy as np
import pytest
from aiida.orm import Dict

from aiida_eipnn.reports.history import read_history, stage_text
from aiida_eipnn.reports.points import PointState


def test_a_finished_loop_gives_its_errors_iteration_by_iteration(make_loop):
    history = read_history(make_loop().node)
    assert history.is_ok
    assert history.stage == "finished"
    assert [item.number for item in history.iterations] == [1, 2]
    assert [item.n_training_labels for item in history.assessed] == [3, 5]
    first, last = history.iterations
    assert last.committee.forces_mae < first.committee.forces_mae
    assert last.committee.forces_mae < last.scratch.forces_mae
    assert last.best_eip_name.startswith("SW_")
    assert last.of_forces.calibration.n == 6  # atoms of the three test configurations
    assert last.of_forces.panel.n == 18
    assert set(last.of_forces.panel.coverage) == {"0.68", "0.9", "0.95"}
    assert sum(last.choices.values()) == history.n_pool == 24


def test_the_reason_to_stop_is_that_of_the_loop(make_loop):
    history = read_history(make_loop().node)
    assert history.stop_reason == "max_iterations"
    assert history.stop_text == "iteration 2 of 2 is done"


def test_an_iteration_says_what_it_asked_for_and_how_uncertain_that_was(make_loop):
    loop = make_loop()
    first, last = read_history(loop.node).iterations
    assert first.asked.n == 2
    assert sum(first.asked.config_types.values()) == 2
    assert first.asked.strategy == "diverse"
    assert np.all(np.array(first.asked.uncertainties) > 0)
    assert last.asked is None


def test_points_are_counted_by_batch_and_a_failed_one_has_its_reason(make_loop):
    history = read_history(make_loop().node)
    assert history.batches == ("test", "initial", "i001")
    assert history.count(PointState.DONE) == 8
    assert history.count(PointState.DONE, "initial") == 3
    (failure,) = history.failures
    assert "did not converge" in failure.reason
    assert failure.energy is None
    # It left no parameters, but it ran.
    assert failure.n_runs == 1
    assert failure.pw_pk is not None


def test_dft_cost_is_wall_time_and_cores_times_wall_time(make_loop):
    history = read_history(make_loop().node)
    done = [point for point in history.points if point.state is PointState.DONE]
    assert {point.wall_seconds for point in done} == {30.0}
    assert {point.cpu_seconds for point in done} == {120.0}


def test_results_from_the_cache_cost_nothing(make_loop):
    from aiida.orm import load_node

    loop = make_loop()
    calculation = load_node(read_history(loop.node).points[0].pw_uuid)
    calculation.base.extras.set("_aiida_cached_from", "another")
    try:
        point = read_history(loop.node).points[0]
    finally:
        calculation.base.extras.delete("_aiida_cached_from")
    assert point.cached
    assert (point.wall_seconds, point.cpu_seconds) == (0.0, 0.0)


def test_a_running_loop_says_its_stage_and_how_many_points_wait(make_loop):
    history = read_history(make_loop("waiting", n_iterations=1).node)
    assert not history.is_over
    assert history.stage == "labelling the points of iteration 1 with DFT"
    assert history.count(PointState.WAITING, "i001") == 1
    assert history.count(PointState.RUNNING, "i001") == 1
    assert len(history.assessed) == 1
    assert history.stop_text is None


def test_a_broken_loop_keeps_what_was_made_before(make_loop):
    history = read_history(make_loop("broken", n_iterations=0).node)
    assert history.is_over
    assert not history.is_ok
    assert history.stage.startswith("failed (403): The loop broke while labelling")
    assert history.count(PointState.DONE) == 3
    assert history.assessed == ()


def test_a_loop_that_did_not_start_has_nothing_but_its_inputs(make_loop):
    history = read_history(make_loop("created").node)
    assert history.stage == "waiting to start"
    assert history.n_pool is None
    assert history.points == ()
    assert len(history.eips) == 2


def test_what_is_no_loop_is_refused_with_the_way_to_find_one(make_loop):
    loop = make_loop()
    with pytest.raises(ValueError, match=r"is a Dict, not a loop.*verdi process list"):
        read_history(Dict({}).store())
    with pytest.raises(ValueError, match="is a ConfigurationsData, not a loop"):
        read_history(loop.pool)


def test_every_stage_has_words_for_people():
    assert stage_text("pretrain") == "pre-training"
    assert stage_text("dft_initial") == "labelling the first points with DFT"
    assert stage_text("dft_i012") == "labelling the points of iteration 12 with DFT"
