import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from aiida_eipnn.science import perturbation as p
from aiida_eipnn.science.gate import geometry_fault

MAKERS = [
    (p.rattled, p.Rattle()),
    (p.strained, p.Strain()),
    (p.vacancy, p.Vacancy()),
    (p.cut_surface, p.Surface()),
    (p.dimer, p.Dimer()),
    (p.interstitial, p.Interstitial()),
    (p.scattered, p.Scatter()),
]


@pytest.fixture
def diamond():
    return bulk("Si", cubic=True)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(("make", "settings"), MAKERS)
def test_the_same_generator_makes_the_same_atoms_and_the_seed_stays(make, settings, diamond):
    before = diamond.copy()

    first, again, other = (
        make(diamond, np.random.default_rng(seed), settings) for seed in (1, 1, 2)
    )

    assert first == again
    assert first != other
    assert diamond == before


def test_rattling_has_the_asked_amplitude(rng):
    large = bulk("Si", cubic=True) * (4, 4, 4)

    moved = p.rattled(large, rng, p.Rattle(amplitude=(0.1, 0.1)))

    assert (moved.positions - large.positions).std() == pytest.approx(0.1, rel=0.1)
    np.testing.assert_array_equal(moved.cell.array, large.cell.array)


def test_strain_keeps_the_volume_in_its_range_and_the_fractions(diamond, rng):
    settings = p.Strain(volume=(0.8, 0.9), shear=0.1, amplitude=(0.0, 0.0))
    for _ in range(20):
        new = p.strained(diamond, rng, settings)
        assert 0.8 <= new.get_volume() / diamond.get_volume() <= 0.9
        np.testing.assert_allclose(
            new.cell.scaled_positions(new.positions),
            diamond.cell.scaled_positions(diamond.positions),
            atol=1e-12,
        )


def test_strain_without_shear_is_isotropic(diamond, rng):
    new = p.strained(diamond, rng, p.Strain(shear=0.0, amplitude=(0, 0)))

    np.testing.assert_allclose(new.cell.lengths(), new.cell.lengths()[0])
    np.testing.assert_allclose(new.cell.angles(), 90)


def test_strain_does_not_rotate(diamond, rng):
    new = p.strained(diamond, rng, p.Strain(shear=0.2))
    stretch = np.linalg.solve(diamond.cell.array, new.cell.array)

    np.testing.assert_allclose(stretch, stretch.T, atol=1e-12)


def test_a_vacancy_lacks_one_atom(diamond, rng):
    assert len(p.vacancy(diamond, rng, p.Vacancy())) == 7
    assert len(p.vacancy(diamond, rng, p.Vacancy(n_vacancies=3))) == 5


def test_the_last_atom_cannot_be_taken_out(rng):
    with pytest.raises(ValueError, match="cannot take 1 of 1 atoms out; use a larger supercell"):
        p.vacancy(bulk("Cu"), rng, p.Vacancy())


@pytest.mark.parametrize("seed", [bulk("Si"), bulk("Si", cubic=True), bulk("W")])
def test_a_slab_is_small_periodic_and_has_vacuum(seed, rng):
    settings = p.Surface(vacuum=8.0, amplitude=(0.0, 0.0))
    for _ in range(10):
        slab = p.cut_surface(seed, rng, settings)
        heights = slab.positions @ (np.cross(*slab.cell.array[:2]) / slab.cell.areas()[2])
        gap = slab.get_volume() / slab.cell.areas()[2] - np.ptp(heights)

        assert len(slab) <= 8
        assert slab.pbc.all()
        assert gap == pytest.approx(8.0)
        assert geometry_fault(slab, min_contact=0.8) is None


def test_a_seed_larger_than_the_slab_may_be_gives_the_thinnest_there_is(diamond, rng):
    for _ in range(5):
        assert len(p.cut_surface(diamond, rng, p.Surface(max_atoms=4))) == 8


def test_a_molecule_has_no_surface(rng):
    with pytest.raises(ValueError, match="periodic in all directions"):
        p.cut_surface(Atoms("Si"), rng, p.Surface())


def test_dimers_cover_their_range_of_distances(rng):
    settings = p.Dimer(distance=(0.8, 1.6))
    found = [p.dimer(bulk("Si"), rng, settings) for _ in range(50)]
    distances = np.array([atoms.get_distance(0, 1, mic=True) for atoms in found]) / 2.22

    assert distances.min() >= 0.8
    assert distances.max() <= 1.6
    assert np.ptp(distances) > 0.6
    assert all(atoms.pbc.all() for atoms in found)


def test_the_box_of_a_large_dimer_grows(rng):
    atoms = p.dimer(bulk("W"), rng, p.Dimer(distance=(1.8, 1.8), box=8.0))

    assert atoms.cell.lengths()[0] == pytest.approx(2 * 1.8 * 2 * 1.62)


def test_an_interstitial_finds_a_hole(diamond, rng):
    new = p.interstitial(diamond, rng, p.Interstitial(amplitude=(0.0, 0.0)))

    assert len(new) == 9
    assert new.get_distances(-1, np.arange(8), mic=True).min() > 1.8


def test_scattered_atoms_keep_composition_density_and_distance(rng):
    seed = bulk("SiC", "zincblende", a=4.36, cubic=True)
    settings = p.Scatter(n_atoms=(8, 8), volume=(1.2, 1.2))
    made = [p.scattered(seed, rng, settings) for _ in range(20)]

    for atoms in made:
        assert sorted(atoms.get_chemical_symbols()) == ["C"] * 4 + ["Si"] * 4
        assert atoms.get_volume() == pytest.approx(1.2 * 4.36**3)
        assert ((atoms.cell.angles() >= 60) & (atoms.cell.angles() <= 120)).all()
        lengths = atoms.cell.lengths()
        assert lengths.min() >= 0.5 * lengths.max()
    closest = [atoms.get_all_distances(mic=True)[~np.eye(8, dtype=bool)].min() for atoms in made]
    alone = p.Scatter(n_atoms=(8, 8), volume=(1.2, 1.2), n_tries=1)
    anywhere = [
        atoms.get_all_distances(mic=True)[~np.eye(8, dtype=bool)].min()
        for atoms in (p.scattered(seed, rng, alone) for _ in range(20))
    ]
    assert np.median(closest) > 1.5 * np.median(anywhere)


def test_atoms_are_scattered_over_what_can_be_a_cell(rng):
    with pytest.raises(ValueError, match="no cell has three angles"):
        p.scattered(bulk("Si"), rng, p.Scatter(angle=(140.0, 150.0)))
    with pytest.raises(ValueError, match="only a seed that is periodic"):
        p.scattered(Atoms("Si2", [[0, 0, 0], [0, 0, 2]]), rng, p.Scatter())
    for wrong in ({"angle": (60.0, 160.0)}, {"shortest": 0.0}, {"n_tries": 0}, {"n_atoms": (0, 2)}):
        with pytest.raises(ValueError, match=r"must|try at least"):
            p.Scatter(**wrong)


def test_a_supercell_may_be_a_matrix():
    primitive = bulk("Si")
    matrix = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))

    assert len(p.repeat(primitive, (2, 2, 1))) == 8
    np.testing.assert_allclose(p.repeat(primitive, matrix).cell.angles(), 90)


def test_a_seed_grows_along_its_shortest_vector_until_it_is_large_enough():
    slab = Atoms("Si", cell=[3.0, 4.0, 9.0], pbc=True)

    lengths = [p.enlarge(slab, n).cell.lengths().tolist() for n in (1, 2, 3, 5)]

    assert lengths == [[3, 4, 9], [6, 4, 9], [6, 8, 9], [9, 8, 9]]
    assert [len(p.enlarge(bulk("Si"), n)) for n in (2, 3, 5, 8)] == [2, 4, 8, 8]


def test_only_periodic_directions_are_repeated():
    wire = Atoms("Si2", [[0, 0, 0], [0, 0, 2.3]], cell=[1, 1, 4.6], pbc=(False, False, True))
    molecule = Atoms("Si2", [[0, 0, 0], [0, 0, 2.3]])

    assert p.enlarge(wire, 6).cell.lengths().tolist() == pytest.approx([1, 1, 13.8])
    assert len(p.enlarge(molecule, 6)) == 2


@pytest.mark.parametrize(
    "supercell", [(2, 2), (0, 1, 1), (1.5, 1, 1), "large", ((1, 0, 0), (1, 0, 0), (0, 0, 1))]
)
def test_a_supercell_that_is_none_is_refused(supercell):
    with pytest.raises(ValueError, match="give three integers"):
        p.repeat(bulk("Si"), supercell)


@pytest.mark.parametrize(
    ("cls", "setting", "words"),
    [
        (p.Rattle, {"amplitude": (0.2, 0.1)}, "must rise"),
        (p.Rattle, {"amplitude": 0.1}, "its lowest and its highest"),
        (p.Strain, {"volume": (0.0, 1.0)}, "volume is .* must rise"),
        (p.Strain, {"shear": 0.7}, "shear is 0.7"),
        (p.Vacancy, {"n_vacancies": 0}, "at least one"),
        (p.Surface, {"miller": ((0, 0, 0),)}, "give planes"),
        (p.Surface, {"vacuum": 0.0}, "above zero"),
        (p.Surface, {"max_atoms": 0}, "at least one atom"),
        (p.Dimer, {"box": -1.0}, "above zero"),
        (p.Interstitial, {"n_tries": 0}, "at least one"),
    ],
)
def test_settings_out_of_range_are_refused(cls, setting, words):
    with pytest.raises(ValueError, match=words):
        cls(**setting)
