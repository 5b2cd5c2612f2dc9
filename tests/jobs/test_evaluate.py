"""The evaluate job on a folder, without AiiDA."""

import json
from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk
from watched import watch_neighbours

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.run import run_job
from aiida_eipnn.jobs.spec import EvaluateJob, State
from aiida_eipnn.science.arrays import load_arrays, save_arrays
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.predictions import Predictions

torch = pytest.importorskip("torch")

from aiida_eipnn.jobs import evaluate  # noqa: E402
from aiida_eipnn.science.nn.committee import Committee  # noqa: E402
from aiida_eipnn.science.nn.network import Network, NetworkParameters  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch")


@pytest.fixture
def committee():
    members = []
    for seed in (0, 1):
        member = Network(NetworkParameters(n_radial=4, l_max=1, width=8), (14,), ("dft",))
        member.initialise(seed)
        members.append(member)
    return Committee(members=tuple(members), stage="finetune", seeds=(0, 1))


def pool_of(symbol="Si", n=5):
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(n):
        atoms = bulk(symbol, "diamond", a=5.43)
        atoms.positions += rng.normal(0, 0.1, (2, 3))
        frames.append(atoms)
    return Configurations.from_atoms(frames, "rattled")


def write(folder, committee, *sets):
    for number, configurations in enumerate(sets):
        save_arrays(folder / spec.CONFIGURATIONS / f"set{number}", configurations.arrays())
    committee.save(folder / spec.COMMITTEE)
    spec.write_job(folder / spec.JOB, EvaluateJob(batch_size=2))
    return folder


def test_the_predictions_are_those_of_the_committee(tmp_path, committee):
    pool = pool_of()
    write(tmp_path, committee, pool.take([0, 1]), pool.take([1, 2, 3, 4]))

    assert run_job(tmp_path) is State.DONE

    found = Predictions.from_arrays(load_arrays(tmp_path / spec.OUTPUT / spec.PREDICTIONS))
    expected = committee.predict(pool)
    assert found.ids.tolist() == pool.ids.tolist()
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-12)
    np.testing.assert_allclose(found.forces, expected.forces, atol=1e-10)
    metrics = json.loads((tmp_path / spec.OUTPUT / spec.METRICS).read_text())
    assert metrics["n_configurations"] == 5
    assert metrics["uncertainty"]["max"] == pytest.approx(expected.uncertainty.max())


def test_a_job_that_was_interrupted_goes_on_after_what_is_predicted(tmp_path, committee):
    pool = pool_of(n=7)
    write(tmp_path, committee, pool)
    job = spec.read_job(tmp_path / spec.JOB)
    states = [evaluate.run(job, tmp_path, stop=lambda: True) for _ in range(4)]

    # Two at once.
    assert states == [State.INTERRUPTED] * 3 + [State.DONE]
    found = Predictions.from_arrays(load_arrays(tmp_path / spec.OUTPUT / spec.PREDICTIONS))
    expected = committee.predict(pool, batch_size=2)
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(getattr(found, name), array)
    metrics = json.loads((tmp_path / spec.OUTPUT / spec.METRICS).read_text())
    assert metrics["uncertainty"]["mean"] == pytest.approx(expected.uncertainty.mean())
    assert not (tmp_path / spec.CHECKPOINT).exists()


def test_predictions_of_another_committee_are_not_gone_on_with(tmp_path, committee):
    write(tmp_path, committee, pool_of())
    evaluate.run(spec.read_job(tmp_path / spec.JOB), tmp_path, stop=lambda: True)
    write(tmp_path, replace(committee, members=committee.members[::-1]), pool_of())

    assert run_job(tmp_path) is State.FAILED

    reason = json.loads((tmp_path / spec.STATUS).read_text())["reason"]
    assert "the checkpoint is that of another job" in reason


def test_no_more_neighbours_than_the_job_allows_are_predicted_at_once(
    tmp_path, committee, monkeypatch
):
    pool = pool_of()
    write(tmp_path, committee, pool)
    spec.write_job(tmp_path / spec.JOB, EvaluateJob(batch_edges=120))
    made = watch_neighbours(monkeypatch)

    assert run_job(tmp_path) is State.DONE

    assert len(made) > 1
    assert max(made) <= 120
    found = Predictions.from_arrays(load_arrays(tmp_path / spec.OUTPUT / spec.PREDICTIONS))
    assert found.ids.tolist() == pool.ids.tolist()
    np.testing.assert_allclose(found.forces, committee.predict(pool).forces, atol=1e-10)


def test_where_all_is_excluded_the_reason_says_so(tmp_path, committee):
    pool = pool_of()
    write(tmp_path, committee, pool)
    save_arrays(tmp_path / spec.EXCLUDE / "all", {"ids": pool.ids})

    assert run_job(tmp_path) is State.FAILED

    reason = json.loads((tmp_path / spec.STATUS).read_text())["reason"]
    assert "every configuration is in `exclude`" in reason


@pytest.mark.parametrize("value", [0, 2.5, "many"])
def test_a_bound_of_neighbours_is_a_whole_number(value):
    with pytest.raises(
        ValueError, match=f"batch_edges must be a whole .* from 1 on, not {value!r}"
    ):
        EvaluateJob(batch_edges=value)


@pytest.fixture
def telling_committee():
    """One network that has heads, and knows where labelled atoms are."""
    network = NetworkParameters(n_radial=4, l_max=1, width=8)
    member = Network(network, (14,), ("dft",), n_drawn=3)
    member.initialise(0)
    rng = np.random.default_rng(0)
    for buffer in member.feature_uncertainty.buffers():
        buffer.copy_(torch.as_tensor(rng.normal(size=buffer.shape)))
    return Committee(members=(member,), stage="finetune", seeds=(0,))


def test_what_a_network_says_of_its_features_is_written_too(tmp_path, telling_committee):
    pool = pool_of()
    write(tmp_path, telling_committee, pool)

    assert run_job(tmp_path) is State.DONE

    found = Predictions.from_arrays(load_arrays(tmp_path / spec.OUTPUT / spec.PREDICTIONS))
    expected = telling_committee.predict(pool)
    for name in ("strangeness", "atom_energy_std", "forces_std"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5)
        assert getattr(found, name).shape == (10,)
        assert (getattr(found, name) > 0).all()
    metrics = json.loads((tmp_path / spec.OUTPUT / spec.METRICS).read_text())
    assert (metrics["n_members"], metrics["n_heads"]) == (1, 3)


def test_a_gpu_that_is_not_there_fails_with_a_reason(tmp_path, committee, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write(tmp_path, committee, pool_of())
    spec.write_job(tmp_path / spec.JOB, EvaluateJob(device="cuda"))

    assert run_job(tmp_path) is State.FAILED

    assert "torch sees no GPU" in json.loads((tmp_path / spec.STATUS).read_text())["reason"]


def test_an_unknown_element_fails_with_a_reason(tmp_path, committee):
    write(tmp_path, committee, pool_of("Ge"))

    assert run_job(tmp_path) is State.FAILED

    assert "does not know" in json.loads((tmp_path / spec.STATUS).read_text())["reason"]


def test_without_configurations_it_fails_with_a_reason(tmp_path, committee):
    write(tmp_path, committee)

    assert run_job(tmp_path) is State.FAILED

    assert "the pool is empty" in json.loads((tmp_path / spec.STATUS).read_text())["reason"]


def test_two_atoms_in_one_place_fail_with_a_reason(tmp_path, committee):
    frames = pool_of(n=2)
    frames.positions[1] = frames.positions[0]
    write(tmp_path, committee, frames)

    assert run_job(tmp_path) is State.FAILED
    assert (
        "two atoms in the same place" in json.loads((tmp_path / spec.STATUS).read_text())["reason"]
    )
