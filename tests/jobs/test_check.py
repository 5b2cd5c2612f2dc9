"""The check job, run as on a compute node."""

import json
import os
import subprocess
import sys

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.check import PACKAGES

# A package that is compiled for another processor ends the interpreter like this.
DIES = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"


def facts_with(folder, **packages):
    """Run the job where packages of this text are found first; return its metrics."""
    for name in ("torch", "kimpy", "numba"):
        text = packages.get(name, f"raise ImportError('{name} is broken')\n")
        (folder / f"{name}.py").write_text(text)
    work = folder / "work"
    work.mkdir()
    spec.write_job(work / spec.JOB, spec.CheckJob())
    path = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", "aiida_eipnn.jobs"],
        cwd=work,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((work / spec.OUTPUT / spec.METRICS).read_text())


def test_facts_name_every_package_with_its_version_or_its_trouble(tmp_path):
    facts = facts_with(tmp_path)

    assert set(facts["packages"]) == set(PACKAGES)
    assert facts["packages"]["numpy"]["version"]
    assert facts["packages"]["torch"]["trouble"] == "ImportError: torch is broken"
    assert facts["python"]["executable"] == sys.executable


def test_a_package_that_ends_the_interpreter_is_a_fact(tmp_path):
    facts = facts_with(tmp_path, torch=DIES)

    assert facts["packages"]["torch"]["trouble"]
    assert facts["packages"]["kimpy"]["trouble"] == "ImportError: kimpy is broken"
