"""The network with its default trunk; test_nn_trunks.py holds what every trunk must do."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111

from aiida_eipnn.science.configurations import Configurations

torch = pytest.importorskip("torch")

from aiida_eipnn.science.nn import descriptor  # noqa: E402
from aiida_eipnn.science.nn.committee import Committee  # noqa: E402
from aiida_eipnn.science.nn.network import (  # noqa: E402
    Network,
    NetworkParameters,
    derivatives,
    describe_configurations,
    with_gradient,
)

pytestmark = pytest.mark.usefixtures("torch")

SILICON_CARBIDE = (6, 14)


def rattle(atoms, amplitude=0.15, seed=0):
    atoms = atoms.copy()
    atoms.positions += np.random.default_rng(seed).normal(0, amplitude, atoms.positions.shape)
    return atoms


def silicon_carbide():
    return rattle(bulk("SiC", "zincblende", a=4.36, cubic=True))


def slab():
    atoms = fcc111("Al", (2, 2, 3), vacuum=4.0)
    atoms.numbers[:] = [6, 14] * 6
    return rattle(atoms)


def cluster():
    atoms = silicon_carbide()
    atoms.pbc = False
    return atoms


def random_committee(elements=SILICON_CARBIDE, n_members=1, **parameters):
    """Return networks that answer strongly, with references that are not zero."""
    frames = [rattle(bulk("SiC", "zincblende", a=4.36, cubic=True), 0.3, seed) for seed in range(4)]
    for atoms in frames:
        atoms.numbers[:] = np.resize(elements, len(atoms))
    settings = NetworkParameters(**parameters)
    members = []
    for seed in range(n_members):
        network = Network(settings, elements, ("dft",))
        network.initialise(seed)
        network.trunk.standardise(
            describe_configurations(Configurations.from_atoms(frames), settings, elements)
        )
        with torch.no_grad():
            network.heads.weight *= 10
            network.heads.reference[0] = torch.linspace(-5, -100, len(elements))
        members.append(network)
    return Committee(members=tuple(members), stage="finetune", seeds=tuple(range(n_members)))


def predict(committee, *frames):
    return committee.predict(Configurations.from_atoms(frames))


def energy(committee, atoms):
    return float(predict(committee, atoms).energy[0])


@pytest.fixture(scope="module")
def committee():
    return random_committee()


def test_a_mirror_image_has_the_same_energy(committee):
    atoms, mirrored = cluster(), cluster()
    mirrored.positions[:, 0] *= -1

    assert energy(committee, mirrored) == pytest.approx(energy(committee, atoms), rel=1e-12)


def test_there_is_no_stress_without_a_volume(committee):
    predicted = predict(committee, silicon_carbide(), slab(), cluster())

    assert np.isfinite(predicted.stress).all(axis=1).tolist() == [True, False, False]
    assert np.isfinite(predicted.forces).all()


def test_nothing_jumps_where_a_neighbour_leaves(committee):
    def dimer(distance):
        return Atoms("SiC", [[0, 0, 0], [0, 0, distance]])

    inside, outside = predict(committee, dimer(5 - 1e-4)), predict(committee, dimer(5 + 1e-4))

    assert inside.energy == pytest.approx(outside.energy, abs=1e-9)
    assert np.abs(inside.forces).max() < 1e-5
    assert np.abs(outside.forces).max() == 0
    assert abs(energy(committee, dimer(2.0)) - float(outside.energy[0])) > 0.01


def test_more_elements_than_channels_are_mixed():
    elements = (3, 6, 8, 14, 32, 50)
    committee = random_committee(elements)
    atoms = rattle(bulk("Si", cubic=True))
    atoms.numbers[:] = np.resize(elements, 8)
    forces = predict(committee, atoms).forces

    moved = [atoms.copy(), atoms.copy()]
    moved[0].positions[1, 2] += 1e-4
    moved[1].positions[1, 2] -= 1e-4
    up, down = predict(committee, *moved).energy

    assert forces[1, 2] == pytest.approx(-(up - down) / 2e-4, rel=1e-5)


def test_single_precision_agrees_with_double():
    double = predict(random_committee(), silicon_carbide())
    single = predict(random_committee(precision="float32"), silicon_carbide())

    np.testing.assert_allclose(single.energy, double.energy, rtol=1e-6)
    largest = np.abs(double.forces).max()
    np.testing.assert_allclose(single.forces, double.forces, atol=1e-4 * largest)


@pytest.mark.parametrize("name", ["trunk.layers.0.weight", "trunk.layers.1.bias", "heads.weight"])
def test_a_loss_on_forces_has_the_right_slope_by_the_weights(name):
    network = random_committee().members[0]
    frames = Configurations.from_atoms([silicon_carbide(), cluster()])
    described = describe_configurations(frames, network.settings, network.elements)
    probe = torch.from_numpy(np.random.default_rng(0).normal(size=(16, 3)))
    weight = dict(network.named_parameters())[name]

    def loss():
        batch = with_gradient(described.batch(np.arange(2)))
        total = network.energies(network.trunk(batch), batch.graph)[:, 0]
        slopes = derivatives(total, batch, trainable=True)
        return (probe * slopes.forces).sum() + slopes.virial.square().sum()

    (slope,) = torch.autograd.grad(loss(), weight)
    entry, h = tuple(0 for _ in weight.shape), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[entry] += sign * h
        values.append(float(loss().detach()))
        with torch.no_grad():
            weight[entry] -= sign * h

    assert float(slope[entry]) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


def test_a_set_too_large_to_keep_is_described_batch_by_batch(monkeypatch):
    frames = Configurations.from_atoms([silicon_carbide(), slab(), cluster()])
    kept = describe_configurations(frames, NetworkParameters(), SILICON_CARBIDE)
    monkeypatch.setattr(descriptor, "MAX_KEPT_BYTES", 0)
    fresh = describe_configurations(frames, NetworkParameters(), SILICON_CARBIDE)

    rows = np.array([2, 0])
    for first, second in zip(kept.batch(rows)[2:], fresh.batch(rows)[2:], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"widht": 32}, r"no setting \['widht'\], only .*'width'"),
        ({"trunk": "nequip"}, "no trunk 'nequip', only .*'power_spectrum'"),
        ({"cutoff": -1.0}, "cutoff must be above 0"),
        ({"n_radial": 0}, "n_radial must be a whole number from 1 on, not 0"),
        ({"depth": 1.5}, "depth must be a whole number"),
        ({"precision": "half"}, "precision must be one of"),
        ({"cutoff": "five"}, "wrong type"),
    ],
)
def test_a_bad_architecture_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        NetworkParameters.from_dict(content)
