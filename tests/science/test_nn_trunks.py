"""What every trunk promises: symmetries, size, derivatives, directional derivatives, files."""

import sys

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111
from scipy.spatial.transform import Rotation

from aiida_eipnn.science.configurations import Configurations

torch = pytest.importorskip("torch")

from aiida_eipnn.science.nn.committee import Committee  # noqa: E402
from aiida_eipnn.science.nn.network import (  # noqa: E402
    Network,
    NetworkParameters,
    derivatives,
    describe_configurations,
    with_gradient,
)
from aiida_eipnn.science.nn.schnet import SchNetTrunk, SchNetVariant  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch")

ELEMENTS = (6, 14)
# Small, deep enough for messages of messages, and with more than one head.
TRUNKS = {
    "power_spectrum": {"n_radial": 4, "l_max": 2, "width": 16, "depth": 2},
    "schnet": {"n_radial": 12, "width": 16, "depth": 3},
    "mace": {"n_radial": 5, "l_max": 2, "width": 6, "depth": 2},
}


def rattle(atoms, amplitude=0.15, seed=0):
    atoms = atoms.copy()
    atoms.positions += np.random.default_rng(seed).normal(0, amplitude, atoms.positions.shape)
    return atoms


def cell():
    """Return two atoms, whose neighbours are images of themselves and of each other."""
    return rattle(bulk("SiC", "zincblende", a=4.36))


def crystal(seed=0):
    return rattle(bulk("SiC", "zincblende", a=4.36, cubic=True), seed=seed)


def slab():
    atoms = fcc111("Al", (2, 1, 3), vacuum=4.0)
    atoms.numbers[:] = [6, 14] * 3
    return rattle(atoms)


def cluster():
    atoms = crystal()
    atoms.pbc = False
    return atoms


SHAPES = {"cell": cell, "crystal": crystal, "slab": slab, "cluster": cluster}


def make_network(name, precision="float64"):
    settings = NetworkParameters.from_dict(
        {"trunk": name, "cutoff": 4.5, "precision": precision, **TRUNKS[name]}
    )
    network = Network(settings, ELEMENTS, ("dft", "other"))
    network.initialise(0)
    frames = Configurations.from_atoms([crystal(seed) for seed in range(3)])
    network.trunk.standardise(describe_configurations(frames, settings, ELEMENTS))
    with torch.no_grad():
        # Strong answers, and references that are not zero.
        network.heads.weight *= 10
        network.heads.reference[0] = torch.tensor([-5.0, -100.0])
    return network


@pytest.fixture(scope="module", params=TRUNKS)
def network(request):
    if request.param == "mace":
        request.getfixturevalue("mace")
    return make_network(request.param)


@pytest.fixture
def committee(network):
    return Committee(members=(network,), stage="finetune", seeds=(0,))


def predict(committee, *frames):
    return committee.predict(Configurations.from_atoms(frames))


def energy(committee, atoms):
    return float(predict(committee, atoms).energy[0])


def read(network, *frames):
    """Return the frames as the trunk reads them, as one batch."""
    described = describe_configurations(
        Configurations.from_atoms(frames), network.settings, network.elements
    )
    return described.batch(np.arange(len(frames)))


def displaced(atoms, move, h):
    atoms = atoms.copy()
    atoms.positions += h * move
    return atoms


def tangent_of(batch, moves):
    """Return how the vectors change when atoms move, with anything in empty places."""
    move = torch.from_numpy(np.concatenate(moves))
    filled = batch.graph.vectors.any(dim=-1, keepdim=True)
    return torch.where(filled, move[batch.graph.partners] - move[:, None], 7.0)


@pytest.fixture
def frames():
    return [crystal(), slab(), Atoms("C", [[0, 0, 0]]), cell()]


@pytest.fixture
def moves(frames):
    rng = np.random.default_rng(1)
    return [rng.normal(size=(len(atoms), 3)) for atoms in frames]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rotation_turns_the_forces_and_leaves_the_energy(committee, shape):
    atoms, turned = SHAPES[shape](), SHAPES[shape]()
    matrix = Rotation.from_rotvec([0.3, -1.1, 0.7]).as_matrix()
    turned.set_cell(atoms.cell.array @ matrix.T)
    turned.positions = atoms.positions @ matrix.T

    before, after = predict(committee, atoms), predict(committee, turned)

    assert after.energy == pytest.approx(before.energy, rel=1e-12)
    np.testing.assert_allclose(after.forces, before.forces @ matrix.T, atol=1e-9)
    assert np.abs(before.forces).max() > 1e-3


def test_order_of_atoms_and_the_place_of_the_cell_do_not_matter(committee):
    atoms, moved = crystal(), crystal()
    moved.positions += [0.7, -3.1, 12.0]
    moved.positions[2] += 2 * moved.cell[0] - moved.cell[1]
    order = np.random.default_rng(0).permutation(len(atoms))

    before, after = predict(committee, atoms), predict(committee, moved[order])

    assert after.energy == pytest.approx(before.energy, rel=1e-12)
    np.testing.assert_allclose(after.forces, before.forces[order], atol=1e-9)


@pytest.mark.parametrize("repeats", [(1, 1, 2), (3, 1, 1), (2, 2, 1)])
def test_a_supercell_has_the_energy_of_its_cells(committee, repeats):
    # Two atoms in the cell: every message between layers passes through an image.
    atoms, n = cell(), int(np.prod(repeats))

    small, large = predict(committee, atoms), predict(committee, atoms.repeat(repeats))

    assert large.energy[0] / n == pytest.approx(small.energy[0], rel=1e-10)
    np.testing.assert_allclose(large.forces, np.tile(small.forces, (n, 1)), atol=1e-9)
    np.testing.assert_allclose(large.stress, small.stress, atol=1e-12)
    np.testing.assert_allclose(large.features, small.features, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_forces_are_the_slope_of_the_energy(committee, shape):
    atoms = SHAPES[shape]()
    forces = predict(committee, atoms).forces

    h = 1e-4
    for atom, axis in [(0, 0), (1, 1), (len(atoms) - 1, 2)]:
        moved = [atoms.copy(), atoms.copy()]
        moved[0].positions[atom, axis] += h
        moved[1].positions[atom, axis] -= h
        up, down = predict(committee, *moved).energy
        assert forces[atom, axis] == pytest.approx(-(up - down) / (2 * h), rel=1e-5, abs=1e-5)


def test_stress_is_the_slope_by_strain(committee):
    atoms = cell()
    stress = predict(committee, atoms).stress[0]

    h = 1e-4
    for entry, (a, b) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):
        pair = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[a, b] += sign * h / 2
            strain[b, a] += sign * h / 2
            pair.append(atoms.copy())
            pair[-1].set_cell(atoms.cell.array @ strain, scale_atoms=True)
        up, down = predict(committee, *pair).energy
        slope = (up - down) / (2 * h) / atoms.get_volume()
        assert stress[entry] == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_nothing_jumps_where_a_neighbour_leaves(committee):
    def chain(distance):
        return Atoms("SiCSi", [[0, 0, 0], [0, 2.0, 0], [0, 0, distance]])

    inside, outside = predict(committee, chain(4.5 - 1e-4)), predict(committee, chain(4.5 + 1e-4))

    assert inside.energy == pytest.approx(outside.energy, abs=1e-7)
    np.testing.assert_allclose(inside.forces, outside.forces, atol=1e-4)
    assert abs(energy(committee, chain(2.5)) - float(outside.energy[0])) > 1e-3


def test_a_batch_gives_what_single_predictions_give(committee):
    frames = [crystal(), Atoms("C", [[0, 0, 0]]), cluster(), slab(), cell()]
    together = predict(committee, *frames)

    singles = [predict(committee, atoms) for atoms in frames]

    np.testing.assert_allclose(together.energy, [one.energy[0] for one in singles], rtol=1e-12)
    np.testing.assert_allclose(
        together.forces, np.concatenate([one.forces for one in singles]), atol=1e-9
    )


def test_a_lonely_atom_has_an_energy_and_no_forces(committee):
    predicted = predict(committee, Atoms("Si", [[0, 0, 0]]), Atoms("C", [[0, 0, 0]]))

    assert np.isfinite(predicted.energy).all()
    assert predicted.energy[0] != predicted.energy[1]
    np.testing.assert_array_equal(predicted.forces, 0)


def test_elements_are_told_apart_as_centre_and_as_neighbour(network):
    def triple(*symbols):
        return Atoms(symbols, [[0, 0, 0], [0, 0, 1.9], [0, 2.3, 0]])

    orders = (("Si", "C", "C"), ("C", "Si", "C"), ("C", "C", "Si"), ("Si", "Si", "C"))
    batch = read(network, *(triple(*symbols) for symbols in orders))
    with torch.no_grad():
        energies = network.energies(network.trunk(batch), batch.graph)[:, 0].tolist()

    assert min(abs(a - b) for i, a in enumerate(energies) for b in energies[:i]) > 1e-3


def test_features_have_the_width_that_the_trunk_says(network):
    with torch.no_grad():
        features = network.trunk(read(network, crystal()))

    assert features.shape == (8, network.trunk.n_features)
    assert features.dtype == torch.float64
    assert torch.unique(features.round(decimals=8), dim=1).shape[1] == network.trunk.n_features


def test_slopes_are_finite_differences_of_the_features(network, frames, moves):
    batch = read(network, *frames)

    with torch.no_grad():
        features, change = network.trunk.slopes(batch, tangent_of(batch, moves))

    h = 1e-4
    with torch.no_grad():
        up, down = (
            network.trunk(
                read(network, *(displaced(*pair, h) for pair in zip(frames, moves, strict=True)))
            )
            for h in (1e-4, -1e-4)
        )
        torch.testing.assert_close(features, network.trunk(batch))
    torch.testing.assert_close(change, (up - down) / (2 * h), rtol=1e-4, atol=1e-5)
    assert change.abs().max() > 0.01


def test_slopes_and_forces_agree_for_every_head(network, frames, moves):
    batch = read(network, *frames)
    _, change = network.trunk.slopes(batch, tangent_of(batch, moves))
    along = (change @ network.heads.weight.T * network.heads.scale).sum(dim=0)

    for head in range(2):
        moving = with_gradient(batch)
        energies = network.energies(network.trunk(moving), moving.graph)
        forces = derivatives(energies[:, head], moving, trainable=False).forces
        work = -(forces * torch.from_numpy(np.concatenate(moves))).sum()
        assert float(along[head].detach()) == pytest.approx(float(work), rel=1e-8)


def test_a_loss_on_slopes_has_the_right_slope_by_the_weights(network, frames, moves):
    batch = read(network, *frames)
    tangent = tangent_of(batch, moves)

    check_weights(
        network, lambda: sum(part.square().sum() for part in network.trunk.slopes(batch, tangent))
    )


def test_a_loss_on_forces_has_the_right_slope_by_the_weights(network, frames):
    batch = read(network, *frames)

    def loss():
        moving = with_gradient(batch)
        energies = network.energies(network.trunk(moving), moving.graph)
        slopes = derivatives(energies[:, 0], moving, trainable=True)
        return slopes.forces.square().sum() + slopes.virial.square().sum()

    check_weights(network, loss)


def check_weights(network, loss):
    """Compare the slope of a loss by some weights, changed together, with finite differences."""
    weights = list(network.trunk.parameters())
    generator = torch.Generator().manual_seed(0)
    moves = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    # The last bias has no part in forces.
    slopes = torch.autograd.grad(loss(), weights, allow_unused=True, materialize_grads=True)
    expected = sum((slope * move).sum() for slope, move in zip(slopes, moves, strict=True))
    h, values = 1e-6, []
    for step in (h, -2 * h, h):
        with torch.no_grad():
            for weight, move in zip(weights, moves, strict=True):
                weight += step * move
        values.append(float(loss().detach()))

    assert float(expected) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4)


def test_every_weight_of_a_trunk_takes_part(network, frames):
    batch = read(network, *frames)

    slopes = torch.autograd.grad(network.trunk(batch).square().sum(), network.trunk.parameters())

    assert all(slope.abs().max() > 0 for slope in slopes)


def test_forces_are_learnt_and_nothing_that_was_standardised_changes(network):
    name = network.settings.trunk
    student, teacher = make_network(name), make_network(name)
    teacher.initialise(1)
    batch = read(student, *(crystal(seed) for seed in range(4)))

    def forces_of(each, trainable):
        moving = with_gradient(batch)
        total = each.energies(each.trunk(moving), moving.graph)[:, 0]
        return derivatives(total, moving, trainable=trainable).forces

    wanted = forces_of(teacher, trainable=False)
    optimiser = torch.optim.Adam(student.parameters(), 5e-3)
    before = {key: value.clone() for key, value in student.trunk.named_buffers()}
    errors = []
    for _ in range(40):
        loss = (forces_of(student, trainable=True) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(float(loss.detach()))

    assert errors[-1] < 0.5 * errors[0]
    assert all(torch.equal(before[key], value) for key, value in student.trunk.named_buffers())


def test_a_saved_committee_predicts_the_same(committee, tmp_path, frames):
    committee.save(tmp_path)
    loaded = Committee.load(tmp_path)

    before, after = predict(committee, *frames), predict(loaded, *frames)

    assert loaded.parameters == committee.parameters
    np.testing.assert_array_equal(after.energy, before.energy)
    np.testing.assert_array_equal(after.forces, before.forces)
    np.testing.assert_array_equal(after.features, before.features)


def test_the_same_seed_gives_the_same_weights(network):
    first, second, other = (make_network(network.settings.trunk) for _ in range(3))
    other.initialise(1)

    states = [each.state_dict() for each in (first, second, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_single_precision_agrees_with_double(network, frames):
    single = make_network(network.settings.trunk, "float32")
    batches = [with_gradient(read(each, *frames)) for each in (network, single)]

    results = []
    for each, batch in zip((network, single), batches, strict=True):
        features = each.trunk(batch)
        energies = each.energies(features, batch.graph)[:, 0]
        forces = derivatives(energies, batch, trainable=False).forces
        results.append((energies.detach(), forces))

    for double, rough in zip(*results, strict=True):
        torch.testing.assert_close(rough, double, rtol=1e-4, atol=float(1e-4 * double.abs().max()))


def test_what_is_fitted_to_the_data_is_the_number_of_neighbours(network):
    if network.settings.trunk == "power_spectrum":
        pytest.skip("fits the spread of its descriptors")
    frames = Configurations.from_atoms([crystal(seed) for seed in range(3)])
    described = describe_configurations(frames, network.settings, ELEMENTS)

    mean = len(described.neighbours.partners) / len(described.neighbours.species)

    assert float(network.trunk.n_neighbours) == pytest.approx(mean)
    assert mean > 10


def test_each_trunk_has_defaults_of_its_own():
    settings = NetworkParameters.from_dict({"trunk": "schnet", "width": 32})

    assert (settings.width, settings.depth, settings.n_radial) == (32, 3, 20)
    assert NetworkParameters.from_dict({}) == NetworkParameters()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mace", None)
    monkeypatch.delitem(sys.modules, "aiida_eipnn.science.nn.mace", raising=False)

    with pytest.raises(ModuleNotFoundError, match=r"pip install aiida-eipnn\[mace\]"):
        Network(NetworkParameters(trunk="mace"), ELEMENTS, ("dft",))


PUBLISHED = SchNetVariant(residual=False, envelope=False, averaged=False, gamma=128 / 5.0)


def published(depth):
    return SchNetTrunk(
        120,
        cutoff=5.0,
        n_radial=128,
        width=128,
        depth=depth,
        dtype=torch.float64,
        variant=PUBLISHED,
    )


def test_the_published_schnet_has_the_published_number_of_weights():
    def count(depth):
        return sum(weight.numel() for weight in published(depth).parameters())

    assert count(5) == 428_160
    assert count(5) - count(4) == 82_560


def test_the_published_schnet_is_what_its_formula_says():
    trunk = published(1)
    trunk.initialise(torch.Generator().manual_seed(0))
    (layers,) = trunk.interactions
    atoms = Atoms("SiSi", [[0, 0, 0], [0, 0, 2.2]])
    described = describe_configurations(
        Configurations.from_atoms([atoms]), NetworkParameters(trunk="schnet"), (14,)
    )
    trunk.standardise(described)
    batch = described.batch(np.arange(1))
    batch = batch._replace(graph=batch.graph._replace(species=torch.tensor([14, 14])))

    def ssp(x):
        return torch.log(0.5 * torch.exp(x) + 0.5)

    centres = torch.linspace(0, 5, 128, dtype=torch.float64)
    gaussians = torch.exp(-25.6 * (2.2 - centres) ** 2)
    filters = ssp(layers.filter_out(ssp(layers.filter_in(gaussians))))
    message = layers.node(trunk.embedding[14]) * filters
    expected = layers.update_out(ssp(layers.update_in(message)))
    torch.testing.assert_close(trunk(batch), expected.expand(2, -1))


def test_a_schnet_without_envelope_jumps_at_the_cutoff():
    """The envelope is what the smoothness of the default comes from."""

    def features(variant, distance):
        trunk = SchNetTrunk(
            1, cutoff=5.0, n_radial=20, width=8, depth=2, dtype=torch.float64, variant=variant
        )
        trunk.initialise(torch.Generator().manual_seed(0))
        frames = Configurations.from_atoms([Atoms("SiSi", [[0, 0, 0], [0, 0, distance]])])
        described = describe_configurations(frames, NetworkParameters(trunk="schnet"), (14,))
        with torch.no_grad():
            return trunk(described.batch(np.arange(1)))

    def jump(variant):
        return float((features(variant, 5 - 1e-6) - features(variant, 5 + 1e-6)).abs().max())

    assert jump(SchNetVariant(envelope=False)) > 1e-3
    assert jump(SchNetVariant()) < 1e-9
