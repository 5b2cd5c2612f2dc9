"""A job of each kind that a loop repeats, small, and what it must find anywhere."""

import shutil
from pathlib import Path

import numpy as np
from ase.build import bulk

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.run import run_job
from aiida_eipnn.jobs.spec import EvaluateJob, LabelJob, Stage, State, TrainJob
from aiida_eipnn.science.arrays import load_arrays, save_arrays
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.predictions import Predictions

# A KIM model, and one that asks for pairs here.
EIPS = ("SW_StillingerWeber_1985_Si__MO_405512056662_005", "lennard-jones[epsilon=0.4,sigma=2.1]")
NETWORK = {"n_radial": 4, "l_max": 1, "width": 8}
TRAINING = {"steps": 6, "min_epochs": 3}
LABEL, TRAIN, EVALUATE = LabelJob.kind, TrainJob.kind, EvaluateJob.kind
COMMITTEE = Path(spec.OUTPUT, spec.COMMITTEE)
WEIGHTS = "weights.safetensors"


def pool() -> Configurations:
    """Return rattled silicon."""
    rng = np.random.default_rng(0)
    frames = [bulk("Si") for _ in range(8)]
    for atoms in frames:
        atoms.positions += rng.normal(0, 0.1, (2, 3))
    return Configurations.from_atoms(frames, "rattled")


def run_here(folder: Path) -> Path:
    """Write and run the three jobs in this process; return ``folder`` with one folder for each."""
    jobs = {
        LABEL: LabelJob(eips=EIPS),
        TRAIN: TrainJob(
            stage=Stage.PRETRAIN, seeds=(1, 2), network=NETWORK, training=TRAINING, device="cpu"
        ),
        EVALUATE: EvaluateJob(device="cpu"),
    }
    for kind, job in jobs.items():
        save_arrays(folder / kind / spec.CONFIGURATIONS / "pool", pool().arrays())
        spec.write_job(folder / kind / spec.JOB, job)
        if kind == TRAIN:
            save_arrays(folder / kind / spec.EIP_LABELS / "pool", labels_in(folder).arrays())
        if kind == EVALUATE:
            shutil.copytree(folder / TRAIN / COMMITTEE, folder / kind / spec.COMMITTEE)
        assert run_job(folder / kind) is State.DONE
    return folder


def copy_inputs(folder: Path, target: Path) -> Path:
    """Copy what a job reads."""
    made = shutil.ignore_patterns(spec.OUTPUT, spec.STATUS, spec.CHECKPOINT)
    return Path(shutil.copytree(folder, target, ignore=made))


def labels_in(folder: Path) -> Labels:
    """Return what the EIPs say."""
    return Labels.from_arrays(load_arrays(folder / LABEL / spec.OUTPUT / spec.LABELS))


def predictions_in(folder: Path) -> Predictions:
    """Return what the committee says."""
    return Predictions.from_arrays(load_arrays(folder / EVALUATE / spec.OUTPUT / spec.PREDICTIONS))


def weights_in(folder: Path) -> bytes:
    """Return the committee."""
    return (folder / TRAIN / COMMITTEE / WEIGHTS).read_bytes()


def assert_equal_labels(found: Labels, expected: Labels) -> None:
    """Other lists of neighbours have other orders, so sums over them differ by rounding."""
    assert found.ok.all()
    assert found.ids.tolist() == expected.ids.tolist()
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-12)
    np.testing.assert_allclose(found.forces, expected.forces, atol=1e-10)
    np.testing.assert_allclose(found.stress, expected.stress, atol=1e-12)


def assert_equal_predictions(found: Predictions, expected: Predictions) -> None:
    """What networks compute has one order wherever it is."""
    np.testing.assert_array_equal(found.energy, expected.energy)
    np.testing.assert_array_equal(found.forces, expected.forces)
