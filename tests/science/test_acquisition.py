from dataclasses import replace

import numpy as np
import pytest

from aiida_eipnn.science import acquisition
from aiida_eipnn.science.acquisition import (
    AcquisitionParameters,
    PoolFacts,
    acquire,
    shares,
    standardise,
    stratified_split,
)
from aiida_eipnn.science.predictions import Predictions


def predictions(uncertainty, features=None, ids=None):
    n = len(uncertainty)
    # The uncertainty of a configuration is that of its worst atom: here the second of two.
    spread = np.column_stack([np.zeros(n), uncertainty]).ravel()
    return Predictions(
        ids=np.array([f"{row:032x}" for row in range(n)] if ids is None else ids),
        offsets=np.arange(0, 2 * n + 1, 2),
        energy=np.zeros(n),
        forces=np.zeros((2 * n, 3)),
        stress=np.zeros((n, 6)),
        energy_std=np.zeros(n),
        forces_std=spread,
        features=np.zeros((n, 1)) if features is None else np.asarray(features, float),
    )


def pick(uncertainty, features=None, ids=None, candidates=None, seed=0, **settings):
    candidates = np.arange(len(uncertainty)) if candidates is None else np.array(candidates)
    return acquire(
        predictions(np.asarray(uncertainty, float), features, ids),
        candidates,
        AcquisitionParameters.from_dict(settings),
        np.random.default_rng(seed),
    )


def test_uncertainty_picks_the_most_uncertain_first():
    chosen = pick([0.1, 0.4, 0.2, 0.3], n_select=2, strategy="uncertainty")

    assert chosen.rows.tolist() == [1, 3]
    assert chosen.scores.tolist() == [0.4, 0.3]


def test_only_candidates_are_picked():
    chosen = pick([0.1, 0.4, 0.2, 0.3], candidates=[0, 2], n_select=1, strategy="uncertainty")

    assert chosen.rows.tolist() == [2]


def test_too_uncertain_is_left_out():
    chosen = pick([0.1, 9.0, 0.2, np.nan], n_select=2, strategy="uncertainty", max_uncertainty=1.0)

    assert chosen.rows.tolist() == [2, 0]


def test_diverse_starts_with_the_most_uncertain_and_skips_its_neighbour():
    features = [[0.0], [0.1], [5.0], [10.0]]

    chosen = pick([0.9, 0.8, 0.7, 0.1], features, n_select=2, strategy="diverse", top_fraction=0.75)

    assert chosen.rows.tolist() == [0, 2]


def test_diverse_never_looks_at_fewer_than_it_must_pick():
    chosen = pick([0.4, 0.3, 0.2, 0.1], [[0], [1], [2], [3]], n_select=3, top_fraction=0.1)

    assert sorted(chosen.rows.tolist()) == [0, 1, 2]


def test_equal_configurations_are_picked_once():
    chosen = pick([0.4, 0.4, 0.1], ids=["a", "a", "b"], n_select=2, strategy="uncertainty")

    assert chosen.rows.tolist() == [0, 2]


def test_random_depends_on_the_generator_only():
    first = pick(np.zeros(50), n_select=5, strategy="random", seed=1)
    again = pick(np.zeros(50), n_select=5, strategy="random", seed=1)
    other = pick(np.zeros(50), n_select=5, strategy="random", seed=2)

    assert first.rows.tolist() == again.rows.tolist() != other.rows.tolist()
    assert len(set(first.rows.tolist())) == 5


@pytest.mark.parametrize("strategy", ["random", "uncertainty", "diverse"])
def test_more_than_there_are_is_refused(strategy):
    with pytest.raises(ValueError, match="cannot pick 3 of 2 candidates"):
        pick([0.1, 0.2], n_select=3, strategy=strategy)


@pytest.mark.parametrize("strategy", ["random", "uncertainty", "diverse"])
@pytest.mark.parametrize("n", [0, 2])
def test_all_there_are_is_taken_where_that_is_allowed(strategy, n):
    chosen = pick(np.full(n, 0.1), n_select=3, strategy=strategy, allow_fewer=True)

    assert len(chosen.rows) == len(chosen.scores) == n


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": "best", "n_select": 1}, "'best', only .*'diverse'"),
        ({"n_select": 0}, "at least one"),
        ({"n_select": 1, "top_fraction": 0}, r"\(0, 1\]"),
        ({"n_select": 1, "min_uncertainty": 1.0, "max_uncertainty": 0.5}, "raise max_uncertainty"),
        ({"n_select": 1, "n_selct": 2}, "no setting .*n_selct"),
        ({}, "give .*n_select"),
        ({"n_select": "many"}, "wrong type"),
    ],
)
def test_wrong_parameters_say_what_is_allowed(settings, words):
    with pytest.raises(ValueError, match=words):
        AcquisitionParameters.from_dict(settings)


@pytest.mark.parametrize("strategy", ["farthest", "max_det", "lcmd"])
def test_what_is_labelled_already_is_not_asked_for_again_in_another_guise(strategy):
    # Two groups; one of the first is labelled, so the next comes from the second.
    features = [[0.0, 1.0], [0.1, 1.0], [0.05, 1.0], [5.0, 1.2], [5.1, 0.9]]
    found = acquire(
        predictions(np.ones(5), features),
        np.array([1, 2, 3, 4]),
        AcquisitionParameters(n_select=1, strategy=strategy),
        np.random.default_rng(0),
        known=np.array([0]),
    )

    assert set(found.rows) <= {3, 4}


def choose_with(facts, uncertainty, features=None, **settings):
    found = acquire(
        predictions(np.asarray(uncertainty, float), features),
        np.arange(len(uncertainty)),
        AcquisitionParameters.from_dict(settings),
        np.random.default_rng(0),
        facts=facts,
    )
    return found.rows.tolist()


def facts_of(cost, types=None):
    types = ["a"] * len(cost) if types is None else types
    return PoolFacts(cost=np.asarray(cost, float), config_types=np.array(types))


def test_what_is_dear_must_bring_more():
    settings = {"n_select": 1, "strategy": "uncertainty"}
    facts = facts_of([1.0, 10.0, 1.0])

    assert choose_with(facts, [0.2, 0.5, 0.3], **settings) == [1]
    assert choose_with(facts, [0.2, 0.5, 0.3], cost_exponent=1.0, **settings) == [2]
    assert choose_with(facts, [0.2, 5.0, 0.3], cost_exponent=1.0, **settings) == [1]


@pytest.mark.parametrize("strategy", ["diverse", "farthest", "lcmd"])
def test_strategies_of_unlike_points_mind_the_cost(strategy):
    # Two points far off, one of them dear; the first is where a batch begins.
    features = [[0.0, 0.1], [9.0, 1.0], [8.9, 1.0], [0.1, 0.0]]
    settings = {"n_select": 2, "strategy": strategy, "top_fraction": 1.0, "cost_exponent": 1.0}
    for cost, wanted, unwanted in (([1, 50, 1, 1], 2, 1), ([1, 1, 50, 1], 1, 2)):
        found = choose_with(facts_of(cost), [1.0, 0.9, 0.9, 0.9], features, **settings)
        assert wanted in found
        assert unwanted not in found


@pytest.mark.parametrize("strategy", ["random", "uncertainty", "diverse", "lcmd"])
def test_strata_get_points_in_proportion(strategy):
    types = ["md"] * 60 + ["surface"] * 30 + ["dimer"] * 10
    rng = np.random.default_rng(1)
    # The most uncertain ones are all of one type.
    uncertainty = np.r_[rng.uniform(0.1, 0.2, 60), rng.uniform(1, 2, 30), rng.uniform(0.1, 0.2, 10)]
    found = choose_with(
        facts_of(np.ones(100), types),
        uncertainty,
        rng.normal(size=(100, 3)),
        n_select=20,
        strategy=strategy,
        stratified=True,
    )

    assert len(set(found)) == 20
    counts = {name: sum(types[row] == name for row in found) for name in ("md", "surface", "dimer")}
    assert counts == {"md": 12, "surface": 6, "dimer": 2}


def test_cost_and_strata_need_the_facts():
    with pytest.raises(ValueError, match="needs the DFT cost of the pool"):
        choose_with(None, [0.1], n_select=1, cost_exponent=1.0)
    with pytest.raises(ValueError, match="needs the types of the configurations of the pool"):
        choose_with(None, [0.1], n_select=1, stratified=True)
    with pytest.raises(ValueError, match="cost_exponent is -1"):
        AcquisitionParameters(n_select=1, cost_exponent=-1)


@pytest.mark.parametrize("measure", ["last_layer", "density"])
def test_what_is_strange_to_the_labelled_ones_is_picked_whatever_the_committee_says(measure):
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(30, 3)), [[9.0, 0.0, 0.0], [0.1, 0.1, 0.1]]])
    uncertainty = np.r_[np.ones(30), 0.1, 5.0]
    found = acquire(
        predictions(uncertainty, features),
        np.array([30, 31]),
        AcquisitionParameters(n_select=1, strategy="uncertainty", measure=measure),
        np.random.default_rng(0),
        known=np.arange(30),
    )

    assert found.rows.tolist() == [30]
    assert found.scores.tolist() == [0.1]


@pytest.mark.parametrize(
    ("measure", "name"), [("atom_density", "strangeness"), ("atom_last_layer", "atom_energy_std")]
)
@pytest.mark.parametrize("strategy", ["uncertainty", "diverse"])
def test_the_strangest_atom_of_a_configuration_counts(measure, name, strategy):
    settings = AcquisitionParameters(n_select=1, strategy=strategy, measure=measure)
    # Of the mean over two atoms the first would be the strangest.
    told = replace(
        predictions(np.array([9.0, 2.0, 1.0])), **{name: np.array([5.0, 5.0, 0.0, 7.0, 1.0, 1.0])}
    )

    chosen = acquire(told, np.arange(3), settings, np.random.default_rng(0))

    assert chosen.rows.tolist() == [1]
    with pytest.raises(ValueError, match=f"these predictions have no {name}"):
        acquire(predictions(np.ones(3)), np.arange(3), settings, np.random.default_rng(0))


def test_a_measure_by_labels_needs_labels():
    with pytest.raises(ValueError, match="nothing is labelled yet"):
        pick([0.1, 0.2], n_select=1, strategy="uncertainty", measure="density")
    with pytest.raises(ValueError, match="no measure of uncertainty 'guess'"):
        AcquisitionParameters(n_select=1, measure="guess")


def test_representative_ones_stand_for_the_uncertain_half():
    # Nine that are certain, and nine that are not: five about 1, three about 2, and one far off.
    features = [[float(number)] for number in range(9)]
    features += [[1.0], [1.01], [1.02], [1.03], [1.04], [2.0], [2.01], [2.02], [30.0]]
    told = predictions(np.repeat([0.1, 0.5], 9), features)
    settings = AcquisitionParameters(n_select=2, strategy="representative")

    chosen = acquire(told, np.arange(18), settings, np.random.default_rng(0))
    assert chosen.rows.tolist() == [13, 17]
    free = np.setdiff1d(np.arange(18), chosen.rows)
    later = acquire(
        told, free, replace(settings, n_select=1), np.random.default_rng(0), known=chosen.rows
    )
    assert later.rows.tolist() == [15]


def test_of_many_candidates_some_at_all_uncertainties_are_looked_at(monkeypatch):
    monkeypatch.setattr(acquisition, "MAX_REPRESENTED", 3)
    features = [[float(number)] for number in range(10)]
    chosen = pick(
        np.arange(10.0) + 1, features, n_select=3, strategy="representative", top_fraction=1.0
    )

    assert sorted(chosen.rows) == [0, 5, 9]


@pytest.mark.parametrize("strategy", ["farthest", "max_det", "lcmd", "representative"])
def test_strategies_by_features_obey_the_window(strategy):
    features = [[0.0], [1.0], [50.0], [2.0]]
    chosen = pick(
        [0.1, 0.2, 9.0, 0.3], features, n_select=3, strategy=strategy, max_uncertainty=1.0
    )

    assert sorted(chosen.rows) == [0, 1, 3]


def test_standardised_features_weigh_the_same_and_constant_ones_nothing():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 3)) * [1.0, 1000.0, 0.0] + 7.3

    scaled = standardise(features)

    np.testing.assert_allclose(scaled.std(axis=0), [1, 1, 0], atol=1e-9)


def test_a_split_holds_every_type_in_proportion_and_every_row_once():
    types = np.array(["md"] * 60 + ["rattled"] * 30 + ["dimer"] * 10)

    parts = stratified_split(types, {"test": 20, "initial": 10}, np.random.default_rng(0))

    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(100))
    assert {name: len(rows) for name, rows in parts.items()} == {
        "test": 20,
        "initial": 10,
        "pool": 70,
    }
    counts = {str(name): int((types[parts["test"]] == name).sum()) for name in np.unique(types)}
    assert counts == {"dimer": 2, "md": 12, "rattled": 6}


def test_a_rare_type_is_represented_in_every_part():
    types = np.array(["md"] * 97 + ["dimer"] * 3)

    parts = stratified_split(types, {"test": 10, "initial": 5}, np.random.default_rng(0))

    assert all("dimer" in types[rows] for rows in parts.values())


def test_a_split_is_the_same_for_the_same_seed_only():
    types = np.array(["a", "b"] * 50)

    def test_rows(seed):
        return stratified_split(types, {"test": 10}, np.random.default_rng(seed))["test"].tolist()

    assert test_rows(1) == test_rows(1) != test_rows(2)


def test_a_part_smaller_than_the_number_of_types_takes_the_common_ones():
    types = np.array(["a"] * 5 + ["b"] * 9 + ["c"] * 7)

    parts = stratified_split(types, {"initial": 2}, np.random.default_rng(0))

    assert set(types[parts["initial"]]) == {"b", "c"}


def test_a_split_into_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"cannot split 3 configurations .* needs 5"):
        stratified_split(np.array(["a"] * 3), {"test": 4, "initial": 1}, np.random.default_rng(0))


def test_the_pool_may_have_a_size_of_its_own():
    parts = stratified_split(np.array(["a"] * 9), {"test": 2, "pool": 3}, np.random.default_rng(0))

    assert {name: len(rows) for name, rows in parts.items()} == {"test": 2, "pool": 3}


def test_shares_add_up_and_never_exceed_what_is_there():
    rng = np.random.default_rng(0)
    for _ in range(200):
        available = rng.integers(0, 12, size=rng.integers(1, 7))
        size = int(rng.integers(0, available.sum() + 1))
        quota = shares(available, size)
        assert quota.sum() == size
        assert (quota <= available).all()
        assert (quota >= 0).all()


def test_the_highest_uncertainty_is_the_lower_of_two_limits():
    both = AcquisitionParameters(n_select=1, max_uncertainty=0.5, max_error=2.0)
    assert both.most_uncertain(None) == 0.5
    assert both.most_uncertain(8.0) == 0.25
    assert both.most_uncertain(1.0) == 0.5
    # Where no error is to be expected, none is too large.
    assert AcquisitionParameters(n_select=1, max_error=2.0).most_uncertain(0.0) is None
