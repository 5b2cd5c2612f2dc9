"""Networks on another device, and in lower precision."""

import copy
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pretend_device import PRETENDED, pretended_device  # noqa: E402
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

from aiida_eipnn.science.eip.pseudo_labels import PseudoLabels  # noqa: E402
from aiida_eipnn.science.nn.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from aiida_eipnn.science.nn.device import ON_CPU, choose_device, mixed_precision  # noqa: E402
from aiida_eipnn.science.nn.stage import StageInputs  # noqa: E402
from aiida_eipnn.science.nn.stages import prepare  # noqa: E402
from aiida_eipnn.science.nn.training import fit, start_training  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch")

TRUNKS = ("power_spectrum", "schnet", "mace")


def network_of(trunk):
    small = {"trunk": trunk, "n_radial": 5, "width": 6, "depth": 2, "precision": "float32"}
    return small | {"l_max": 0 if trunk == "schnet" else 1, "cutoff": 3.0}


@pytest.fixture(scope="module")
def teaching():
    """Return what every stage needs: a pool, two EIPs, a few labels and pseudo-labels."""
    pool = pool_of(8)
    eips = labels_of(pool, {"soft": SOFT, "hard": HARD})
    dft = labels_of(pool.take(np.arange(4)), {"dft": SOFT}, shift=-1.0)
    dft = replace(dft, stress=np.full_like(dft.stress, 0.01))
    rest = np.arange(4, 8)
    said = labels_of(pool.take(rest), {"dft": SOFT}, shift=-1.0)
    pseudo = PseudoLabels(
        ids=said.ids,
        offsets=said.offsets,
        energy=said.energy[:, 0],
        energy_error=np.full(4, 1e-3),
        forces=said.forces[0],
        forces_error=np.full(4, 1e-2),
    )
    return StageInputs(configurations=pool, labels=dft, eip_labels=eips, pseudo=pseudo)


def taught(teaching, trunk, device):
    """Train in every stage, and return what the networks say in the end."""
    pool, short = teaching.configurations, {"steps": 3, "batch_size": 3, "min_epochs": 1}
    network = network_of(trunk)
    settings = {
        "pretrain": settings_for("pretrain", network, **short),
        "classify": settings_for("classify", network, **short),
        "finetune": settings_for(
            "finetune", network, **short, validation_fraction=0.25, stress_weight=0.1, n_heads=3
        ),
    }
    settings = {name: replace(item, device=device) for name, item in settings.items()}
    _, first = train("pretrain", replace(teaching, labels=None), settings["pretrain"])
    start = replace(teaching, members=(first.network,))
    stage, tuned = train("finetune", start, settings["finetune"])
    assert stage.teachers.replay is not None
    assert stage.teachers.pseudo is not None
    predicted = committee_of(tuned.network).predict(pool)
    scores = [row["validation_score"] for row in tuned.history]
    assert (predicted.forces_std > 0).all()
    spread = [predicted.forces_std, predicted.energy_std, predicted.strangeness]
    said = [predicted.energy, predicted.forces, predicted.features, *spread, scores]
    if trunk == "mace":
        # What is left does not depend on the trunk, and MACE takes seconds to build.
        return said
    _, classified = train("classify", start, settings["classify"])
    names = tuple(map(str, teaching.eip_labels.sources))
    choice = committee_of(classified.network, stage="classify", eips=names)
    return [*said, choice.select(pool, teaching.eip_labels).probabilities]


@pytest.fixture(params=TRUNKS)
def trunk(request):
    if request.param == "mace":
        request.getfixturevalue("mace")
    return request.param


def test_all_that_is_trained_and_predicted_stays_on_its_device(teaching, trunk):
    expected = taught(teaching, trunk, ON_CPU)
    with pretended_device() as device:
        found = taught(teaching, trunk, device)
    for here, there in zip(expected, found, strict=True):
        np.testing.assert_array_equal(here, there)


def test_the_pretended_device_refuses_what_was_left_on_the_cpu():
    with pretended_device() as device:
        there, here = torch.ones(2, device=device), torch.ones(2)
        assert float((there + there).sum()) == 4
        with pytest.raises(RuntimeError, match="same device"):
            there + here


def test_a_set_too_large_to_keep_stays_on_its_device_too(teaching, monkeypatch):
    monkeypatch.setattr("aiida_eipnn.science.nn.directions.MAX_KEPT_BYTES", 1)
    monkeypatch.setattr("aiida_eipnn.science.nn.descriptor.MAX_KEPT_BYTES", 1)
    expected = taught(teaching, "power_spectrum", ON_CPU)
    with pretended_device() as device:
        found = taught(teaching, "power_spectrum", device)
    np.testing.assert_array_equal(expected[1], found[1])


def test_a_training_goes_on_on_another_device(teaching, tmp_path):
    settings = settings_for(
        "finetune", network_of("power_spectrum"), steps=6, validation_fraction=0.25
    )
    inputs = replace(teaching, pseudo=None)
    _, whole = train("finetune", inputs, settings)
    path = tmp_path / "member.safetensors"

    stage = prepare("finetune", inputs, settings)
    state = start_training(stage.network(0, 0), settings.training, 0)
    left = iter([False] * 2)
    fit(
        state,
        stage,
        settings.training,
        save=lambda state: save_checkpoint(path, state, "same"),
        must_stop=lambda: next(left, True),
    )
    with pretended_device() as device:
        there = replace(settings, device=device)
        stage = prepare("finetune", inputs, there)
        state = start_training(stage.network(0, 0), settings.training, 0)
        load_checkpoint(path, state, "same")
        assert fit(state, stage, settings.training)
        stage.finish(state.network, 0)
        assert state.network.device == PRETENDED
        found = committee_of(state.network).to(ON_CPU)
    assert found.members[0].device == ON_CPU
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, found.members[0].state_dict()[name]), name


def test_networks_to_start_from_stay_where_they_are(teaching, trunk):
    network = network_of(trunk)
    settings = settings_for("finetune", network, steps=1)
    _, first = train("pretrain", teaching, settings_for("pretrain", network, steps=1))
    with pretended_device() as device:
        stage = prepare(
            "finetune",
            replace(teaching, members=(first.network,)),
            replace(settings, device=device),
        )
        assert stage.network(0, 0).device == device
    assert first.network.device == ON_CPU


def test_devices_are_checked(monkeypatch):
    assert choose_device("cpu") == ON_CPU
    with pytest.raises(ValueError, match=r"one of .*not 'gpu'"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == ON_CPU
    with pytest.raises(ValueError, match="torch sees no GPU"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 0)
    assert [choose_device("auto", number).index for number in (1, 2, 3)] == [1, 0, 1]
    assert choose_device("cpu") == ON_CPU


@pytest.mark.parametrize("trunk", ["power_spectrum", "schnet"])
def test_bfloat16_layers_learn_almost_the_same(teaching, trunk):
    inputs = replace(teaching, pseudo=None)
    found = {}
    for name in ("none", "bfloat16"):
        settings = settings_for("finetune", network_of(trunk), steps=40, mixed_precision=name)
        _, state = train("finetune", inputs, settings)
        assert state.network.trunk.reduced_dtype is None
        assert state.network.heads.weight.dtype == torch.float32
        found[name] = committee_of(state.network).predict(teaching.configurations).forces
    difference = np.abs(found["none"] - found["bfloat16"]).mean()
    # Another path, to the same end.
    assert 0 < difference < 0.3 * np.abs(found["none"]).mean()


def test_layers_are_rounded_and_descriptors_are_not(teaching):
    settings = settings_for("finetune", network_of("power_spectrum"), steps=1)
    stage = prepare("finetune", replace(teaching, pseudo=None), settings)
    network = stage.network(0, 0)
    batch = stage.described.batch(np.arange(2))
    exact = network.trunk(batch)
    with mixed_precision(network, "bfloat16"):
        rounded = network.trunk(batch)
    assert rounded.dtype == exact.dtype
    error = float((rounded - exact).detach().norm() / exact.detach().norm())
    # Eight bits: neither equal nor far.
    assert 1e-4 < error < 2e-2
    assert torch.equal(network.trunk(batch), exact)


def test_tf32_is_for_the_steps_only(teaching):
    settings = settings_for(
        "finetune", network_of("power_spectrum"), steps=2, mixed_precision="tf32"
    )
    stage = prepare("finetune", replace(teaching, pseudo=None), settings)
    seen, loss = [], stage.loss
    stage.loss = lambda *given: seen.append(torch.get_float32_matmul_precision()) or loss(*given)
    fit(start_training(stage.network(0, 0), settings.training, 0), stage, settings.training)
    assert set(seen) == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_cannot_be_mixed_is_refused(teaching):
    inputs = replace(teaching, pseudo=None)
    double = network_of("schnet") | {"precision": "float64"}
    settings = settings_for("finetune", double, steps=1, mixed_precision="bfloat16")
    with pytest.raises(ValueError, match="needs a network of precision 'float32'"):
        train("finetune", inputs, settings)
    with pytest.raises(ValueError, match="mixed_precision must be one of"):
        settings_for("finetune", mixed_precision="float16")


def test_mace_does_not_compute_in_bfloat16(teaching, mace):
    settings = settings_for("finetune", network_of("mace"), steps=1, mixed_precision="bfloat16")
    with pytest.raises(ValueError, match="trunk 'mace' do not compute in bfloat16"):
        train("finetune", replace(teaching, pseudo=None), settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_says_the_same(teaching, trunk):
    expected, found = (taught(teaching, trunk, choose_device(name)) for name in ("cpu", "cuda"))
    for here, there in zip(expected, found, strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-4)


def test_a_copy_is_made_only_where_the_device_differs(teaching):
    _, first = train("pretrain", teaching, settings_for("pretrain", SMALL, steps=1))
    committee = committee_of(first.network, stage="pretrain")
    assert committee.to(ON_CPU) is committee
    assert copy.deepcopy(first.network).device == ON_CPU
