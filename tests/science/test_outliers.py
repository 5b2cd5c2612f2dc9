from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.outliers import refuse_outliers, stray_energies, strongest_forces


def crystals(n=60, n_atoms=2):
    frames = [bulk("Si") * (1, 1, n_atoms // 2) for _ in range(n)]
    for number, atoms in enumerate(frames):
        atoms.positions[0, 0] += 1e-3 * number
    return Configurations.from_atoms(frames)


def labelled(configurations, per_atom):
    """Labels of ``per_atom`` energies of shape (n, m), with small forces."""
    n, m = per_atom.shape
    empty = Labels.missing(configurations, [f"eip-{k}" for k in range(m)])
    return replace(
        empty,
        energy=per_atom * configurations.n_atoms[:, None],
        forces=np.full(empty.forces.shape, 0.1),
        stress=np.zeros((n, m, 6)),
        status=np.zeros((n, m), dtype=np.int64),
    )


def spread_out(n=60, m=4, seed=0):
    rng = np.random.default_rng(seed)
    return -4.5 + rng.gamma(2, 0.15, size=(n, 1)) + rng.normal(scale=0.03, size=(n, m))


def refused(labels, kept):
    return np.argwhere(labels.ok & ~kept.ok).tolist()


def test_sound_labels_of_eips_pass_unchanged():
    configurations = crystals()
    labels = labelled(configurations, spread_out())

    kept = refuse_outliers(configurations, labels)

    assert refused(labels, kept) == []
    assert np.array_equal(kept.energy, labels.energy)


@pytest.mark.parametrize(("shift", "word"), [(-6.0, "below"), (6.0, "above")])
def test_an_eip_that_is_alone_is_refused_on_either_side(shift, word):
    configurations = crystals()
    per_atom = spread_out()
    per_atom[7, 2] += shift
    labels = labelled(configurations, per_atom)

    kept = refuse_outliers(configurations, labels)

    assert refused(labels, kept) == [[7, 2]]
    assert word in kept.failures()[0].reason
    assert np.isnan(kept.energy[7, 2])
    assert np.isnan(kept.stress[7, 2]).all()


def test_free_atoms_on_which_the_eips_agree_are_kept():
    configurations = crystals()
    per_atom = spread_out()
    per_atom[:2] = 0.0
    labels = labelled(configurations, per_atom)

    assert refused(labels, refuse_outliers(configurations, labels)) == []


@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_one_eip_alone_is_judged_by_its_own_spread(shift):
    configurations = crystals()
    per_atom = spread_out(m=1)
    per_atom[3] += shift
    labels = labelled(configurations, per_atom)

    assert refused(labels, refuse_outliers(configurations, labels)) == [[3, 0]]


def test_random_crystals_spread_to_high_energies_and_are_kept():
    configurations = crystals(300)
    per_atom = -4.7 + np.random.default_rng(1).gamma(1.0, 0.8, size=(300, 1))

    energy = per_atom * configurations.n_atoms[:, None]

    assert not stray_energies(configurations, energy, np.ones((300, 1), dtype=bool)).any()


def test_zero_levels_of_elements_make_no_outlier():
    frames = [
        Atoms(["Cu"] * (4 - k % 3) + ["Ag"] * (k % 3), np.arange(12).reshape(4, 3) + 0.01 * k)
        for k in range(60)
    ]
    configurations = Configurations.from_atoms(frames)
    silver = np.array([(atoms.numbers == 47).sum() for atoms in frames])
    energy = (4 * spread_out(m=1)[:, 0] - 4000.0 * silver)[:, None]

    assert not stray_energies(configurations, energy, np.ones((60, 1), dtype=bool)).any()


def test_few_configurations_are_not_judged_by_energy():
    configurations = crystals(10)
    per_atom = spread_out(10)
    per_atom[0] += 100
    labels = labelled(configurations, per_atom)

    assert refused(labels, refuse_outliers(configurations, labels)) == []


def test_what_is_no_number_or_too_strong_is_refused_with_the_reason():
    configurations = crystals(10)
    labels = labelled(configurations, spread_out(10))
    labels.forces[1, 4, 2] = np.nan
    labels.forces[2, 7, 0] = -60.0
    labels.energy[9, 3] = np.inf

    kept = refuse_outliers(configurations, labels)

    reasons = {
        (int(row), int(column)): kept.reasons[kept.status[row, column] - 1]
        for row, column in np.argwhere(~kept.ok)
    }
    assert sorted(reasons) == [(2, 1), (3, 2), (9, 3)]
    assert "not finite" in reasons[2, 1]
    assert "above 50 eV/Å" in reasons[3, 2]


def test_a_label_that_was_missing_keeps_its_reason():
    configurations = crystals()
    labels = labelled(configurations, spread_out())
    labels.status[5, 0] = 1

    kept = refuse_outliers(configurations, labels)

    assert kept.failures() == labels.failures()


def test_forces_may_lie_in_a_file_and_are_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr("aiida_eipnn.science.outliers.BLOCK", 7)
    configurations = crystals()
    labels = labelled(configurations, spread_out())
    stored = np.lib.format.open_memmap(
        tmp_path / "forces.npy", "w+", np.float32, labels.forces.shape
    )
    stored[:] = labels.forces
    stored[3, 100] = [0, 80, 0]

    kept = refuse_outliers(configurations, replace(labels, forces=stored))

    assert refused(labels, kept) == [[50, 3]]
    assert kept.forces is stored


def test_the_strongest_force_of_each_label_is_its_longest_vector():
    configurations = crystals(3)
    labels = labelled(configurations, spread_out(3))
    labels.forces[0, 2] = [3, 4, 0]

    assert strongest_forces(labels)[1, 0] == pytest.approx(5.0)


def test_other_configurations_are_refused():
    configurations = crystals(30)
    labels = labelled(configurations, spread_out(30))

    with pytest.raises(ValueError, match="in their order"):
        refuse_outliers(configurations.take(range(29, -1, -1)), labels)
