"""Whether EIPs carry information: planted cases must come out as they were planted."""

import numpy as np
import pytest
from ase.build import bulk

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.potential import open_potential
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.worth import (
    MIN_TO_TELL,
    Answer,
    Quantity,
    first_of_copies,
    judge_worth,
)


def pool_of(n: int, seed: int = 0, kinds: int = 1) -> Configurations:
    rng = np.random.default_rng(seed)
    frames = []
    for number in range(n):
        atoms = bulk("Ar", "fcc", a=5.3, cubic=number % 2 == 0)
        strain = np.eye(3) + 0.03 * rng.normal(size=(3, 3))
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        atoms.positions += 0.2 * rng.normal(size=(len(atoms), 3))
        frames.append(atoms)
    return Configurations.from_atoms(frames, [f"kind {number % kinds}" for number in range(n)])


def labels_of(pool, energy, forces, missing=None) -> Labels:
    """Labels of as many sources as there are columns of energies."""
    m = energy.shape[1]
    empty = Labels.missing(pool, ["dft"] if m == 1 else [f"eip{k}" for k in range(m)], "broken")
    status = np.zeros((len(pool), m), dtype=np.int64) if missing is None else missing * 1
    per_atom = np.repeat(status > 0, pool.n_atoms, axis=0).T[:, :, None]
    return Labels.from_arrays(
        {
            **empty.arrays(),
            "energy": np.where(status > 0, np.nan, energy),
            "forces": np.where(per_atom, np.nan, forces),
            "status": status,
        }
    )


def truth_of(pool, seed=3) -> Labels:
    """DFT that a pair potential explains only in part."""
    argon = open_potential("lennard-jones[epsilon=0.0104,sigma=3.4,cutoff=6]")
    rng = np.random.default_rng(seed)
    labels = [argon.label(pool.atoms(row)) for row in range(len(pool))]
    energy = np.array([label.energy for label in labels])
    energy += pool.n_atoms * rng.normal(0, 0.02, len(pool))
    forces = np.concatenate([label.forces for label in labels])
    forces += rng.normal(0, 0.05, forces.shape)
    return labels_of(pool, energy[:, None], forces[None])


def good_eips(pool, dft, m=3, seed=4, missing=None) -> Labels:
    """DFT on other zeros and scales, with small errors."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.8, 1.2, m)
    error = pool.n_atoms[:, None] * rng.normal(0, 0.001, (len(pool), m))
    energy = scale * dft.energy + 3.0 * pool.n_atoms[:, None] + error
    forces = scale[:, None, None] * dft.forces + rng.normal(0, 0.005, (m, *dft.forces[0].shape))
    return labels_of(pool, energy, forces, missing)


def noise(pool, m=4, seed=5) -> Labels:
    rng = np.random.default_rng(seed)
    n_atoms = pool.n_atoms[:, None]
    return labels_of(
        pool,
        n_atoms * rng.normal(-4, 0.1, (len(pool), m)),
        rng.normal(0, 0.3, (m, len(pool.numbers), 3)),
    )


def judge(pool, dft, eips, seed=0):
    return judge_worth(pool, dft, eips, np.random.default_rng(seed))


@pytest.mark.parametrize("n", [24, 70])
def test_eips_near_dft_help(n):
    pool = pool_of(n)
    dft = truth_of(pool)

    worth = judge(pool, dft, good_eips(pool, dft))

    assert worth.answer is Answer.HELP
    assert {row.answer for row in worth.comparisons} == {Answer.HELP}
    assert min(row.gain for row in worth.comparisons) > 0.5
    assert "with EIPs" in worth.text


@pytest.mark.parametrize("seed", range(3))
def test_eips_of_pure_noise_do_not_help(seed):
    pool = pool_of(70, seed, kinds=3)

    worth = judge(pool, truth_of(pool, seed), noise(pool, seed=seed + 10), seed)

    assert worth.answer is Answer.NO_HELP
    assert max(row.high for row in worth.comparisons) < 0.05


def test_a_structure_that_says_it_all_leaves_nothing_to_eips():
    """Poor EIPs are no help where a regression without them is nearly exact."""
    pool = pool_of(70)
    argon = open_potential("lennard-jones[epsilon=0.0104,sigma=3.4,cutoff=6]")
    labels = [argon.label(pool.atoms(row)) for row in range(len(pool))]
    forces = np.concatenate([label.forces for label in labels])[None]
    dft = labels_of(pool, np.array([[label.energy] for label in labels]), forces)
    rng = np.random.default_rng(1)
    poor = np.concatenate([forces, forces]) + rng.normal(0, 0.3, (2, *forces[0].shape))

    worth = judge(pool, dft, labels_of(pool, np.tile(dft.energy, 2) * 0 + 1.0, poor))

    found = [row for row in worth.comparisons if row.quantity is Quantity.FORCES]
    assert {row.answer for row in found} == {Answer.NO_HELP}


def test_few_configurations_cannot_tell():
    pool = pool_of(MIN_TO_TELL - 1)
    dft = truth_of(pool)

    worth = judge(pool, dft, good_eips(pool, dft))

    assert worth.answer is Answer.UNKNOWN
    assert "19 distinct labelled configurations are too few" in worth.text


def test_eips_without_a_label_cannot_tell():
    pool = pool_of(30)
    dft = truth_of(pool)

    worth = judge(pool, dft, good_eips(pool, dft, missing=np.ones((30, 3), bool)))

    assert worth.answer is Answer.UNKNOWN
    assert "no EIP labelled" in worth.text


def test_missing_labels_are_no_obstacle():
    pool = pool_of(60)
    dft = truth_of(pool)
    missing = np.random.default_rng(0).random((60, 3)) < 0.3
    missing[:4] = True

    worth = judge(pool, dft, good_eips(pool, dft, missing=missing))

    assert worth.answer is Answer.HELP


def test_one_kind_at_a_time_is_held_out_where_there_are_three():
    pool, two = pool_of(60, kinds=3), pool_of(60, kinds=2)
    dft = truth_of(pool)
    eips = good_eips(pool, dft)

    held_out = {row.where for row in judge(pool, dft, eips).comparisons}
    without = {row.where for row in judge(two, dft, eips).comparisons}

    assert held_out == {"at random", "one config_type at a time"}
    assert without == {"at random"}


def test_few_labels_are_tried_beside_all():
    pool = pool_of(60)
    dft = truth_of(pool)

    found = judge(pool, dft, good_eips(pool, dft)).comparisons

    assert sorted({row.n_train for row in found}) == [25, 48]


def test_the_same_seed_gives_the_same_answer():
    pool = pool_of(60)
    dft = truth_of(pool)
    eips = good_eips(pool, dft)

    assert judge(pool, dft, eips, 7) == judge(pool, dft, eips, 7)
    assert judge(pool, dft, eips, 7) != judge(pool, dft, eips, 8)


def test_copies_are_found_in_any_orientation():
    pool = pool_of(5)
    dft = truth_of(pool)
    q = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    turned = []
    for row in (1, 3):
        atoms = pool.atoms(row)
        atoms.set_cell(atoms.cell.array @ q.T, scale_atoms=True)
        turned.append(atoms)
    frames = [pool.atoms(row) for row in range(5)] + turned
    forces = [dft.forces_of(row) for row in range(5)]
    forces += [forces[1] @ q.T, forces[3] @ q.T]
    energy = np.append(dft.energy[:, 0], dft.energy[[1, 3], 0])
    everything = Configurations.from_atoms(frames)

    found = first_of_copies(
        everything, labels_of(everything, energy[:, None], np.concatenate(forces)[None])
    )

    assert found.tolist() == [0, 1, 2, 3, 4]


def test_a_copy_never_tells_about_its_original():
    """With every configuration twice, labels that nothing explains stay unexplained."""
    pool = pool_of(60)
    rng = np.random.default_rng(9)
    frames = [pool.atoms(row) for row in range(60)]
    moved = [atoms.copy() for atoms in frames]
    for atoms in moved:
        atoms.positions += 0.5
    both = Configurations.from_atoms(frames + moved)
    energy = np.tile(both.n_atoms[:60] * rng.normal(-3, 0.1, 60), 2)
    half = rng.normal(size=(len(pool.numbers), 3))
    dft = labels_of(both, energy[:, None], np.concatenate([half, half])[None])

    worth = judge(both, dft, noise(both))

    assert worth.n_configurations == 60
    structure = worth.comparisons[0].errors
    assert structure["structure"] > 0.8 * structure["constant for each element"]


def test_the_reason_names_where_eips_do_not_help():
    """Good energies and noise for forces."""
    pool = pool_of(60)
    dft = truth_of(pool)
    eips = good_eips(pool, dft)
    forces = np.random.default_rng(0).normal(0, 0.3, eips.forces.shape)

    worth = judge(pool, dft, labels_of(pool, eips.energy, forces))

    assert worth.answer is Answer.HELP
    assert "the energy of held-out configurations" in worth.text
    assert "elsewhere they do not help (force with 25 labels, at random" in worth.text


def test_an_element_in_one_kind_only_is_not_asked_of_the_others():
    """Its zero of energy is a hundred volts off, and nobody could know."""
    pool = pool_of(60, kinds=4)
    frames = [pool.atoms(row) for row in range(60)]
    for row in range(0, 60, 4):
        frames[row].numbers[0] = 36
    mixed = Configurations.from_atoms(frames)
    plain = truth_of(pool)
    krypton = np.array([(atoms.numbers == 36).sum() for atoms in frames])
    dft = labels_of(mixed, plain.energy - 100.0 * krypton[:, None], plain.forces)
    eips = good_eips(mixed, dft)

    worth = judge(mixed, dft, eips)

    held_out = [row for row in worth.comparisons if row.where == "one config_type at a time"]
    assert {row.n_test for row in held_out} == {45}
    assert max(row.without for row in held_out) < 1.0
