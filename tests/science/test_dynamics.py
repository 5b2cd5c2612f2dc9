from typing import ClassVar

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT

from aiida_eipnn.science.dynamics import Dynamics, run_dynamics


@pytest.fixture
def copper():
    return bulk("Cu", cubic=True)


class Collapse(Calculator):
    """Pulls the atoms of a crystal together until they overlap."""

    implemented_properties: ClassVar[list[str]] = ["energy", "forces"]

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        away = self.atoms.positions - self.atoms.positions.mean(axis=0)
        self.results = {"energy": 0.0, "forces": -20.0 * away}


class Failing(EMT):
    """Fails once the atoms have moved for some steps."""

    calls = 0

    def calculate(self, *arguments, **settings):
        type(self).calls += 1
        if type(self).calls > 25:
            raise RuntimeError("out of range")
        super().calculate(*arguments, **settings)


def test_snapshots_are_as_many_as_asked_and_all_differ(copper):
    before = copper.copy()

    frames, fault = run_dynamics(
        copper, EMT(), np.random.default_rng(0), Dynamics(temperature=300, n_snapshots=5)
    )

    assert fault == ""
    assert len(frames) == 5
    assert len({frame.positions.tobytes() for frame in frames}) == 5
    assert copper == before
    assert all(frame.calc is None for frame in frames)


def test_the_same_generator_gives_the_same_frames(copper):
    settings = Dynamics(temperature=600, n_snapshots=3)

    first, again, other = (
        run_dynamics(copper, EMT(), np.random.default_rng(seed), settings).frames
        for seed in (4, 4, 5)
    )

    assert first == again
    assert first != other


def test_atoms_move_more_where_it_is_hotter(copper):
    def displacement(temperature):
        settings = Dynamics(temperature=temperature, n_snapshots=10, friction=0.05)
        frames = run_dynamics(copper * (2, 1, 1), EMT(), np.random.default_rng(1), settings).frames
        return np.std(frames[-1].positions - (copper * (2, 1, 1)).positions)

    assert displacement(1000) > 1.5 * displacement(100)


def test_a_run_whose_atoms_overlap_keeps_its_good_frames(copper):
    settings = Dynamics(
        temperature=10, n_snapshots=50, spacing=2, max_temperature_factor=1e9, timestep=1.0
    )

    frames, fault = run_dynamics(copper, Collapse(), np.random.default_rng(0), settings)

    assert 0 < len(frames) < 50
    assert f"stopped after step {2 * len(frames)}: two atoms overlap" in fault


def test_a_run_that_grows_too_hot_is_stopped(copper):
    settings = Dynamics(temperature=10, n_snapshots=50, spacing=2, min_contact=0.0)

    frames, fault = run_dynamics(copper, Collapse(), np.random.default_rng(0), settings)

    assert len(frames) < 50
    assert "the guard is 100 K" in fault


def test_a_potential_that_fails_ends_the_run_without_raising(copper):
    Failing.calls = 0

    frames, fault = run_dynamics(
        copper,
        Failing(),
        np.random.default_rng(0),
        Dynamics(temperature=300, n_snapshots=9, spacing=10),
    )

    assert len(frames) == 2
    assert fault == "stopped after step 20: the potential failed (RuntimeError: out of range)"


class Unsure(EMT):
    """Forgets more of what it knew at each step."""

    implemented_properties: ClassVar[list[str]] = [*EMT.implemented_properties, "forces_std"]

    def calculate(self, *arguments, **settings):
        super().calculate(*arguments, **settings)
        self.steps = getattr(self, "steps", 0) + 1
        self.results["forces_std"] = np.array([0.0, 0.01 * self.steps, 0.0, 0.0])


def test_a_run_ends_with_the_configuration_that_the_committee_does_not_know(copper):
    settings = Dynamics(temperature=300, n_snapshots=5, spacing=10, max_uncertainty=0.255)
    trajectory = run_dynamics(copper, Unsure(), np.random.default_rng(0), settings)
    # The first call is for the start: the 25th step is the first one above.
    assert len(trajectory.frames) == 3
    assert "the spread of a force is 0.26 eV/Å, above 0.255" in trajectory.fault
    free = Dynamics(temperature=300, n_snapshots=5, spacing=10)
    known = run_dynamics(copper, Unsure(), np.random.default_rng(0), free)
    assert not known.fault
    assert len(known.frames) == 5
    assert known.frames[1] == trajectory.frames[1]
    assert known.frames[2] != trajectory.frames[2]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 300, "n_snapshots": 0},
        {"temperature": 300, "timestep": -1},
        {"temperature": 300, "max_temperature_factor": 1},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="it must be above"):
        Dynamics(**settings)


def volumes(atoms, pressure):
    settings = Dynamics(temperature=300, n_snapshots=15, spacing=20, pressure=pressure)
    frames, fault = run_dynamics(atoms, EMT(), np.random.default_rng(0), settings)
    assert fault == ""
    return np.array([frame.get_volume() for frame in frames])


def test_a_barostat_brings_the_volume_to_its_pressure(copper):
    assert np.ptp(volumes(copper, None)) == 0
    high, low = (volumes(copper, pressure)[5:].mean() for pressure in (20.0, -5.0))
    # Copper gives way by a tenth per 20 GPa: its bulk modulus is 140 GPa and rises.
    assert 0.85 < high / copper.get_volume() < 0.96
    assert 1.01 < low / copper.get_volume() < 1.10


def test_a_slab_has_no_pressure(copper):
    copper.pbc = [True, True, False]
    settings = Dynamics(temperature=300, pressure=0.0)
    frames, fault = run_dynamics(copper, EMT(), np.random.default_rng(0), settings)
    assert frames == []
    assert "periodic" in fault
