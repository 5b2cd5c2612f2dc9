"""The benchmarks on a small set of their own."""

import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

from aiida_eipnn.science.eip.analytic import LennardJones

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# The last one is not there: an EIP without a single label must not stop anything.
EIPS = [
    "EAM_Dynamo_Ackland_2003_W__MO_141627196590_005",
    "lennard-jones",
    "EAM_NotInstalled_W__MO_000000000000_000",
]
FEW = {"steps": 10, "min_epochs": 1}


def write_set(path: Path) -> None:
    """Tungsten that obeys a pair potential, with a published split."""
    rng = np.random.default_rng(0)
    frames = []
    for number in range(30):
        atoms = bulk("W", a=3.17, cubic=True)
        atoms.set_cell(atoms.cell * (1 + rng.uniform(-0.05, 0.05)), scale_atoms=True)
        atoms.positions += rng.normal(0, 0.08, atoms.positions.shape)
        label = LennardJones(epsilon=0.5, sigma=2.45).label(atoms)
        atoms.calc = SinglePointCalculator(atoms, energy=label.energy, forces=label.forces)
        atoms.info |= {"split": "test" if number % 3 == 0 else "train", "config_type": "hot"}
        frames.append(atoms)
    ase.io.write(path, frames, format="extxyz")


@pytest.fixture
def injection(kim, torch, tmp_path, monkeypatch):
    """The runner, on the small set, with trainings of a few steps."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import injection
    import injection_data
    import injection_networks

    from aiida_eipnn.science.nn.classification import Classification
    from aiida_eipnn.science.nn.finetuning import Finetuning
    from aiida_eipnn.science.nn.pretraining import Pretraining

    write_set(tmp_path / "mvl_W.extxyz")
    monkeypatch.setattr(injection_data, "DATA", tmp_path)
    monkeypatch.setattr(injection_data, "BUILD", tmp_path / "build")
    monkeypatch.setattr(injection_data, "choose_eips", lambda element: EIPS)
    monkeypatch.setattr(injection, "ERRORS", tmp_path / "errors")
    for stage in (Pretraining, Classification, Finetuning):
        monkeypatch.setattr(stage, "defaults", {**stage.defaults, **FEW})
    monkeypatch.setattr(injection_networks, "SCRATCH_STEPS", (5, 10))
    monkeypatch.setattr(injection_networks, "PSEUDO_STEPS", 10)
    few = [{**recipe, "count": 4} for recipe in injection_networks.RECIPES[:2]]
    monkeypatch.setattr(injection_networks, "RECIPES", few)
    # In this process: a worker would not know of the small set.
    monkeypatch.setattr(
        injection,
        "run_all",
        lambda run, tasks, n_workers: ((task, run(task)) for task in tasks),
    )
    injection.load_dataset.cache_clear()
    injection_networks._material.cache_clear()
    yield injection
    injection.load_dataset.cache_clear()
    injection_networks._material.cache_clear()
    for name in [name for name in sys.modules if name.startswith(("injection", "active_learning"))]:
        del sys.modules[name]
