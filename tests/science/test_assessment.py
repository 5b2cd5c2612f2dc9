"""Whatever tells how wrong a committee may be is judged by the same panel."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from ase.build import bulk

from aiida_eipnn.science.assessment import assess_uncertainties
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import DFT, Labels
from aiida_eipnn.science.predictions import Predictions

N = 400


@pytest.fixture(scope="module")
def configurations():
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(N):
        atoms = bulk("Si")
        atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
        frames.append(atoms)
    return Configurations.from_atoms(frames)


@pytest.fixture(scope="module")
def test(configurations):
    missing = Labels.missing(configurations, [DFT])
    return replace(
        missing,
        energy=np.zeros((N, 1)),
        forces=np.zeros((1, 2 * N, 3)),
        status=np.zeros_like(missing.status),
        reasons=np.array([], dtype="<U1"),
    )


@pytest.fixture
def predicted(configurations):
    """Predictions that are wrong by as much as they say, on the average."""
    rng = np.random.default_rng(1)
    sigma, sigma_energy = rng.uniform(0.05, 0.5, 2 * N), rng.uniform(0.001, 0.02, N)
    return Predictions(
        ids=configurations.ids,
        offsets=configurations.offsets,
        energy=2 * sigma_energy * rng.normal(size=N),
        forces=sigma[:, None] * rng.normal(size=(2 * N, 3)),
        stress=np.zeros((N, 6)),
        energy_std=sigma_energy,
        forces_std=np.sqrt(3) * sigma,
        features=np.zeros((N, 1)),
        # Without a unit: only how they go with the errors counts.
        strangeness=1000 * sigma,
        atom_energy_std=rng.uniform(1, 2, 2 * N).astype(np.float32),
    )


def test_uncertainties_that_are_right_are_found_to_be(test, predicted):
    found = assess_uncertainties(test, predicted)

    assert found.keys() == {"forces_std", "energy_std", "strangeness", "atom_energy_std"}
    for name, n in (("forces_std", 6 * N), ("energy_std", N)):
        panel = found[name].panel
        assert panel.n == n
        assert panel.coverage["0.9"] == pytest.approx(0.9, abs=0.03)
        assert panel.miscalibration_area < 0.02
        assert found[name].conformal.coverage == pytest.approx(0.9, abs=0.03)
    assert found["energy_std"].calibration.scale == pytest.approx(1.0, abs=0.1)
    assert found["forces_std"].conformal_worst.n == N
    assert found["energy_std"].conformal_worst is None


def test_the_unit_of_an_uncertainty_does_not_count(test, predicted):
    found = assess_uncertainties(test, predicted)

    same = asdict(found["forces_std"].panel)
    for name, value in asdict(found["strangeness"].panel).items():
        assert value == pytest.approx(same[name], rel=1e-9)
    assert found["strangeness"].conformal.coverage == found["forces_std"].conformal.coverage
    ratio = found["forces_std"].calibration.scale / found["strangeness"].calibration.scale
    assert ratio == pytest.approx(1000 / np.sqrt(3))


def test_what_knows_nothing_is_found_to_know_nothing(test, predicted):
    found = assess_uncertainties(test, predicted)

    assert abs(found["atom_energy_std"].panel.spearman) < 0.06
    assert abs(found["atom_energy_std"].panel.rejection) < 0.1
    assert found["forces_std"].panel.rejection > 0.3
    assert found["forces_std"].panel.nll < found["atom_energy_std"].panel.nll


def test_what_is_not_told_or_zero_everywhere_is_not_there(test, predicted):
    silent = replace(predicted, strangeness=None, energy_std=np.zeros(N))

    assert assess_uncertainties(test, silent).keys() == {"forces_std", "atom_energy_std"}


def test_one_prediction_that_is_no_number_says_nothing_of_the_others(test, predicted):
    forces, energy = predicted.forces.copy(), predicted.energy.copy()
    forces[3], energy[1] = np.nan, np.nan
    strangeness = predicted.strangeness.copy()
    strangeness[7] = np.nan

    found = assess_uncertainties(
        test, replace(predicted, forces=forces, energy=energy, strangeness=strangeness)
    )

    assert found["forces_std"].calibration.n == 2 * N - 1
    assert found["forces_std"].conformal_worst.n == N - 1
    assert found["energy_std"].calibration.n == N - 1
    assert found["strangeness"].panel.n == 6 * N - 6
    assert all(np.isfinite(item.calibration.scale) for item in found.values())


def test_labels_without_errors_leave_no_scale_and_break_nothing(test, predicted):
    right = replace(predicted, energy=np.zeros(N), forces=np.zeros((2 * N, 3)))

    found = assess_uncertainties(test, right)

    assert found["energy_std"].calibration.scale == 0.0
    assert found["forces_std"].panel.coverage["0.68"] == 1.0


def test_the_test_set_is_found_among_all_predictions(test, predicted):
    some = test.take(range(0, N, 3))

    found = assess_uncertainties(some, predicted)

    assert found["energy_std"].panel.n == len(some)
    assert found["forces_std"].panel.n == 6 * len(some)
