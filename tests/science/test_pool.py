from pathlib import Path

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT

import aiida_eipnn
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.dynamics import Trajectory, run_dynamics
from aiida_eipnn.science.eip.analytic import LennardJones
from aiida_eipnn.science.eip.potential import EipCalculator
from aiida_eipnn.science.gate import refuse_invalid
from aiida_eipnn.science.pool import KINDS, Stopped, counts_by_type, make_pool

PROTOCOLS = Path(aiida_eipnn.__file__).parent / "workflows" / "protocols" / "active_learning.yaml"


def recipes_of_protocols():
    """Return every recipe that is shipped, but few configurations of each."""
    content = yaml.safe_load(PROTOCOLS.read_text())
    inputs = [content["default_inputs"], *content["protocols"].values()]
    found = [recipe for part in inputs for recipe in part.get("explore", {}).get("recipes", [])]
    return [recipe | {"count": 3} for recipe in found]


@pytest.fixture
def seeds():
    return Configurations.from_atoms([bulk("Cu", cubic=True), bulk("Cu") * (2, 1, 1)])


class OneByOne:
    """Runs molecular dynamics here, one run after the other."""

    has_uncertainty = False

    def __init__(self, calculator):
        self.calculator = calculator
        self.asked = []

    def run(self, runs):
        self.asked.append(len(runs))
        for run in runs:
            yield run_dynamics(run.start, self.calculator, run.rng, run.settings)


def make(seeds, *recipes, seed=0, calculator=None, **settings):
    driver = OneByOne(calculator) if calculator else None
    return make_pool(seeds, recipes, np.random.default_rng(seed), driver, **settings)


def test_every_recipe_makes_exactly_its_count_and_nothing_invalid(seeds):
    recipes = [{"config_type": name, "count": 7} for name in KINDS]
    recipes.append({"config_type": "md", "count": 7, "spacing": 5, "snapshots_per_run": 3})

    pool, notes = make(seeds, *recipes, calculator=EMT())

    assert counts_by_type(pool) == dict.fromkeys(sorted([*KINDS, "md"]), 7)
    assert refuse_invalid(pool) == ()
    assert notes == ()


def test_the_same_seed_makes_the_same_pool(seeds):
    recipe = {"config_type": "rattled", "count": 5}

    first, again, other = (make(seeds, recipe, seed=seed)[0].ids.tolist() for seed in (1, 1, 2))

    assert first == again
    assert not set(first) & set(other)


def test_a_change_of_one_recipe_changes_no_other(seeds):
    strained = {"config_type": "strained", "count": 4}

    few, _ = make(seeds, {"config_type": "rattled", "count": 2}, strained)
    many, _ = make(seeds, {"config_type": "rattled", "count": 5}, strained)

    assert few.ids[2:].tolist() == many.ids[5:].tolist()
    assert few.ids[:2].tolist() == many.ids[:2].tolist()


@pytest.mark.parametrize(
    "seed", [bulk("Si"), bulk("Si", cubic=True), bulk("Si", cubic=True) * (2, 1, 1)], ids=len
)
def test_the_recipes_of_every_protocol_can_be_followed_with_any_seed(seed):
    recipes = recipes_of_protocols()
    calculator = EipCalculator(LennardJones())

    pool, notes = make(Configurations.from_atoms([seed]), *recipes, calculator=calculator)

    assert {"vacancy", "surface", "md"} <= {recipe["config_type"] for recipe in recipes}
    assert len(pool) == 3 * len(recipes)
    assert notes == ()


def test_seeds_are_used_in_turn_unless_a_size_is_preferred_that_there_is(seeds):
    both, _ = make(seeds, {"config_type": "rattled", "count": 4})
    one, _ = make(seeds, {"config_type": "rattled", "count": 4, "n_atoms": 2})
    none, _ = make(seeds, {"config_type": "rattled", "count": 4, "n_atoms": 3})

    assert both.n_atoms.tolist() == [4, 2, 4, 2]
    assert one.n_atoms.tolist() == [2, 2, 2, 2]
    assert none.n_atoms.tolist() == [4, 2, 4, 2]


def test_seeds_grow_to_the_least_number_of_atoms_and_no_further(seeds):
    pool, _ = make(seeds, {"config_type": "vacancy", "count": 2, "min_atoms": 4})

    assert pool.n_atoms.tolist() == [3, 3]


def test_the_supercell_counts_towards_the_least_number_of_atoms(seeds):
    recipe = {"config_type": "rattled", "count": 2, "supercell": [2, 2, 1], "min_atoms": 12}

    pool, _ = make(seeds, recipe)

    assert pool.n_atoms.tolist() == [16, 16]


def test_supercells_are_made_before_the_perturbation(seeds):
    pool, _ = make(
        seeds, {"config_type": "vacancy", "count": 2, "n_atoms": 2, "supercell": [2, 2, 1]}
    )

    assert pool.n_atoms.tolist() == [7, 7]


def test_settings_reach_the_perturbation(seeds):
    pool, _ = make(
        seeds,
        {"config_type": "dimer", "count": 3, "distance": [1.0, 1.0001], "box": 9.0},
    )

    np.testing.assert_allclose(pool.cells[0], 9.0 * np.eye(3))
    assert pool.atoms(0).get_distance(0, 1) == pytest.approx(2.64, abs=1e-3)


def test_a_recipe_that_repeats_itself_is_a_note_and_keeps_what_it_made(seeds):
    still = {"config_type": "rattled", "count": 5, "amplitude": [0.0, 0.0]}

    pool, notes = make(seeds, still)

    assert len(pool) == 2
    assert notes[0].startswith("rattled: 2 of 5 were made: 500 tries did not give more different")


def test_a_recipe_whose_atoms_always_overlap_is_a_note_and_the_others_go_on(seeds):
    crushed = {"config_type": "strained", "count": 1, "volume": [0.1, 0.11]}

    pool, notes = make(seeds, crushed, {"config_type": "rattled", "count": 2})

    assert counts_by_type(pool) == {"rattled": 2}
    (note,) = notes
    assert note.startswith("strained: 0 of 1 were made: ")
    assert "two atoms overlap" in note
    assert "make the perturbation weaker" in note


def test_a_pool_of_nothing_is_refused_with_the_reasons(seeds):
    crushed = {"config_type": "strained", "count": 1, "volume": [0.1, 0.11]}
    emptied = {"config_type": "vacancy", "count": 3, "n_vacancies": 9}

    with pytest.raises(ValueError, match=r"not one .* two atoms overlap.* cannot take 9 of 2"):
        make(seeds, crushed, emptied)


def test_a_seed_that_does_not_allow_a_recipe_leaves_it_to_the_others():
    molecule = Atoms("Cu2", [[0, 0, 0], [2.5, 0, 0]])
    seeds = Configurations.from_atoms([molecule, bulk("Cu", cubic=True)])

    pool, notes = make(seeds, {"config_type": "surface", "count": 3})

    assert len(pool) == 3
    assert pool.pbc.all()
    assert notes == ()


def test_a_molecule_has_no_surface_which_is_a_note():
    seeds = Configurations.from_atoms([Atoms("Cu2", [[0, 0, 0], [2.5, 0, 0]])])

    _, notes = make(
        seeds, {"config_type": "surface", "count": 30}, {"config_type": "rattled", "count": 1}
    )

    assert notes == (
        "surface: 0 of 30 were made: only a seed that is periodic in all directions has surfaces",
    )


def test_dynamics_that_blows_up_is_noted_and_keeps_what_is_good(seeds):
    recipe = {
        "config_type": "md",
        "count": 500,
        "temperatures": [300, 30000],
        "snapshots_per_run": 2,
        "spacing": 2,
        "timestep": 30.0,
        "max_temperature_factor": 2.0,
    }

    pool, notes = make(
        seeds, {"config_type": "rattled", "count": 2}, recipe | {"count": 60}, calculator=EMT()
    )

    assert any("md at" in note and "stopped" in note for note in notes)
    assert refuse_invalid(pool) == ()


class Refusing(OneByOne):
    """Every second run ends before its first snapshot."""

    def run(self, runs):
        for number, trajectory in enumerate(super().run(runs)):
            yield Trajectory([], "refused") if number % 2 else trajectory


def test_runs_that_give_too_little_are_made_good_by_as_many_as_are_needed(seeds):
    recipe = {"config_type": "md", "count": 12, "snapshots_per_run": 3, "spacing": 2}
    driver = Refusing(EMT())

    pool, notes = make_pool(seeds, [recipe], np.random.default_rng(0), driver)

    assert len(pool) == 12
    # Half of four runs, then half of two, then the only one.
    assert driver.asked == [4, 2, 1]
    assert notes == (
        "md at 300 K, 2 atoms: refused",
        "md at 600 K, 2 atoms: refused",
        "md at 1000 K, 2 atoms: refused",
    )


def test_runs_that_never_give_anything_come_to_an_end(seeds):
    class Silent(OneByOne):
        def run(self, runs):
            self.asked.append(len(runs))
            return [Trajectory([], "refused")] * len(runs)

    recipe = {"config_type": "md", "count": 12, "snapshots_per_run": 3}
    driver = Silent(None)

    pool, notes = make_pool(
        seeds, [recipe, {"config_type": "rattled", "count": 1}], np.random.default_rng(0), driver
    )

    assert len(pool) == 1
    assert driver.asked == [4, 4, 4, 3]
    assert notes[-1] == "md: 0 of 12 were made"


def test_a_pool_that_must_stop_is_no_pool(seeds):
    answers = iter([False, False, True])

    with pytest.raises(Stopped):
        make(seeds, {"config_type": "rattled", "count": 10}, must_stop=lambda: next(answers))
    # What is complete needs not be asked about.
    pool, _ = make(seeds, {"config_type": "rattled", "count": 1}, must_stop=lambda: True)
    assert len(pool) == 1


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"config_type": "melted", "count": 1}, r"'melted', only .*'dimer'.*'md'"),
        ({"config_type": "rattled", "count": 1, "shear": 0.1}, r"no setting \['shear'\], only"),
        ({"config_type": "rattled"}, r"recipe 'rattled': give \['count'\] too"),
        ({"config_type": "rattled", "count": 0}, "at least one"),
        ({"config_type": "rattled", "count": 1, "n_atoms": 0}, "n_atoms is 0; give a whole"),
        ({"config_type": "rattled", "count": 1, "min_atoms": 2.5}, "'rattled': min_atoms is 2.5"),
        ({"config_type": "rattled", "count": 1, "amplitude": [1, 0]}, "'rattled': amplitude"),
        ({"config_type": "rattled", "count": 1, "supercell": [1, 1]}, "give three integers"),
        ({"config_type": "md", "count": 1, "temperatures": []}, "at least one"),
        ({"config_type": "md", "count": 1, "temperatures": [-5]}, "above zero"),
        ({"config_type": "md", "count": 1, "pressures": ["high"]}, "numbers, in GPa"),
        ({"config_type": "md", "count": 1}, "needs an EIP"),
    ],
)
def test_a_wrong_recipe_is_refused_whatever_the_others_make(seeds, recipe, words):
    with pytest.raises(ValueError, match=words):
        make(seeds, {"config_type": "rattled", "count": 1}, recipe)


def test_no_seeds_and_no_recipes_are_refused(seeds):
    with pytest.raises(ValueError, match="no seeds"):
        make(seeds.take([]), {"config_type": "rattled", "count": 1})
    with pytest.raises(ValueError, match="no recipes"):
        make(seeds)
