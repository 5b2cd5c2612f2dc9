"""Energy zeros: planted ones come back, and failures are never chosen."""

import warnings

import numpy as np
import pytest
from ase import Atoms

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.reference import (
    MIN_LABELS_FOR_SCALE,
    Alignment,
    best_single,
    fit_alignment,
    fit_reference_energies,
    source_errors,
)

SI, C = 14, 6


def pool_of(n: int, seed: int = 0, elements: tuple[str, ...] = ("Si", "C")) -> Configurations:
    rng = np.random.default_rng(seed)
    return Configurations.from_atoms(
        [
            Atoms(
                rng.choice(elements, size=size), rng.normal(size=(size, 3)), pbc=True, cell=[9] * 3
            )
            for size in rng.integers(3, 9, size=n)
        ]
    )


def labels_of(pool: Configurations, energies: dict[str, np.ndarray], forces=None) -> Labels:
    """Labels with the given energies; where an energy is NaN there is no label."""
    empty = Labels.missing(pool, list(energies), "did not work")
    energy = np.stack(list(energies.values()), axis=1)
    status = np.isnan(energy).astype(np.int64)
    some = np.random.default_rng(1).normal(size=empty.forces.shape) if forces is None else forces
    per_atom = np.repeat(status > 0, pool.n_atoms, axis=0).T[:, :, None]
    stress = np.where(status[:, :, None] > 0, np.nan, 0.1)
    return Labels.from_arrays(
        {
            **empty.arrays(),
            "energy": energy,
            "forces": np.where(per_atom, np.nan, some),
            "stress": np.broadcast_to(stress, empty.stress.shape).copy(),
            "status": status,
        }
    )


def composition(pool: Configurations) -> np.ndarray:
    """Atoms of Si and of C in each configuration."""
    return np.array(
        [[np.sum(pool.atoms(row).numbers == z) for z in (SI, C)] for row in range(len(pool))]
    )


def planted(
    n: int, scale: float = 0.85, noise: float = 0.0
) -> tuple[Configurations, Labels, Labels]:
    """A pool, DFT labels and those of one EIP: DFT = scale * EIP + 3 n_Si - 5 n_C."""
    pool = pool_of(n)
    rng = np.random.default_rng(7)
    eip = pool.n_atoms * rng.normal(-4.0, 0.5, size=n)
    dft = scale * eip + composition(pool) @ [3.0, -5.0]
    dft = dft + noise * pool.n_atoms * rng.normal(size=n)
    return pool, labels_of(pool, {"dft": dft}), labels_of(pool, {"eip": eip})


def test_reference_energies_of_exact_sums_are_found():
    pool = pool_of(6)

    found = fit_reference_energies(pool, composition(pool) @ [-160.0, -250.0])

    assert found == pytest.approx({SI: -160.0, C: -250.0}, rel=1e-6)


def test_a_fixed_composition_shares_its_energy_evenly():
    pool = Configurations.from_atoms([Atoms("SiC"), Atoms("Si2C2"), Atoms("Si3C3")])

    found = fit_reference_energies(pool, np.array([-10.0, -20.0, -30.0]))

    assert found == pytest.approx({SI: -5.0, C: -5.0})


def test_missing_energies_are_left_out_and_none_at_all_is_refused():
    pool = Configurations.from_atoms([Atoms("Si"), Atoms("Si2"), Atoms("Si3")])

    assert fit_reference_energies(pool, np.array([np.nan, -8.0, np.nan])) == pytest.approx({SI: -4})
    with pytest.raises(ValueError, match="none of the 3 configurations has an energy"):
        fit_reference_energies(pool, np.full(3, np.nan))


@pytest.mark.parametrize("n", [MIN_LABELS_FOR_SCALE, 25])
def test_planted_scale_and_shifts_are_recovered(n):
    alignment = fit_alignment(*planted(n))

    assert alignment.elements.tolist() == [C, SI]
    assert alignment.scale == pytest.approx([0.85], abs=1e-6)
    np.testing.assert_allclose(alignment.shift, [[-5.0, 3.0]], atol=1e-4)


def test_aligned_labels_are_the_reference():
    pool, dft, eip = planted(25)

    aligned = fit_alignment(pool, dft, eip).apply(pool, eip)

    np.testing.assert_allclose(aligned.energy, dft.energy, atol=1e-3)
    np.testing.assert_allclose(aligned.forces, 0.85 * eip.forces, atol=1e-5)
    np.testing.assert_allclose(aligned.stress, 0.85 * eip.stress, atol=1e-6)
    assert aligned.ok.all()


@pytest.mark.parametrize("n", [1, 3, MIN_LABELS_FOR_SCALE - 1])
def test_few_labels_shift_and_do_not_scale(n):
    pool, dft, eip = planted(25, scale=1.0)

    alignment = fit_alignment(pool, dft.take(range(n)), eip)

    assert alignment.scale.tolist() == [1.0]
    aligned = alignment.apply(pool, eip)
    np.testing.assert_allclose(aligned.energy[:n], dft.energy[:n], atol=1e-4)


def test_one_label_moves_every_element_by_the_same():
    pool, dft, eip = planted(5, scale=1.0)

    shift = fit_alignment(pool, dft.take([0]), eip).shift[0]

    difference = (dft.energy - eip.energy)[0, 0] / pool.n_atoms[0]
    assert shift == pytest.approx([difference, difference])


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "not aligned, for want of labels"),
        (1, "aligned on 1 label: one shift, no scale below 10"),
        (3, "aligned on 3 labels: a shift for each element, no scale below 10"),
        (25, "aligned on 25 labels: a scale for each EIP and a shift for each element"),
    ],
)
def test_an_alignment_says_what_was_fitted(n, text):
    pool, dft, eip = planted(25)

    assert fit_alignment(pool, dft.take(range(n)), eip).text.startswith(text)


def test_an_alignment_of_nothing_says_so():
    pool, dft, eip = planted(3)
    dead = labels_of(pool, {"eip": np.full(3, np.nan)})

    assert fit_alignment(pool, dft, dead).text.startswith("no EIP could be aligned")
    assert fit_alignment(pool, dft, eip).n_labels.tolist() == [3]


def test_a_scale_can_be_forbidden():
    pool, dft, eip = planted(25)

    alignment = fit_alignment(pool, dft, eip, min_labels_for_scale=None)

    assert alignment.scale.tolist() == [1.0]


def silicon(differences: list[float]) -> tuple[Configurations, Labels, Labels]:
    """Silicon, with these differences of DFT and EIP in eV/atom."""
    pool = pool_of(len(differences), elements=("Si",))
    eip = pool.n_atoms * -4.0
    dft = eip + pool.n_atoms * np.array(differences)
    return pool, labels_of(pool, {"dft": dft}), labels_of(pool, {"eip": eip})


def test_of_three_labels_one_absurd_one_is_outvoted():
    alignment = fit_alignment(*silicon([0.80, 0.82, 9.0]))

    assert alignment.shift[0] == pytest.approx([0.81], abs=0.03)


def test_of_25_labels_five_absurd_ones_are_outvoted():
    noise = np.random.default_rng(0).normal(0.8, 0.02, 25)
    noise[[2, 5, 9, 14, 20]] += [8.0, -30.0, 12.0, 400.0, 5.0]

    alignment = fit_alignment(*silicon(noise.tolist()))

    assert alignment.shift[0] == pytest.approx([0.8], abs=0.03)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_elements_in_all_but_equal_shares_move_by_the_same(n):
    """One atom more or less of 60 must not turn an error of 20 meV/atom into volts."""
    frames = [Atoms(["Si"] * (30 + k % 2) + ["C"] * (30 - k % 2)) for k in range(n)]
    for k, atoms in enumerate(frames):
        atoms.positions += k
    pool = Configurations.from_atoms(frames)
    eip = pool.n_atoms * -5.0
    noise = np.random.default_rng(1).normal(0, 0.02, n)
    dft = eip + pool.n_atoms * (1.0 + noise)

    alignment = fit_alignment(pool, labels_of(pool, {"dft": dft}), labels_of(pool, {"eip": eip}))

    assert alignment.shift[0] == pytest.approx([1.0, 1.0], abs=0.05)


def test_elements_a_thousand_volts_apart_are_told_apart_by_three_labels():
    """As with pseudopotentials, whose zeros have nothing in common."""
    pool = pool_of(20)
    eip = pool.n_atoms * np.random.default_rng(3).normal(-4, 0.1, 20)
    dft = eip + composition(pool) @ [-100.0, -1100.0]
    labels = labels_of(pool, {"eip": eip})

    aligned = fit_alignment(pool, labels_of(pool, {"dft": dft}).take(range(3)), labels).apply(
        pool, labels
    )

    np.testing.assert_allclose(aligned.energy[:, 0], dft, atol=1e-3)


def test_an_element_without_a_label_has_no_zero():
    pool = Configurations.from_atoms([Atoms("Si2"), Atoms("Si3"), Atoms("SiC")])
    eip = labels_of(pool, {"eip": np.array([-8.0, -12.0, -10.0])})
    dft = labels_of(pool, {"dft": np.array([-6.0, -9.0, np.nan])})

    alignment = fit_alignment(pool, dft, eip)
    aligned = alignment.apply(pool, eip)

    assert np.isnan(alignment.shift[0]).tolist() == [True, False]
    assert aligned.ok[:, 0].tolist() == [True, True, False]
    assert "has no reference energy (there are Si)" in aligned.failures()[0].reason
    assert np.isnan(aligned.energy[2, 0])
    assert aligned.energy[:2, 0] == pytest.approx([-6.0, -9.0])


def test_an_eip_is_aligned_where_another_one_has_no_label():
    """What one EIP lacks does not cost the others."""
    pool = Configurations.from_atoms([Atoms("Si2"), Atoms("Si3"), Atoms("SiC")])
    energy = np.array([-8.0, -12.0, -10.0])
    eips = labels_of(pool, {"all": energy, "silicon": np.where([1, 1, 0], energy, np.nan)})
    dft = labels_of(pool, {"dft": energy + 1})

    alignment = fit_alignment(pool, dft, eips)

    assert np.isfinite(alignment.shift).tolist() == [[True, True], [False, True]]
    assert alignment.n_labels.tolist() == [3, 2]


def test_without_any_label_nothing_changes_and_nothing_warns():
    pool, dft, eip = planted(4)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alignment = fit_alignment(pool, dft.take([]), eip)
        aligned = alignment.apply(pool, eip)

    np.testing.assert_array_equal(aligned.energy, eip.energy)
    np.testing.assert_array_equal(aligned.forces, eip.forces)


def test_reference_labels_that_failed_do_not_count():
    pool, dft, eip = planted(25)
    with_failures = labels_of(pool, {"dft": np.where(np.arange(25) < 12, dft.energy[:, 0], np.nan)})

    alignment = fit_alignment(pool, with_failures, eip)

    assert alignment.scale == pytest.approx([0.85], abs=1e-6)


def test_labels_are_joined_by_id_and_not_by_row():
    pool, dft, eip = planted(25)
    order = np.random.default_rng(0).permutation(25)

    alignment = fit_alignment(pool, dft.take(order[:20]), eip)

    assert alignment.scale == pytest.approx([0.85], abs=1e-6)


def test_a_few_absurd_labels_do_not_move_the_alignment():
    pool, dft, eip = planted(40, noise=0.01)
    spoilt = eip.energy[:, 0].copy()
    spoilt[[3, 17, 30]] += pool.n_atoms[[3, 17, 30]] * 20.0

    alignment = fit_alignment(pool, dft, labels_of(pool, {"eip": spoilt}))

    assert alignment.scale == pytest.approx([0.85], abs=0.03)
    np.testing.assert_allclose(alignment.shift, [[-5.0, 3.0]], atol=0.15)


def test_an_eip_that_says_nothing_keeps_a_scale_within_reason():
    pool, dft, _ = planted(12)
    noise = pool.n_atoms * np.random.default_rng(3).normal(-4, 0.5, size=12)

    scale = fit_alignment(pool, dft, labels_of(pool, {"eip": noise})).scale[0]

    assert 0.5 <= scale <= 2.0


def test_an_eip_without_labels_is_marked_and_its_labels_stay_missing():
    pool, dft, eip = planted(25)
    both = labels_of(pool, {"good": eip.energy[:, 0], "dead": np.full(25, np.nan)})

    alignment = fit_alignment(pool, dft, both)
    aligned = alignment.apply(pool, both)

    assert alignment.usable.tolist() == [True, False]
    assert aligned.ok[:, 0].all()
    assert not aligned.ok[:, 1].any()
    assert best_single(pool, dft, aligned) == "good"


def test_an_eip_with_labels_only_elsewhere_is_missing_with_a_reason():
    pool, dft, eip = planted(25)
    elsewhere = np.where(np.arange(25) < 20, np.nan, eip.energy[:, 0])
    labels = labels_of(pool, {"eip": elsewhere})

    aligned = fit_alignment(pool, dft.take(range(20)), labels).apply(pool, labels)

    assert not aligned.ok.any()
    assert aligned.failures()[-1].reason == "the EIP could not be aligned"
    assert np.isnan(aligned.energy).all()
    assert np.isnan(aligned.forces).all()


def test_an_element_that_was_not_aligned_is_missing_with_a_reason():
    pool, dft, eip = planted(25)
    alignment = fit_alignment(pool, dft, eip)
    germanium = Configurations.from_atoms([Atoms("SiGe")])

    aligned = alignment.apply(germanium, labels_of(germanium, {"eip": np.array([-8.0])}))

    assert "has no reference energy (there are C, Si)" in aligned.failures()[0].reason


def test_labels_of_other_eips_are_refused():
    pool, dft, eip = planted(25)
    with pytest.raises(ValueError, match=r"is for \['eip'\], not \['dft'\]"):
        fit_alignment(pool, dft, eip).apply(pool, dft)


def test_two_references_at_once_are_refused():
    pool, _, eip = planted(3)
    two = labels_of(pool, {"dft": eip.energy[:, 0], "more": eip.energy[:, 0]})
    with pytest.raises(ValueError, match="must be one source"):
        fit_alignment(pool, two, eip)


def test_the_most_accurate_eip_is_the_best():
    pool, dft, eip = planted(25)
    rng = np.random.default_rng(5)
    worse = eip.energy[:, 0] + pool.n_atoms * rng.normal(0, 0.3, 25)
    labels = labels_of(pool, {"worse": worse, "better": eip.energy[:, 0]})

    aligned = fit_alignment(pool, dft, labels).apply(pool, labels)

    assert best_single(pool, dft, aligned) == "better"
    table = {row.source: row for row in source_errors(dft, aligned)}
    assert table["better"].energy_mae < 1e-4 < table["worse"].energy_mae
    assert table["worse"].n == 25


def test_with_one_label_the_forces_decide():
    pool = pool_of(4)
    energy = pool.n_atoms * -4.0
    rng = np.random.default_rng(2)
    forces = rng.normal(size=(1, len(pool.numbers), 3))
    dft = labels_of(pool, {"dft": energy}, forces)
    two = np.concatenate([forces + rng.normal(size=forces.shape), forces + 0.01])
    labels = labels_of(pool, {"worse": energy + 1, "better": energy - 1}, two)

    one = dft.take([2])
    aligned = fit_alignment(pool, one, labels).apply(pool, labels)

    assert best_single(pool, one, aligned) == "better"


def test_an_eip_with_one_lucky_label_is_not_the_best():
    pool, dft, eip = planted(25, noise=0.05)
    lucky = np.where(np.arange(25) == 4, dft.energy[:, 0], np.nan)
    labels = labels_of(pool, {"lucky": lucky, "steady": eip.energy[:, 0]})

    aligned = fit_alignment(pool, dft, labels).apply(pool, labels)

    assert best_single(pool, dft, aligned) == "steady"


def test_there_is_no_best_where_nothing_can_be_compared():
    pool, dft, eip = planted(4)
    with pytest.raises(ValueError, match="labelled a configuration that the reference labelled"):
        best_single(pool, dft.take([]), eip)


def test_an_alignment_survives_the_disk():
    alignment = fit_alignment(*planted(12))
    again = Alignment.from_arrays(alignment.arrays())
    np.testing.assert_array_equal(again.shift, alignment.shift)
    assert again.sources.tolist() == ["eip"]
