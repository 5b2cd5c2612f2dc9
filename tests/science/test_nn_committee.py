"""A committee in files, as a predictor, and as an ASE calculator."""

import json
from importlib import metadata

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.md.verlet import VelocityVerlet

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels

torch = pytest.importorskip("torch")

from aiida_eipnn.science.nn.calculator import CommitteeCalculator  # noqa: E402
from aiida_eipnn.science.nn.committee import Committee  # noqa: E402
from aiida_eipnn.science.nn.network import (  # noqa: E402
    Network,
    NetworkParameters,
    describe_configurations,
    fit_pooling,
)
from aiida_eipnn.science.predictions import join_predictions  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch")

CARBIDE = (6, 14)
SETTINGS = NetworkParameters(n_radial=5, l_max=2, width=16)


def carbide(seed=0):
    atoms = bulk("SiC", "zincblende", a=4.36)
    atoms.positions += np.random.default_rng(seed).normal(0, 0.15, (2, 3))
    return atoms


def committee_of(n_members=2, heads=("dft",), classes=(), eips=(), stage="finetune"):
    described = describe_configurations(
        Configurations.from_atoms([carbide(seed) for seed in range(6)]), SETTINGS, CARBIDE
    )
    members = []
    for seed in range(n_members):
        network = Network(SETTINGS, CARBIDE, heads, classes)
        network.initialise(seed)
        network.trunk.standardise(described)
        fit_pooling(network, described)
        with torch.no_grad():
            network.heads.reference += torch.tensor([-150.0, -107.0])
        members.append(network)
    seeds = tuple(range(n_members))
    return Committee(members=tuple(members), stage=stage, seeds=seeds, eips=eips)


def assert_equal_predictions(first, second):
    for name, array in first.arrays().items():
        np.testing.assert_array_equal(array, second.arrays()[name], err_msg=name)


def test_a_saved_committee_predicts_the_same(tmp_path):
    committee = committee_of(eips=("a", "b"))
    frames = Configurations.from_atoms([carbide(), carbide(1)])

    committee.save(tmp_path)
    loaded = Committee.load(tmp_path)

    assert_equal_predictions(committee.predict(frames), loaded.predict(frames))
    assert (loaded.stage, loaded.seeds, loaded.eips) == ("finetune", (0, 1), ("a", "b"))
    assert loaded.parameters == SETTINGS


def test_the_files_are_readable_without_pickles(tmp_path):
    committee_of().save(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "weights.safetensors",
    ]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["elements"] == ["C", "Si"]
    assert config["heads"] == ["dft"]
    assert config["reference_energies"][1] == {"dft": {"C": -150.0, "Si": -107.0}}
    assert config["schema_version"] == 2
    assert config["versions"]["torch"] == metadata.version("torch")


def test_a_committee_of_a_newer_version_is_refused(tmp_path):
    committee_of().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"schema_version": 3}))

    with pytest.raises(ValueError, match="version 3, this program reads up to 2; update"):
        Committee.load(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    committee_of().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["network"]["width"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match=r"the weights do not fit config\.json"):
        Committee.load(tmp_path)


def test_a_committee_of_the_first_version_is_read(tmp_path):
    committee = committee_of()
    committee.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["n_drawn"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"schema_version": 1}))
    frames = Configurations.from_atoms([carbide()])

    loaded = Committee.load(tmp_path)

    assert loaded.n_heads == 2
    assert loaded.predict(frames).strangeness is None
    assert_equal_predictions(committee.predict(frames), loaded.predict(frames))


def test_an_unknown_element_is_named():
    with pytest.raises(ValueError, match=r"does not know .*Ge.*, only .*C.*Si"):
        committee_of().predict(Configurations.from_atoms([Atoms("Ge", [[0, 0, 0]])]))


def test_the_mean_and_the_spread_are_those_of_the_members():
    committee = committee_of(3)
    frames = Configurations.from_atoms([carbide(), carbide(1).repeat(2)])

    together = committee.predict(frames)
    alone = [
        Committee(members=(member,), stage="finetune", seeds=(0,)).predict(frames)
        for member in committee.members
    ]

    energies, forces = (
        np.array([getattr(p, name) for p in alone]) for name in ("energy", "forces")
    )
    np.testing.assert_allclose(together.energy, energies.mean(axis=0))
    np.testing.assert_allclose(together.energy_std, (energies / [2, 16]).std(axis=0))
    variance = ((forces - forces.mean(axis=0)) ** 2).sum(axis=2).mean(axis=0)
    np.testing.assert_allclose(together.forces_std, np.sqrt(variance))
    np.testing.assert_array_equal(together.features, alone[0].features)
    np.testing.assert_array_equal(alone[0].forces_std, 0)


def test_the_batch_size_does_not_matter():
    committee = committee_of()
    frames = Configurations.from_atoms(
        [carbide(seed).repeat((1 + seed % 2, 1, 1)) for seed in range(5)]
    )

    one, two = committee.predict(frames, 1), committee.predict(frames, 2)

    for name in ("energy", "forces", "stress"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(one.features, two.features, rtol=1e-6, atol=1e-6)


def test_predictions_come_in_parts_no_larger_than_a_batch():
    committee = committee_of()
    frames = Configurations.from_atoms([carbide(seed) for seed in range(3)])
    parts = list(committee.predict_parts(frames, 2))

    assert [len(part) for part in parts] == [2, 1]
    assert_equal_predictions(join_predictions(parts), committee.predict(frames, 2))


def test_what_is_unknown_is_found_before_the_first_part():
    frames = Configurations.from_atoms([carbide(), Atoms("Ge", [[0, 0, 0]])])

    with pytest.raises(ValueError, match="does not know Ge"):
        committee_of().predict_parts(frames, 1)


def test_nothing_to_predict_gives_nothing():
    predicted = committee_of().predict(Configurations.from_atoms([]))

    assert predicted.energy.shape == (0,)
    assert predicted.features.shape == (0, SETTINGS.width)


def test_a_pretrained_committee_speaks_for_the_consensus():
    committee = committee_of(heads=("a", "consensus"), stage="pretrain")
    member = committee.members[0]
    with torch.no_grad():
        member.heads.reference[0] = 1e6

    predicted = committee.predict(Configurations.from_atoms([carbide()]))

    assert predicted.energy[0] < 0


def test_a_committee_without_energies_says_so():
    committee = committee_of(heads=(), classes=("a", "none"), eips=("a",), stage="classify")

    with pytest.raises(ValueError, match=r"predicts no energies: .* pre-train or fine-tune one"):
        committee.predict(Configurations.from_atoms([carbide()]))


def test_a_selection_covers_all_configurations_and_only_eips_with_a_label():
    committee = committee_of(classes=("a", "b", "none"), eips=("a", "b"), stage="classify")
    with torch.no_grad():
        for member in committee.members:
            member.classifier.bias += torch.tensor([9.0, 6.0, 0.0])
    frames = Configurations.from_atoms([carbide(seed) for seed in range(4)])
    labels = Labels.missing(frames.take([2, 0, 1]), ["a", "b"])
    # In the order of the labels: both, only the second, neither. The last one is not among them.
    labels.status[0], labels.status[1, 1] = 0, 0
    labels.energy[0], labels.energy[1, 1] = -1.0, -1.0

    selection = committee.select(frames, labels)

    assert selection.ids.tolist() == frames.ids.tolist()
    assert selection.choice.tolist() == [1, 2, 0, 2]
    assert selection.probabilities[0, 0] == 0
    np.testing.assert_allclose(selection.probabilities.sum(axis=1), 1)


def test_a_selection_among_other_eips_is_refused():
    committee = committee_of(classes=("a", "none"), eips=("a",), stage="classify")
    frames = Configurations.from_atoms([carbide()])

    with pytest.raises(ValueError, match=r"chooses among \['a'\], but the labels are of \['b'\]"):
        committee.select(frames, Labels.missing(frames, ["b"]))


def test_a_committee_without_classifier_says_so():
    committee = committee_of(eips=("a",))
    frames = Configurations.from_atoms([carbide()])

    with pytest.raises(ValueError, match="no classifier of EIPs; train it in stage classify"):
        committee.select(frames, Labels.missing(frames, ["a"]))


@pytest.fixture
def calculator(tmp_path):
    committee_of().save(tmp_path)
    return CommitteeCalculator.from_folder(tmp_path)


def test_the_calculator_gives_what_the_committee_predicts(calculator):
    atoms = carbide()
    atoms.calc = calculator
    predicted = calculator.committee.predict(Configurations.from_atoms([atoms]))

    assert atoms.get_potential_energy() == predicted.energy[0]
    np.testing.assert_array_equal(atoms.get_forces(), predicted.forces)
    np.testing.assert_array_equal(atoms.get_stress(), predicted.stress[0])
    assert calculator.results["free_energy"] == predicted.energy[0]
    assert calculator.results["energy_std"] == predicted.energy_std[0]
    assert calculator.uncertainty == predicted.forces_std.max() > 0


def test_the_forces_of_the_calculator_are_the_slope_of_its_energy(calculator):
    atoms = carbide()
    atoms.calc = calculator
    forces = atoms.get_forces()

    for atom, axis in [(0, 0), (1, 2)]:
        energies = []
        for sign in (1, -1):
            moved = carbide()
            moved.positions[atom, axis] += sign * 1e-4
            moved.calc = calculator
            energies.append(moved.get_potential_energy())
        slope = (energies[0] - energies[1]) / 2e-4
        assert forces[atom, axis] == pytest.approx(-slope, rel=1e-5, abs=1e-6)


def test_the_calculator_is_extensive_and_blind_to_rotation_and_order(calculator):
    atoms = carbide()
    turned = atoms.repeat((2, 1, 1))
    turned.rotate(37, (1, 2, 3), rotate_cell=True)
    turned = turned[[2, 0, 3, 1]]
    atoms.calc = turned.calc = calculator

    assert turned.get_potential_energy() == pytest.approx(
        2 * atoms.get_potential_energy(), rel=1e-9
    )


def test_the_calculator_has_no_stress_without_a_volume(calculator):
    atoms = Atoms("SiC", [[0, 0, 0], [0, 0, 1.9]], calculator=calculator)

    assert atoms.get_forces().shape == (2, 3)
    assert "stress" not in calculator.results


def test_the_calculator_has_no_uncertainty_before_a_calculation(calculator):
    with pytest.raises(ValueError, match="nothing was calculated yet"):
        _ = calculator.uncertainty


def test_molecular_dynamics_conserves_the_energy(calculator):
    # Random networks are rough: a smoother landscape for a time step of half a femtosecond.
    for member in calculator.committee.members:
        with torch.no_grad():
            member.heads.weight *= 0.05
    atoms = carbide().repeat((2, 2, 1))
    atoms.calc = calculator
    thermal = np.sqrt(units.kB * 600 * atoms.get_masses())[:, None]
    atoms.set_momenta(thermal * np.random.default_rng(0).normal(size=(len(atoms), 3)))

    with VelocityVerlet(atoms, 0.5 * units.fs) as dynamics:
        before = atoms.get_total_energy()
        kinetic = atoms.get_kinetic_energy()
        dynamics.run(60)

    assert abs(atoms.get_total_energy() - before) < 0.01 * kinetic
