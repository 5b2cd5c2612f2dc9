"""The calcfunctions that steer the loop."""

from dataclasses import replace

import numpy as np
import pytest
from aiida.orm import Dict, Int
from ase.build import bulk

from aiida_eipnn.calculations import loop
from aiida_eipnn.data.choice import Choice, ChoiceData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.finite import finite
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.data.predictions import PredictionsData
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.engine import label_with_eips
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.predictions import Predictions

SW = "SW_StillingerWeber_1985_Si__MO_405512056662_005"
EIPS = (
    "EDIP_JustoBazantKaxiras_1998_Si__MO_958932894036_002",
    "Tersoff_LAMMPS_Tersoff_1988T3_Si__MO_186459956893_003",
    "MEAM_LAMMPS_LenoskySadighAlonso_2000_Si__MO_533426548156_000",
)


@pytest.fixture
def known(kim, rattled_silicon):
    """Sound labels, and what EIPs that had no part in them say."""
    configurations = rattled_silicon(30, amplitude=0.1)
    labels = label_with_eips(configurations, (SW,))
    eip_labels = label_with_eips(configurations, EIPS)
    labels = replace(labels, sources=np.array(["dft"]))
    return ConfigurationsData.from_value(configurations), labels, LabelsData.from_value(eip_labels)


def check(known, **changes):
    configurations, labels, eip_labels = known
    changed = LabelsData.from_value(replace(labels, **changes), level={})
    return loop.check_given_labels.run_get_node(configurations, changed, eip_labels)


def test_sound_labels_pass_the_gate(known):
    outputs, node = check(known)
    assert node.is_finished_ok, node.exit_message
    assert outputs["labels"].base.attributes.get("n_labels") == 30


def test_labels_in_hartree_are_refused_with_the_diagnosis(known):
    labels = known[1]
    _, node = check(known, energy=labels.energy / 27.2114, forces=labels.forces / 27.2114)
    assert node.exit_status == 310
    # EIPs differ by more than two atomic units do: the fault is certain, its name is not.
    assert "give eV/Å" in node.exit_message


def test_forces_of_the_wrong_sign_are_refused_with_the_diagnosis(known):
    _, node = check(known, forces=-known[1].forces)
    assert node.exit_status == 310
    assert "sign" in node.exit_message


def stray(labels, row=4):
    """Labels with one energy that is far too high."""
    energy = labels.energy.copy()
    energy[row] += 30 * labels.n_atoms[row]
    return replace(labels, energy=energy)


def test_a_stray_given_label_is_a_row_without_a_label_and_its_reason(known):
    outputs, node = check(known, energy=stray(known[1]).energy)
    assert node.is_finished_ok, node.exit_message
    kept = outputs["labels"]
    assert np.flatnonzero(~kept.value().ok[:, 0]).tolist() == [4]
    assert kept.base.attributes.get("n_labels") == 29
    assert list(kept.base.attributes.get("gate")["reasons"]) == [known[1].ids[4]]
    assert "1 labels refused (1 stray energies)" in outputs["report"]["text"]


def test_known_labels_of_what_was_chosen_before_are_left_out(known):
    configurations, labels, eip_labels = known
    given = LabelsData.from_value(labels, level={})
    test = ChoiceData.from_value(Choice.from_ids(labels.ids[:4]))
    refused = ChoiceData.from_value(Choice.from_ids(labels.ids[6:8]))

    def check_given(**taken):
        return loop.check_given_labels.run_get_node(configurations, given, eip_labels, **taken)

    outputs, _ = check_given(taken_test=test, taken_refused=refused)
    assert outputs["choice"].ids().tolist() == labels.ids[4:].tolist()
    assert outputs["labels"].value().ids.tolist() == labels.ids[4:].tolist()
    assert outputs["report"]["n_chosen_before"] == 4
    everything = ChoiceData.from_value(Choice.from_ids(labels.ids))
    outputs, node = check_given(taken_known=everything)
    assert node.is_finished_ok
    assert list(outputs) == ["report"]


def test_known_labels_of_unknown_configurations_are_refused(known):
    configurations, labels, eip_labels = known
    some = ConfigurationsData.from_value(configurations.value().take(range(20)))
    given = LabelsData.from_value(labels, level={})

    _, node = loop.check_given_labels.run_get_node(some, given, eip_labels)

    assert node.exit_status == 310
    assert "labels of unknown configurations" in node.exit_message


def test_what_exploration_finds_may_have_eip_labels_already(known):
    configurations, _, eip_labels = known
    sets = configurations.value()
    pool, new = (ConfigurationsData.from_value(sets.take(rows)) for rows in (range(20), [25]))
    again = LabelsData.from_value(eip_labels.value().take([25]))

    made = loop.extend_pool(pool, new, eip_labels, again)

    assert made["pool"].value().ids.tolist() == [*sets.ids[:20], sets.ids[25]]
    assert made["eip_labels"].value().ids.tolist() == sets.ids.tolist()


def test_a_stray_dft_label_is_refused_beside_what_is_known(known):
    configurations, labels, eip_labels = known
    old = LabelsData.from_value(labels.take(range(10, 30)))
    new = LabelsData.from_value(stray(labels).take(range(10)), level={"fingerprint": "x"})

    kept = loop.refuse_dft_labels(configurations, new, eip_labels, i001=old)

    assert kept.value().ids.tolist() == labels.ids[:10].tolist()
    assert [failure.id for failure in kept.value().failures()] == [labels.ids[4]]
    assert "energy is +" in kept.value().failures()[0].reason
    assert kept.level == {"fingerprint": "x"}


def test_a_dft_label_of_a_known_geometry_is_refused(known):
    configurations, labels, eip_labels = known
    pool = configurations.value()
    turned = pool.atoms(0)
    turned.rotate(90, "z", rotate_cell=True)
    frames = [pool.atoms(row) for row in range(len(pool))] + [turned]
    pool = Configurations.from_atoms(frames, "x")
    energy = np.append(labels.energy, labels.energy[:1], axis=0)
    new = Labels.missing(pool, ["dft"])
    new = replace(new, energy=energy, forces=np.zeros_like(new.forces), status=new.status * 0)

    kept = loop.refuse_dft_labels(
        ConfigurationsData.from_value(pool),
        LabelsData.from_value(new.take([30])),
        eip_labels,
        i001=LabelsData.from_value(new.take(range(30))),
    )

    assert not kept.value().ok.any()
    assert "same geometry" in kept.value().failures()[0].reason


def test_the_gate_refuses_overlapping_atoms_and_says_why(rattled_silicon):
    good = rattled_silicon(6)
    bad = bulk("Si")
    bad.positions[1] = bad.positions[0] + [0.5, 0, 0]
    frames = [good.atoms(row) for row in range(6)] + [bad]
    pool = ConfigurationsData.from_value(Configurations.from_atoms(frames, "x"))
    gate = loop.refuse(pool, Dict({"min_contact": 0.6}))
    (refused,) = gate.ids()
    assert "overlap" in gate.base.attributes.get("reasons")[refused]
    sizes = Dict({"test": 3, "initial": 3})
    chosen = loop.split_pool(pool, sizes, Int(1), eip_labels_of(pool), taken_refused=gate)
    assert refused not in {*chosen["test"].ids(), *chosen["initial"].ids()}


def eip_labels_of(pool, energy=None):
    """Return what two EIPs say of a pool: nothing, or these energies, of shape ``(n, 2)``."""
    labels = Labels.missing(pool.value(), ["eip0", "eip1"])
    if energy is not None:
        labels = replace(
            labels,
            energy=energy,
            forces=np.zeros_like(labels.forces),
            status=np.zeros_like(labels.status),
            reasons=np.array([], dtype="<U1"),
        )
    return LabelsData.from_value(labels)


def test_the_first_points_are_disputed_where_that_is_asked_for(pool):
    sizes = {"test": 2, "initial": 2}
    blind = loop.split_pool(pool, Dict(sizes), Int(5), eip_labels_of(pool))
    ids = pool.value().ids
    free = np.flatnonzero(~np.isin(ids, blind["test"].ids()))
    # The two EIPs agree about the others, whatever their zeros are.
    disputed = free[::2]
    energy = np.tile([0.0, 7.0], (len(ids), 1))
    energy[disputed, 1] += np.array([1.0, -1.0, 1.0, -1.0])

    labels = eip_labels_of(pool, energy)
    chosen = loop.split_pool(pool, Dict(sizes | {"first": "disputed"}), Int(5), labels)

    # The test set is drawn blindly all the same.
    assert chosen["test"].ids().tolist() == blind["test"].ids().tolist()
    assert set(chosen["initial"].ids()) <= set(ids[disputed])
    assert chosen["initial"].base.attributes.get("strategy") == "disputed"
    assert blind["initial"].base.attributes.get("strategy") == "random"
    assert not set(blind["initial"].ids()) <= set(ids[disputed])


def no_history():
    return Dict({"iterations": [{}]})


@pytest.fixture
def pool(rattled_silicon):
    return ConfigurationsData.from_value(rattled_silicon(10))


@pytest.fixture
def predictions(pool):
    configurations = pool.value()
    spread = np.linspace(0.1, 1.0, 10)
    return PredictionsData.from_value(
        Predictions(
            ids=configurations.ids,
            offsets=configurations.offsets,
            energy=np.zeros(10),
            forces=np.zeros((20, 3)),
            stress=np.zeros((10, 6)),
            energy_std=np.zeros(10),
            forces_std=np.repeat(spread, 2),
            features=np.random.default_rng(0).normal(size=(10, 3)),
        )
    )


def test_what_was_taken_before_is_no_candidate(pool, predictions):
    ids = predictions.value().ids
    taken = ChoiceData.from_value(Choice.from_ids(ids[5:]))
    choice = loop.acquire(
        pool,
        predictions,
        Dict({"n_select": 2, "strategy": "uncertainty"}),
        Dict({}),
        no_history(),
        Int(0),
        taken_test=taken,
    )
    assert choice.ids().tolist() == [ids[4], ids[3]]
    assert choice.value().scores.tolist() == pytest.approx([0.5, 0.4])


def test_each_iteration_draws_anew_from_the_one_seed(pool, predictions):
    ids = predictions.value().ids
    settings = Dict({"n_select": 4, "strategy": "random"})
    taken = ChoiceData.from_value(Choice.from_ids(ids[:0]))
    first = loop.acquire(
        pool, predictions, settings, Dict({}), no_history(), Int(0), taken_test=taken
    )
    again = loop.acquire(
        pool, predictions, settings, Dict({}), no_history(), Int(0), taken_test=taken
    )
    later = loop.acquire(
        pool,
        predictions,
        settings,
        Dict({}),
        no_history(),
        Int(0),
        taken_test=taken,
        taken_i001=taken,
    )
    assert first.ids().tolist() == again.ids().tolist()
    assert first.ids().tolist() != later.ids().tolist()


def test_twins_are_set_apart_and_copies_are_not(pool):
    frames = [pool.value().atoms(row) for row in range(10)]
    turned = frames[3].copy()
    turned.rotate(90, "z", rotate_cell=True)
    configurations = Configurations.from_atoms([*frames, turned, frames[5]], "x")
    node = ConfigurationsData.from_value(configurations)
    energy = np.arange(12.0)
    energy[10], energy[11] = energy[3], energy[5]

    twins = loop.set_apart_twins(node, eip_labels_of(node, np.stack([energy, energy], axis=1)))

    assert twins.ids().tolist() == [configurations.ids[10]]
    # Each geometry is asked for once.
    sizes = Dict({"test": 5, "initial": 5})
    chosen = loop.split_pool(node, sizes, Int(0), eip_labels_of(node), taken_twins=twins)
    asked = [*chosen["test"].ids(), *chosen["initial"].ids()]
    assert sorted(asked) == sorted(set(configurations.ids) - set(twins.ids()))


def test_candidates_are_those_that_could_be_chosen(pool, predictions):
    ids = predictions.value().ids
    test = ChoiceData.from_value(Choice.from_ids(ids[:2]))

    def facts(**settings):
        history = {"iterations": [{"iteration": 1, "n_dft_labels": 5, "error_scale": 1.0}]}
        made = loop.reconsider(
            Dict(history), predictions, Dict({"n_select": 1, **settings}), Dict({}), taken_test=test
        )
        return made["iterations"][0], made["stop"]

    record, stop = facts(max_error=0.55)
    assert (record["n_candidates"], record["n_outside"], stop) == (3, 5, None)
    record, stop = facts(max_error=0.01)
    assert record["n_candidates"] == 0
    assert "8 are outside the window" in stop["text"]
    # Chance has no window.
    record, stop = facts(max_error=0.01, strategy="random")
    assert (record["n_candidates"], record["n_outside"], stop) == (8, 0, None)


def test_the_budget_caps_what_is_asked_for(pool, predictions):
    ids = predictions.value().ids
    paid = ChoiceData.from_value(Choice.from_ids(ids[:4]))
    choice = loop.acquire(
        pool,
        predictions,
        Dict({"n_select": 4}),
        Dict({"dft_budget": 6}),
        no_history(),
        Int(0),
        taken_test=paid,
    )
    assert len(choice) == 2


def test_the_budget_of_core_hours_caps_what_is_asked_for(pool, predictions):
    paid = ChoiceData.from_value(Choice.from_ids(predictions.value().ids[:4]))
    # Four cost half an hour each, so two more and a bit are to be had.
    history = Dict({"iterations": [{"core_hours": 2.0}]})
    stop = Dict({"core_hours_budget": 3.2})
    choice = loop.acquire(
        pool, predictions, Dict({"n_select": 4}), stop, history, Int(0), taken_test=paid
    )
    assert len(choice) == 2


def test_what_is_likely_to_be_wrong_by_too_much_is_not_asked_for(pool, predictions):
    nothing = ChoiceData.from_value(Choice.from_ids(predictions.value().ids[:0]))
    settings = {"n_select": 2, "strategy": "uncertainty"}
    uncertainty = predictions.value().uncertainty

    def most_uncertain(history, **more):
        choice = loop.acquire(
            pool,
            predictions,
            Dict(settings | more),
            Dict({}),
            history,
            Int(0),
            taken_test=nothing,
        )
        return choice.value().scores.max()

    twice = Dict({"iterations": [{"error_scale": 2.0}]})
    assert most_uncertain(twice) == uncertainty.max()
    limit = float(np.sort(uncertainty)[5])
    assert most_uncertain(twice, max_error=2 * limit + 1e-9) == pytest.approx(limit)
    # Before a batch was labelled nobody knows.
    assert most_uncertain(no_history(), max_error=1e-9) == uncertainty.max()


def test_no_number_never_reaches_the_database():
    assert finite({"a": [1.0, float("nan")], "b": float("inf")}) == {"a": [1.0, None], "b": None}
