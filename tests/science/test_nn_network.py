"""Physics of the network: symmetries, derivatives, size, cutoff."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111
from scipy.spatial.transform import Rotation

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


SHAPES = {"crystal": silicon_carbide, "slab": slab, "cluster": cluster}


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


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rotation_turns_the_forces_and_leaves_the_energy(committee, shape):
    atoms, turned = SHAPES[shape](), SHAPES[shape]()
    matrix = Rotation.from_rotvec([0.3, -1.1, 0.7]).as_matrix()
    turned.set_cell(atoms.cell.array @ matrix.T)
    turned.positions = atoms.positions @ matrix.T

    before, after = predict(committee, atoms), predict(committee, turned)

    assert after.energy == pytest.approx(before.energy, rel=1e-12)
    np.testing.assert_allclose(after.forces, before.forces @ matrix.T, atol=1e-9)


def test_a_mirror_image_has_the_same_energy(committee):
    atoms, mirrored = cluster(), cluster()
    mirrored.positions[:, 0] *= -1

    assert energy(committee, mirrored) == pytest.approx(energy(committee, atoms), rel=1e-12)


def test_order_of_atoms_does_not_matter(committee):
    atoms = silicon_carbide()
    order = np.random.default_rng(0).permutation(len(atoms))

    before, after = predict(committee, atoms), predict(committee, atoms[order])

    assert after.energy == pytest.approx(before.energy, rel=1e-12)
    np.testing.assert_allclose(after.forces, before.forces[order], atol=1e-9)


def test_translation_and_wrapping_change_nothing(committee):
    atoms, moved = silicon_carbide(), silicon_carbide()
    moved.positions += [0.7, -3.1, 12.0]
    moved.positions[2] += 2 * moved.cell[0] - moved.cell[1]

    before, after = predict(committee, atoms), predict(committee, moved)

    assert after.energy == pytest.approx(before.energy, rel=1e-12)
    np.testing.assert_allclose(after.forces, before.forces, atol=1e-9)


@pytest.mark.parametrize("repeats", [(2, 1, 1), (1, 2, 2), (3, 1, 2)])
def test_a_supercell_has_the_energy_of_its_cells(committee, repeats):
    atoms = silicon_carbide()
    n = int(np.prod(repeats))

    small, large = predict(committee, atoms), predict(committee, atoms.repeat(repeats))

    assert large.energy[0] == pytest.approx(n * small.energy[0], rel=1e-10)
    np.testing.assert_allclose(large.forces, np.tile(small.forces, (n, 1)), atol=1e-9)
    np.testing.assert_allclose(large.stress, small.stress, atol=1e-12)
    np.testing.assert_allclose(large.features, small.features, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_forces_are_the_slope_of_the_energy(committee, shape):
    atoms = SHAPES[shape]()
    forces = predict(committee, atoms).forces

    h = 1e-4
    for atom, axis in [(0, 0), (3, 1), (5, 2)]:
        moved = [atoms.copy(), atoms.copy()]
        moved[0].positions[atom, axis] += h
        moved[1].positions[atom, axis] -= h
        up, down = predict(committee, *moved).energy
        assert forces[atom, axis] == pytest.approx(-(up - down) / (2 * h), rel=1e-5, abs=1e-5)


def test_stress_is_the_slope_by_strain(committee):
    atoms = silicon_carbide()
    stress = predict(committee, atoms).stress[0]

    h = 1e-5
    for entry, (a, b) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[a, b] += sign * h / 2
            strain[b, a] += sign * h / 2
            strained = atoms.copy()
            strained.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            energies.append(energy(committee, strained))
        slope = (energies[0] - energies[1]) / (2 * h) / atoms.get_volume()
        assert stress[entry] == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_there_is_no_stress_without_a_volume(committee):
    predicted = predict(committee, silicon_carbide(), slab(), cluster())

    assert np.isfinite(predicted.stress).all(axis=1).tolist() == [True, False, False]
    assert np.isfinite(predicted.forces).all()


def test_a_batch_gives_what_single_predictions_give(committee):
    frames = [silicon_carbide(), cluster(), slab(), Atoms("C", [[0, 0, 0]])]
    together = predict(committee, *frames)

    singles = [predict(committee, atoms) for atoms in frames]

    np.testing.assert_allclose(together.energy, [one.energy[0] for one in singles], rtol=1e-12)
    np.testing.assert_allclose(
        together.forces, np.concatenate([one.forces for one in singles]), atol=1e-9
    )


def test_a_lonely_atom_has_an_energy_and_no_forces(committee):
    predicted = predict(committee, Atoms("Si", [[0, 0, 0]]))

    assert np.isfinite(predicted.energy).all()
    np.testing.assert_array_equal(predicted.forces, 0)


def test_nothing_jumps_where_a_neighbour_leaves(committee):
    def dimer(distance):
        return Atoms("SiC", [[0, 0, 0], [0, 0, distance]])

    inside, outside = predict(committee, dimer(5 - 1e-4)), predict(committee, dimer(5 + 1e-4))

    assert inside.energy == pytest.approx(outside.energy, abs=1e-9)
    assert np.abs(inside.forces).max() < 1e-5
    assert np.abs(outside.forces).max() == 0
    assert abs(energy(committee, dimer(2.0)) - float(outside.energy[0])) > 0.01


def test_elements_are_told_apart_as_centre_and_as_neighbour(committee):
    def triple(*symbols):
        return Atoms(symbols, [[0, 0, 0], [0, 0, 1.9], [0, 2.3, 0]])

    committee = random_committee()
    committee.members[0].heads.reference.zero_()
    energies = [
        energy(committee, triple(*symbols))
        for symbols in (("Si", "C", "C"), ("C", "Si", "C"), ("C", "C", "Si"), ("Si", "Si", "C"))
    ]

    assert min(abs(a - b) for i, a in enumerate(energies) for b in energies[:i]) > 1e-3


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
