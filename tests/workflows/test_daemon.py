"""The daemon with so few slots that a wide fan-out would lock up for good."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aiida_eipnn.science.io import write_labelled
from aiida_eipnn.workflows.label_dft import slots_needed

SCRIPTS = Path(__file__).parents[2] / "workflows"
BIN = Path(sys.executable).parent
PREPARE = """
from aiida import load_profile, orm
load_profile()
from aiida_pseudo.data.pseudo import UpfData
from aiida_pseudo.groups.family import CutoffsPseudoPotentialFamily
from pathlib import Path
family = CutoffsPseudoPotentialFamily.create_from_folder(
    Path({folder!r}), "tests/LDA", pseudo_type=UpfData
)
family.set_cutoffs({{"Si": {{"cutoff_wfc": 20.0, "cutoff_rho": 80.0}}}}, "low", unit="Ry")
from aiida_eipnn.cli import environment
environment.ensure_computer()
environment.ensure_code(
    "pw", environment.find_pw(None), plugin=environment.PW_PLUGIN, prepend=environment.pw_prepend()
)
"""
# One process asks again and again: to start one takes seconds of CPU.
EXIT_STATUS = """
import time
from aiida import load_profile, orm
load_profile()
node, deadline = orm.load_node({pk}), time.monotonic() + 800
while not node.is_terminated:
    assert time.monotonic() < deadline, "the lanes did not end: a deadlock"
    time.sleep(1)
print(node.exit_status)
"""

CHECK = """
from aiida import load_profile
load_profile()
from aiida_eipnn.cli.launch import too_few_slots
print(too_few_slots(12))
"""


@pytest.fixture
def daemon(tmp_path, pw_code):
    """Run commands against a profile with a daemon of its own."""
    environment = os.environ | {
        "AIIDA_PATH": str(tmp_path),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }

    def call(*command: object, check: bool = True, timeout: int = 300) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout

    call("verdi", "presto", "--profile-name", "daemon", "--use-zeromq")
    yield call
    call("verdi", "daemon", "stop", check=False)


@pytest.mark.daemon
def test_lanes_label_more_configurations_than_the_daemon_has_slots(
    daemon, tmp_path, si_pseudo, rattled_silicon
):
    n_lanes, n_configurations = 2, 5
    folder = tmp_path / "upf"
    folder.mkdir()
    (folder / "Si.upf").write_bytes(si_pseudo.read_bytes())
    daemon("python", "-c", PREPARE.format(folder=str(folder)))
    overrides = {
        "dft": {
            "n_lanes": n_lanes,
            "scaling": {"conv_thr_per_atom": 1e-6},
            "pw_base": {"kpoints_distance": 2.0, "pseudo_family": "tests/LDA"},
        }
    }
    (tmp_path / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    write_labelled(tmp_path / "pool.xyz", rattled_silicon(n_configurations))
    # One fan-out step over all of them would need 3 * 5 + 4 slots.
    daemon("verdi", "config", "set", "daemon.worker_process_slots", slots_needed(n_lanes))
    daemon("verdi", "daemon", "start", 1)
    printed = daemon(
        *("verdi", "run", SCRIPTS / "02_label_with_dft.py", "--submit"),
        *("--pool", tmp_path / "pool.xyz", "--overrides", tmp_path / "overrides.yaml"),
    )
    pk = int(re.search(r"status (\d+)", printed).group(1))
    assert daemon("python", "-c", EXIT_STATUS.format(pk=pk), timeout=900).strip() == "0"


@pytest.mark.daemon
def test_too_few_slots_are_refused_with_the_command_to_type(daemon, tmp_path):
    daemon("verdi", "config", "set", "daemon.worker_process_slots", 5)
    daemon("verdi", "daemon", "start", 1)
    printed = daemon("python", "-c", CHECK)
    assert "verdi daemon incr 2" in printed
