"""Whatever an EIP does, its labels are right or missing with a reason."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from aiida_eipnn.science.arrays import load_arrays
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.analytic import LennardJones
from aiida_eipnn.science.eip.batch import OVERLAP
from aiida_eipnn.science.eip.engine import (
    MAX_DEATHS,
    NOT_FINITE,
    STRONG_FORCE,
    Limits,
    label_into,
    label_with_eips,
)
from aiida_eipnn.science.eip.potential import open_potential
from aiida_eipnn.science.labels import NOT_RUN, Labels

LJ = "lennard-jones"
SW = "SW_StillingerWeber_1985_Si__MO_405512056662_005"
EDIP = "EDIP_JustoBazantKaxiras_1998_Si__MO_958932894036_002"


@pytest.fixture(scope="module", autouse=True)
def _importable():
    """The engine's processes find the module by name, as a user's potential would be found."""
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    # The first process takes a second or two, which is not what the tests time.
    label_with_eips(pool_of(2), [LJ])
    yield
    sys.path.remove(folder)


def rattled(n_atoms: int, seed: int) -> Atoms:
    atoms = bulk("Si", cubic=True)[:n_atoms]
    atoms.positions += 0.05 * np.random.default_rng(seed).normal(size=(n_atoms, 3))
    return atoms


def pool_of(*sizes: int) -> Configurations:
    return Configurations.from_atoms([rattled(size, seed) for seed, size in enumerate(sizes)])


def reasons_of(labels: Labels, source: int = 0) -> list[str]:
    """Return the reason of each configuration, empty where it is labelled."""
    names = ["", *map(str, labels.reasons)]
    return [names[code] for code in labels.status[:, source]]


def misbehaving(how: str) -> str:
    return f"python:dying_potentials:{how}"


def assert_same(one: Labels, two: Labels) -> None:
    np.testing.assert_array_equal(one.energy, two.energy)
    np.testing.assert_array_equal(one.forces, two.forces)
    np.testing.assert_array_equal(one.stress, two.stress)
    for source in range(len(one.sources)):
        assert reasons_of(one, source) == reasons_of(two, source)


def test_labels_are_those_of_the_potential_in_the_order_of_the_configurations():
    pool = pool_of(8, 2, 6)

    labels = label_with_eips(pool, [LJ, "lennard-jones[sigma=2.3]"])

    assert labels.ok.all()
    assert labels.sources.tolist() == [LJ, "lennard-jones[sigma=2.3]"]
    for row in range(3):
        for source, potential in enumerate((LennardJones(), LennardJones(sigma=2.3))):
            expected = potential.label(pool.atoms(row))
            assert labels.energy[row, source] == expected.energy
            forces, stress = expected.forces.astype("f4"), expected.stress.astype("f4")
            np.testing.assert_array_equal(labels.forces_of(row, source), forces)
            np.testing.assert_array_equal(labels.stress[row, source], stress)


@pytest.mark.usefixtures("kim")
def test_labels_depend_neither_on_the_workers_nor_on_the_order():
    pool, order = pool_of(8, 4, 6, 2, 8), [3, 0, 4, 2, 1]

    labels = label_with_eips(pool, [SW, EDIP, LJ], n_workers=1)
    shuffled = label_with_eips(pool.take(order), [SW, EDIP, LJ], n_workers=3)

    assert labels.ok.all()
    assert_same(labels.take(order), shuffled)
    fresh = [open_potential(SW).label(pool.atoms(row)).energy for row in range(len(pool))]
    np.testing.assert_allclose(labels.energy[:, 0], fresh, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("aborts", "the process died with signal 6 (SIGABRT) on this configuration"),
        ("exits", "the process ended with exit code 7 on this configuration"),
        ("raises", "ZeroDivisionError: division by zero"),
        ("returns_nan", NOT_FINITE),
        ("pushes_hard", STRONG_FORCE),
    ],
)
def test_only_the_configuration_that_goes_wrong_is_lost(how, reason):
    pool = pool_of(8, 6, 7, 4, 2)

    labels = label_with_eips(pool, [misbehaving(how), LJ])

    assert reasons_of(labels, 0) == ["", "", reason, "", ""]
    assert reasons_of(labels, 1) == [""] * 5
    np.testing.assert_array_equal(labels.energy[labels.ok[:, 0], 0], labels.energy[[0, 1, 3, 4], 1])
    assert np.isnan(labels.energy[2, 0])
    assert np.isnan(labels.forces_of(2, 0)).all()
    assert np.isnan(labels.stress[2, 0]).all()


@pytest.mark.parametrize("how", ["aborts_in_batches", "hangs_in_batches"])
def test_of_a_batch_only_the_configurations_that_go_wrong_are_lost(how):
    pool = pool_of(8, 6, 7, 4, 5, 2)

    labels = label_with_eips(
        pool, [LJ, misbehaving(how), "lennard-jones[sigma=2.3]"], limits=Limits(timeout=2.0)
    )

    reasons = reasons_of(labels, 1)
    assert [bool(reason) for reason in reasons] == [False, False, True, False, True, False]
    assert all(reason.endswith("on this configuration") for reason in reasons if reason)
    assert labels.ok[:, [0, 2]].all()


def test_an_eip_that_keeps_dying_is_given_up():
    pool = pool_of(8, *[7] * MAX_DEATHS, 8, 6)

    labels = label_with_eips(pool, [misbehaving("aborts"), LJ])

    reasons = reasons_of(labels)
    assert reasons[0] == ""
    assert all("SIGABRT" in reason for reason in reasons[1:-2])
    assert all(reason.startswith("given up") for reason in reasons[-2:])
    assert labels.ok[:, 1].all()


def test_an_eip_that_dies_when_it_is_opened_takes_no_other_with_it():
    labels = label_with_eips(pool_of(8, 6), [misbehaving("dies_when_opened"), LJ])

    assert all("while it opened the potential" in reason for reason in reasons_of(labels, 0))
    assert labels.ok[:, 1].all()


def test_an_eip_that_hangs_loses_only_where_it_does():
    started = time.monotonic()

    labels = label_with_eips(
        pool_of(8, 6, 7, 4), [misbehaving("hangs"), LJ], limits=Limits(timeout=1.5), n_workers=2
    )

    reason = "it gave no label within 1.5 s on this configuration"
    assert reasons_of(labels, 0) == ["", "", reason, ""]
    assert labels.ok[:, 1].all()
    assert time.monotonic() - started < 30


def test_an_eip_that_eats_the_memory_loses_only_where_it_does():
    labels = label_with_eips(
        pool_of(8, 7, 6), [misbehaving("eats_memory"), LJ], limits=Limits(memory=1500)
    )

    first, second, third = reasons_of(labels, 0)
    assert (first, third) == ("", "")
    assert "MemoryError" in second or "more than 1500 MB" in second or "died" in second
    assert labels.ok[:, 1].all()


def test_an_eip_that_dies_goes_on_alone_in_the_next_chunk(monkeypatch):
    monkeypatch.setattr("aiida_eipnn.science.eip.store.SMALLEST_CHUNK", 3)
    pool = pool_of(8, 7, 6, 8, 6, 5, 4, 2, 8)

    labels = label_with_eips(pool, [LJ, misbehaving("aborts"), "lennard-jones[sigma=2.3]"])

    assert [bool(reason) for reason in reasons_of(labels, 1)] == [
        False,
        True,
        *[False] * 3,
        True,
        *[False] * 3,
    ]
    assert labels.ok[:, [0, 2]].all()


def test_a_potential_that_is_not_there_is_a_reason_and_not_an_error():
    labels = label_with_eips(pool_of(8, 6), ["python:dying_potentials:nowhere", LJ])

    assert all("has no attribute 'nowhere'" in reason for reason in reasons_of(labels, 0))
    assert labels.ok[:, 1].all()


@pytest.mark.usefixtures("kim")
def test_an_element_that_an_eip_lacks_costs_only_these_configurations():
    pool = Configurations.from_atoms([rattled(8, 0), bulk("SiC", "zincblende", a=4.36)])

    labels = label_with_eips(pool, [SW])

    assert labels.ok[:, 0].tolist() == [True, False]
    assert "does not know C" in reasons_of(labels)[1]


@pytest.mark.parametrize("distance", [0.0, 1.2])
def test_overlapping_atoms_are_refused_for_every_eip(distance):
    close = Atoms("Si2", [[0, 0, 0], [distance, 0, 0]])
    labels = label_with_eips(Configurations.from_atoms([close, rattled(8, 0)]), [LJ])

    assert reasons_of(labels) == [OVERLAP, ""]


def test_what_is_no_geometry_is_a_failure_of_that_configuration_alone():
    lost, flat = rattled(8, 1), rattled(8, 2)
    lost.positions[3, 1] = np.nan
    flat.cell[2] = flat.cell[1]

    labels = label_with_eips(Configurations.from_atoms([lost, rattled(8, 0), flat]), [LJ])

    first, second, third = reasons_of(labels)
    assert first == "a position is not a finite number"
    assert second == ""
    assert third.startswith("its periodic cell has no volume")


def read(store, folder) -> Labels:
    store.write_labels(folder)
    return Labels.from_arrays(load_arrays(folder))


def test_labelling_stops_when_it_must_and_goes_on_from_there(tmp_path):
    pool, slow = pool_of(8, 6, 4, 8, 6, 2), misbehaving("is_slow")

    chunks, end = tmp_path / "chunks", time.monotonic() + 1.5

    def is_late():
        return time.monotonic() >= end

    half = read(label_into(chunks, pool, [slow, LJ], must_stop=is_late), tmp_path / "half")
    whole = read(label_into(chunks, pool, [slow, LJ]), tmp_path / "whole")

    assert 0 < half.ok.sum() < half.ok.size
    assert set(half.reasons[half.status[~half.ok] - 1]) == {NOT_RUN}
    assert whole.ok.all()
    assert_same(whole, label_with_eips(pool, [LJ, "lennard-jones[sigma=2.1]"]))


def test_what_is_labelled_or_has_failed_is_not_tried_again(tmp_path):
    pool, eips = pool_of(8, 7, 4), [misbehaving("raises"), LJ]
    store = label_into(tmp_path / "chunks", pool, eips)
    arrays = store.arrays(0, "r+")
    arrays.energy[1] += 1.0
    arrays.state[1, 2] = 0

    again = read(label_into(tmp_path / "chunks", pool, eips, n_workers=2), tmp_path / "labels")

    fresh = [LennardJones().label(pool.atoms(row)).energy for row in range(3)]
    np.testing.assert_array_equal(again.energy[:, 1], [fresh[0] + 1.0, fresh[1] + 1.0, fresh[2]])
    assert reasons_of(again, 0) == ["", "ZeroDivisionError: division by zero", ""]


def test_labels_of_another_pool_are_not_gone_on_with(tmp_path):
    label_into(tmp_path, pool_of(8, 6), [LJ])

    with pytest.raises(ValueError, match="holds labels of other configurations or EIPs"):
        label_into(tmp_path, pool_of(8, 4), [LJ])


def test_chunks_without_a_plan_are_made_anew(tmp_path):
    label_into(tmp_path, pool_of(8, 6, 4), [LJ])
    (tmp_path / "plan.json").unlink()

    store = label_into(tmp_path, pool_of(2, 4), [LJ])

    assert store.arrays(0).energy.shape == (1, 2)
    assert store.progress().n_done == 2


@pytest.mark.usefixtures("kim")
def test_energies_of_atoms_are_kept_where_they_are_told():
    labels = label_with_eips(pool_of(8, 6), [SW, EDIP], atomic_energies=True)

    assert labels.atomic_energy[0, :8].sum() == pytest.approx(labels.energy[0, 0], abs=1e-4)
    assert labels.atomic_energy[0, 8:].sum() == pytest.approx(labels.energy[1, 0], abs=1e-4)
    assert np.isnan(labels.atomic_energy[1]).all()
    assert labels.take([1]).atomic_energy.shape == (2, 6)
    assert label_with_eips(pool_of(8), [SW]).atomic_energy is None


def test_progress_is_reported_while_it_goes_on_and_at_the_end(tmp_path):
    seen = []
    slow = misbehaving("is_slow")
    store = label_into(
        tmp_path,
        pool_of(8, 6, 4, 8),
        [slow],
        on_progress=seen.append,
        progress_interval=0.3,
    )

    counts = [progress.n_done for progress in seen]
    assert counts == sorted(counts)
    assert counts[-1] == seen[-1].n_labels == 4
    assert len(seen) > 1
    assert store.seconds()[slow] > 1.1


def test_no_configurations_are_no_trouble():
    assert len(label_with_eips(Configurations.from_atoms([]), [LJ])) == 0


@pytest.mark.parametrize(
    ("eips", "n_workers", "words"),
    [
        ([], 1, "no EIP to label with"),
        ([LJ, LJ], 1, "given twice"),
        ([LJ], 0, "at least one worker"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(eips, n_workers, words):
    with pytest.raises(ValueError, match=words):
        label_with_eips(pool_of(8), eips, n_workers=n_workers)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lennard-jones[depth=2]", "only the settings"),
        ("lennard-jones[sigma=wide]", "wide"),
        ("lennard-jones[sigma=-1]", "must be positive"),
        ("lennard-jones-12-6", "cannot read"),
        ("python:nowhere", "write python:module:callable"),
    ],
)
def test_a_name_that_opens_nothing_is_refused_with_what_to_write(name, words):
    with pytest.raises(ValueError, match=words):
        open_potential(name)


def test_what_is_no_potential_is_refused():
    with pytest.raises(TypeError, match="lacks part of EmpiricalPotential"):
        open_potential("python:decimal:Decimal")


def test_limits_of_nothing_are_refused():
    with pytest.raises(ValueError, match="must be above 0, not 0 and 4096"):
        Limits(timeout=0)
