"""Pseudo-labels: planted EIPs must be found, and errors as large as they are said to be."""

import json
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from aiida_eipnn.science.arrays import load_arrays, save_arrays
from aiida_eipnn.science.configurations import Configurations, join_configurations
from aiida_eipnn.science.eip.candidates import mean_by_configuration
from aiida_eipnn.science.eip.label_model import (
    METHODS,
    LabelModelParameters,
    make_pseudo_labels,
)
from aiida_eipnn.science.eip.potential import open_potential
from aiida_eipnn.science.eip.pseudo_labels import PseudoLabels, pseudo_weights
from aiida_eipnn.science.eip.quantity_model import MIX
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.reference import fit_alignment
from aiida_eipnn.science.uncertainty import spearman

# Argon, ten times as deep.
LENNARD_JONES = "lennard-jones[epsilon=0.104,sigma=3.4,cutoff=6]"
N_LABELS, N_POOL = 40, 160
SCALE, SHIFT = 1.2, -3.0


def pool_of(n: int, seed: int = 0) -> Configurations:
    rng = np.random.default_rng(seed)
    frames = []
    for number in range(n):
        # Every other one is dense.
        stretch = rng.uniform(0.97, 1.0) if number % 2 else rng.uniform(1.05, 1.1)
        atoms = bulk("Ar", "fcc", a=5.3 * stretch, cubic=True)
        strain = np.eye(3) + 0.01 * rng.normal(size=(3, 3))
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        atoms.positions += rng.uniform(0.02, 0.15) * rng.normal(size=(len(atoms), 3))
        frames.append(atoms)
    return Configurations.from_atoms(frames, "rattled")


def labels_of(pool, energy, forces, names=None, missing=None) -> Labels:
    """Labels of as many sources as there are columns of energies."""
    m = energy.shape[1]
    names = names or (["dft"] if m == 1 else [f"eip{k}" for k in range(m)])
    empty = Labels.missing(pool, names, "broken")
    status = np.zeros((len(pool), m), dtype=np.int64) if missing is None else missing * 1
    per_atom = np.repeat(status > 0, pool.n_atoms, axis=0).T[:, :, None]
    return replace(
        empty,
        energy=np.where(status > 0, np.nan, energy),
        forces=np.where(per_atom, np.nan, forces),
        status=status,
    )


def truth_of(pool) -> Labels:
    """DFT that the structure alone cannot tell."""
    potential = open_potential(LENNARD_JONES)
    labels = [potential.label(pool.atoms(row)) for row in range(len(pool))]
    rng = np.random.default_rng(7)
    energy = np.array([label.energy for label in labels]) + 2.0 * rng.normal(size=len(labels))
    forces = np.concatenate([label.forces for label in labels])
    return labels_of(pool, energy[:, None], (forces + 0.5 * rng.normal(size=forces.shape))[None])


@pytest.fixture(scope="module")
def pool():
    return pool_of(N_LABELS + N_POOL)


@pytest.fixture(scope="module")
def dft(pool):
    return truth_of(pool)


def noisy(pool, dft, energy_noise, force_noise, seed=4, names=None, missing=None) -> Labels:
    """EIPs with these errors (of each EIP, or of each configuration and EIP) on another zero."""
    rng = np.random.default_rng(seed)
    energy_noise = np.broadcast_to(energy_noise, (len(pool), np.shape(energy_noise)[-1]))
    force_noise = np.broadcast_to(force_noise, energy_noise.shape)
    n_atoms = pool.n_atoms[:, None]
    energy = dft.energy + n_atoms * (energy_noise * rng.normal(size=energy_noise.shape))
    by_atom = np.repeat(force_noise, pool.n_atoms, axis=0).T[:, :, None]
    forces = dft.forces + by_atom * rng.normal(size=(by_atom.shape[0], len(pool.numbers), 3))
    return labels_of(pool, energy - SHIFT * n_atoms, forces, names, missing)


def planted(pool, dft) -> Labels:
    """DFT is ``SCALE * E_0 + SHIFT`` where dense, ``E_1 + SHIFT`` elsewhere; the rest is noise."""
    dense = np.arange(len(pool)) % 2 == 1
    noise = 0.3 * np.column_stack([~dense, dense, np.ones(len(pool))])
    eips = noisy(pool, dft, noise, noise)
    scale = np.array([SCALE, 1.0, 1.0])
    return replace(eips, energy=eips.energy / scale, forces=eips.forces / scale[:, None, None])


def unpredictable(pool, dft) -> Labels:
    """DFT that neither structure nor EIPs can tell."""
    rng = np.random.default_rng(8)
    return replace(
        dft,
        energy=dft.energy + 0.5 * pool.n_atoms[:, None] * rng.normal(size=dft.energy.shape),
        forces=dft.forces + rng.normal(size=dft.forces.shape),
    )


def label(pool, dft, eips, method="auto", n=N_LABELS, seed=0, **settings):
    parameters = LabelModelParameters(method=method, **settings)
    return make_pseudo_labels(pool, dft.take(range(n)), eips, parameters, seed)


def errors_of(pseudo: PseudoLabels, dft: Labels):
    """Return the errors of energies per atom and of force components, by configuration."""
    truth = dft.take(dft.rows_of(pseudo.ids))
    energy = np.abs(pseudo.energy - truth.energy[:, 0]) / truth.n_atoms
    forces = np.abs(pseudo.forces - truth.forces[0]).mean(axis=1)
    return energy, mean_by_configuration(forces, truth.n_atoms)


def test_the_alignment_finds_the_planted_scale_and_shift(pool, dft):
    right = planted(pool, dft).take(range(1, N_LABELS, 2))
    alignment = fit_alignment(pool, dft.take(range(N_LABELS)), right)
    assert alignment.scale[0] == pytest.approx(SCALE, abs=0.01)
    assert alignment.shift[0, 0] == pytest.approx(SHIFT, abs=0.03)


def test_the_selector_finds_the_eip_that_is_right_on_each_half(pool, dft):
    pseudo, _ = label(pool, dft, planted(pool, dft), "select")
    energy, forces = errors_of(pseudo, dft)
    # The other EIPs are off by 0.3 eV/atom and 0.3 eV/Å.
    assert (energy < 0.04).mean() > 0.95
    assert (forces < 0.04).mean() > 0.95
    # Though half of the labels speak against it, each is aligned on the other half.
    assert np.median(energy) < 1e-3
    assert np.median(forces) < 5e-3


def test_auto_does_on_the_planted_set_what_no_single_eip_can(pool, dft):
    eips = planted(pool, dft)
    pseudo, model = label(pool, dft, eips)
    energy, forces = errors_of(pseudo, dft)
    assert energy.mean() < 0.25 * model.energy.errors["best EIP"]
    assert forces.mean() < 0.5 * model.forces.errors["best EIP"]


def test_candidates_that_do_better_weigh_more_in_the_mix(pool, dft):
    _, model = label(pool, dft, planted(pool, dft))
    for quantity, useless in ((model.energy, "constant for each element"), (model.forces, "zero")):
        assert quantity.chosen == MIX
        single = {name: error for name, error in quantity.errors.items() if name != MIX}
        best = min(single, key=single.__getitem__)
        assert max(quantity.weights, key=quantity.weights.__getitem__) == best
        assert quantity.weights[useless] < 1e-3


def test_a_stack_averages_out_independent_errors(pool, dft):
    eips = noisy(pool, dft, np.full(6, 0.02), np.full(6, 0.02))
    stacked, _ = label(pool, dft, eips, "stack")
    single = np.abs(eips.energy[N_LABELS:, 0] / 4 + SHIFT - dft.energy[N_LABELS:, 0] / 4).mean()
    energy, forces = errors_of(stacked, dft)
    assert energy.mean() < 0.7 * single
    assert np.median(forces) < 0.7 * 0.016


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_finite_labels_of_what_is_not_labelled(pool, dft, method):
    eips = noisy(pool, dft, np.array([0.01, 0.05, 0.2]), np.array([0.2, 0.02, 0.1]))
    pseudo, model = label(pool, dft, eips, method)
    assert pseudo.ids.tolist() == pool.ids[N_LABELS:].tolist()
    assert np.isfinite(pseudo.energy).all()
    assert np.isfinite(pseudo.forces).all()
    assert pseudo.energy_error.min() >= 1e-3
    assert pseudo.forces_error.min() >= 1e-2
    assert errors_of(pseudo, dft)[0].mean() < 0.06
    assert sum(model.energy.weights.values()) == pytest.approx(1.0)


def test_an_eip_without_a_label_is_not_chosen(pool, dft):
    noise = np.array([1e-4, 0.1, 0.1])
    missing = np.zeros((len(pool), 3), dtype=bool)
    missing[N_LABELS::3, 0] = True
    eips = noisy(pool, dft, noise, noise, missing=missing)
    pseudo, _ = label(pool, dft, eips, "select")
    energy, forces = errors_of(pseudo, dft)
    there = ~missing[N_LABELS:, 0]
    assert energy[there].mean() < 0.005
    assert forces[there].mean() < 0.005
    assert np.isfinite(pseudo.energy).all()
    # The forces are of one of the others, and not what stands in for the one that is missing.
    first = pool.offsets[N_LABELS]
    others = eips.forces[1:, first : first + 4]
    chosen = pseudo.forces[:4]
    scale = (others * chosen).sum(axis=(1, 2)) / (others**2).sum(axis=(1, 2))
    assert np.abs(scale[:, None, None] * others - chosen).max(axis=(1, 2)).min() < 1e-6


def test_labels_that_are_not_finite_count_as_missing(pool, dft):
    noise = np.array([0.01, 0.02, 0.03])
    missing = np.zeros((len(pool), 3), dtype=bool)
    missing[::4, 0] = True
    marked = noisy(pool, dft, noise, noise, missing=missing)
    unmarked = replace(marked, status=np.zeros_like(marked.status))
    first, second = (label(pool, dft, eips)[0] for eips in (marked, unmarked))
    assert np.array_equal(first.energy, second.energy)
    assert np.array_equal(first.forces_error, second.forces_error)


def test_an_eip_that_labelled_nothing_changes_nothing(pool, dft):
    noise = np.array([0.01, 0.02])
    eips = noisy(pool, dft, noise, noise)
    broken = labels_of(
        pool,
        np.column_stack([eips.energy, np.full(len(pool), np.nan)]),
        np.concatenate([eips.forces, np.full((1, *eips.forces[0].shape), np.nan)]),
        missing=np.arange(3) == np.full((len(pool), 1), 2),
    )
    with_it, without = label(pool, dft, broken)[0], label(pool, dft, eips)[0]
    assert np.allclose(with_it.energy, without.energy)
    assert np.allclose(with_it.forces, without.forces)


def test_pseudo_labels_of_noise_count_less_than_half_and_good_ones_more(pool, dft):
    noise = np.full(3, 0.005)
    eips = noisy(pool, dft, noise, noise)
    good, _ = label(pool, dft, eips)
    bad, _ = label(pool, unpredictable(pool, dft), eips)
    assert (pseudo_weights(good.energy_error, half=0.03) >= 0.5).mean() > 0.95
    assert (pseudo_weights(good.forces_error, half=0.1) >= 0.5).mean() > 0.95
    assert (pseudo_weights(bad.energy_error, half=0.03) >= 0.5).mean() < 0.05
    assert (pseudo_weights(bad.forces_error, half=0.1) >= 0.5).mean() < 0.05


def test_energies_and_forces_are_chosen_separately(pool, dft):
    eips = noisy(pool, dft, np.array([0.001, 0.2]), np.array([0.2, 0.001]))
    pseudo, model = label(pool, dft, eips, n=5)
    energy, forces = errors_of(pseudo, dft)
    assert energy.mean() < 0.03
    assert forces.mean() < 0.03
    assert model.energy.errors["best EIP"] < 0.01
    assert model.forces.errors["best EIP"] < 0.01


def test_one_eip_may_have_the_best_energy_and_another_the_best_forces(pool, dft):
    eips = noisy(pool, dft, np.array([0.001, 0.2]), np.array([0.2, 0.001]))
    pseudo, _ = label(pool, dft, eips, "select")
    energy, forces = errors_of(pseudo, dft)
    assert energy.mean() < 0.01
    assert forces.mean() < 0.01


def test_expected_errors_are_as_large_as_the_errors(pool, dft):
    # Half of the space is hard, and a common error is what no combination takes away.
    hard = np.where(np.arange(len(pool)) % 2 == 1, 0.08, 0.01)[:, None]
    truth = noisy(pool, dft, hard, hard, seed=9, names=["dft"])
    eips = noisy(pool, dft, np.full(4, 0.004), np.full(4, 0.004))
    n = 80
    pseudo, model = label(pool, truth, eips, n=n)
    for expected, errors, how in zip(
        (pseudo.energy_error, pseudo.forces_error),
        errors_of(pseudo, truth),
        (model.energy.reliability, model.forces.reliability),
        strict=True,
    ):
        assert expected.mean() == pytest.approx(errors.mean(), rel=0.4)
        assert expected[1::2].mean() > 2 * expected[::2].mean()
        assert spearman(expected, errors) > 0.4
        assert how.n == n
        assert 0.5 < how.coverage[0] < 0.95
        assert how.coverage[2] > 0.9
        assert how.nll < -0.1


def test_far_from_all_labels_larger_errors_are_expected(pool, dft):
    noise = np.full(3, 0.01)
    dense = Atoms("Ar4", cell=4.6 * np.eye(3), pbc=True)
    dense.set_scaled_positions([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    wider = join_configurations([pool, Configurations.from_atoms([dense], "squeezed")])
    pseudo, _ = label(wider, dft, noisy(wider, truth_of(wider), noise, noise))
    assert pseudo.energy_error[-1] > 1.5 * np.median(pseudo.energy_error[:-1])
    assert pseudo.forces_error[-1] > 1.5 * np.median(pseudo.forces_error[:-1])


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_few_labels_are_enough_to_align_the_best_eip(pool, dft, n):
    eips = noisy(pool, dft, np.array([0.3, 0.001, 0.3]), np.array([0.3, 0.001, 0.3]))
    pseudo, model = label(pool, dft, eips, n=n)
    energy, forces = errors_of(pseudo, dft)
    assert energy.mean() < 0.05
    assert forces.mean() < 0.05
    assert model.energy.reliability is None
    assert pseudo.energy_error.min() > 0.5 * energy.mean()


def test_without_an_eip_or_with_a_new_element_no_error_is_small_enough(pool, dft):
    krypton = Configurations.from_atoms([bulk("Kr", "fcc", a=5.6, cubic=True)], "other")
    both = join_configurations([pool, krypton])
    missing = np.zeros((len(both), 2), dtype=bool)
    missing[N_LABELS + 3] = True
    wide = labels_of(
        both, np.append(dft.energy, [[-1.0]], axis=0), np.append(dft.forces, np.zeros((1, 4, 3)), 1)
    )
    noise = np.array([0.01, 0.02])
    pseudo, _ = label(both, dft, noisy(both, wide, noise, noise, missing=missing))
    unknown = np.flatnonzero(np.isinf(pseudo.energy_error))
    assert unknown.tolist() == [3, len(pseudo) - 1]
    assert np.flatnonzero(np.isinf(pseudo.forces_error)).tolist() == unknown.tolist()
    assert np.isfinite(pseudo.energy).all()
    assert pseudo_weights(pseudo.energy_error, half=1.0)[unknown].tolist() == [0.0, 0.0]


def test_the_order_of_the_dft_labels_and_strangers_among_them_do_not_matter(pool, dft):
    eips = noisy(pool, dft, np.full(2, 0.01), np.full(2, 0.01))
    few = eips.take(range(60))
    shuffled = np.random.default_rng(1).permutation(N_LABELS)
    stranger = len(pool) - 1
    one, _ = make_pseudo_labels(pool, dft.take(range(N_LABELS)), few, LabelModelParameters(), 0)
    other, _ = make_pseudo_labels(
        pool, dft.take([stranger, *shuffled]), few, LabelModelParameters(), 0
    )
    assert np.array_equal(one.energy, other.energy)
    assert np.array_equal(one.forces_error, other.forces_error)


def test_a_geometry_that_was_labelled_twice_is_learnt_once(pool, dft):
    frames = [pool.atoms(row) for row in range(10)]
    moved = [atoms.copy() for atoms in frames]
    for atoms in moved:
        atoms.positions += 0.5
    twice = join_configurations([pool, Configurations.from_atoms(moved, "moved")])
    truth = truth_of(twice)
    eips = noisy(twice, truth, np.full(2, 0.01), np.full(2, 0.01))
    rows = [*range(N_LABELS), *range(len(pool), len(twice))]
    pseudo, model = make_pseudo_labels(twice, truth.take(rows), eips, LabelModelParameters(), 0)
    assert model.n_labels == N_LABELS
    assert len(pseudo) == N_POOL


def test_no_more_labels_are_learnt_than_asked_for(pool, dft):
    eips = noisy(pool, dft, np.full(2, 0.01), np.full(2, 0.01))
    pseudo, model = label(pool, dft, eips, max_labels=20)
    assert model.n_labels == 20
    assert len(pseudo) == N_POOL


def test_nothing_is_wanted_where_all_is_labelled(pool, dft):
    eips = noisy(pool, dft, np.full(2, 0.01), np.full(2, 0.01)).take(range(N_LABELS))
    pseudo, model = make_pseudo_labels(
        pool, dft.take(range(N_LABELS)), eips, LabelModelParameters(), 0
    )
    assert len(pseudo) == 0
    assert pseudo.forces.shape == (0, 3)
    assert model.energy.errors


def test_pseudo_labels_survive_a_folder_and_can_be_taken_by_id(pool, dft, tmp_path):
    pseudo, model = label(pool, dft, noisy(pool, dft, np.full(2, 0.01), np.full(2, 0.01)), "soft")
    save_arrays(tmp_path, pseudo.arrays())
    read = PseudoLabels.from_arrays(load_arrays(tmp_path))
    for name, array in pseudo.arrays().items():
        assert np.array_equal(getattr(read, name), array), name
    two = read.take(pseudo.ids[[7, 2]])
    assert two.energy.tolist() == pseudo.energy[[7, 2]].tolist()
    assert np.array_equal(two.forces[:4], pseudo.forces[28:32])
    assert json.loads(json.dumps(model.report()))["energy"]["chosen"] == "soft mix of EIPs"


def test_the_same_seed_makes_the_same_labels(pool, dft):
    eips = noisy(pool, dft, np.full(2, 0.01), np.full(2, 0.01))
    first, again, other = (label(pool, dft, eips, seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first.energy, again.energy)
    assert not np.array_equal(first.energy, other.energy)


def test_weights_fall_with_the_expected_error_from_one_to_nothing():
    weights = pseudo_weights(np.array([0.0, 0.01, 0.02, 0.04, np.inf]), half=0.01)
    np.testing.assert_allclose(weights, [1, 1 / 2, 1 / 5, 1 / 17, 0])


def test_an_error_to_count_half_at_is_needed():
    with pytest.raises(ValueError, match="counts half is 0, not above 0"):
        pseudo_weights(np.array([0.1]), half=0)


def test_a_pseudo_label_that_is_no_number_is_refused_unless_nobody_expects_anything_of_it():
    fields = {
        "ids": np.array(["a", "b"]),
        "offsets": np.array([0, 1, 2]),
        "energy": np.array([1.0, np.nan]),
        "forces": np.zeros((2, 3)),
        "forces_error": np.array([0.1, np.inf]),
    }
    PseudoLabels(**fields, energy_error=np.array([0.1, np.inf]))
    with pytest.raises(ValueError, match="must be finite where an error is expected"):
        PseudoLabels(**fields, energy_error=np.array([0.1, 0.2]))


def test_labels_of_configurations_without_eips_are_refused(pool, dft):
    eips = noisy(pool, dft, np.full(2, 0.01), np.full(2, 0.01)).take(range(N_LABELS, 60))
    with pytest.raises(ValueError, match="label the configurations of the DFT labels with"):
        make_pseudo_labels(pool, dft.take(range(N_LABELS)), eips, LabelModelParameters(), 0)


def test_eips_that_labelled_nothing_are_refused(pool, dft):
    with pytest.raises(ValueError, match="choose EIPs for these elements"):
        label(pool, dft, Labels.missing(pool, ["eip0"]))


def test_labels_of_two_sources_are_refused(pool, dft):
    eips = noisy(pool, dft, np.full(2, 0.01), np.full(2, 0.01))
    with pytest.raises(ValueError, match="must be of one source"):
        make_pseudo_labels(pool, eips, eips, LabelModelParameters(), 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"method": "guess"}, "give one of"),
        ({"n_folds": 1}, "at least 2 folds"),
        ({"energy_floor": 0.0}, "energy_floor must be above 0"),
        ({"max_labels": 3}, "max_labels must be at least 8"),
        ({"fold": 3}, "no setting"),
    ],
)
def test_settings_that_cannot_be_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        LabelModelParameters.from_dict(content)
