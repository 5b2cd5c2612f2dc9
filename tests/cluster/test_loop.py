"""A loop on a cluster as in production, with accidents, against the same loop undisturbed.

The daemon has two workers, PostgreSQL and RabbitMQ. The shaken loop runs its jobs in Slurm over
ssh. In the middle of it each worker is killed once, Slurm cancels a training, the ssh server goes
away for half a minute, and the pre-training is longer than its walltime. The calm one runs the same
jobs on this machine.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import yaml
from aiida.engine.daemon.client import get_daemon_client
from aiida.manage.configuration import load_profile
from aiida.orm import (
    CalcFunctionNode,
    CalcJobNode,
    Computer,
    InstalledCode,
    ProcessNode,
    QueryBuilder,
    load_node,
)
from ase.build import bulk

from aiida_eipnn.jobs import spec
from aiida_eipnn.reports.points import outputs_of
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.io import write_labelled

ROOT = Path(__file__).parents[2]
PROFILE = "eipnn"
BIN = Path(sys.executable).parent
UPF = Path("/usr/share/espresso/pseudo/Si.pz-vbc.UPF")
FAMILY = "cluster/LDA"
EIPS = (
    "SW_StillingerWeber_1985_Si__MO_405512056662_005",
    "EDIP_JustoBazantKaxiras_1998_Si__MO_958932894036_002",
    "Tersoff_LAMMPS_Tersoff_1988T3_Si__MO_186459956893_003",
)
OVERRIDES = {
    "n_members": 2,
    "train_scratch": False,
    # As if the pool was large.
    "upload_above": 0,
    "label": {"n_workers": 1},
    "train": {"n_workers": 1},
    "dft": {
        "n_lanes": 2,
        "scaling": {"conv_thr_per_atom": 1e-8},
        "pw_base": {"kpoints_distance": 0.5, "pseudo_family": FAMILY},
    },
    "network": {"n_radial": 4, "l_max": 2, "width": 16, "depth": 1},
    "pretrain": {"steps": 6000},
    "finetune": {"steps": 200},
    "split": {"test": 4, "initial": 4},
    "acquisition": {"n_select": 3},
    "stop": {"max_iterations": 2},
}
# Each stage in its own way. A training stops in the middle of its walltime, far before the minute
# that is Slurm's shortest, and so the pre-training takes several jobs.
OPTIONS = {
    "max_wallclock_seconds": 600,
    "queue_name": "debug",
    "dft": {"max_wallclock_seconds": 300, "custom_scheduler_commands": "#SBATCH --comment=dft"},
    "train": {"max_wallclock_seconds": 30, "custom_scheduler_commands": "#SBATCH --comment=train"},
}
LEDGER = 'echo "{what} $(md5sum < aiida.in | cut -c1-32)" >> {ledger}\n'
# A loop that takes longer hangs.
LIMIT_SECONDS = 2400
SSH_AWAY_SECONDS = 30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Codes on both computers, pseudopotentials and a daemon; where the files of this test lie."""
    folder = tmp_path_factory.mktemp("cluster")
    load_profile(PROFILE)
    upf = folder / "upf"
    upf.mkdir()
    shutil.copy(UPF, upf / "Si.upf")
    family(upf)
    for computer in ("cluster", "localhost"):
        ledger = folder / f"ledger-{computer}"
        ledger.touch()
        code("pw", computer, shutil.which("pw.x"), ledger)
        code("eipnn-job", computer, BIN / "eipnn-job")
    pool(folder / "pool.xyz")
    for name, content in (("overrides", OVERRIDES), ("options", OPTIONS)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    verdi("daemon", "start", "2")
    # What a user does first: everything that a stage needs is there, says the cluster itself.
    print(run(str(BIN / "aiida-eipnn"), "setup", "--computer", "cluster"))  # noqa: T201
    # It ran pw.x once.
    (folder / "ledger-cluster").write_text("")
    yield folder
    # The circus answers late where the machine is busy.
    verdi("daemon", "stop", "--timeout", "120")


@pytest.fixture(scope="module")
def loops(place):
    """Both loops, at their end, with what happened to the shaken one."""
    calm = start(place, "localhost")
    shaken = start(place, "cluster", "--options", str(place / "options.yaml"))
    accidents = [
        accident("worker killed", shaken, "PwCalculation", lambda _: kill_worker(0)),
        accident("worker killed", shaken, "TrainCalculation", lambda _: kill_worker(1)),
        accident("job cancelled", shaken, "TrainCalculation", cancel),
        accident("ssh server away", shaken, "PwCalculation", take_ssh_away),
    ]
    for pk in (shaken, calm):
        wait(lambda pk=pk: load_node(pk).is_terminated, f"loop {pk} to end")
    found = SimpleNamespace(calm=load_node(calm), shaken=load_node(shaken), accidents=accidents)
    print(json.dumps(facts(found, place), indent=1))  # noqa: T201
    return found


def family(folder: Path) -> None:
    """Make the family of pseudopotentials."""
    from aiida_pseudo.data.pseudo import UpfData
    from aiida_pseudo.groups.family import CutoffsPseudoPotentialFamily

    if CutoffsPseudoPotentialFamily.collection.count({"label": FAMILY}):
        return
    made = CutoffsPseudoPotentialFamily.create_from_folder(folder, FAMILY, pseudo_type=UpfData)
    made.set_cutoffs({"Si": {"cutoff_wfc": 20.0, "cutoff_rho": 80.0}}, "low", unit="Ry")


def code(label: str, computer: str, path: Path | str, ledger: Path | None = None) -> None:
    """Register a code that notes down when it begins and ends, if there is a ledger."""
    # Of a run before this one, whose services were left running.
    if old := find(label, computer):
        old.label = f"{label}-{old.pk}"
    InstalledCode(
        label=label,
        computer=Computer.collection.get(label=computer),
        filepath_executable=str(path),
        default_calc_job_plugin="quantumespresso.pw" if ledger else None,
        prepend_text=LEDGER.format(what="begin", ledger=ledger) if ledger else "",
        append_text=LEDGER.format(what="end", ledger=ledger) if ledger else "",
        with_mpi=False,
    ).store()


def computer(label: str) -> None:
    """Make a computer that is reached by ssh and starts jobs without asking a scheduler."""
    if Computer.collection.count({"label": label}):
        return
    made = Computer(
        label=label,
        hostname="eipnn-cluster",
        transport_type="core.ssh_async",
        scheduler_type="core.direct",
        workdir=str(Path(os.environ["EIPNN_CLUSTER_DIR"]) / "work" / label),
    ).store()
    made.configure(host="eipnn-cluster", backend="asyncssh", safe_interval=0, use_login_shell=False)
    made.set_minimum_job_poll_interval(0.5)
    made.set_default_mpiprocs_per_machine(1)


def pool(path: Path) -> None:
    """Write two-atom silicon, rattled and strained."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(24):
        atoms = bulk("Si")
        atoms.set_cell(atoms.cell * rng.uniform(0.96, 1.04), scale_atoms=True)
        atoms.positions += rng.normal(0, 0.08, atoms.positions.shape)
        frames.append(atoms)
    types = ["strained" if row % 2 else "rattled" for row in range(24)]
    write_labelled(path, Configurations.from_atoms(frames, types), [])


def verdi(*arguments: str) -> str:
    """Run verdi in the profile and return what it says."""
    return run(str(BIN / "verdi"), "-p", PROFILE, *arguments)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def start(place: Path, computer: str, *more: str) -> int:
    """Submit a loop whose jobs run on a computer, as a user does; return its PK."""
    said = verdi(
        *("run", "workflows/active_learning.py", "--submit", "--protocol", "demo"),
        *("--pw-code", f"pw@{computer}", "--job-code", f"eipnn-job@{computer}"),
        *("--pool", str(place / "pool.xyz"), "--overrides", str(place / "overrides.yaml")),
        *(part for eip in EIPS for part in ("--eip", eip)),
        *more,
    )
    return int(re.search(r"status (\d+)", said)[1])


def wait(condition: Callable[[], object], what: str) -> object:
    """Wait for something and return it."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.5)
    raise AssertionError(f"waited {LIMIT_SECONDS} s for {what}")


def jobs(pk: int, name: str, **attributes: str) -> list[CalcJobNode]:
    """Return the jobs of this name below a loop, in the order in which they began."""
    return [
        node
        for node in sorted(load_node(pk).called_descendants, key=lambda node: node.pk)
        if isinstance(node, CalcJobNode)
        and node.process_label == name
        and all(node.base.attributes.get(key, None) == value for key, value in attributes.items())
    ]


def accident(
    what: str, pk: int, name: str, happen: Callable[[CalcJobNode], None]
) -> dict[str, str]:
    """Let something happen while such a job of the loop runs in Slurm, one that ran not before."""
    seen = {node.pk for node in jobs(pk, name)}

    def running() -> list[CalcJobNode]:
        found = jobs(pk, name, scheduler_state="running")
        return [node for node in found if node.pk not in seen and not node.is_terminated]

    (job, *_) = wait(running, f"a new {name} to run")
    happen(job)
    return {"what": what, "while": name, "pk": job.pk}


def kill_worker(number: int) -> None:
    """Send SIGKILL to a worker of the daemon, which starts another one."""
    workers = sorted(get_daemon_client().get_worker_info()["info"])
    psutil.Process(int(workers[number])).kill()


def cancel(job: CalcJobNode) -> None:
    """Let Slurm cancel a training that has learnt something, as it does to preempt one."""
    progress = Path(job.outputs.remote_folder.get_remote_path(), spec.PROGRESS)
    wait(progress.exists, "the training to learn")
    run("scancel", job.get_job_id())


def take_ssh_away(_: CalcJobNode) -> None:
    """Stop the ssh server with all that are logged in, and start it again later."""
    script = Path(os.environ["EIPNN_CLUSTER"]) / "sshd.sh"
    pid = (Path(os.environ["EIPNN_CLUSTER_DIR"]) / "sshd" / "sshd.pid").read_text()
    sessions = psutil.Process(int(pid)).children(recursive=True)
    run(str(script), "stop")
    for process in sessions:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    time.sleep(SSH_AWAY_SECONDS)
    run(str(script), "start")


def find(label: str, computer: str) -> InstalledCode | None:
    query = QueryBuilder().append(Computer, filters={"label": computer}, tag="computer")
    query.append(InstalledCode, with_computer="computer", filters={"label": label})
    return query.first(flat=True)


def dataset(node: ProcessNode) -> dict[str, list[tuple[object, ...]]]:
    """Return all DFT labels of a loop by name of the output, bit by bit."""
    found = {}
    for name, labels in sorted(outputs_of(node.pk).items()):
        if name.endswith("labels") and not name.startswith("eip"):
            value = labels.value()
            found[name] = [
                (
                    str(value.ids[row]),
                    value.energy[row].tobytes(),
                    value.take([row]).forces.tobytes(),
                    value.stress[row].tobytes(),
                )
                for row in range(len(value))
            ]
    return found


def ledger(place: Path, computer: str) -> tuple[int, int]:
    """Return how many runs of pw.x began, and how many on an input that one had ended on."""
    ended: set[str] = set()
    begun = repeated = 0
    for line in (place / f"ledger-{computer}").read_text().splitlines():
        what, name = line.split()
        begun += what == "begin"
        repeated += what == "begin" and name in ended
        if what == "end":
            ended.add(name)
    return begun, repeated


def facts(loops: SimpleNamespace, place: Path) -> dict[str, object]:
    """Return what the closing lines of a run say."""
    return {
        "accidents": loops.accidents,
        "exit_status": {"calm": loops.calm.exit_status, "shaken": loops.shaken.exit_status},
        "dft_labels": sum(map(len, dataset(loops.shaken).values())),
        "pw_begun_and_repeated": {name: ledger(place, name) for name in ("localhost", "cluster")},
        "trainings": [
            (node.pk, node.exit_status) for node in jobs(loops.shaken.pk, "TrainCalculation")
        ],
        "seconds": {
            name: round((node.mtime - node.ctime).total_seconds())
            for name, node in (("calm", loops.calm), ("shaken", loops.shaken))
        },
    }


def test_the_loop_ends_with_the_labels_of_the_one_that_nothing_happened_to(loops):
    assert loops.calm.is_finished_ok, loops.calm.exit_message
    assert loops.shaken.is_finished_ok, loops.shaken.exit_message
    labels = dataset(loops.shaken)
    assert {name: len(rows) for name, rows in labels.items()} == {
        "test_labels": 4,
        "initial_labels": 4,
        "iterations__i001__labels": 3,
    }
    assert labels == dataset(loops.calm)


def test_no_dft_run_was_repeated(loops, place):
    for computer in ("localhost", "cluster"):
        assert ledger(place, computer) == (11, 0)
    assert len(jobs(loops.shaken.pk, "PwCalculation")) == 11


def test_a_training_went_on_after_its_walltime(loops):
    ended = [node.exit_status for node in jobs(loops.shaken.pk, "TrainCalculation")]
    assert 400 in ended
    assert ended[-1] == 0


def test_a_training_that_was_cancelled_went_on_from_where_it_was(loops):
    (pk,) = [item["pk"] for item in loops.accidents if item["what"] == "job cancelled"]
    job = load_node(pk)
    status = json.loads(job.outputs.retrieved.base.repository.get_object_content(spec.STATUS))
    assert (status["state"], status["reason"]) == ("interrupted", "SIGTERM")
    assert job.exit_status == 400
    following = [node for node in jobs(loops.shaken.pk, "TrainCalculation") if node.pk > pk]
    assert following[0].inputs.parent_folder.uuid == job.outputs.remote_folder.uuid


def test_each_stage_has_its_own_options(loops):
    script = {
        name: jobs(loops.shaken.pk, name)[0].base.repository.get_object_content("_aiidasubmit.sh")
        for name in ("PwCalculation", "TrainCalculation", "LabelCalculation")
    }
    assert "#SBATCH --comment=dft" in script["PwCalculation"]
    assert "#SBATCH --comment=train" in script["TrainCalculation"]
    assert "comment" not in script["LabelCalculation"]
    assert all("#SBATCH --partition=debug" in text for text in script.values())


def test_a_node_that_one_job_holds_runs_all_of_pw(loops, place):
    """Many short runs, one entry in the queue: see docs/howto/cluster.md."""
    computer("cluster-node")
    code("pw", "cluster-node", shutil.which("pw.x"), place / "ledger-cluster-node")
    held = run("sbatch", "--parsable", "--time=60", "--output=/dev/null", "--wrap", "sleep 3600")
    pk = start(place, "localhost", "--code", "dft=pw@cluster-node")
    queue: set[str] = set()

    def ended() -> bool:
        queue.update(run("squeue", "--noheader", "--format=%i").split())
        return load_node(pk).is_terminated

    wait(ended, f"loop {pk} to end")
    run("scancel", held.strip())
    assert queue == {held.strip()}
    assert ledger(place, "cluster-node") == (11, 0)
    assert dataset(load_node(pk)) == dataset(loops.calm)


def test_what_many_jobs_read_is_sent_once_and_folders_are_gone(loops):
    uploads = jobs(loops.shaken.pk, "UploadCalculation")
    sent = [node.inputs.node.pk for node in uploads]
    assert len(sent) >= 2
    assert len(sent) == len(set(sent))
    trainings = jobs(loops.shaken.pk, "TrainCalculation")
    for before, after in itertools.pairwise(trainings):
        if before.exit_status == 400:
            # The checkpoint went from folder to folder on the cluster.
            assert after.inputs.parent_folder.pk == before.outputs.remote_folder.pk
    others = ("LabelCalculation", "EvaluateCalculation")
    for node in [
        *uploads,
        *trainings,
        *(job for name in others for job in jobs(loops.shaken.pk, name)),
    ]:
        assert not Path(node.get_remote_workdir()).exists(), node


def test_commands_tell_of_the_loop(loops):
    said = run(str(BIN / "aiida-eipnn"), "status", str(loops.shaken.pk))
    assert "11" in said
    said = run(str(BIN / "aiida-eipnn"), "lineage", str(loops.shaken.pk))
    assert said.count("labelled") + said.count("done") >= 7


def test_nothing_is_left_running(loops):
    assert run("squeue", "--noheader") == ""
    active = QueryBuilder().append(
        ProcessNode, filters={"attributes.process_state": {"in": ["created", "running", "waiting"]}}
    )
    # A calculation function that a killed worker was at says for ever that it runs: the step ran
    # again, and made another one.
    cut_off = {
        node.pk for node in loops.shaken.called_descendants if isinstance(node, CalcFunctionNode)
    }
    left_over = active.all(flat=True)
    assert [node for node in left_over if node.pk not in cut_off] == []
    # One at most for each worker that was killed.
    assert len(left_over) <= 2
    work = Path(os.environ["EIPNN_CLUSTER_DIR"]) / "work"
    left = [
        item for item in psutil.process_iter(["cwd"]) if str(item.info["cwd"]).startswith(str(work))
    ]
    assert left == []
