"""Forces along random directions: of all heads, in one pass."""

import numpy as np
import pytest
from ase.build import bulk

from aiida_eipnn.science.configurations import Configurations

torch = pytest.importorskip("torch")

from aiida_eipnn.science.nn import directions  # noqa: E402
from aiida_eipnn.science.nn.directions import (  # noqa: E402
    DrawnDirections,
    KeptDirections,
    directed_set,
    forces_along,
)
from aiida_eipnn.science.nn.network import (  # noqa: E402
    Network,
    NetworkParameters,
    derivatives,
    describe_configurations,
    with_gradient,
)

pytestmark = pytest.mark.usefixtures("torch")

ELEMENTS = (6, 14)
HEADS = ("first", "second", "third")
TRUNKS = {
    "power_spectrum": {"n_radial": 4, "l_max": 2, "width": 12},
    "schnet": {"n_radial": 8, "width": 12, "depth": 2},
}


def some_configurations():
    """Return crystals of different sizes, a cluster and an atom with nobody around."""
    rng = np.random.default_rng(4)
    crystal = bulk("SiC", "zincblende", a=4.36, cubic=True)
    cluster = crystal.copy()
    cluster.pbc = False
    alone = crystal[:1]
    alone.pbc = False
    frames = [crystal, bulk("SiC", "zincblende", a=4.3), cluster, alone]
    for atoms in frames:
        atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
    return Configurations.from_atoms(frames)


def network_for(trunk, configurations):
    parameters = NetworkParameters.from_dict({"trunk": trunk, **TRUNKS[trunk]})
    network = Network(parameters, ELEMENTS, HEADS)
    network.initialise(3)
    described = describe_configurations(configurations, parameters, ELEMENTS)
    network.trunk.standardise(described)
    network.heads.scale.fill_(0.7)
    return network, described


def forces_and_energies(network, described, n):
    """Return what derivatives by all positions say, head by head."""
    batch = with_gradient(described.batch(np.arange(n)))
    energies = network.energies(network.trunk(batch), batch.graph)
    forces = [derivatives(column, batch, trainable=False).forces for column in energies.T]
    return torch.stack(forces).numpy(), energies.detach().numpy()


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("kept", [True, False])
def test_one_pass_gives_what_derivatives_of_every_head_give(trunk, kept):
    configurations = some_configurations()
    network, described = network_for(trunk, configurations)
    if kept and not network.settings.has_fixed_descriptors:
        pytest.skip("only fixed descriptors are kept")
    directed = (
        KeptDirections(configurations, network.settings, ELEMENTS, seed=1)
        if kept
        else DrawnDirections(described)
    )
    n_atoms = configurations.n_atoms

    moved = directed.move(network, np.arange(4), np.random.default_rng(0))

    forces, energies = forces_and_energies(network, described, 4)
    np.testing.assert_allclose(
        moved.energies.detach().numpy(), energies / n_atoms[:, None], atol=1e-10
    )
    np.testing.assert_allclose(
        moved.along.detach().numpy(),
        forces_along(forces, moved.directions, n_atoms),
        # Kept directions are in single precision.
        atol=1e-6,
    )


def test_the_order_of_rows_is_that_of_the_batch():
    configurations = some_configurations()
    network, _ = network_for("power_spectrum", configurations)
    directed = KeptDirections(configurations, network.settings, ELEMENTS, seed=1)
    rng = np.random.default_rng

    forwards = directed.move(network, np.array([0, 2, 1]), rng(5))
    backwards = directed.move(network, np.array([1, 2, 0]), rng(5))

    assert torch.allclose(forwards.along, backwards.along.flip(0))
    assert torch.allclose(forwards.energies, backwards.energies.flip(0))


def test_forces_along_a_direction_are_as_large_as_force_components():
    rng = np.random.default_rng(0)
    n_atoms = np.full(400, 5)
    forces = rng.normal(0, 2.0, (1, 2000, 3))

    along = forces_along(forces, rng.normal(size=(2000, 3)), n_atoms)

    assert along.shape == (400, 1)
    assert np.sqrt((along**2).mean()) == pytest.approx(2.0, rel=0.1)


def test_weights_can_be_trained_on_forces_along_directions():
    configurations = some_configurations()
    for trunk in TRUNKS:
        network, described = network_for(trunk, configurations)
        moved = DrawnDirections(described).move(network, np.arange(3), np.random.default_rng(1))

        moved.along.square().sum().backward()

        # A bias of the last layer moves no force.
        grads = [weight.grad for weight in network.trunk.parameters() if weight.grad is not None]
        assert len(grads) > 3
        assert all(torch.isfinite(grad).all() and grad.any() for grad in grads)


def test_a_set_that_is_too_large_is_not_kept(monkeypatch):
    configurations = some_configurations()
    parameters = NetworkParameters.from_dict(TRUNKS["power_spectrum"])

    assert isinstance(directed_set(configurations, parameters, ELEMENTS, 0), KeptDirections)
    monkeypatch.setattr(directions, "MAX_KEPT_BYTES", 100)
    assert isinstance(directed_set(configurations, parameters, ELEMENTS, 0), DrawnDirections)
