"""Daemons that are killed and machines that lose their power: nothing is lost, nothing is repeated.

`benchmarks/kill.py` does the same to a whole loop, at random moments.
"""

import json
import os
import stat
import sys
import time
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import psutil
import pytest
import yaml
from aiida.common import AttributeDict
from aiida.engine import run_get_node
from aiida.orm import CalcJobNode, Dict

from aiida_eipnn.data.choice import Choice, ChoiceData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.science.io import write_labelled
from aiida_eipnn.workflows.active_learning import ActiveLearningWorkChain
from aiida_eipnn.workflows.label_dft import DftLabelWorkChain

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "workflows"
PROFILE = "accidents"
DFT = {
    "n_lanes": 2,
    "scaling": {"conv_thr_per_atom": 1e-7},
    "pw_base": {"kpoints_distance": 0.7, "pseudo_family": "tests/LDA", "max_iterations": 1},
}

# Says when it begins and ends, and on what; the first run of all is killed before it ends.
PW = """#!/bin/bash
input=$(md5sum < aiida.in | cut -d' ' -f1)
echo begin $input >> {folder}/ledger
if mkdir {folder}/first 2> /dev/null; then timeout -s KILL 0.3 {pw} "$@"; kill -9 $$; fi
{pw} "$@"
echo end $input >> {folder}/ledger
"""


def write_script(folder: Path, text: str) -> Path:
    script = folder / "pw-of-test"
    script.write_text(text)
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    return script


def repeated(folder: Path) -> int:
    """Return how many runs of pw.x began on an input that one had ended on."""
    ended, count = set(), 0
    for line in (folder / "ledger").read_text().splitlines():
        what, name = line.split()
        count += what == "begin" and name in ended
        if what == "end":
            ended.add(name)
    return count


def runs_of(node):
    runs = [child for child in node.called_descendants if isinstance(child, CalcJobNode)]
    return sorted(runs, key=lambda run: run.pk)


@pytest.fixture
def label_builder(pseudo_family):
    """Return a function that makes the builder which labels all configurations with a code."""

    def make(configurations, code):
        choice = Choice.from_ids(configurations.ids)
        return DftLabelWorkChain.get_builder_from_protocol(
            code,
            ConfigurationsData.from_value(configurations),
            ChoiceData.from_value(choice, strategy="given"),
            protocol="demo",
            overrides={"dft": DFT},
        )

    return make


def test_a_run_of_pw_that_is_killed_starts_again_and_is_no_attempt(
    pw_code, aiida_code_installed, label_builder, rattled_silicon, tmp_path
):
    path = write_script(tmp_path, PW.format(folder=tmp_path, pw=pw_code.filepath_executable))
    code = aiida_code_installed(
        label="fragile-pw",
        default_calc_job_plugin="quantumespresso.pw",
        filepath_executable=str(path),
        prepend_text=pw_code.prepend_text,
    )
    configurations = rattled_silicon(1, seed=21)

    outputs, node = run_get_node(label_builder(configurations, code))

    assert node.is_finished_ok, node.exit_message
    # `max_iterations` is 1.
    assert [run.is_finished_ok for run in runs_of(node)] == [False, True]
    assert outputs["labels"].value().ok.all()


def test_a_run_that_pw_itself_gave_up_is_not_started_again(pw_code, label_builder, rattled_silicon):
    from ase.build import bulk

    from aiida_eipnn.science.configurations import Configurations

    atoms = bulk("Si")
    atoms.positions[1] = atoms.positions[0]
    _, node = run_get_node(label_builder(Configurations.from_atoms([atoms]), pw_code))
    assert len(runs_of(node)) == 1


def loop_that_waits():
    """Return what stands for a loop, and what it says."""
    said = []
    loop = SimpleNamespace(ctx=AttributeDict(), report=said.append, _name=lambda: "i001")
    for name in ("_step", "_goes_on"):
        setattr(loop, name, MethodType(getattr(ActiveLearningWorkChain, name), loop))
    return loop, said


def job_of(label, exit_status, **outputs):
    """Return what stands for a job that a loop called."""
    call = SimpleNamespace(one=lambda: SimpleNamespace(link_label=label))
    return SimpleNamespace(
        exit_status=exit_status,
        process_label="EvaluateCalculation",
        pk=1,
        base=SimpleNamespace(links=SimpleNamespace(get_incoming=lambda **_: call)),
        outputs=SimpleNamespace(**outputs),
    )


@pytest.mark.parametrize(
    ("exit_status", "tries"), [(401, [True, True, False]), (300, [True] * 2), (310, [False])]
)
def test_an_evaluation_that_was_killed_starts_again_but_not_for_ever(exit_status, tries):
    loop, _ = loop_that_waits()
    starts_again = ActiveLearningWorkChain._starts_again
    for label in ("evaluate", "evaluate_scratch"):
        # Each job has deaths of its own.
        assert [starts_again(loop, job_of(label, exit_status)) for _ in tries] == tries


def test_a_job_that_was_interrupted_goes_on_as_long_as_that_leads_anywhere():
    loop, said = loop_that_waits()
    jobs = [
        job_of("extend", 400, checkpoint=Dict({"checksums": {"a.json": number}}))
        for number in (1, 2, 2)
    ]

    go_on = [ActiveLearningWorkChain._starts_again(loop, each) for each in jobs]
    assert go_on == [True, True, False]
    assert "came no further" in said[-1]


PREPARE = """
from pathlib import Path
from aiida import load_profile
load_profile()
from aiida_pseudo.data.pseudo import UpfData
from aiida_pseudo.groups.family import CutoffsPseudoPotentialFamily
family = CutoffsPseudoPotentialFamily.create_from_folder(
    Path({folder!r}) / "upf", "tests/LDA", pseudo_type=UpfData
)
family.set_cutoffs({{"Si": {{"cutoff_wfc": 20.0, "cutoff_rho": 80.0}}}}, "low", unit="Ry")
from aiida_eipnn.cli import environment
environment.ensure_computer()
environment.ensure_code(
    "pw", Path({folder!r}) / "pw-of-test", plugin=environment.PW_PLUGIN,
    prepend=environment.pw_prepend(),
)
"""

SUBMIT = """
from aiida import load_profile
load_profile()
from aiida.engine import submit
from aiida.orm import Str
from dying import Parent
print(submit(Parent, mark=Str({mark!r})).pk)
"""

# One process asks again and again: to start one takes seconds of CPU.
LOOK = """
import json, time
from aiida import load_profile, orm
load_profile()
node, deadline = orm.load_node({pk}), time.monotonic() + 800
while not node.is_terminated:
    assert time.monotonic() < deadline, "it hangs"
    time.sleep(1)
labels = node.outputs.labels.value() if "labels" in node.outputs else None
query = orm.QueryBuilder().append(
    orm.ProcessNode, filters={{"attributes.process_state": {{"!in": ["finished", "excepted"]}}}}
)
print(json.dumps({{
    "exit_status": node.exit_status, "left": query.count(),
    "children": [child.process_label for child in node.called],
    "energies": dict(zip(labels.ids.tolist(), labels.energy[:, 0].tolist())) if labels else {{}},
}}))
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Commands in a profile with a daemon of its own, and what kills it."""
    from subprocess import run

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    python_path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    variables = os.environ | {"AIIDA_PATH": str(tmp_path), "PATH": path, "PYTHONPATH": python_path}

    def call(*command, check=True):
        words = [str(word) for word in command]
        done = run(words, env=variables, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout

    call("verdi", "presto", "--profile-name", PROFILE, "--use-zeromq")
    call("aiida-eipnn", "recover")
    yield call
    call("verdi", "daemon", "stop", check=False)
    daemon, jobs = processes(tmp_path)
    kill([*daemon, *jobs])


def processes(folder: Path):
    """Return the processes of the daemon, and of its jobs, which work in the scratch folder."""
    daemon, jobs = [], []
    for process in psutil.process_iter():
        try:
            if process.environ().get("AIIDA_PATH") == str(folder / ".aiida"):
                at_work = process.cwd().startswith(str(folder / ".aiida" / "scratch"))
                (jobs if at_work else daemon).append(process)
        except psutil.Error:
            continue
    return daemon, jobs


def kill(victims):
    for process in victims:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(victims, timeout=10)


def wait_until(condition, seconds=900):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.3)
    return found


def ended(call, pk):
    return json.loads(call("python", "-c", LOOK.format(pk=pk)))


@pytest.mark.daemon
@pytest.mark.slow
def test_a_child_of_a_step_that_was_cut_off_is_taken_over(site, tmp_path):
    mark = tmp_path / "mark"
    pk = int(site("python", "-c", SUBMIT.format(mark=str(mark))))
    wait_until(mark.exists)
    site("aiida-eipnn", "recover")
    state = ended(site, pk)
    assert state["exit_status"] == 0
    # One of each step.
    assert state["children"] == ["Child", "Child"]
    assert state["left"] == 0


@pytest.mark.daemon
def test_after_a_killed_daemon_and_a_power_cut_the_labels_are_there_and_none_was_made_twice(
    site, tmp_path, pw_code, si_pseudo, rattled_silicon, label_builder
):
    pw = pw_code.filepath_executable
    write_script(tmp_path, PW.format(folder=tmp_path, pw=pw).replace("if mkdir", "if false"))
    (tmp_path / "upf").mkdir()
    (tmp_path / "upf" / "Si.upf").write_bytes(si_pseudo.read_bytes())
    (tmp_path / "overrides.yaml").write_text(yaml.safe_dump({"dft": DFT}))
    configurations = rattled_silicon(6, seed=22)
    write_labelled(tmp_path / "pool.xyz", configurations)
    site("python", "-c", PREPARE.format(folder=str(tmp_path)))
    printed = site(
        *("verdi", "run", SCRIPTS / "02_label_with_dft.py", "--submit"),
        *("--pool", tmp_path / "pool.xyz", "--overrides", tmp_path / "overrides.yaml"),
    )
    pk = int(printed.split("status ")[1].split()[0])
    ledger = tmp_path / "ledger"

    def begun(n):
        return lambda: ledger.exists() and ledger.read_text().count("begin") >= n

    wait_until(begun(2))
    kill(processes(tmp_path)[0])
    site("aiida-eipnn", "recover")
    wait_until(begun(4))
    daemon, jobs = processes(tmp_path)
    assert jobs
    kill([*daemon, *jobs])
    site("aiida-eipnn", "recover")
    state = ended(site, pk)

    assert state["exit_status"] == 0
    assert state["left"] == 0
    assert repeated(tmp_path) == 0
    outputs, _ = run_get_node(label_builder(configurations, pw_code))
    labels = outputs["labels"].value()
    undisturbed = dict(zip(labels.ids.tolist(), labels.energy[:, 0].tolist(), strict=True))
    assert np.isfinite(list(undisturbed.values())).all()
    assert state["energies"] == undisturbed
