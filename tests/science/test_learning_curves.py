"""Learning curves: the points saved must come out as they were planted."""

import numpy as np
import pytest
from ase.build import bulk

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.learning_curves import (
    LearningCurve,
    draw_points,
    estimate_saving,
    find_points_needed,
    find_twins,
)

SIZES = np.array([10, 20, 40, 80])


def curve(mae, n=SIZES, n_seeds=3, n_test=40, noise=0.0, seed=0) -> LearningCurve:
    """Test configurations of 1 to 4 atoms, some harder, whose mean absolute errors are given."""
    weights = 3.0 * (1 + np.arange(n_test) % 4)
    hardness = np.exp(noise * np.random.default_rng(seed).normal(size=n_test))
    hardness /= np.average(hardness, weights=weights)
    errors = np.asarray(mae)[:, None, None] * np.ones((1, n_seeds, 1)) * weights * hardness
    return LearningCurve(n=n, errors=errors, weights=weights)


def power_law(factor, n=SIZES):
    return factor * n**-0.5


def saving_of(one, other, n, seed=0, **options):
    return estimate_saving(one, other, n, np.random.default_rng(seed), **options)


def labelled(energies, strains) -> tuple[Configurations, Labels]:
    frames = []
    for strain in strains:
        atoms = bulk("Si", cubic=True)
        atoms.set_cell(atoms.cell.array * strain, scale_atoms=True)
        frames.append(atoms)
    pool = Configurations.from_atoms(frames)
    arrays = Labels.missing(pool, ["dft"]).arrays()
    arrays |= {"energy": np.array(energies)[:, None], "status": np.zeros((len(pool), 1), int)}
    return pool, Labels.from_arrays(arrays)


def test_draws_of_one_seed_are_nested():
    rows = np.arange(100, 400)

    draws = [draw_points(rows, n, seed=3) for n in (5, 20, 300)]

    assert set(draws[0]) < set(draws[1]) < set(draws[2]) == set(rows)
    assert [len(set(draw)) for draw in draws] == [5, 20, 300]


def test_draws_of_two_seeds_differ():
    rows = np.arange(50)

    assert set(draw_points(rows, 20, seed=0)) != set(draw_points(rows, 20, seed=1))


@pytest.mark.parametrize("n", [0, 51])
def test_more_points_than_there_are_cannot_be_drawn(n):
    with pytest.raises(ValueError, match=f"cannot draw {n} of 50"):
        draw_points(np.arange(50), n, seed=0)


def test_a_test_configuration_with_the_energy_and_volume_of_a_training_one_is_a_twin():
    pool, dft = labelled([-40.0, -41.0, -40.00004, -41.0, -40.0], [1.0, 1.1, 1.0 + 1e-9, 1.2, 1.3])

    twins = find_twins(pool, dft, train=np.array([0, 1]), test=np.array([2, 3, 4]))

    # The second has the energy of one but another volume, the third too.
    assert twins.tolist() == [True, False, False]


def test_the_error_is_weighted_by_what_each_configuration_has():
    found = LearningCurve(
        n=np.array([10]),
        errors=np.array([[[6.0, 0.0, 6.0], [12.0, 9.0, 6.0]]]),
        weights=np.array([3.0, 0.0, 6.0]),
    )

    # Of the first seed 12 over 9 components, of the second 27.
    assert found.mae.tolist() == pytest.approx([(12 / 9 + 27 / 9) / 2])


def test_points_between_two_sizes_are_interpolated_on_logarithms():
    needed = find_points_needed(SIZES, power_law(1.0), 30**-0.5)

    assert needed == pytest.approx(30.0)


def test_a_target_that_the_smallest_training_set_beats_needs_no_more_than_it():
    assert find_points_needed(SIZES, power_law(1.0), 1.0) == 10.0


def test_a_target_that_is_never_reached_needs_infinitely_many_points():
    assert find_points_needed(SIZES, power_law(1.0), 0.01) == np.inf


def test_of_a_curve_that_rises_again_the_first_crossing_counts():
    needed = find_points_needed(SIZES, np.array([4.0, 1.0, 3.0, 0.5]), 2.0)

    assert needed == pytest.approx(np.sqrt(10 * 20))


def test_half_the_error_at_each_size_saves_three_quarters_of_the_points():
    found = saving_of(curve(power_law(1.0)), curve(power_law(2.0)), 80)

    assert found.n_needed == pytest.approx(20.0)
    assert found.saving == pytest.approx(0.75)
    assert found.target == pytest.approx(2.0 * 80**-0.5)
    assert (found.low, found.high) == pytest.approx((0.75, 0.75))
    assert found.bound == ""


def test_a_worse_curve_saves_less_than_nothing():
    found = saving_of(curve(power_law(1.4)), curve(power_law(1.0)), 20)

    assert found.saving == pytest.approx(1 - 1.4**2)


def test_a_saving_is_never_extrapolated():
    better = saving_of(curve(power_law(1.0)), curve(power_law(9.0)), 20)
    worse = saving_of(curve(power_law(9.0)), curve(power_law(1.0)), 20)

    assert (better.saving, better.bound) == (0.5, "at least")
    assert (worse.saving, worse.bound) == (-3.0, "at most")


def test_the_interval_holds_the_planted_saving_and_narrows_with_the_test_set():
    def found(n_test):
        one, other = (
            curve(power_law(factor), n_test=n_test, noise=0.5, seed=seed)
            for seed, factor in ((1, 1.0), (2, 2.0))
        )
        return saving_of(one, other, 80)

    few, many = found(15), found(400)

    assert few.low < 0.75 < few.high
    assert many.low < 0.75 < many.high
    assert few.high - few.low > 2 * (many.high - many.low)


def test_seeds_that_differ_widen_the_interval():
    steady, other = curve(power_law(1.0)), curve(power_law(2.0))
    factors = np.array([0.6, 1.0, 1.4])[None, :, None]
    shaky = LearningCurve(n=steady.n, errors=factors * steady.errors, weights=steady.weights)

    found = saving_of(shaky, other, 80)

    assert found.low < 0.7 < 0.75 < found.high


def test_what_is_hard_for_both_curves_does_not_widen_the_interval():
    one, other = (curve(power_law(factor), noise=1.0) for factor in (1.0, 2.0))

    found = saving_of(one, other, 80)

    assert (found.low, found.high) == pytest.approx((0.75, 0.75))


def test_the_same_seed_gives_the_same_interval():
    one, other = curve(power_law(1.0), noise=0.5), curve(power_law(2.0))

    assert saving_of(one, other, 80, seed=1) == saving_of(one, other, 80, seed=1)
    assert saving_of(one, other, 80, seed=1) != saving_of(one, other, 80, seed=2)


def test_curves_of_other_seeds_are_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        saving_of(curve(power_law(1.0)), curve(power_law(2.0), n_seeds=2), 80)


def test_a_size_that_the_reference_has_not_is_refused():
    with pytest.raises(ValueError, match="no training with 30 points"):
        saving_of(curve(power_law(1.0)), curve(power_law(2.0)), 30)


def test_sizes_that_do_not_ascend_are_refused():
    with pytest.raises(ValueError, match="must ascend"):
        curve(power_law(1.0), n=SIZES[::-1])
