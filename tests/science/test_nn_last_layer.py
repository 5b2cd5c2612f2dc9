"""Heads that are drawn about the one of DFT, and atoms that are strange to the labelled ones."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from small_trainings import SOFT, committee_of, labels_of, pool_of, settings_for, train

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.predictions import Predictions

torch = pytest.importorskip("torch")

from aiida_eipnn.science.nn.committee import Committee  # noqa: E402
from aiida_eipnn.science.nn.last_layer import (  # noqa: E402
    MAX_PROBES,
    MIN_PROBES,
    count_probes,
    draw_weights,
    symmetric_root,
)
from aiida_eipnn.science.nn.stage import StageInputs  # noqa: E402
from aiida_eipnn.science.nn.stages import prepare  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch")

STEPS = {"steps": 60, "learning_rate": 2e-2, "validation_fraction": 0.3}


@pytest.fixture(scope="module")
def inputs():
    pool = pool_of(20)
    return StageInputs(configurations=pool, labels=labels_of(pool, {"dft": SOFT}))


def tuned(inputs, seed=3, **training):
    return train("finetune", inputs, settings_for("finetune", **STEPS, **training), seed=seed)


@pytest.fixture(scope="module")
def trained(inputs):
    """Stage and state of a network with heads."""
    return tuned(inputs, n_heads=6)


@pytest.fixture(scope="module")
def network(trained):
    return trained[1].network


def headless(network):
    plain = copy.deepcopy(network)
    plain.feature_uncertainty = None
    return plain


def test_the_mean_of_the_heads_is_the_trained_head(network):
    row = network.heads.row("dft")
    mean = network.feature_uncertainty.heads.mean(dim=0)

    torch.testing.assert_close(mean, network.heads.weight[row].detach())
    assert network.feature_uncertainty.heads.std(dim=0).min() > 0


def test_a_network_with_heads_predicts_what_it_predicts_without(network):
    unseen = pool_of(4, seed=9)

    with_heads = committee_of(network).predict(unseen)
    without = committee_of(headless(network)).predict(unseen)

    for name in ("energy", "forces", "stress"):
        found, expected = getattr(with_heads, name), getattr(without, name)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=name)
    assert (with_heads.forces_std > 0).all()
    assert (with_heads.energy_std > 0).all()
    np.testing.assert_array_equal(without.forces_std, 0)


def test_heads_change_nothing_of_the_training(inputs, trained):
    _, without = tuned(inputs)

    assert without.network.n_drawn == 0
    for name, weight in without.network.named_parameters():
        assert torch.equal(weight, dict(trained[1].network.named_parameters())[name]), name


def test_the_spread_is_that_of_the_errors_that_were_held_out(inputs, trained):
    # 6 of 20; many heads, so that luck has no part in it.
    stage, state = trained
    many = copy.deepcopy(state.network)
    root = many.feature_uncertainty.last_layer.numpy()
    weight = many.heads.weight[many.heads.row("dft")].detach().numpy()
    drawn = draw_weights(weight, root, 60, np.random.default_rng(0))
    many.feature_uncertainty.heads = torch.as_tensor(drawn)
    held = stage.configurations.take(stage.held_out)
    truth = stage.labels.take(stage.held_out)

    predicted = committee_of(many).predict(held)

    error = np.linalg.norm(predicted.forces - truth.forces[0], axis=1)
    assert len(held) == 6
    # What is calibrated are forces along random directions, here are those on atoms.
    ratio = np.sqrt(((error / predicted.forces_std) ** 2).mean())
    assert 0.6 < ratio < 1.6


def test_the_spread_grows_away_from_the_data(network):
    near, far = (pool_of(6, seed=9, amplitude=amplitude) for amplitude in (0.15, 0.4))

    spread = [committee_of(network).predict(part).uncertainty.mean() for part in (near, far)]

    assert spread[1] > 2 * spread[0]


def test_the_same_seed_draws_the_same_heads(inputs, trained):
    stage, state = trained
    again, other = copy.deepcopy(state.network), copy.deepcopy(state.network)
    stage.finish(again, 3)
    stage.finish(other, 4)

    heads = [item.feature_uncertainty.heads for item in (state.network, again, other)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.allclose(heads[0], heads[2])


def spread_of_heads(committee, unseen):
    """Return the spread of forces of networks with one of the heads each."""
    found = []
    for member in committee.members:
        for weight in member.feature_uncertainty.heads:
            plain = headless(member)
            with torch.no_grad():
                plain.heads.weight[plain.heads.row("dft")] = weight
            found.append(committee_of(plain).predict(unseen).forces)
    deviation = np.array(found) - np.mean(found, axis=0)
    return np.sqrt((deviation**2).sum(axis=2).mean(axis=0))


def test_every_head_counts_as_a_member(inputs, network):
    second = tuned(inputs, seed=4, n_heads=6)[1].network
    committee = committee_of(network, second)
    unseen = pool_of(3, seed=9)

    together = committee.predict(unseen)

    assert len(committee) == 2
    assert committee.n_heads == 12
    np.testing.assert_allclose(together.forces_std, spread_of_heads(committee, unseen), rtol=1e-6)


# MACE is compiled with torch.jit, which warns of itself when it is copied.
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("trunk", ["schnet", "mace"])
def test_each_trunk_can_have_heads(inputs, trunk, request):
    if trunk == "mace":
        request.getfixturevalue("mace")
    small = {"trunk": trunk, "n_radial": 5, "width": 6, "depth": 2}
    settings = settings_for(
        "finetune",
        small | {"l_max": 1 if trunk == "mace" else 0},
        steps=5,
        validation_fraction=0.3,
        n_heads=4,
    )
    network = train("finetune", inputs, settings)[1].network
    committee, unseen = committee_of(network), pool_of(3, seed=9)

    predicted = committee.predict(unseen)

    assert committee.n_heads == 4
    assert (predicted.forces_std > 0).all()
    spread = spread_of_heads(committee, unseen)
    np.testing.assert_allclose(predicted.forces_std, spread, rtol=1e-6)
    without = committee_of(headless(network)).predict(unseen)
    np.testing.assert_allclose(predicted.forces, without.forces, atol=1e-9)


@pytest.mark.parametrize("n_heads", [0, 1])
def test_no_heads_are_drawn_unless_there_are_two(inputs, n_heads):
    network = tuned(inputs, n_heads=n_heads)[1].network

    assert network.n_drawn == 0
    assert committee_of(network).n_heads == 1


def test_a_saved_committee_has_its_heads(tmp_path, network):
    committee = committee_of(network)
    unseen = pool_of(3, seed=9)

    committee.save(tmp_path)
    loaded = Committee.load(tmp_path)

    assert loaded.n_heads == 6
    found, expected = loaded.predict(unseen).arrays(), committee.predict(unseen).arrays()
    assert set(found) == set(expected) >= {"strangeness", "atom_energy_std"}
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_network_with_heads_may_be_tuned_on(inputs, network):
    again = replace(inputs, members=(network,))

    tuned_on = tuned(again, n_heads=2)[1].network

    assert tuned_on.heads.names == ("dft",)
    assert tuned_on.n_drawn == 2


@pytest.mark.parametrize("name", ["pretrain", "classify"])
def test_other_stages_draw_no_heads(inputs, name):
    both = replace(inputs, eip_labels=labels_of(inputs.configurations, {"soft": SOFT}))

    with pytest.raises(ValueError, match=f"n_heads is 2, but stage {name} .* in stage finetune"):
        prepare(name, both, settings_for(name, n_heads=2))


@pytest.mark.parametrize("n_heads", [-1, 2.5, "8"])
def test_a_number_of_heads_is_a_whole_number(n_heads):
    with pytest.raises(ValueError, match="n_heads must be a whole number from 0 on"):
        settings_for("finetune", n_heads=n_heads)


def test_drawn_weights_have_the_covariance_that_is_asked_for():
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(3, 3))
    covariance = factor @ factor.T
    root = symmetric_root(np.linalg.inv(covariance))

    drawn = draw_weights(np.array([1.0, 2.0, 3.0]), root, 20_000, rng)

    np.testing.assert_allclose(root @ root, covariance, rtol=1e-9)
    np.testing.assert_allclose(np.cov(drawn.T), covariance, rtol=0.05, atol=0.1)
    # Of two heads, too, the mean is right, and the variance in the mean of many draws.
    pairs = np.array([draw_weights(np.zeros(3), root, 2, rng) for _ in range(20_000)])
    np.testing.assert_allclose(pairs.mean(axis=1), 0, atol=1e-9)
    np.testing.assert_allclose(pairs.var(axis=1).mean(axis=0), np.diag(covariance), rtol=0.05)


def test_few_labels_are_asked_along_more_directions():
    assert count_probes(5, 128) == MAX_PROBES
    assert count_probes(20, 128) == math.ceil(8 * 128 / 20)
    assert count_probes(300, 128) == MIN_PROBES


def test_the_atom_out_of_place_is_the_strangest(inputs, network):
    atoms = inputs.configurations.atoms(0)
    atoms.positions[3] += (0.4, 0.4, 0.4)

    found = committee_of(network).predict(Configurations.from_atoms([atoms]))
    usual = committee_of(network).predict(inputs.configurations)

    assert found.strangeness.argmax() == 3
    assert found.largest("strangeness")[0] > usual.strangeness.max()
    assert found.strangeness.shape == found.atom_energy_std.shape == (8,)


def test_strangeness_of_atoms_is_their_mahalanobis_distance(inputs, trained):
    stage, state = trained
    network, described = state.network, stage.described
    with torch.no_grad():
        batch = described.batch(np.arange(len(described)))
        features = network.trunk(batch).numpy()
    found = committee_of(network).predict(stage.configurations).strangeness

    covariance = np.cov(features.T, bias=True)
    shrunk = 0.999 * covariance + 0.001 * np.trace(covariance) / 16 * np.eye(16)
    away = features - features.mean(axis=0)
    expected = np.sqrt(np.einsum("ai,ij,aj->a", away, np.linalg.inv(shrunk), away))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_each_element_has_a_centre_of_its_own():
    # Rock salt: atoms of both elements are all alike, but features of the two differ.
    frames = []
    for seed in range(6):
        atoms = bulk("SiC", "rocksalt", a=4.1)
        atoms.positions += np.random.default_rng(seed).normal(0, 0.02, (2, 3))
        frames.append(atoms)
    pool = Configurations.from_atoms(frames)
    inputs = StageInputs(configurations=pool, labels=labels_of(pool, {"dft": SOFT}))
    network = tuned(inputs)[1].network
    swapped = copy.deepcopy(network)
    swapped.feature_uncertainty.centres.copy_(network.feature_uncertainty.centres.flip(0))

    usual, wrong = (committee_of(item).predict(pool).strangeness for item in (network, swapped))

    assert wrong.min() > 2 * usual.max()


def test_an_element_without_labels_has_the_centre_of_all():
    pool = Configurations.from_atoms(
        [*(pool_of(4).atoms(row) for row in range(4)), Atoms("C", [[0, 0, 0]])]
    )
    inputs = StageInputs(configurations=pool, labels=labels_of(pool.take(range(4)), {"dft": SOFT}))
    network = tuned(inputs)[1].network

    carbon, silicon = network.feature_uncertainty.centres
    torch.testing.assert_close(carbon, silicon)


def test_predictions_of_older_versions_are_read_and_say_what_they_lack(network):
    predicted = committee_of(headless(network)).predict(pool_of(2))
    arrays = predicted.arrays()

    found = Predictions.from_arrays(arrays)

    assert not {"strangeness", "atom_energy_std"} & set(arrays)
    assert found.strangeness is None
    with pytest.raises(ValueError, match=r"have no strangeness: .* evaluate again, or choose by"):
        found.largest("strangeness")


def test_nothing_to_predict_has_no_atoms(network):
    found = committee_of(network).predict(Configurations.from_atoms([]))

    assert found.strangeness.shape == found.atom_energy_std.shape == (0,)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_one_label_of_equal_atoms_leaves_every_number_finite(precision):
    crystal = Configurations.from_atoms([bulk("Si", a=5.3)])
    inputs = StageInputs(configurations=crystal, labels=labels_of(crystal, {"dft": SOFT}))
    few = {"steps": 5, "n_heads": 3}
    network = {"precision": precision, "n_radial": 4, "l_max": 1, "width": 8, "depth": 1}
    _, state = train("finetune", inputs, settings_for("finetune", network, **few))

    said = committee_of(state.network).predict(pool_of(3, seed=5))

    for name in ("energy", "forces", "energy_std", "forces_std", "strangeness", "atom_energy_std"):
        assert np.isfinite(getattr(said, name)).all(), name
    assert said.strangeness.min() > 0
