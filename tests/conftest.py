"""Fixtures that several rooms use, and the rule for codes that are not installed."""

import importlib.util
import os
import shutil
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest

from aiida_eipnn.science.configurations import Configurations

pytest_plugins = ["aiida.tools.pytest_fixtures"]

PSEUDOS = Path("/usr/share/espresso/pseudo")
PSEUDO_FAMILY = "tests/LDA"
# A norm-conserving LDA pseudopotential that is cheap at 20 Ry: physics for tests, not for papers.
SI_PSEUDO = "Si.pz-vbc.UPF"

MARKED = {
    "pw_code": ("qe", "slow"),
    "pseudo_family": ("qe",),
    "kim": ("kim",),
    "mace": ("mace",),
    "torch": ("torch",),
}


# How each code is found and how to get it.
CODES = {
    "kim": (lambda: importlib.util.find_spec("kimpy"), "pip install aiida-eipnn[kim]"),
    "mace": (lambda: importlib.util.find_spec("mace"), "pip install aiida-eipnn[mace]"),
    "torch": (lambda: importlib.util.find_spec("torch"), "pip install aiida-eipnn[nn]"),
    "qe": (lambda: shutil.which("pw.x"), "apt-get install quantum-espresso"),
}


def pytest_configure():
    """Refuse to start without a code that must be there: a skip, however it came, would hide it."""
    for name in filter(None, os.environ.get("EIPNN_REQUIRE", "").split(",")):
        if name not in CODES:
            raise pytest.UsageError(f"EIPNN_REQUIRE names {name!r}, only {sorted(CODES)} are known")
        found, how = CODES[name]
        if not found():
            raise pytest.UsageError(f"EIPNN_REQUIRE names {name}, which is missing: {how}")


# Files of whole loops come first, the longest before the others: two processes then end together.
LONGEST = (
    "workflows/test_active_learning.py",
    "workflows/test_continuation.py",
    "launch/test_scripts.py",
    "workflows/test_accidents.py",
    "workflows/test_restart.py",
    "workflows/test_daemon.py",
    "workflows/test_label_dft.py",
)


def pytest_collection_modifyitems(items):
    """Put the longest files first, and mark each test by the codes that its fixtures need."""
    place = {str(Path(__file__).parent / name): index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(str(item.path), len(place)))
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            for mark in MARKED.get(fixture, ()):
                item.add_marker(mark)


def skip_without(name: str) -> None:
    """Skip a test whose code is missing."""
    found, how = CODES[name]
    if not found():
        pytest.skip(f"{name} is missing: {how}")


# How often tests ask how a child or a job is, in seconds: without a pause, as AiiDA does in a test
# profile, asking takes a whole core from pw.x and torch. A job costs twenty times as much.
PATIENCE = 0.25
PATIENCE_WITH_JOBS = 1.0


@pytest.fixture(scope="session", autouse=True)
def patient_runners():
    """Let a work chain ask after its children a few times a second."""
    from aiida.manage.manager import Manager

    create = Manager.create_runner

    def create_patient(self, *args, **kwargs):
        return create(self, *args, **{"poll_interval": PATIENCE, **kwargs})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manager, "create_runner", create_patient)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_database():
    """Spare the engine a fifth of its time.

    The database of a test need not survive a power cut, and AiiDA itself asks again for what
    another process may have changed. Daemons and commands run as they do for users.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine
    from sqlalchemy.orm import Session

    def do_not_sync(connection, _):
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    def keep_what_was_read(session, *_):
        session.expire_on_commit = False

    listeners = ((Engine, "connect", do_not_sync), (Session, "after_begin", keep_what_was_read))
    for listener in listeners:
        event.listen(*listener)
    yield
    for listener in listeners:
        event.remove(*listener)


@pytest.fixture(scope="session", autouse=True)
def quick_repository():
    """Keep the index of the files of a profile open, which AiiDA opens anew for each file.

    This is a fifth of the engine's time.
    """
    from aiida.repository.backend import DiskObjectStoreRepositoryBackend
    from aiida.storage.sqlite_dos.backend import SqliteDosStorage
    from disk_objectstore import Container

    class OpenContainer(Container):
        def __exit__(self, *_):
            pass

    opened = {}

    def get_repository(storage):
        folder = storage.filepath_container
        if folder not in opened:
            opened[folder] = OpenContainer(folder)
        return DiskObjectStoreRepositoryBackend(container=opened[folder])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SqliteDosStorage, "get_repository", get_repository)
        yield
    for container in opened.values():
        container.close()


@pytest.fixture(scope="session", autouse=True)
def quick_states():
    """Ask the database for the outputs that are stored only where a process has some.

    AiiDA asks at every change of state of every process, a tenth of the engine's time.
    """
    from aiida.engine import Process

    update = Process.update_outputs

    def update_if_any(self):
        if self.outputs:
            update(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Process, "update_outputs", update_if_any)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_yaml():
    """Let libyaml write checkpoints, which takes the engine a tenth of its time in plain Python."""
    import yaml
    from aiida.orm.utils import serialize

    class Dumper(yaml.cyaml.CEmitter, serialize.AiiDADumper):
        __init__ = yaml.CDumper.__init__

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serialize, "AiiDADumper", Dumper)
        yield


@pytest.fixture(scope="session")
def kim():
    """OpenKIM, with its models."""
    skip_without("kim")


@pytest.fixture(scope="session")
def mace():
    """The package mace-torch."""
    skip_without("mace")


@pytest.fixture
def torch():
    """The torch module, on one thread."""
    skip_without("torch")
    import torch

    torch.set_num_threads(1)
    return torch


@pytest.fixture
def job_code(aiida_code_installed, aiida_localhost):
    """The code that runs ``eipnn-job``."""
    tune(aiida_localhost)
    return aiida_code_installed(
        label="eipnn-job",
        default_calc_job_plugin="eipnn.train",
        filepath_executable=str(Path(sys.executable).with_name("eipnn-job")),
        prepend_text="export OMP_NUM_THREADS=1",
    )


@pytest.fixture
def pw_code(aiida_code_installed, aiida_localhost):
    """The code that runs pw.x."""
    from aiida_eipnn.cli import environment

    skip_without("qe")
    tune(aiida_localhost)
    return aiida_code_installed(
        label="pw",
        default_calc_job_plugin="quantumespresso.pw",
        filepath_executable=shutil.which("pw.x"),
        prepend_text=environment.pw_prepend(),
    )


def tune(computer) -> None:
    """Let a test not wait for the politeness that a cluster deserves."""
    computer.set_minimum_job_poll_interval(PATIENCE_WITH_JOBS)
    computer.configure(safe_interval=0.0, use_login_shell=False)


@pytest.fixture
def si_pseudo():
    """The file of the cheap silicon."""
    path = PSEUDOS / SI_PSEUDO
    if not path.exists():
        # Where pw.x must be there, so must this: CI must not pass without the tests of DFT.
        missing = pytest.fail if "qe" in os.environ.get("EIPNN_REQUIRE", "") else pytest.skip
        missing(f"{path} is missing: apt-get install quantum-espresso-data")
    return path


@pytest.fixture
def pseudo_family(tmp_path, si_pseudo):
    """A family with the cheap silicon, by its label."""
    from aiida.common.exceptions import NotExistent
    from aiida.orm import load_group
    from aiida_pseudo.data.pseudo import UpfData
    from aiida_pseudo.groups.family import CutoffsPseudoPotentialFamily

    try:
        return load_group(PSEUDO_FAMILY).label
    except NotExistent:
        folder = tmp_path / "pseudos"
        folder.mkdir()
        shutil.copy(si_pseudo, folder / "Si.upf")
        family = CutoffsPseudoPotentialFamily.create_from_folder(
            folder, PSEUDO_FAMILY, pseudo_type=UpfData
        )
        for stringency in ("low", "normal"):
            cutoffs = {"Si": {"cutoff_wfc": 20.0, "cutoff_rho": 80.0}}
            family.set_cutoffs(cutoffs, stringency, unit="Ry")
        return family.label


@pytest.fixture
def rattled_silicon():
    """Return a function that makes rattled two-atom silicon."""
    from ase.build import bulk

    def make(n: int, *, seed: int = 0, amplitude: float = 0.05) -> Configurations:
        rng = np.random.default_rng(seed)
        frames = []
        for _ in range(n):
            atoms = bulk("Si")
            atoms.set_cell(atoms.cell * rng.uniform(0.97, 1.03), scale_atoms=True)
            atoms.positions += rng.normal(0, amplitude, atoms.positions.shape)
            frames.append(atoms)
        return Configurations.from_atoms(
            frames, ["rattled", "strained"] * (n // 2) + ["rattled"] * (n % 2)
        )

    return make
