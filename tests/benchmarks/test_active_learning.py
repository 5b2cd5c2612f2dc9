"""The active-learning benchmark: every arm on a small set, and what is made of its rows."""

import numpy as np
import pytest

from aiida_eipnn.science.predictions import Predictions


@pytest.fixture
def benchmark(injection, monkeypatch):
    """The benchmark on the small set, with trainings of a few steps."""
    import active_learning

    active_learning.setting_of.cache_clear()
    monkeypatch.setattr(active_learning, "load_dataset", injection.load_dataset)
    monkeypatch.setattr(active_learning, "MEMBERS", 2)
    monkeypatch.setattr(active_learning, "STEPS", {"mvl_W": {4: 10, 8: 10}})
    monkeypatch.setattr(active_learning, "FIXED_TARGETS", {"mvl_W": 10.0})
    yield active_learning
    active_learning.setting_of.cache_clear()


def test_every_arm_asks_for_points_and_learns_them(benchmark):
    for arm in benchmark.ARMS:
        rows = benchmark.run_task(benchmark.Task("mvl_W", arm, 0), {"mvl_W": (4, 8)})
        assert [row["n"] for row in rows] == [4, 8]
        assert all(row["force_mae_mev"] > 0 for row in rows)
        assert rows[1]["worst_type_force_mae_mev"] == pytest.approx(
            rows[1]["force_mae_mev"], rel=1e-3
        )
        assert 0 <= rows[1]["coverage_90"] <= 1


def test_arms_of_a_seed_start_from_the_same_points(benchmark):
    setting = benchmark.setting_of("mvl_W")
    first = [
        benchmark.start_rows(setting, benchmark.ARMS[arm], 4, np.random.default_rng(0)).tolist()
        for arm in ("random", "window_lcmd", "full")
    ]
    assert first[0] == first[1]
    assert first[0] != first[2]
    assert len(set(first[2])) == 4


def test_labels_are_those_of_the_rows(benchmark):
    setting = benchmark.setting_of("mvl_W")
    rows = np.array([7, 2, 11])
    problem = setting.problem(rows)
    assert problem.dft.ids.tolist() == setting.everything.pool.ids[rows].tolist()


def test_windows_come_from_the_last_batch(benchmark):
    # The error is four times the spread.
    setting = benchmark.setting_of("mvl_W")
    labels = setting.problem(np.arange(6)).dft
    spread = np.repeat(np.linspace(0.1, 0.2, 6), labels.n_atoms)
    said = Predictions(
        ids=labels.ids,
        offsets=labels.offsets,
        energy=np.zeros(6),
        forces=labels.forces[0] + 4 * spread[:, None] * [1.0, 0.0, 0.0],
        stress=np.zeros((6, 6)),
        energy_std=np.zeros(6),
        forces_std=spread,
        features=np.zeros((6, 1)),
    )
    batch = benchmark.Batch(labels, said)
    arms = benchmark.ARMS
    assert benchmark.window_of(arms["window_lcmd"], batch) == (0.0, pytest.approx(5.0 / 4))
    assert benchmark.window_of(arms["trains_pot_rule"], batch) == (pytest.approx(0.025), np.inf)
    assert benchmark.window_of(arms["dpgen_rule"], None) == benchmark.FIXED_WINDOW
    assert benchmark.window_of(arms["random"], batch) == (0.0, np.inf)
    assert benchmark.window_of(arms["window_lcmd"], None) == (0.0, np.inf)


def test_savings_are_points_at_equal_error(benchmark):
    def rows(arm, factor, seeds=(0, 1)):
        return [
            {
                "dataset": "mvl_W",
                "arm": arm,
                "seed": seed,
                "n": n,
                "force_mae_mev": factor * (1 + 0.1 * seed) * 100 / n,
            }
            for seed in seeds
            for n in (5, 10, 20)
        ]

    for found in benchmark.savings([*rows("random", 1.0), *rows("full", 0.5)]):
        # Half the error at each number of points: half the points.
        assert found["saving"] == pytest.approx(0.5, abs=1e-3)
        assert found["low"] <= found["saving"] <= found["high"]
    worse, at_fixed = benchmark.savings([*rows("random", 1.0), *rows("fps", 100.0)])
    assert worse["saving"] < -1
    assert worse["target_force_mae_mev"] == pytest.approx(1.2 * 5.25)
    assert at_fixed["target_force_mae_mev"] == 10.0
    one = benchmark.savings([*rows("random", 1.0, (0,)), *rows("full", 0.5, (0,))])
    assert [item["low"] for item in one] == [item["high"] for item in one] == [None, None]
    # A run that is not complete does not count.
    assert benchmark.savings([*rows("random", 1.0), *rows("full", 0.5)[:2]]) == []


def test_the_worst_type_is_compared_at_equal_points(benchmark):
    def rows(arm, errors):
        return [
            {
                "dataset": "mvl_W",
                "arm": arm,
                "seed": seed,
                "n": n,
                "force_mae_mev": 1.0,
                "worst_type_force_mae_mev": error * (1 + seed),
            }
            for seed in (0, 1)
            for n, error in zip((5, 10), errors, strict=True)
        ]

    made = benchmark.worst_types([*rows("random", (100, 50)), *rows("full", (80, 60))])
    assert [(item["n"], item["lower_by"]) for item in made] == [(5, 0.2), (10, -0.2)]
    assert made[0]["low"] == made[0]["high"] == 0.2
    assert benchmark.worst_types(rows("full", (80, 60))) == []
