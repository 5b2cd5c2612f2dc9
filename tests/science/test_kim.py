"""KIM models against fresh models, finite differences and symmetry."""

import os
import subprocess
import sys

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.md.verlet import VelocityVerlet

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.batch import Batch
from aiida_eipnn.science.eip.potential import (
    EipCalculator,
    describe_potential,
    open_potential,
)

pytestmark = pytest.mark.usefixtures("kim")

SW = "SW_StillingerWeber_1985_Si__MO_405512056662_005"
WAGNER = "MEAM_LAMMPS_Wagner_2007_Cu__MO_313717476091_000"
SILICON = [
    SW,
    "Tersoff_LAMMPS_Tersoff_1988T3_Si__MO_186459956893_003",
    "EDIP_JustoBazantKaxiras_1998_Si__MO_958932894036_002",
    "MEAM_LAMMPS_LenoskySadighAlonso_2000_Si__MO_533426548156_000",
    "ThreeBodyBondOrder_PPM_PurjaPunMishin_2017_Si__MO_566683736730_000",
    "ThreeBodyCluster_SRS_StephensonRadnySmith_1996_Si__MO_604248666067_000",
    "MFF_MistriotisFlytzanisFarantos_1989_Si__MO_080526771943_001",
    "lennard-jones",
]


def rattled(atoms: Atoms, seed: int, size: float = 0.08) -> Atoms:
    rng = np.random.default_rng(seed)
    moved = atoms.copy()
    moved.set_cell(atoms.cell @ (np.eye(3) + 0.02 * rng.normal(size=(3, 3))), scale_atoms=True)
    moved.positions += size * rng.normal(size=moved.positions.shape)
    return moved


@pytest.fixture
def silicon() -> Atoms:
    return rattled(bulk("Si", cubic=True), seed=1)


@pytest.mark.parametrize("name", SILICON)
def test_forces_are_minus_the_derivative_of_the_energy(name, silicon, slope_by_place):
    potential = open_potential(name)
    forces = potential.label(silicon).forces

    for atom, axis in ((0, 0), (3, 1), (7, 2)):
        expected = -slope_by_place(potential, silicon, atom, axis)
        assert forces[atom, axis] == pytest.approx(expected, abs=2e-6)
    np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-10)


@pytest.mark.parametrize("name", SILICON)
def test_stress_is_the_derivative_of_the_energy_by_strain(name, silicon, slope_by_strain):
    potential = open_potential(name)
    stress = potential.label(silicon).stress

    for voigt, (i, j) in enumerate(((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))):
        slope = slope_by_strain(potential, silicon, i, j)
        assert stress[voigt] == pytest.approx(slope / silicon.cell.volume, abs=1e-7)


@pytest.mark.parametrize("name", SILICON)
def test_a_supercell_has_the_same_label_per_atom(name, silicon):
    potential = open_potential(name)
    one, two = potential.label(silicon), potential.label(silicon * (2, 1, 1))

    assert two.energy == pytest.approx(2 * one.energy, rel=1e-12)
    np.testing.assert_allclose(two.forces, np.tile(one.forces, (2, 1)), atol=1e-9)
    np.testing.assert_allclose(two.stress, one.stress, atol=1e-11)


@pytest.mark.parametrize("name", SILICON)
def test_a_reused_model_equals_a_fresh_one_in_any_order(name):
    pool = [rattled(bulk("Si", cubic=True), seed) for seed in range(4)]
    pool.append(Atoms("Si2", [[0, 0, 0], [2.3, 0, 0]]))
    potential = open_potential(name)

    forward = [potential.label(atoms) for atoms in pool]
    backward = [potential.label(atoms) for atoms in reversed(pool)][::-1]
    fresh = [open_potential(name).label(atoms) for atoms in pool]

    for first, second, third, atoms in zip(forward, backward, fresh, pool, strict=True):
        assert first.energy == second.energy
        assert abs(first.energy - third.energy) / len(atoms) < 1e-10
        np.testing.assert_allclose(first.forces, third.forces, atol=1e-10)


def test_a_model_that_a_refresh_would_spoil_labels_the_same_six_times():
    copper = rattled(bulk("Cu", cubic=True), seed=2)
    potential = open_potential(WAGNER)

    energies = [potential.label(copper).energy for _ in range(6)]

    assert np.ptp(energies) < 1e-10
    assert energies[-1] == pytest.approx(open_potential(WAGNER).label(copper).energy, abs=1e-10)


def test_the_known_cohesive_energy_comes_out():
    # Stillinger & Weber 1985 in the model's own description: 4.3364 eV per atom of diamond.
    label = open_potential(SW).label(bulk("Si", a=5.431))

    assert label.energy / 2 == pytest.approx(-4.3364, abs=1e-4)


@pytest.mark.parametrize("name", [SW, "lennard-jones"])
def test_an_atom_may_sit_many_cells_away(name, silicon):
    """``create_paddings`` alone misses its images: 3.9 eV for one atom two cells out."""
    potential = open_potential(name)
    drifted = silicon.copy()
    drifted.positions[2] += [3, -2, 5] @ silicon.cell.array

    here, there = potential.label(silicon), potential.label(drifted)

    assert there.energy == pytest.approx(here.energy, abs=1e-10)
    np.testing.assert_allclose(there.forces, here.forces, atol=1e-9)
    np.testing.assert_allclose(there.stress, here.stress, atol=1e-11)


@pytest.mark.parametrize("name", [SW, "lennard-jones"])
@pytest.mark.parametrize("pbc", [(True, True, False), (False, True, False), (False, False, False)])
def test_a_direction_without_period_is_like_one_with_much_vacuum(name, pbc, silicon):
    potential = open_potential(name)
    open_cell, roomy = silicon.copy(), silicon.copy()
    open_cell.pbc = pbc
    open_cell.set_cell(silicon.cell.array * np.array(pbc)[:, None])
    roomy.set_cell(silicon.cell.array * np.where(pbc, 1, 10)[:, None])

    label = potential.label(open_cell)

    assert label.energy == pytest.approx(potential.label(roomy).energy, abs=1e-10)
    assert np.isnan(label.stress).all()


def test_a_lone_atom_has_no_neighbours_and_no_forces():
    label = open_potential(SW).label(Atoms("Si"))

    assert label.energy == 0.0
    np.testing.assert_array_equal(label.forces, np.zeros((1, 3)))


@pytest.mark.parametrize("name", ["ex_model_Ar_P_Morse_MultiCutoff", "ex_model_Ar_SLJ_MultiCutoff"])
def test_several_cutoffs_and_neighbours_of_images_are_served(name, slope_by_place):
    """Examples of the KIM API: both want two lists, the second also neighbours of images."""
    argon = rattled(bulk("Ar", a=5.26, cubic=True), seed=3)
    potential = open_potential(name)
    label = potential.label(argon)

    slope = slope_by_place(potential, argon, 1, 2)

    assert label.forces[1, 2] == pytest.approx(-slope, rel=1e-4)
    assert potential.label(argon * (1, 2, 1)).energy == pytest.approx(2 * label.energy, rel=1e-12)


def test_an_element_that_the_model_lacks_is_named():
    with pytest.raises(ValueError, match=r"does not know C; .*\(it knows Si\)"):
        open_potential(SW).label(bulk("SiC", "zincblende", a=4.36))


def test_a_model_that_is_not_installed_is_refused_with_the_closest_names():
    with pytest.raises(ValueError, match=f"not installed; close to it are {SW}"):
        open_potential("SW_StillingerWeber_1985_Si__MO_405512056662_004")


def test_a_model_is_described_by_what_is_installed_with_it():
    described = describe_potential(SW)

    assert described.kim_id == "MO_405512056662_005"
    assert described.species == ("Si",)
    assert described.family == "SW"
    assert described.year == 1985
    assert described.doi == "10.1103/PhysRevB.31.5262"
    assert "Stillinger, Frank H." in described.citation
    assert not described.machine_learned


def test_machine_learned_models_are_marked():
    assert describe_potential("SNAP_ZuoChenLi_2019_Si__MO_869330304805_000").machine_learned


def test_a_model_without_metadata_is_described_by_what_it_says_itself():
    assert describe_potential("ex_model_Ar_P_Morse").species == ("Ar",)


def test_every_installed_model_can_be_described():
    from aiida_eipnn.science.eip.kim import installed_kim_models

    for name in installed_kim_models():
        assert describe_potential(name).species, name


def test_no_log_file_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_potential(SW).label(bulk("Si"))

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [SW, "lennard-jones"])
def test_molecular_dynamics_conserves_the_energy(name):
    atoms = rattled(bulk("Si", cubic=True), seed=4, size=0.05)
    atoms.calc = EipCalculator(open_potential(name))
    before = atoms.get_total_energy()

    VelocityVerlet(atoms, timestep=0.5 * units.fs).run(200)

    assert atoms.get_kinetic_energy() > 0.05
    assert atoms.get_total_energy() == pytest.approx(before, abs=2e-3)


def test_the_calculator_gives_what_the_potential_gives(silicon):
    potential = open_potential(SW)
    silicon.calc = EipCalculator(potential)
    label = potential.label(silicon)

    assert silicon.get_potential_energy() == label.energy
    np.testing.assert_array_equal(silicon.get_forces(), label.forces)
    np.testing.assert_array_equal(silicon.get_stress(), label.stress)


def shapes(symbol: str) -> list[Atoms]:
    """Return cells of one atom and of many, skewed and long, slabs, wires, clusters and atoms."""
    crystal = bulk(symbol)
    skewed = crystal.copy()
    skewed.set_cell(skewed.cell @ [[1, 0, 0], [2, 1, 0], [-1, 3, 1]], scale_atoms=False)
    long = bulk(symbol, cubic=True).repeat((1, 1, 5))
    far_out = rattled(bulk(symbol, cubic=True), seed=5)
    far_out.positions += [[100 * atom, -30, 7] for atom in range(len(far_out))] @ far_out.cell
    slab, wire = bulk(symbol, cubic=True).repeat((1, 1, 2)), bulk(symbol, cubic=True)
    slab.pbc, wire.pbc = (True, True, False), (False, False, True)
    cluster = bulk(symbol, cubic=True).repeat(2)
    cluster.pbc, cluster.cell = False, None
    frames = [crystal, skewed, long, far_out, slab, wire, cluster, crystal.repeat(4)]
    moved = [rattled(atoms, seed) for seed, atoms in enumerate(frames[:-2])]
    alone = Atoms(symbol, [[1.0, 2.0, 3.0]])
    return [*frames, *moved, alone]


@pytest.mark.parametrize("symbol", ["Si", "Al", "W"])
def test_batches_agree_with_kimpys_own_lists_for_every_usable_model(symbol):
    from aiida_eipnn.science.eip.catalogue import usable_eips
    from aiida_eipnn.science.eip.kim import open_kim_potential

    frames = shapes(symbol)
    configurations = Configurations.from_atoms(frames)
    potentials = [open_kim_potential(name) for name in usable_eips([symbol])]
    batch = Batch(configurations, [potential.reach for potential in potentials])
    assert len(potentials) > 10

    for potential in potentials:
        labels = potential.label_batch(batch)
        for row, atoms in enumerate(frames):
            expected = potential._label_alone(atoms)
            part = slice(configurations.offsets[row], configurations.offsets[row + 1])
            where = f"{potential.name}, {row}"
            difference = (labels.energy[row] - expected.energy) / len(atoms)
            assert abs(difference) < 1e-10, where
            np.testing.assert_allclose(
                labels.forces[part], expected.forces, rtol=1e-10, atol=1e-9, err_msg=where
            )
            np.testing.assert_allclose(
                labels.stress[row], expected.stress, rtol=1e-10, atol=1e-10, err_msg=where
            )


def test_without_numba_the_labels_are_the_same(monkeypatch):
    from aiida_eipnn.science.eip.kim import open_kim_potential

    configurations = Configurations.from_atoms(shapes("Si"))
    potential = open_kim_potential(SW)
    compiled = potential.label_batch(Batch(configurations, [potential.reach]))
    for module in ("kim", "batch"):
        monkeypatch.setattr(f"aiida_eipnn.science.eip.{module}.COMPILED", False)

    plain = potential.label_batch(Batch(configurations))

    assert potential.reach is None
    assert Batch(configurations).faults() == {}
    np.testing.assert_allclose(plain.energy, compiled.energy, rtol=1e-11, atol=1e-9)
    np.testing.assert_allclose(plain.forces, compiled.forces, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(plain.stress, compiled.stress, rtol=1e-9, atol=1e-9)


def test_kernels_compile_where_nothing_can_be_kept():
    # None of the places where numba keeps what it compiled is one.
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator"}
    code = "from aiida_eipnn.science.eip.neighbours import find_close"

    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )

    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("row", range(15))
def test_pairs_are_all_that_are_near_enough_also_of_images(row):
    from aiida_eipnn.science.eip.batch import Reach

    atoms = shapes("Si")[row]
    batch = Batch(Configurations.from_atoms([atoms]), [Reach(4.0, True)])

    pairs = batch.pairs(Reach(4.0, True))

    between = np.linalg.norm(pairs.positions[:, None] - pairs.positions, axis=2)
    near = (between < 4.0) & ~np.eye(len(between), dtype=bool)
    # Only of what some atom reaches: no model sees the other images.
    seen = near[: len(atoms)].any(axis=0)
    seen[: len(atoms)] = True
    found = np.zeros_like(near)
    for image in range(len(near)):
        found[image, pairs.neighbour[pairs.pair_offsets[image] : pairs.pair_offsets[image + 1]]] = 1
    np.testing.assert_array_equal(found, near & seen[:, None])
