"""The first points, chosen without DFT."""

from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk

from aiida_eipnn.science.cold_start import eip_disagreement, first_points, pick_disputed
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.uncertainty import spearman


@pytest.fixture
def pool():
    rng = np.random.default_rng(0)
    frames = []
    for number in range(60):
        atoms = bulk("SiC", "zincblende", a=4.36) if number % 2 else bulk("Si")
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        frames.append(atoms)
    return Configurations.from_atoms(frames)


def eips_of(pool, energies):
    """Return EIP labels with these energies per atom. Shape ``(n, m)``."""
    missing = Labels.missing(pool, [f"eip{number}" for number in range(energies.shape[1])])
    known = np.isfinite(energies)
    return replace(
        missing,
        energy=energies * pool.n_atoms[:, None],
        status=np.where(known, 0, 1),
        reasons=np.array(["it failed"]),
    )


@pytest.fixture
def disputed(pool):
    """Return what each of 60 configurations is disputed by, and what six EIPs say."""
    rng = np.random.default_rng(1)
    dispute = rng.uniform(0.01, 0.3, len(pool))
    truth = rng.normal(0, 0.2, len(pool))
    energies = truth[:, None] + dispute[:, None] * rng.normal(size=(len(pool), 6))
    # Zeros of their own: one number for each element.
    silicon = np.array([(pool.atoms(row).numbers == 14).mean() for row in range(len(pool))])
    zeros = rng.normal(0, 50, size=(6, 2))
    return dispute, energies + silicon[:, None] * zeros[:, 0] + (1 - silicon)[:, None] * zeros[:, 1]


def test_eips_disagree_where_they_were_made_to(pool, disputed):
    dispute, energies = disputed
    found = eip_disagreement(pool, eips_of(pool, energies))
    assert spearman(found, dispute) > 0.7
    assert found.max() < 1.0


def test_wild_eips_are_not_asked(pool, disputed):
    dispute, energies = disputed
    wild = np.random.default_rng(2).normal(0, 20, size=(len(pool), 4))
    found = eip_disagreement(pool, eips_of(pool, np.column_stack([energies, wild])))
    assert spearman(found, dispute) > 0.6
    assert found.max() < 1.0


def test_what_one_eip_labelled_alone_is_not_known(pool, disputed):
    _, energies = disputed
    energies = energies.copy()
    energies[3, 1:] = np.nan
    energies[4, 2:] = np.nan
    # The last one failed too often.
    energies[10:, 5] = np.nan
    found = eip_disagreement(pool, eips_of(pool, energies))
    assert np.isnan(found[3])
    assert np.isfinite(found[[0, 20]]).all()
    with pytest.raises(ValueError, match="1 of 1 EIPs"):
        eip_disagreement(pool, eips_of(pool, energies[:, :1]))


def test_first_points_are_disputed_and_differ():
    rng = np.random.default_rng(3)
    features = np.concatenate([rng.normal(centre, 0.01, size=(20, 2)) for centre in (0, 5, 10)])
    disagreement = np.tile([1.0, 0.1], 30)
    disagreement[0] = np.nan
    rows = pick_disputed(disagreement, features.__getitem__, 3)
    assert sorted(rows // 20) == [0, 1, 2]
    assert (rows % 2 == 0).all()
    assert 0 not in rows
    with pytest.raises(ValueError, match="60"):
        pick_disputed(disagreement, features.__getitem__, 60)


def test_first_points_are_asked_of_configurations(pool, disputed):
    dispute, energies = disputed
    rows = first_points(pool, eips_of(pool, energies), 6)
    assert len(set(rows.tolist())) == 6
    assert dispute[rows].mean() > dispute.mean()
    # Both materials: they differ more than two of one.
    assert len({len(np.unique(pool.atoms(row).numbers)) for row in rows}) == 2
