"""The method of Shui et al. as published, and the faults that can be switched on again."""

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.analytic import LennardJones
from aiida_eipnn.science.labels import Labels

torch = pytest.importorskip("torch")

from aiida_eipnn.science.nn import paper  # noqa: E402
from aiida_eipnn.science.nn.losses import (  # noqa: E402
    TUKEY_C,
    PseudoWeight,
    masked_mse,
    mse_with_pseudo_labels,
    standardise_residuals,
    tukey_biweight,
)
from aiida_eipnn.science.nn.paper import PaperInputs, PaperNetwork, PaperParameters  # noqa: E402
from aiida_eipnn.science.nn.paper_network import paper_set  # noqa: E402
from aiida_eipnn.science.nn.training import Diverged  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch")

SOFT, HARD = LennardJones(epsilon=0.4, sigma=2.1), LennardJones(epsilon=0.6, sigma=2.15)
SMALL = {"n_interactions": 2, "cutoff": 4.0, "batch_size": 4, "epochs": 4}
SPLITS = {"Si": (14_000, 1_351), "Al": (5_081, 762)}  # pool and training part


def parameters_of(**settings):
    return PaperParameters.from_dict({**SMALL, **settings})


def rattled(n, seed=0):
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n):
        atoms = bulk("Si", cubic=True)
        atoms.set_cell(atoms.cell * (1 + rng.uniform(-0.06, 0.06)), scale_atoms=True)
        atoms.positions += rng.normal(0, rng.uniform(0.02, 0.15), atoms.positions.shape)
        frames.append(atoms)
    return Configurations.from_atoms(frames, "rattled")


def labels_of(configurations, potentials):
    frames = [configurations.atoms(row) for row in range(len(configurations))]
    missing = Labels.missing(configurations, list(potentials))
    energy = np.array(
        [[potential.label(atoms).energy for potential in potentials.values()] for atoms in frames]
    )
    return replace(missing, energy=energy, status=np.zeros_like(missing.status))


def with_energy(labels, rows, column, energy, *, failed=False):
    changed, status = labels.energy.copy(), labels.status.copy()
    changed[rows, column] = energy
    if failed:
        status[rows, column] = 1
    return replace(labels, energy=changed, status=status)


@pytest.fixture(scope="module")
def inputs():
    """12 labels to learn from, 6 to validate, 14 configurations of the pool; DFT is SOFT."""
    configurations = rattled(32)
    dft = labels_of(configurations, {"dft": SOFT})
    return PaperInputs(
        configurations=configurations,
        train=dft.take(range(12)),
        validation=dft.take(range(12, 18)),
        eip_labels=labels_of(configurations, {"soft": SOFT, "hard": HARD}),
        pool=configurations.ids[18:],
    )


def n_weights(module):
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)


def rattled_cell():
    """Return four atoms in no particular place."""
    atoms = bulk("Al", cubic=True)
    atoms.rattle(0.2, seed=1)
    return atoms


def energies_per_atom(network, cell):
    matrices = (np.eye(3), np.diag([2, 1, 1]), np.diag([2, 2, 1]))
    supercells = Configurations.from_atoms([make_supercell(cell, m) for m in matrices])
    return paper.predict(network, supercells).energy / supercells.n_atoms


# --- what the paper's numbers say -----------------------------------------------------------


def test_schnet_has_the_published_number_of_weights():
    trunk = PaperNetwork(PaperParameters(), [14], ["dft"], seed=0).trunk
    assert n_weights(trunk) == 428_160
    assert {n_weights(interaction) for interaction in trunk.interactions} == {82_560}


def test_soapnet_has_the_published_number_of_weights():
    network = PaperNetwork(PaperParameters(network="soapnet"), [14], ["dft"], seed=0)
    assert n_weights(network.trunk) == 98_432
    assert network.trunk.layers[0].in_features == 252


@pytest.mark.parametrize(
    ("n_outputs", "classifies", "expected"),
    [
        (1, False, 16_641),
        (8, False, 17_544),
        (10, False, 17_802),
        (9, True, 17_929),
        (11, True, 18_187),
    ],
)
def test_heads_have_the_published_number_of_weights(n_outputs, classifies, expected):
    names = [f"{number}" for number in range(n_outputs)]
    network = PaperNetwork(PaperParameters(), [14], names, classifies=classifies, seed=0)
    assert n_weights(network.head) == expected


@pytest.mark.parametrize(
    ("element", "baseline", "pretraining", "augmented"),
    [("Si", 4_200, 43_700, 47_900), ("Al", 2_300, 15_800, 18_200)],
)
def test_a_hundred_epochs_have_the_published_number_of_steps(
    element, baseline, pretraining, augmented
):
    pool, train = SPLITS[element]
    steps = [paper.n_steps(n, 32, 100) for n in (train, pool, train + pool)]
    assert steps == [baseline, pretraining, augmented]


def test_the_slanted_triangle_has_its_top_at_epoch_20():
    factors = [paper.slanted_triangle(epoch, 100) for epoch in range(100)]
    assert np.argmax(factors) == 20
    np.testing.assert_allclose(
        [factors[0], factors[20], factors[99]], [1 / 32, 1.0, 0.0434], rtol=1e-3
    )


def test_the_linear_schedule_falls_towards_a_hundredth():
    factors = [paper.linear_decay(epoch, 100) for epoch in (0, 50, 100)]
    np.testing.assert_allclose(factors, [1.0, 0.505, 0.01])


@pytest.mark.parametrize(("element", "expected"), [("Si", 0.0965), ("Al", 0.150)])
def test_pseudo_labels_weigh_alpha_rho_in_all_so_more_of_them_weigh_less(element, expected):
    pool, train = SPLITS[element]
    settings = PaperParameters(alpha=2.0)
    assert paper.pseudo_weight(settings, train, pool) == pytest.approx(2 * expected, rel=1e-3)
    half = paper.pseudo_weight(settings, train, pool // 2)
    assert half == pytest.approx(4 * expected, rel=2e-3)


def test_without_rho_pseudo_labels_weigh_alpha_however_many_they_are():
    settings = PaperParameters(alpha=2.0, rho=False)
    assert [paper.pseudo_weight(settings, 100, n) for n in (0, 10, 5000)] == [0.0, 2.0, 2.0]


# --- losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("r", "value", "slope"),
    [
        (0.0, 0.0, 0.0),
        (TUKEY_C / 2, 3.6584 * (1 - 0.75**3), TUKEY_C / 2 * 0.75**2),
        (TUKEY_C, 3.6584, 0.0),
        (2 * TUKEY_C, 3.6584, 0.0),
        (-2 * TUKEY_C, 3.6584, 0.0),
    ],
)
def test_tukeys_loss_rises_to_a_plateau(r, value, slope):
    residual = torch.tensor(r, dtype=torch.float64, requires_grad=True)
    loss = tukey_biweight(residual)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(value, abs=1e-4)
    assert float(residual.grad) == pytest.approx(slope, abs=1e-12)


def test_residuals_are_standardised_without_a_gradient_through_the_median():
    residual = torch.tensor([-4.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    standardised = standardise_residuals(residual, residual)
    np.testing.assert_allclose(standardised.detach(), np.array([-4, 1, 2]) / (1.4826 * 2))
    standardised.sum().backward()
    np.testing.assert_allclose(residual.grad, np.full(3, 1 / (1.4826 * 2)))


def test_an_absurd_pseudo_label_does_not_pull():
    predicted = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0.1, -0.1, 0.2, 0.1, 0.1, 1e4], dtype=torch.float64)
    is_pseudo = torch.tensor([False, False, False, True, True, True])
    mse_with_pseudo_labels(predicted, target, is_pseudo, PseudoWeight(1.0)).backward()
    assert predicted.grad[5] == 0
    assert (predicted.grad[3:5] < 0).all()


def test_the_loss_is_the_squared_error_plus_the_weighted_loss_of_tukey():
    predicted = torch.zeros(4, dtype=torch.float64)
    target = torch.tensor([1.0, 3.0, 2.0, 2.0], dtype=torch.float64)
    is_pseudo = torch.tensor([False, False, True, True])
    loss = mse_with_pseudo_labels(predicted, target, is_pseudo, PseudoWeight(0.5))
    tukey = float(tukey_biweight(torch.tensor(1 / 1.4826, dtype=torch.float64)))
    assert float(loss) == pytest.approx((1 + 9) / 2 + 0.5 * tukey)


@pytest.mark.parametrize("is_pseudo", [[True, True], [False, False]])
def test_a_batch_of_one_kind_has_a_loss(is_pseudo):
    predicted = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = mse_with_pseudo_labels(
        predicted, torch.zeros(2), torch.tensor(is_pseudo), PseudoWeight(1.0)
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(predicted.grad).all()


def test_missing_labels_are_left_out_of_the_squared_error():
    predicted = torch.tensor([[1.0, 5.0], [2.0, 0.0]])
    target = torch.tensor([[0.0, torch.nan], [torch.inf, 3.0]])
    assert float(masked_mse(predicted, target)) == pytest.approx((1 + 9) / 2)


# --- networks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"n_interactions": 3}, {"network": "soapnet"}], ids=["schnet", "soapnet"]
)
def test_energy_per_atom_is_that_of_a_supercell(settings):
    network = PaperNetwork(parameters_of(precision="float64", **settings), [13], ["dft"], seed=1)
    energies = energies_per_atom(network, rattled_cell())
    np.testing.assert_allclose(energies, energies[0], rtol=1e-6)


def test_images_as_nodes_are_right_for_one_interaction_and_wrong_for_two():
    settings = {"precision": "float64", "padding": "legacy", "cutoff": 5.0}
    one, two = (
        PaperNetwork(parameters_of(n_interactions=n, **settings), [13], ["dft"], seed=1)
        for n in (1, 2)
    )
    first, second = (energies_per_atom(network, rattled_cell()) for network in (one, two))
    np.testing.assert_allclose(first, first[0], rtol=1e-6)
    assert np.ptp(second) > 1e-2 * abs(second).max()


def test_schnet_sums_filtered_neighbours_without_residual_or_envelope():
    # A dimer, by hand from the weights.
    network = PaperNetwork(
        parameters_of(precision="float64", n_interactions=1), [13, 14], ["dft"], seed=1
    )
    weights = {name: w.numpy() for name, w in network.trunk.state_dict().items()}
    dimer = Configurations.from_atoms([Atoms("AlSi", [[0, 0, 0], [0, 0, 3.9]])])
    data = paper_set(dimer, network.settings, network.elements)
    features = network.trunk(data.batch(np.array([0]))).detach().numpy()

    def linear(x, name):
        name = f"interactions.0.{name}"
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def ssp(x):
        return np.log(0.5 * np.exp(x) + 0.5)

    gaussians = np.exp(-128 / 4.0 * (3.9 - np.linspace(0, 4.0, 128)) ** 2)
    filtered = ssp(linear(ssp(linear(gaussians, "filter_in")), "filter_out"))
    message = linear(weights["embedding"][14], "node") * filtered
    expected = linear(ssp(linear(message, "update_in")), "update_out")
    np.testing.assert_allclose(features[0], expected, rtol=1e-10)


def test_soapnet_reads_the_power_spectrum_and_nothing_linear_in_the_density():
    network = PaperNetwork(
        parameters_of(precision="float64", network="soapnet"), [13], ["dft"], seed=1
    )
    cell = Configurations.from_atoms([rattled_cell()])
    batch = paper_set(cell, network.settings, network.elements).batch(np.array([0]))
    density = batch.described.density
    spectrum = [
        (density[:, :, d**2 : (d + 1) ** 2] @ density[:, :, d**2 : (d + 1) ** 2].mT)[
            :, *torch.triu_indices(8, 8)
        ]
        for d in range(7)
    ]
    x = torch.cat(spectrum, dim=1)
    for number, layer in enumerate(network.trunk.layers):
        x = layer(torch.log(0.5 * torch.exp(x) + 0.5) if number else x)
    torch.testing.assert_close(network.trunk(batch), x)


@pytest.mark.parametrize("n_interactions", [1, 3])
def test_images_as_nodes_do_not_matter_without_periodicity(n_interactions):
    atoms = rattled_cell()
    atoms.pbc = False
    cluster = Configurations.from_atoms([atoms])
    energies = []
    for padding in ("none", "legacy"):
        settings = parameters_of(
            precision="float64", padding=padding, n_interactions=n_interactions
        )
        network = PaperNetwork(settings, [13], ["dft"], seed=1)
        energies.append(paper.predict(network, cluster).energy)
    np.testing.assert_allclose(energies[0], energies[1], rtol=1e-12)


def test_each_image_is_a_node_that_sees_the_cell_only():
    # One atom with 12 neighbours, all of them images of itself.
    cell = Configurations.from_atoms([bulk("Al")])
    data = paper_set(cell, parameters_of(padding="legacy", cutoff=3.0), [13])
    batch = data.batch(np.array([0]))
    assert batch.atoms.tolist() == [0] * 13
    assert batch.contributes.flatten().tolist() == [True] + [False] * 12
    assert np.diff(data.neighbours.pair_offsets).tolist() == [12] + [1] * 12
    assert data.neighbours.partners[12:].tolist() == [0] * 12


@pytest.mark.parametrize(
    "settings",
    [{"n_interactions": 3}, {"network": "soapnet"}, {"padding": "legacy"}],
    ids=["schnet", "soapnet", "legacy"],
)
def test_forces_are_the_slope_of_the_energy(settings):
    network = PaperNetwork(parameters_of(precision="float64", **settings), [13], ["dft"], seed=1)
    atoms, step = rattled_cell(), 1e-4
    forces = paper.predict(network, Configurations.from_atoms([atoms])).forces
    moved = [atoms.copy(), atoms.copy()]
    moved[0].positions[1, 2] += step
    moved[1].positions[1, 2] -= step
    up, down = paper.predict(network, Configurations.from_atoms(moved)).energy
    assert forces[1, 2] == pytest.approx(-(up - down) / (2 * step), rel=1e-5, abs=1e-8)
    assert abs(forces[1, 2]) > 1e-5
    np.testing.assert_allclose(forces.sum(axis=0), 0.0, atol=1e-10)


def test_a_batch_predicts_what_its_configurations_do_alone():
    network = PaperNetwork(parameters_of(precision="float64"), [13, 14], ["dft"], seed=1)
    frames = [
        rattled_cell(),
        bulk("Si"),
        Atoms("Al", positions=[[0, 0, 0]]),
        Atoms("AlSi", [[0, 0, 0], [0, 0, 2]]),
    ]
    together = paper.predict(network, Configurations.from_atoms(frames))
    alone = [paper.predict(network, Configurations.from_atoms([atoms])) for atoms in frames]
    np.testing.assert_allclose(together.energy, [one.energy[0] for one in alone], rtol=1e-12)
    np.testing.assert_allclose(
        together.forces, np.concatenate([one.forces for one in alone]), atol=1e-12
    )


def test_the_classifier_sees_the_size_of_a_cell_as_published():
    network = PaperNetwork(parameters_of(), [13], ["a", "none"], classifies=True, seed=1)
    network.eval()
    cells = Configurations.from_atoms([rattled_cell(), rattled_cell().repeat((2, 1, 1))])
    data = paper_set(cells, network.settings, network.elements)
    logits = network(data.batch(np.array([0, 1]))).detach()
    assert not torch.allclose(logits[0], logits[1], rtol=1e-2)


def test_soapnet_refuses_two_elements():
    with pytest.raises(ValueError, match="one element"):
        PaperNetwork(PaperParameters(network="soapnet"), [13, 14], ["dft"], seed=0)


def test_a_network_of_many_energies_does_not_predict():
    network = PaperNetwork(parameters_of(), [14], ["soft", "hard"], seed=0)
    with pytest.raises(ValueError, match="one energy"):
        paper.predict(network, rattled(1))


# --- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"network": "painn"}, "network must be one of"),
        ({"alignment": "yes"}, "alignment must be one of"),
        ({"tau": 0.1}, "no setting"),
        ({"epochs": 0}, "epochs must be a whole number"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
        ({"rho": 1}, "true or false"),
        ({"network": "soapnet", "padding": "legacy"}, "only schnet"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        PaperParameters.from_dict(settings)


# --- labels of classes and of the pool --------------------------------------------------------


def test_an_eip_that_failed_is_the_best_one_without_the_fix_and_never_with_it(inputs):
    failed = replace(
        inputs, eip_labels=with_energy(inputs.eip_labels, slice(None), 1, np.nan, failed=True)
    )
    classes = {}
    for fix in (True, False):
        settings = parameters_of(nan_fix=fix)
        eips = paper.align_eips(failed, settings)
        classes[fix] = paper.paper_classes(failed.train, eips, settings)
    assert (classes[True] == 0).all()
    assert (classes[False] == 1).all()


def test_an_eip_without_an_energy_is_no_pseudo_label(inputs):
    failed = replace(
        inputs, eip_labels=with_energy(inputs.eip_labels, slice(None), 0, np.nan, failed=True)
    )
    network = PaperNetwork(parameters_of(), [14], ["soft", "hard", "none"], classifies=True, seed=0)
    with torch.no_grad():
        network.head.layers[-1].bias[:] = torch.tensor([100.0, 50.0, 0.0])
    with_fix = paper.pseudo_labels(network, failed, parameters_of())
    assert with_fix.choice.tolist() == [1] * len(inputs.pool)
    without = paper.pseudo_labels(network, failed, parameters_of(nan_fix=False))
    assert len(without.ids) == 0


def test_configurations_of_the_class_none_get_no_pseudo_label(inputs):
    network = PaperNetwork(parameters_of(), [14], ["soft", "hard", "none"], classifies=True, seed=0)
    with torch.no_grad():
        network.head.layers[-1].bias[2] = 100.0
    assert len(paper.pseudo_labels(network, inputs, parameters_of()).ids) == 0


@pytest.mark.parametrize("alignment", ["none", "shift", "affine"])
def test_energies_above_the_limit_are_neither_chosen_nor_in_the_alignment(inputs, alignment):
    train = inputs.eip_labels.rows_of(inputs.train.ids)
    absurd = replace(inputs, eip_labels=with_energy(inputs.eip_labels, train[:1], 0, 1e6))
    settings = parameters_of(alignment=alignment, nan_fix=False)
    eips = paper.align_eips(absurd, settings)
    assert np.isinf(eips.energy[train[0], 0])
    assert paper.paper_classes(absurd.train, eips, settings)[0] != 0
    undisturbed = paper.align_eips(inputs, settings)
    np.testing.assert_allclose(eips.energy[20:], undisturbed.energy[20:], atol=0.05)


def test_only_aligned_energies_tell_a_right_eip_from_a_constant(inputs):
    # The right one, 1 eV/atom too high.
    high = with_energy(inputs.eip_labels, slice(None), 0, inputs.eip_labels.energy[:, 0] + 8.0)
    shifted = replace(inputs, eip_labels=high)
    classes = {}
    for alignment in ("none", "shift"):
        settings = parameters_of(alignment=alignment)
        eips = paper.align_eips(shifted, settings)
        classes[alignment] = paper.paper_classes(shifted.train, eips, settings)
    assert (classes["shift"] == 0).all()
    assert (classes["none"] != 0).all()


@pytest.mark.parametrize(("alignment", "error"), [("shift", 0.05), ("affine", 1e-3)])
def test_an_affine_alignment_finds_the_scale_too(inputs, alignment, error):
    scaled = with_energy(
        inputs.eip_labels, slice(None), 0, 1.5 * inputs.eip_labels.energy[:, 0] - 8.0
    )
    eips = paper.align_eips(replace(inputs, eip_labels=scaled), parameters_of(alignment=alignment))
    wrong = np.abs(eips.energy[:, 0] - inputs.eip_labels.energy[:, 0]) / eips.n_atoms
    assert wrong.mean() < error
    assert (wrong.mean() > 1e-3) == (alignment == "shift")


def test_the_oracle_takes_the_eip_that_is_closest(inputs):
    pool = labels_of(inputs.part(inputs.pool), {"dft": HARD})
    labels = paper.oracle_pseudo_labels(pool, inputs, parameters_of())
    assert labels.choice.tolist() == [1] * len(inputs.pool)
    np.testing.assert_allclose(labels.energy, pool.energy[:, 0])


def test_noisy_labels_are_off_by_mean_and_spread(inputs):
    pool = labels_of(rattled(200, seed=3), {"dft": HARD})
    labels = paper.noisy_pseudo_labels(pool, 2.0, 0.5, np.random.default_rng(0))
    error = labels.energy - pool.energy[:, 0]
    assert error.mean() == pytest.approx(2.0, abs=0.1)
    assert error.std() == pytest.approx(0.5, abs=0.1)


def test_a_configuration_in_two_parts_is_refused(inputs):
    with pytest.raises(ValueError, match="in two of"):
        replace(inputs, pool=inputs.train.ids[:1])


def test_pseudo_labels_of_other_configurations_are_refused(inputs):
    pseudo = paper.PseudoLabels(inputs.validation.ids, np.zeros(6), np.zeros(6, np.int64))
    with pytest.raises(ValueError, match="not of the pool"):
        paper.train(inputs, parameters_of(), seed=0, pseudo=pseudo)


# --- training -------------------------------------------------------------------------------


def test_transfer_copies_the_trunk_and_nothing_else(inputs):
    settings = parameters_of(epochs=1, learning_rate=1e-30)
    pretrained = paper.pretrain(inputs, settings, seed=1).network
    tuned = paper.train(inputs, settings, seed=2, pretrained=pretrained).network
    scratch = paper.train(inputs, settings, seed=2).network
    for name, weight in tuned.trunk.state_dict().items():
        torch.testing.assert_close(weight, pretrained.trunk.state_dict()[name], rtol=0, atol=0)
    for name, weight in tuned.head.state_dict().items():
        torch.testing.assert_close(weight, scratch.head.state_dict()[name], rtol=0, atol=0)


def test_nothing_is_frozen_after_transfer(inputs):
    settings = parameters_of(epochs=2)
    pretrained = paper.pretrain(inputs, settings, seed=1).network
    tuned = paper.train(inputs, settings, seed=2, pretrained=pretrained).network
    for name, weight in tuned.trunk.named_parameters():
        before = pretrained.trunk.state_dict()[name]
        # Of the embedding only the row of silicon is ever used.
        changed = (weight.detach() != before).any()
        assert changed, f"{name} did not change"


def test_a_trunk_of_another_architecture_is_refused(inputs):
    pretrained = PaperNetwork(parameters_of(cutoff=5.0), [14], ["soft", "hard"], seed=0)
    with pytest.raises(ValueError, match="does not fit"):
        paper.train(inputs, parameters_of(), seed=0, pretrained=pretrained)


def test_the_same_seed_gives_the_same_weights_and_another_one_does_not(inputs):
    first, again, other = (
        paper.train(inputs, parameters_of(epochs=2), seed=seed).network.state_dict()
        for seed in (3, 3, 4)
    )
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
    assert not torch.equal(first["head.layers.0.weight"], other["head.layers.0.weight"])


@pytest.mark.parametrize("network", ["schnet", "soapnet"])
def test_training_lowers_the_error(inputs, network):
    result = paper.train(inputs, parameters_of(epochs=25, network=network), seed=0)
    errors = [epoch["validation"] for epoch in result.history]
    assert min(errors) < 0.3 * errors[0]
    assert result.n_steps == 25 * (12 // 4)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (paper.train, [1.0, 0.802, 0.604, 0.406, 0.208]),
        (paper.pretrain, [1 / 32, 1.0, 0.7578, 0.5156, 0.2734]),
        (paper.train_classifier, [1 / 32, 1.0, 0.7578, 0.5156, 0.2734]),
    ],
)
def test_each_stage_has_the_published_schedule(inputs, stage, expected):
    result = stage(inputs, parameters_of(epochs=5, learning_rate=0.002), seed=0)
    rates = [epoch["learning_rate"] / 0.002 for epoch in result.history]
    np.testing.assert_allclose(rates, expected, rtol=1e-3)


def test_the_weights_are_those_of_the_epoch_that_validates_best(inputs):
    result = paper.train(inputs, parameters_of(epochs=12, learning_rate=0.01), seed=0)
    errors = [epoch["validation"] for epoch in result.history]
    predicted = paper.predict(result.network, inputs.part(inputs.validation.ids))
    error = np.abs(predicted.energy - inputs.validation.energy[:, 0]).mean()
    assert result.best_epoch == np.argmin(errors) + 1
    assert error == pytest.approx(min(errors), rel=1e-5)


def test_pretraining_learns_every_eip(inputs):
    result = paper.pretrain(inputs, parameters_of(epochs=25), seed=0)
    errors = [epoch["validation"] for epoch in result.history]
    assert min(errors) < 0.3 * errors[0]
    assert result.network.outputs == ("soft", "hard")


def test_both_strategies_together_learn(inputs):
    settings = parameters_of(epochs=10)
    classifier = paper.train_classifier(inputs, settings, seed=0)
    # SOFT is what the labels are made of, so it is right everywhere.
    assert classifier.history[classifier.best_epoch - 1]["validation"] == 0.0
    pseudo = paper.pseudo_labels(classifier.network, inputs, settings)
    expected = inputs.eip_labels.take(inputs.eip_labels.rows_of(pseudo.ids)).energy[:, 0]
    assert len(pseudo.ids) > 0
    np.testing.assert_allclose(pseudo.energy, expected)
    pretrained = paper.pretrain(inputs, settings, seed=0).network
    result = paper.train(inputs, settings, seed=0, pseudo=pseudo, pretrained=pretrained)
    errors = [epoch["validation"] for epoch in result.history]
    assert min(errors) < errors[0]
    assert result.n_steps == 10 * ((12 + len(pseudo.ids)) // 4)


def test_pseudo_labels_change_what_is_learnt(inputs):
    eips = inputs.eip_labels.take(inputs.eip_labels.rows_of(inputs.pool))
    pseudo = paper.PseudoLabels(inputs.pool, eips.energy[:, 0], np.zeros(14, np.int64))
    weights = [
        paper.train(
            inputs, parameters_of(epochs=2, alpha=alpha), seed=0, pseudo=pseudo
        ).network.state_dict()["head.layers.0.weight"]
        for alpha in (0.0, 5.0)
    ]
    assert not torch.allclose(weights[0], weights[1])


def test_too_few_configurations_for_a_batch_are_refused(inputs):
    with pytest.raises(ValueError, match="do not fill a batch"):
        paper.train(inputs, parameters_of(batch_size=32), seed=0)


def test_a_loss_that_is_not_finite_is_reported(inputs):
    absurd = replace(inputs, train=with_energy(inputs.train, slice(None), 0, np.inf))
    with pytest.raises(Diverged, match="epoch 1"):
        paper.train(absurd, parameters_of(), seed=0)
