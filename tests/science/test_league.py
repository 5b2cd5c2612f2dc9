"""The league table: who wins, by how much, and what is missing."""

import json

import numpy as np
import pytest
from ase import Atoms

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.league import rank_eips


def pool_of(n: int, seed: int = 0) -> Configurations:
    rng = np.random.default_rng(seed)
    frames = [
        Atoms(f"Si{size}", rng.uniform(0, 9, (size, 3)), cell=[9] * 3, pbc=True)
        for size in rng.integers(3, 7, n)
    ]
    return Configurations.from_atoms(frames)


def labels_of(pool, table, reasons=("broken",)) -> Labels:
    """Labels of sources with energies per atom and forces; NaN is missing, for the first reason."""
    names = list(table)
    empty = Labels.missing(pool, names)
    energy = np.stack([per_atom * pool.n_atoms for per_atom, _ in table.values()], axis=1)
    status = np.isnan(energy).astype(np.int64)
    per_atom = np.repeat(status > 0, pool.n_atoms, axis=0).T[:, :, None]
    forces = np.where(per_atom, np.nan, np.stack([forces for _, forces in table.values()]))
    return Labels.from_arrays(
        {
            **empty.arrays(),
            "energy": energy,
            "forces": forces,
            "status": status,
            "reasons": np.array(reasons),
        }
    )


@pytest.fixture
def case():
    """Forty configurations; one EIP is better in energy, another in forces, one is dead."""
    pool = pool_of(40)
    rng = np.random.default_rng(1)
    energy, forces = rng.normal(-4, 0.3, 40), rng.normal(0, 1, (len(pool.numbers), 3))
    dft = labels_of(pool, {"dft": (energy, forces)})
    eips = labels_of(
        pool,
        {
            "energetic": (energy + 1 + rng.normal(0, 0.001, 40), forces + 0.5),
            "forceful": (energy - 2 + rng.normal(0, 0.1, 40), forces + 0.01),
            "poor": (rng.normal(-3, 0.3, 40), 3 * forces[::-1]),
            "dead": (np.full(40, np.nan), forces),
        },
    )
    return pool, dft, eips


def rank(pool, dft, eips, **options):
    return rank_eips(pool, dft, eips, np.random.default_rng(0), **options)


def test_the_best_in_energy_comes_first_and_forces_have_their_own_best(case):
    league = rank(*case)

    assert [row.eip for row in league.standings] == ["energetic", "forceful", "poor", "dead"]
    assert (league.best_energy, league.best_forces) == ("energetic", "forceful")
    assert league.same_winner < 0.1


def test_errors_are_after_alignment_and_forces_as_they_are_given(case):
    row = rank(*case).standings[0]

    assert row.energy_mae == pytest.approx(0.0008, abs=0.0003)
    assert row.energy_rmse >= row.energy_mae
    assert row.shifted_mae == pytest.approx(row.energy_mae, abs=0.0005)
    assert row.forces_mae == row.forces_rmse == pytest.approx(0.5)
    assert row.scale == pytest.approx(1.0, abs=0.01)
    assert row.scaled_forces_mae == pytest.approx(0.5, abs=0.02)


def test_a_scale_is_told_from_a_shift():
    pool = pool_of(30)
    rng = np.random.default_rng(1)
    energy, forces = rng.normal(-4, 0.3, 30), rng.normal(0, 1, (len(pool.numbers), 3))
    dft = labels_of(pool, {"dft": (energy, forces)})

    row = rank(pool, dft, labels_of(pool, {"steep": (energy / 0.7, forces / 0.7)})).standings[0]

    assert row.scale == pytest.approx(0.7, abs=1e-4)
    assert row.energy_mae < 1e-3 < 0.05 < row.shifted_mae
    assert row.scaled_forces_mae < 1e-3 < 0.2 < row.forces_mae


def test_wins_are_shares_and_the_oracle_is_as_good_as_the_best(case):
    league = rank(*case)

    rows = {row.eip: row for row in league.standings}
    alive = [rows[name] for name in ("energetic", "forceful", "poor")]
    assert sum(row.energy_wins for row in league.standings) == pytest.approx(1)
    assert sum(row.forces_wins for row in league.standings) == pytest.approx(1)
    assert league.oracle_energy <= min(row.energy_mae for row in alive)
    assert league.oracle_forces <= min(row.forces_mae for row in alive)
    assert rows["energetic"].energy_wins > 0.9
    assert rows["forceful"].forces_wins > 0.9


def test_equal_eips_share_their_wins():
    pool = pool_of(30)
    rng = np.random.default_rng(1)
    energy, forces = rng.normal(-4, 0.3, 30), rng.normal(0, 1, (len(pool.numbers), 3))
    twin, other = (energy + 1, forces + 0.1), (rng.normal(-4, 0.3, 30), -forces)
    eips = labels_of(pool, {"one": twin, "other": other, "two": twin})

    rows = {
        row.eip: row
        for row in rank(pool, labels_of(pool, {"dft": (energy, forces)}), eips).standings
    }

    assert rows["one"].energy_wins == rows["two"].energy_wins == pytest.approx(0.5)
    assert rows["one"].forces_wins == rows["two"].forces_wins == pytest.approx(0.5)


def test_missing_labels_are_counted_with_their_reason(case):
    league = rank(*case)

    dead = league.standings[-1]
    assert (dead.eip, dead.n, dead.missing) == ("dead", 0, {"broken": 40})
    assert np.isnan(dead.energy_mae)
    assert league.standings[0].missing == {}


def test_baselines_are_a_constant_and_no_force(case):
    pool, dft, eips = case
    league = rank(pool, dft, eips)

    per_atom = dft.energy[:, 0] / pool.n_atoms
    assert league.constant_energy == pytest.approx(
        np.abs(per_atom - np.median(per_atom)).mean(), rel=0.05
    )
    assert league.zero_forces == pytest.approx(np.abs(dft.forces).mean())


def test_disagreement_that_follows_the_error_correlates_with_it():
    pool = pool_of(40)
    rng = np.random.default_rng(1)
    energy, forces = rng.normal(-4, 0.3, 40), rng.normal(0, 1, (len(pool.numbers), 3))
    hard = np.geomspace(0.001, 0.3, 40)
    eips = {
        f"eip{k}": (
            energy + hard * rng.normal(size=40),
            forces + np.repeat(hard, pool.n_atoms)[:, None] * rng.normal(size=forces.shape),
        )
        for k in range(5)
    }

    league = rank(pool, labels_of(pool, {"dft": (energy, forces)}), labels_of(pool, eips))

    assert league.energy_disagreement.spearman > 0.3
    assert league.forces_disagreement.spearman > 0.5
    assert league.forces_disagreement.n == 40


def test_two_eips_have_no_consensus(case):
    pool, dft, _ = case
    per_atom = dft.energy[:, 0] / pool.n_atoms
    two = labels_of(pool, {"a": (per_atom, dft.forces[0]), "b": (per_atom + 1, dft.forces[0])})

    assert rank(pool, dft, two).energy_disagreement.n == 0


def test_with_a_split_the_rest_is_shown_and_nothing_of_it_is_fitted(case):
    pool, dft, eips = case
    train = [str(name) for name in pool.ids[:30]]
    moved = dft.energy.copy()
    moved[30:] += 0.5 * pool.n_atoms[30:, None]
    other = Labels.from_arrays({**dft.arrays(), "energy": moved})

    league, shifted = rank(pool, dft, eips, train=train), rank(pool, other, eips, train=train)

    assert league.n_configurations == 10
    assert league.worth == shifted.worth
    assert shifted.standings[0].energy_mae == pytest.approx(0.5, abs=0.1)
    assert "30 labels" in league.alignment


def test_a_split_with_nothing_to_show_is_refused(case):
    pool, dft, eips = case
    with pytest.raises(ValueError, match=r"0 are in the training part; name a split"):
        rank(pool, dft, eips, train=[])


def test_copies_count_once(case):
    pool, dft, eips = case
    frames = [pool.atoms(row) for row in range(40)]
    copy = frames[0].copy()
    copy.positions += 1.0
    both = Configurations.from_atoms([*frames, copy])
    extra = {name: np.append(np.arange(40), 0) for name in ("dft", "eip")}

    def extended(labels, rows):
        again = labels.take(rows).arrays()
        return Labels.from_arrays({**again, "ids": both.ids})

    league = rank(both, extended(dft, extra["dft"]), extended(eips, extra["eip"]))

    assert (league.n_configurations, league.n_copies) == (40, 1)


def test_labels_are_joined_by_id(case):
    pool, dft, eips = case
    order = np.random.default_rng(3).permutation(40)

    league = rank(pool, dft, eips.take(order))

    assert league.standings[0].energy_mae == pytest.approx(rank(*case).standings[0].energy_mae)


def test_without_a_common_configuration_there_is_no_table(case):
    pool, dft, eips = case
    with pytest.raises(ValueError, match="label the same configurations with both"):
        rank(pool, dft.take(range(10)), eips.take(range(20, 40)))


def test_one_label_is_ranked_and_judged_too_few(case):
    pool, dft, eips = case

    league = rank(pool, dft.take([3]), eips)

    assert league.n_configurations == 1
    assert league.standings[0].energy_mae == pytest.approx(0, abs=1e-6)
    assert league.worth.answer == "cannot tell"


def test_a_league_is_plain_json(case):
    content = json.loads(json.dumps(rank(*case).as_dict(), allow_nan=False))

    assert content["standings"][-1]["energy_mae"] is None
    assert content["worth"]["answer"] in ("help", "do not help", "cannot tell")
