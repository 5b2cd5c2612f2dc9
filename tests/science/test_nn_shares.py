"""Shares of a batch add up to the batch, whatever computes them."""

import numpy as np
import pytest
from ase.build import molecule

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.pseudo_labels import PseudoLabels

torch = pytest.importorskip("torch")

from small_trainings import HARD, SOFT, labels_of, pool_of, settings_for  # noqa: E402

from aiida_eipnn.science.nn.processes import Processes  # noqa: E402
from aiida_eipnn.science.nn.shares import Share  # noqa: E402
from aiida_eipnn.science.nn.stage import StageInputs  # noqa: E402
from aiida_eipnn.science.nn.stages import prepare  # noqa: E402
from aiida_eipnn.science.nn.training import Step, fit, start_training  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch")

TRUNKS = ["power_spectrum", "schnet", "mace"]


def settings_of(stage, trunk, **training):
    network = {"trunk": trunk, "cutoff": 3.0, "width": 4, "depth": 1, "n_radial": 4, "l_max": 1}
    weights = {"stress_weight": 1.0} if stage == "finetune" else {}
    return settings_for(stage, network, **{"steps": 4, "batch_size": 4, **weights, **training})


def inputs_of(stage, trunk):
    """Return all that a stage can learn from: labels are missing here and there."""
    # Configurations differ in their number of atoms, and one has no volume, so no stress.
    cells = pool_of(6)
    odd = molecule("Si2H6")
    odd.symbols[:] = "Si"
    odd.positions *= 1.6
    configurations = Configurations.from_atoms([*map(cells.atoms, range(6)), odd], "some")
    eip_labels = labels_of(configurations, {"soft": SOFT, "hard": HARD})
    eip_labels.status[2, 1] = 1
    if stage == "pretrain":
        return StageInputs(configurations=configurations, eip_labels=eip_labels)
    labels = labels_of(configurations.take([0, 1, 2, 6]), {"dft": SOFT})
    labels.stress[1] = np.nan
    unknown = configurations.take([3, 4, 5])
    said = labels_of(unknown, {"dft": HARD})
    pseudo = PseudoLabels(
        ids=unknown.ids,
        offsets=said.offsets,
        energy=said.energy[:, 0],
        energy_error=np.array([0.01, 0.02, 0.05]),
        forces=said.forces[0],
        forces_error=np.array([0.1, 0.2, 0.5]),
    )
    start = prepare("pretrain", inputs_of("pretrain", trunk), settings_of("pretrain", trunk))
    return StageInputs(
        configurations=configurations,
        labels=labels,
        eip_labels=eip_labels,
        pseudo=pseudo,
        members=(start.network(0, 0),),
        eips=("soft", "hard"),
    )


def loss_of(stage, network, shares):
    """Return loss, sums and gradients of all shares together."""
    rows, value, sums = np.array([3, 0, 2, 1]), 0.0, {}
    network.zero_grad()
    for share in shares:
        loss = stage.loss(network, rows, Step(0.1, np.random.default_rng(3), share))
        if loss.value.requires_grad:
            loss.value.backward()
        value += float(loss.value.detach())
        for name, (total, count) in loss.sums.items():
            before = sums.get(name, (0.0, 0))
            sums[name] = (before[0] + float(total), before[1] + count)
    return value, sums, {name: weight.grad for name, weight in network.named_parameters()}


@pytest.mark.parametrize("stage", ["pretrain", "classify", "finetune"])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_losses_and_gradients_of_shares_add_up_to_those_of_the_batch(trunk, stage, request):
    if trunk == "mace":
        request.getfixturevalue("mace")
    prepared = prepare(stage, inputs_of(stage, trunk), settings_of(stage, trunk))
    network = prepared.network(1, 0)
    value, sums, gradients = loss_of(prepared, network, [Share()])
    assert value > 0
    # Five shares of four configurations: one is empty.
    for count in (2, 5):
        parts = loss_of(prepared, network, [Share(number, count) for number in range(count)])
        assert parts[0] == pytest.approx(value, rel=1e-10)
        assert list(parts[1]) == list(sums)
        for name, (total, n) in parts[1].items():
            assert (total, n) == (pytest.approx(sums[name][0], rel=1e-10), sums[name][1])
        for name, gradient in parts[2].items():
            if gradients[name] is None:
                assert gradient is None
            else:
                torch.testing.assert_close(gradient, gradients[name], rtol=1e-8, atol=1e-12)


def test_a_batch_in_parts_trains_the_same_network():
    inputs = inputs_of("finetune", "schnet")
    settings = settings_of("finetune", "schnet", batch_size=3, min_epochs=4)
    stage = prepare("finetune", inputs, settings)
    weights = []
    for n_parts in (1, 2, 8):
        state = start_training(stage.network(0, 0), settings.training, 0)
        assert fit(state, stage, settings.training, n_parts=n_parts)
        weights.append(dict(state.network.named_parameters()))
    for other in weights[1:]:
        for name, weight in other.items():
            torch.testing.assert_close(weight, weights[0][name], rtol=1e-8, atol=1e-10)
    assert not torch.equal(weights[0]["heads.weight"], stage.network(0, 0).heads.weight)


def test_a_weight_that_has_no_gradient_in_any_process_is_left_without(tmp_path):
    used, unused = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    used.grad = torch.full((2, 3), 2.0)
    group = torch.distributed
    group.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        Processes(number=0, count=2).add_gradients([used, unused])
    finally:
        group.destroy_process_group()
    assert torch.equal(used.grad, torch.full((2, 3), 2.0))
    # With one of zeros the optimiser would shrink it.
    assert unused.grad is None
