"""The label job on a folder, without AiiDA."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from watched import SLOW

from aiida_eipnn.jobs import label, spec
from aiida_eipnn.jobs.spec import LabelJob, State
from aiida_eipnn.jobs.stop import Stop
from aiida_eipnn.science.arrays import load_arrays, save_arrays
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels

LJ = "lennard-jones"
SW = "SW_StillingerWeber_1985_Si__MO_405512056662_005"

RUN = """
import sys
from pathlib import Path
from aiida_eipnn.jobs import label, spec

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    label.run(spec.read_job(folder / spec.JOB), folder)
"""


def pool_of(n: int, seed: int = 0, symbol: str = "Si") -> Configurations:
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n):
        atoms = bulk(symbol, "diamond", a=5.43)
        atoms.positions += 0.05 * rng.normal(size=(2, 3))
        frames.append(atoms)
    return Configurations.from_atoms(frames, "rattled")


def write_pool(folder: Path, **sets: Configurations) -> None:
    for name, part in sets.items():
        save_arrays(folder / spec.CONFIGURATIONS / name, part.arrays())


def read_labels(folder: Path) -> Labels:
    return Labels.from_arrays(load_arrays(folder / spec.OUTPUT / spec.LABELS))


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / spec.OUTPUT / spec.METRICS).read_text())


def test_every_set_is_labelled_by_every_eip(tmp_path):
    write_pool(tmp_path, pool=pool_of(3), seeds=pool_of(2, seed=1))

    state = label.run(LabelJob(eips=(LJ, "lennard-jones[sigma=2.2]")), tmp_path)

    labels = read_labels(tmp_path)
    assert state is State.DONE
    assert labels.ids.tolist() == [*pool_of(3).ids, *pool_of(2, seed=1).ids]
    assert labels.sources.tolist() == [LJ, "lennard-jones[sigma=2.2]"]
    assert labels.ok.all()


@pytest.mark.usefixtures("kim")
def test_metrics_count_labels_and_say_where_an_eip_comes_from(tmp_path):
    write_pool(tmp_path, pool=pool_of(3))

    state = label.run(
        LabelJob(eips=(SW, "SW_StillingerWeber_1985_Si__MO_405512056662_004")), tmp_path
    )

    metrics = read_metrics(tmp_path)
    known, unknown = metrics["eips"].values()
    assert state is State.DONE
    assert metrics["n_configurations"] == 3
    assert (known["n_ok"], known["n_failed"]) == (3, 0)
    assert known["seconds"] > 0
    assert known["metadata"]["kim_id"] == "MO_405512056662_005"
    assert known["metadata"]["year"] == 1985
    assert (unknown["n_ok"], unknown["n_failed"]) == (0, 3)
    (reason,) = unknown["reasons"]
    assert "is not installed; close to it are" in reason
    assert unknown["reasons"][reason] == 3


def test_a_job_labels_without_kim_and_says_what_a_kim_model_would_need(tmp_path):
    """In an interpreter of its own, whose processes cannot import kimpy either."""
    (tmp_path / "kimpy.py").write_text("raise ModuleNotFoundError('blocked', name='kimpy')")
    folder = tmp_path / "job"
    write_pool(folder, pool=pool_of(3), copper=pool_of(2, symbol="Cu"))
    eips = (
        LJ,
        "stillinger-weber",
        "stillinger-weber[hauch-1999,lambda=80]",
        "ase:ase.calculators.emt:EMT[asap_cutoff=True]",
        SW,
    )
    spec.write_job(folder / spec.JOB, LabelJob(eips=eips))
    paths = [str(tmp_path), *filter(None, sys.path)]

    done = subprocess.run(
        [sys.executable, "-m", "aiida_eipnn.jobs"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    labels, eips_of = read_labels(folder), read_metrics(folder)["eips"]
    assert labels.sources.tolist() == list(eips_of) == list(eips)
    of_copper = np.isin(labels.ids, pool_of(2, symbol="Cu").ids)
    assert labels.ok[~of_copper].all(axis=0).tolist() == [True, True, True, False, False]
    assert labels.ok[of_copper].all(axis=0).tolist() == [True, False, False, True, False]
    assert eips_of[eips[1]]["metadata"]["year"] == 1985
    assert eips_of[eips[3]]["metadata"]["family"] == "EMT"
    (reason,) = eips_of[SW]["reasons"]
    assert "need kimpy, which is not installed; pip install aiida-eipnn[kim]" in reason


def test_a_job_that_runs_out_of_time_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "slow_potential.py").write_text(SLOW)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_pool(tmp_path, pool=pool_of(60))
    slow = "python:slow_potential:Slow"

    first = label.run(LabelJob(eips=(slow,)), tmp_path, Stop.after(8.0))
    n_made = (tmp_path / "calls").stat().st_size
    second = label.run(LabelJob(eips=(slow,)), tmp_path)

    assert first is State.INTERRUPTED
    assert 0 < n_made < 60
    assert second is State.DONE
    assert read_labels(tmp_path).ok.all()
    assert not (tmp_path / spec.CHECKPOINT).exists()
    # One label may be lost when the first run is stopped, no more.
    assert (tmp_path / "calls").stat().st_size <= 61


def test_a_job_that_is_killed_leaves_labels_to_go_on_from_and_no_process(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "slow_potential.py").write_text(SLOW)
    (tmp_path / "run.py").write_text(RUN)
    write_pool(tmp_path, pool=pool_of(24))
    job = LabelJob(eips=(LJ, "python:slow_potential:Slow"), timeout=60.0)
    spec.write_job(tmp_path / spec.JOB, job)
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), str(tmp_path)])
    calls = tmp_path / "calls"
    try:
        wait_until(lambda: calls.exists() and calls.stat().st_size > 4, 60)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: does_not_grow(calls), 20)
    n_made = calls.stat().st_size

    assert n_made < 24
    assert label.run(job, tmp_path) is State.DONE
    assert read_labels(tmp_path).ok.all()
    # Each of the processes that were killed may have lost the label that it was making.
    assert calls.stat().st_size <= 24 + 2


def test_a_job_without_configurations_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the pool is empty"):
        label.run(LabelJob(eips=(LJ,)), tmp_path)

    write_pool(tmp_path, pool=Configurations.from_atoms([]))
    with pytest.raises(ValueError, match="the pool is empty"):
        label.run(LabelJob(eips=(LJ,)), tmp_path)


@pytest.mark.usefixtures("kim")
def test_an_element_that_nobody_knows_is_refused_with_what_they_know(tmp_path):
    write_pool(tmp_path, pool=pool_of(1), more=pool_of(1, symbol="Ge"))

    with pytest.raises(ValueError, match=f"no EIP knows Ge, .*they know: {SW}: Si"):
        label.run(LabelJob(eips=(SW,)), tmp_path)


@pytest.mark.usefixtures("kim")
def test_an_eip_that_is_tied_to_no_element_knows_them_all(tmp_path):
    write_pool(tmp_path, pool=pool_of(1), more=pool_of(1, symbol="Ge"))

    assert label.run(LabelJob(eips=(SW, LJ)), tmp_path) is State.DONE
    assert read_labels(tmp_path).ok.tolist() == [[False, True], [True, True]]


def test_a_job_without_one_label_is_done_and_says_why(tmp_path):
    write_pool(tmp_path, pool=pool_of(2))

    state = label.run(LabelJob(eips=("python:nowhere:f",)), tmp_path)

    assert state is State.DONE
    assert not read_labels(tmp_path).ok.any()
    (facts,) = read_metrics(tmp_path)["eips"].values()
    assert facts["n_failed"] == 2
    (reason,) = facts["reasons"]
    assert "No module named 'nowhere'" in reason


def does_not_grow(path: Path) -> bool:
    before = path.stat().st_size
    time.sleep(1.0)
    return path.stat().st_size == before


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        time.sleep(0.2)


WILD = """
from aiida_eipnn.science.eip.analytic import LennardJones
from aiida_eipnn.science.eip.potential import Label


class Wild:
    name, elements, cutoff = "wild", LennardJones().elements, 5.0
    description = LennardJones().description
    count = 0

    def label(self, atoms):
        energy, forces, stress = LennardJones().label(atoms)
        self.count += 1
        return Label(energy - 500.0 * (self.count == 7), forces, stress)
"""


def test_an_energy_far_from_the_others_is_no_label(tmp_path, monkeypatch):
    (tmp_path / "wild_potential.py").write_text(WILD)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_pool(tmp_path, pool=pool_of(30))
    wild = "python:wild_potential:Wild"

    label.run(LabelJob(eips=(LJ, wild)), tmp_path)

    labels = read_labels(tmp_path)
    assert labels.ok[:, 0].all()
    assert np.flatnonzero(~labels.ok[:, 1]).tolist() == [6]
    assert np.isnan(labels.forces_of(6, 1)).all()
    assert np.isnan(labels.energy[6, 1])
    (reason,) = read_metrics(tmp_path)["eips"][wild]["reasons"]
    assert "far below" in reason


@pytest.mark.usefixtures("kim")
def test_a_known_fault_of_an_eip_that_was_asked_for_is_in_the_metrics(tmp_path):
    write_pool(tmp_path, pool=pool_of(2, symbol="Ni"))
    faulty = "EAM_IMD_BrommerGaehler_2006B_AlNiCo__MO_128037485276_003"

    label.run(LabelJob(eips=(faulty, LJ)), tmp_path)

    eips = read_metrics(tmp_path)["eips"]
    assert "not minus the slope of the energy" in eips[faulty]["fault"]
    assert eips[LJ]["fault"] == ""
