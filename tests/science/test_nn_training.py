"""The training loop, and what the stages feed it."""

import math
from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.analytic import LennardJones
from aiida_eipnn.science.eip.pseudo_labels import pseudo_labels_of_selection
from aiida_eipnn.science.eip.selection import (
    NONE,
    Selection,
    SelectionParameters,
    class_labels,
    select,
)

torch = pytest.importorskip("torch")

from small_trainings import (  # noqa: E402
    HARD,
    SMALL,
    SOFT,
    committee_of,
    labels_of,
    pool_of,
    settings_for,
    train,
)

from aiida_eipnn.science.nn.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from aiida_eipnn.science.nn.eip_targets import eip_targets  # noqa: E402
from aiida_eipnn.science.nn.heads import sum_atoms  # noqa: E402
from aiida_eipnn.science.nn.network import (  # noqa: E402
    describe_configurations,
)
from aiida_eipnn.science.nn.sizes import Sizes  # noqa: E402
from aiida_eipnn.science.nn.stage import StageInputs  # noqa: E402
from aiida_eipnn.science.nn.stages import prepare  # noqa: E402
from aiida_eipnn.science.nn.training import (  # noqa: E402
    Diverged,
    Loss,
    Step,
    TrainingParameters,
    fit,
    learning_rate,
    start_training,
)

pytestmark = pytest.mark.usefixtures("torch")


def without(labels, row, column):
    """Return labels of which one is missing."""
    energy, forces, status = labels.energy.copy(), labels.forces.copy(), labels.status.copy()
    energy[row, column], status[row, column] = np.nan, 1
    forces[column, labels.offsets[row] : labels.offsets[row + 1]] = np.nan
    return replace(labels, energy=energy, forces=forces, status=status)


def errors(network, configurations, labels):
    """Return mean absolute errors of energy per atom and of forces."""
    predicted = committee_of(network).predict(configurations)
    energy = (predicted.energy - labels.energy[:, 0]) / labels.n_atoms
    return np.abs(energy).mean(), np.abs(predicted.forces - labels.forces[0]).mean()


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture(scope="module")
def eip_inputs():
    pool = pool_of(24)
    return StageInputs(
        configurations=pool, eip_labels=labels_of(pool, {"soft": SOFT, "hard": HARD})
    )


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_an_interrupted_training_ends_with_the_same_weights(eip_inputs, tmp_path, precision):
    settings = settings_for(
        "pretrain", SMALL | {"precision": precision}, steps=20, batch_size=5, bootstrap=True
    )
    stage, whole = train("pretrain", eip_inputs, settings, seed=7)

    path, pieces = tmp_path / "member.safetensors", 0
    while True:
        state = start_training(stage.network(7, 0), settings.training, 7)
        if path.exists():
            load_checkpoint(path, state, "same")
        # Every piece is three steps, so that it ends in the middle of an epoch of five.
        left = iter([False] * 3)
        done = fit(
            state,
            stage,
            settings.training,
            save=lambda state: save_checkpoint(path, state, "same"),
            must_stop=lambda left=left: next(left, True),
        )
        pieces += 1
        if done:
            break

    assert pieces == 7
    for name, weight in whole.network.state_dict().items():
        if not name.startswith("pooled"):
            assert torch.equal(weight, state.network.state_dict()[name]), name
    assert [row["loss"] for row in state.history] == [row["loss"] for row in whole.history]


def test_an_interrupted_training_with_held_out_labels_ends_with_the_same_weights(tmp_path):
    inputs = judged_inputs()
    settings = settings_for("finetune", steps=60, validation_fraction=0.3, learning_rate=2e-2)
    stage, whole = train("finetune", inputs, settings, seed=3)
    path = tmp_path / "member.safetensors"
    while True:
        state = start_training(stage.network(3, 0), settings.training, 3)
        if path.exists():
            load_checkpoint(path, state, "same")
        left = iter([False] * 7)
        if fit(
            state,
            stage,
            settings.training,
            save=lambda state: save_checkpoint(path, state, "same"),
            must_stop=lambda left=left: next(left, True),
        ):
            break

    for name, weight in whole.network.named_parameters():
        assert torch.equal(weight, state.network.get_parameter(name)), name


def judged_inputs():
    pool = pool_of(14)
    labels = labels_of(pool, {"dft": SOFT})
    # Noise, so that there is something to learn too well.
    noise = np.random.default_rng(0).normal(0, 0.5, labels.forces.shape)
    return StageInputs(configurations=pool, labels=replace(labels, forces=labels.forces + noise))


def test_the_weights_that_did_best_on_held_out_labels_are_used():
    settings = settings_for("finetune", steps=600, validation_fraction=0.3, learning_rate=2e-2)
    stage, state = train("finetune", judged_inputs(), settings)

    scores = [row["validation_score"] for row in state.history]
    assert len(stage) == 9
    assert stage.n_labels == 14
    assert scores[-1] > min(scores)
    assert stage.validate(state.network)["validation_score"] == pytest.approx(min(scores))


def test_training_stops_when_held_out_labels_say_so():
    settings = settings_for(
        "finetune", steps=10_000, validation_fraction=0.3, learning_rate=2e-2, patience=3
    )
    state = train("finetune", judged_inputs(), settings)[1]

    scores = [row["validation_score"] for row in state.history]
    assert len(scores) < 100
    assert np.argmin(scores) == len(scores) - 4


def test_each_member_holds_out_other_labels_until_each_was_held_out_once():
    settings = settings_for("finetune", steps=2, validation_fraction=0.3)
    stage = prepare("finetune", judged_inputs(), settings)
    parts = [set(stage.for_member(member).held_out.tolist()) for member in range(3)]

    assert [len(part) for part in parts] == [5, 5, 5]
    assert set.union(*parts) == set(range(14))
    assert parts[0] == set(stage.held_out.tolist())


@pytest.mark.parametrize("member", [0, 2])
def test_nothing_of_what_a_member_holds_out_is_learnt(member):
    inputs = judged_inputs()
    settings = settings_for("finetune", steps=20, validation_fraction=0.3)
    held = prepare("finetune", inputs, settings).for_member(member).held_out
    labels = inputs.labels
    energy, forces = labels.energy.copy(), labels.forces.copy()
    energy[held] += 5.0
    forces[:, np.isin(np.repeat(np.arange(14), labels.n_atoms), held)] *= 3.0
    other = replace(inputs, labels=replace(labels, energy=energy, forces=forces))

    networks = []
    for each in (inputs, other):
        stage = prepare("finetune", each, settings).for_member(member)
        state = start_training(stage.network(4, member), settings.training, 4)
        for _ in range(5):
            rows = np.arange(len(stage))
            stage.loss(state.network, rows, Step(0.0, np.random.default_rng(0))).value.backward()
            state.optimiser.step()
        networks.append(state.network)

    for name, weight in networks[0].named_parameters():
        assert torch.equal(weight, networks[1].get_parameter(name)), name
    assert torch.equal(networks[0].heads.reference, networks[1].heads.reference)


def test_all_labels_held_out_are_refused():
    with pytest.raises(ValueError, match=r"0\.99 of 14 DFT labels leaves none to learn from"):
        prepare("finetune", judged_inputs(), settings_for("finetune", validation_fraction=0.99))


def test_thousands_of_epochs_are_a_hundred_records(eip_inputs):
    told = []
    settings = settings_for("pretrain", steps=1234)
    stage = prepare("pretrain", eip_inputs, settings)
    state = start_training(stage.network(0, 0), settings.training, 0)

    fit(state, stage, settings.training, report=told.append)

    assert told == state.history
    assert len(told) == 95
    assert [row["epoch"] for row in told[-2:]] == [1222, 1234]


def test_a_checkpoint_of_other_data_is_refused(eip_inputs, tmp_path):
    settings = settings_for("pretrain", steps=1)
    state = train("pretrain", eip_inputs, settings)[1]
    save_checkpoint(tmp_path / "member.safetensors", state, "mine")

    with pytest.raises(ValueError, match="other settings or data; start without it"):
        load_checkpoint(tmp_path / "member.safetensors", state, "yours")


def test_a_broken_checkpoint_is_refused(tmp_path):
    (tmp_path / "member.safetensors").write_bytes(b"half a file")

    with pytest.raises(ValueError, match="is not a checkpoint"):
        load_checkpoint(tmp_path / "member.safetensors", None, "mine")


def test_equal_seeds_give_equal_members_and_others_do_not(eip_inputs):
    settings = settings_for("pretrain", steps=1)
    first, again, other = (
        train("pretrain", eip_inputs, settings, seed)[1].network.heads.weight for seed in (1, 1, 2)
    )

    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_loss_that_is_not_finite_ends_the_training(eip_inputs):
    class Hopeless:
        def __len__(self):
            return 3

        def loss(self, network, rows, step):
            return Loss(network.heads.weight.sum() * math.nan, {})

        def sizes(self, rows, step):
            return [Sizes(np.ones_like(rows), np.ones_like(rows))]

        def validate(self, network):
            return {}

    settings = settings_for("pretrain", steps=2)
    network = prepare("pretrain", eip_inputs, settings).network(0, 0)

    with pytest.raises(Diverged, match="the loss became nan in epoch 1"):
        fit(start_training(network, settings.training, 0), Hopeless(), settings.training)


def test_the_learning_rate_rises_fast_and_falls_to_a_hundredth():
    rates = [learning_rate(progress) for progress in (0.0, 0.02, 0.5, 1.0)]

    assert rates == pytest.approx([0.05, 1.0, 0.52, 0.01], abs=2e-3)


def test_a_small_set_is_seen_often_and_a_large_one_often_enough():
    parameters = TrainingParameters(steps=1000, min_epochs=20, batch_size=10)

    assert [parameters.n_epochs(n) for n in (3, 50, 400, 100_000)] == [1000, 200, 25, 20]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"step": 3}, r"no setting \['step'\], only .*'steps'"),
        ({"steps": 0}, "steps must be a whole number from 1 on, not 0"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"energy_weight": -1}, "energy_weight must not be below 0"),
        ({"ema_decay": 1.0}, "ema_decay must be below 1"),
        ({"bootstrap": 2}, "bootstrap must be true or false"),
        ({"learning_rate": "fast"}, "wrong type"),
    ],
)
def test_bad_training_settings_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        TrainingParameters.from_dict(content, {"steps": 10})


def test_missing_labels_are_masked_and_empty_configurations_dropped(eip_inputs):
    labels = without(without(without(eip_inputs.eip_labels, 3, 0), 5, 0), 5, 1)

    targets = eip_targets(eip_inputs.configurations, labels, (14,))
    stage, state = train(
        "pretrain",
        replace(eip_inputs, eip_labels=labels),
        settings_for("pretrain", steps=2),
    )

    assert len(targets.configurations) == len(stage) == 23
    assert stage.n_labels == 2 * 24 - 3
    assert targets.known[3].tolist() == [False, True, True]
    # Where one EIP is left, it is the consensus.
    assert targets.energy[3, 2] == targets.energy[3, 1]
    assert all(math.isfinite(row["loss"]) for row in state.history)


def test_the_consensus_is_the_median_of_referenced_energies_and_of_forces(eip_inputs):
    middle = LennardJones(epsilon=0.5, sigma=2.12)
    pool = eip_inputs.configurations
    labels = labels_of(pool, {"a": SOFT, "b": HARD, "c": middle})

    targets = eip_targets(pool, labels, (14,))

    np.testing.assert_allclose(targets.energy[:, 3], np.median(targets.energy[:, :3], axis=1))
    np.testing.assert_allclose(targets.forces[3], np.median(labels.forces, axis=0))
    np.testing.assert_allclose(targets.energy[:, :3].mean(axis=0), 0, atol=1e-6)


@pytest.mark.parametrize("energy", [1e6, -1e6])
def test_energies_far_off_on_either_side_are_not_learnt(eip_inputs, energy):
    wrong = eip_inputs.eip_labels.energy.copy()
    wrong[4, 1] = energy

    targets = eip_targets(
        eip_inputs.configurations, replace(eip_inputs.eip_labels, energy=wrong), (14,)
    )

    assert np.argwhere(~targets.known).tolist() == [[4, 1]]
    assert np.nanmax(np.abs(targets.energy)) < 100


def test_a_pretrained_network_knows_its_eips_each_on_its_own_zero():
    pool = pool_of(60)
    labels = labels_of(pool, {"soft": SOFT, "hard": HARD})
    labels = replace(labels, energy=labels.energy - np.array([0.0, 300.0]))
    inputs = StageInputs(configurations=pool, eip_labels=labels)

    network = train("pretrain", inputs, settings_for("pretrain", steps=600))[1].network

    assert network.heads.names == ("soft", "hard", "consensus")
    row = network.heads.row("hard")
    described = describe_configurations(pool, network.settings, (14,))
    with torch.no_grad():
        batch = described.batch(np.arange(60))
        energies = network.energies(network.trunk(batch), batch.graph)
        total = (energies + network.heads.references(batch.graph))[:, row].numpy()
    spread = np.std(labels.energy[:, 1])
    assert np.abs(total - labels.energy[:, 1]).mean() < 0.15 * spread


def test_fine_tuning_beats_the_constant_and_pretraining_beats_scratch():
    pool, test = pool_of(60), pool_of(40, seed=5)
    truth = {"dft": LennardJones(epsilon=0.5, sigma=2.12)}
    chosen = pool.take(range(12))
    eip_labels = labels_of(pool, {"soft": SOFT, "hard": HARD})
    dft, wanted = labels_of(chosen, truth, -100.0), labels_of(test, truth, -100.0)
    pretrained = train(
        "pretrain",
        StageInputs(configurations=pool, eip_labels=eip_labels),
        settings_for("pretrain", steps=600),
    )[1].network
    settings = settings_for("finetune", steps=180)
    inputs = StageInputs(configurations=pool, labels=dft)

    scratch = train("finetune", inputs, settings)[1].network
    taught = replace(inputs, eip_labels=eip_labels, members=(pretrained,))
    tuned = train("finetune", taught, settings)[1].network

    per_atom = wanted.energy[:, 0] / wanted.n_atoms
    constant = np.abs(per_atom - (dft.energy[:, 0] / dft.n_atoms).mean()).mean()
    no_forces = np.abs(wanted.forces).mean()
    assert errors(scratch, test, wanted)[0] < 0.5 * constant
    assert errors(tuned, test, wanted)[0] < 0.5 * errors(scratch, test, wanted)[0]
    assert errors(tuned, test, wanted)[1] < 0.7 * errors(scratch, test, wanted)[1]
    assert errors(tuned, test, wanted)[1] < 0.2 * no_forces


def test_the_zero_of_energy_moves_the_reference_and_nothing_else(eip_inputs):
    pool = eip_inputs.configurations
    networks = [
        train(
            "finetune",
            StageInputs(configurations=pool, labels=labels_of(pool, {"dft": SOFT}, shift)),
            settings_for("finetune", steps=2, min_epochs=1),
        )[1].network
        for shift in (0.0, -5000.0)
    ]

    first, second = (committee_of(network).predict(pool) for network in networks)

    np.testing.assert_allclose(
        (second.energy - first.energy) / pool.n_atoms, -5000.0, rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(first.forces, second.forces, atol=1e-6)


def test_stress_is_learnt_where_it_weighs():
    pool, test = pool_of(12, amplitude=0.03), pool_of(20, seed=3, amplitude=0.03)
    labels, wanted = labels_of(pool, {"dft": SOFT}), labels_of(test, {"dft": SOFT})
    # The label of a configuration that is not periodic has no stress.
    stress = labels.stress.copy()
    stress[0] = np.nan
    inputs = StageInputs(configurations=pool, labels=replace(labels, stress=stress))
    found = {}
    for weight in (0.0, 10.0):
        settings = settings_for(
            "finetune",
            steps=300,
            learning_rate=1e-2,
            stress_weight=weight,
            energy_weight=0.01,
            forces_weight=0.01,
        )
        network = train("finetune", inputs, settings)[1].network
        predicted = committee_of(network).predict(test)
        found[weight] = np.abs(predicted.stress - wanted.stress[:, 0]).mean()

    assert found[10.0] < 0.5 * found[0.0]


def test_members_that_start_alike_are_shaken_apart(eip_inputs):
    pretrained = train("pretrain", eip_inputs, settings_for("pretrain", steps=1))[1].network
    pool = eip_inputs.configurations
    stage = prepare(
        "finetune",
        StageInputs(
            configurations=pool, labels=labels_of(pool, {"dft": SOFT}), members=(pretrained,)
        ),
        settings_for("finetune"),
    )

    first, second = stage.network(1, 0), stage.network(2, 1)

    for name, weight in pretrained.trunk.state_dict().items():
        assert torch.equal(weight, first.trunk.state_dict()[name]), name
    assert not torch.equal(first.heads.weight, second.heads.weight)


def test_the_head_of_dft_starts_as_the_eips_that_fit_it():
    pool = pool_of(60)
    odd = LennardJones(epsilon=0.2, sigma=1.6)
    inputs = StageInputs(
        configurations=pool, eip_labels=labels_of(pool, {"soft": SOFT, "hard": HARD, "odd": odd})
    )
    pretrained = train("pretrain", inputs, settings_for("pretrain", steps=800))[1].network
    few = pool.take(range(8))
    truth = labels_of(few, {"a": SOFT, "b": HARD})
    mixed = replace(
        labels_of(few, {"dft": SOFT}),
        energy=truth.energy.mean(axis=1, keepdims=True) - 50.0 * few.n_atoms[:, None],
        forces=truth.forces.mean(axis=0, keepdims=True),
    )
    stage = prepare(
        "finetune",
        StageInputs(configurations=pool, labels=mixed, members=(pretrained,)),
        settings_for("finetune", head_noise=0.0),
    )

    energy, forces = errors(stage.network(1, 0), few, mixed)

    assert energy < 0.1 * np.std(mixed.energy[:, 0] / few.n_atoms)
    assert forces < 0.2 * np.abs(mixed.forces).mean()


def test_replay_holds_the_heads_of_the_eips():
    pool = pool_of(60)
    eip_labels = labels_of(pool, {"soft": SOFT, "hard": HARD})
    inputs = StageInputs(configurations=pool, eip_labels=eip_labels)
    pretrained = train("pretrain", inputs, settings_for("pretrain", steps=800))[1].network
    few = pool.take(range(6))
    # DFT that no EIP knows anything of.
    truth = labels_of(few, {"dft": LennardJones(epsilon=0.1, sigma=1.5)})
    found = {}
    for weight in (0.0, 1.0):
        settings = settings_for("finetune", steps=400, replay_weight=weight, learning_rate=5e-3)
        tuned = train("finetune", replace(inputs, labels=truth, members=(pretrained,)), settings)[1]
        found[weight] = head_errors(tuned.network, pretrained, pool, eip_labels)

    before = head_errors(pretrained, pretrained, pool, eip_labels)
    assert found[1.0] < 1.1 * before
    assert found[0.0] > 2 * before


def head_errors(network, pretrained, pool, eip_labels):
    """Return the mean error of the EIP heads, in eV/atom, with the heads as they are, or were."""
    described = describe_configurations(pool, network.settings, (14,))
    batch = described.batch(np.arange(len(pool)))
    heads = network.heads if "soft" in network.heads.names else pretrained.heads
    with torch.no_grad():
        features = network.trunk(batch)
        graph = batch.graph
        energy = sum_atoms(heads(features), graph) + heads.references(graph)
    rows = [heads.row("soft"), heads.row("hard")]
    wrong = energy[:, rows].numpy() - eip_labels.energy
    return np.abs(wrong / pool.n_atoms[:, None]).mean()


def test_replay_with_labels_of_other_eips_is_refused(eip_inputs):
    pretrained = train("pretrain", eip_inputs, settings_for("pretrain", steps=1))[1].network
    pool = eip_inputs.configurations
    inputs = StageInputs(
        configurations=pool,
        labels=labels_of(pool.take(range(2)), {"dft": SOFT}),
        eip_labels=labels_of(pool, {"other": HARD}),
        members=(pretrained,),
    )

    with pytest.raises(ValueError, match=r"no heads for \['other'\], only .*'soft'.*replay_weight"):
        prepare("finetune", inputs, settings_for("finetune"))


def planted_selection(n, rng):
    """Return a pool and labels: each EIP is right on its half, up to scale and zero."""
    pool = pool_of(n, strain=0.08, amplitude=0.05)
    volumes = np.linalg.det(pool.cells)
    dense = volumes < np.median(volumes)
    truth = labels_of(pool, {"dft": SOFT}, shift=-100.0)
    wrong = truth.energy[:, 0] + 0.3 * pool.n_atoms * rng.choice([-1, 1], n)
    first, second = (np.where(half, truth.energy[:, 0], wrong) for half in (dense, ~dense))
    eip_labels = replace(
        labels_of(pool, {"first": SOFT, "second": SOFT}),
        energy=np.column_stack([(first + 107.0 * pool.n_atoms) / 1.2, second - 3.0 * pool.n_atoms]),
    )
    return pool, truth, eip_labels, np.where(dense, 0, 1)


def test_the_classifier_finds_the_half_where_each_eip_is_right(rng):
    pool, truth, eip_labels, planted = planted_selection(160, rng)
    pretrained = train(
        "pretrain",
        StageInputs(configurations=pool, eip_labels=labels_of(pool, {"soft": SOFT, "hard": HARD})),
        settings_for("pretrain", steps=50),
    )[1].network
    inputs = StageInputs(
        configurations=pool,
        labels=truth.take(range(60)),
        eip_labels=eip_labels,
        members=(pretrained,),
    )

    stage, state = train("classify", inputs, settings_for("classify", tolerance=0.15))
    committee = committee_of(state.network, stage="classify", eips=("first", "second"))
    selection = committee.select(pool, eip_labels)

    assert (stage.classes == planted[:60]).mean() > 0.95
    assert (selection.choice == planted)[60:].mean() > 0.9
    for name, weight in pretrained.trunk.state_dict().items():
        assert torch.equal(weight, state.network.trunk.state_dict()[name])


def test_classes_are_the_best_eip_within_the_tolerance_and_never_one_without_label():
    pool = pool_of(4)
    reference = labels_of(pool, {"dft": SOFT})
    aligned = replace(
        labels_of(pool, {"a": SOFT, "b": SOFT}),
        energy=reference.energy + np.array([[0.08, -0.4], [8.0, 0.0], [8.0, -8.0], [0.0, 0.08]]),
    )
    aligned = without(aligned, 3, 0)

    # 0.08 eV in eight atoms are 0.01 eV/atom.
    assert class_labels(reference, aligned, SelectionParameters(tolerance=0.02)).tolist() == [
        0,
        1,
        2,
        1,
    ]
    assert class_labels(reference, aligned, SelectionParameters(tolerance=0.001)).tolist() == [
        2,
        1,
        2,
        2,
    ]


def test_an_eip_without_label_has_no_probability_and_is_not_chosen():
    labels = without(labels_of(pool_of(3), {"a": SOFT, "b": HARD}), 1, 0)
    labels = without(without(labels, 2, 0), 2, 1)
    sure = np.tile([0.9, 0.06, 0.04], (3, 1))
    sure[2] = [0.5, 0.5, 0.0]

    selection = select(sure, labels)

    assert selection.sources.tolist() == ["a", "b", NONE]
    np.testing.assert_allclose(selection.probabilities[1], [0, 0.6, 0.4])
    np.testing.assert_allclose(selection.probabilities[2], [0, 0, 1])
    assert selection.choice.tolist() == [0, 1, 2]


def test_pseudo_labels_are_aligned_and_only_where_dft_has_none():
    pool = pool_of(12)
    eip_labels = labels_of(pool, {"a": SOFT, "b": HARD})
    dft = labels_of(pool.take(range(5)), {"dft": SOFT}, shift=-100.0)
    choice = np.array([0, 1, 2] * 4)
    selection = Selection(
        ids=pool.ids,
        sources=np.array(["a", "b", NONE]),
        probabilities=np.eye(3)[choice],
        choice=choice,
    )

    pseudo = pseudo_labels_of_selection(pool, dft, eip_labels, selection)

    chosen = [row for row in range(5, 12) if choice[row] != 2]
    assert pseudo.ids.tolist() == pool.ids[chosen].tolist()
    soft = [place for place, row in enumerate(chosen) if choice[row] == 0]
    rows = [row for row in chosen if choice[row] == 0]
    np.testing.assert_allclose(
        pseudo.energy[soft], eip_labels.energy[rows, 0] - 100.0 * pool.n_atoms[rows], rtol=1e-9
    )
    assert np.isinf(pseudo.forces_error).all()


def test_pseudo_labels_of_a_good_eip_help():
    pool = pool_of(30)
    eip_labels = labels_of(pool, {"good": SOFT, "bad": HARD})
    few = pool.take(range(3))
    dft, wanted = labels_of(few, {"dft": SOFT}, -100.0), labels_of(pool, {"dft": SOFT}, -100.0)
    selection = select(np.tile([1.0, 0.0, 0.0], (30, 1)), eip_labels)
    plain = StageInputs(configurations=pool, labels=dft)
    helped = replace(plain, eip_labels=eip_labels, selection=selection)
    settings = settings_for("finetune", steps=200, learning_rate=1e-2, pseudo_weight=3.0)

    without_pseudo, with_pseudo = (
        errors(train("finetune", inputs, settings)[1].network, pool, wanted)[0]
        for inputs in (plain, helped)
    )

    assert with_pseudo < 0.5 * without_pseudo


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pretrain", "pre-training needs labels of at least one EIP, and there is not one"),
        ("classify", "classification needs DFT labels, and there is not one"),
        ("finetune", "fine-tuning needs DFT labels, and there is not one"),
    ],
)
def test_a_stage_without_labels_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        prepare(name, StageInputs(configurations=pool_of(2)), settings_for(name))


def test_labels_of_unknown_configurations_are_refused():
    labels = labels_of(pool_of(3, seed=9), {"dft": SOFT})

    with pytest.raises(ValueError, match="3 of 3 DFT labels are of configurations that"):
        prepare(
            "finetune",
            StageInputs(configurations=pool_of(2), labels=labels),
            settings_for("finetune"),
        )


def test_an_element_that_the_committee_does_not_know_is_refused(eip_inputs):
    pretrained = train("pretrain", eip_inputs, settings_for("pretrain", steps=1))[1].network
    other = Configurations.from_atoms([bulk("SiC", "zincblende", a=4.36)])
    labels = labels_of(other, {"dft": SOFT})

    with pytest.raises(ValueError, match=r"the network does not know .*C.*only .*Si"):
        prepare(
            "finetune",
            StageInputs(configurations=other, labels=labels, members=(pretrained,)),
            settings_for("finetune"),
        )
