"""One small loop in a profile and with a daemon of its own, with or without accidents.

`kill.py` runs this in a process of its own, since AiiDA knows one folder (`AIIDA_PATH`) in each.
"""

import argparse
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from aiida.engine import submit
from aiida.engine.daemon.client import get_daemon_client
from aiida.manage import get_manager
from aiida.manage.configuration import get_config
from aiida.orm import CalcJobNode, ProcessNode, QueryBuilder, load_code, load_node
from aiida_pseudo.data.pseudo import UpfData
from aiida_pseudo.groups.family import CutoffsPseudoPotentialFamily
from ase.build import bulk

from aiida_eipnn.cli import environment
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.reports.history import read_history
from aiida_eipnn.reports.points import call_of, outputs_of
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.workflows.active_learning import ActiveLearningWorkChain
from aiida_eipnn.workflows.builder import Codes, Start

PROFILE = "kill"
FAMILY = "kill/LDA"
UPF = Path("/usr/share/espresso/pseudo/Si.pz-vbc.UPF")
EIPS = [
    "SW_StillingerWeber_1985_Si__MO_405512056662_005",
    "EDIP_JustoBazantKaxiras_1998_Si__MO_958932894036_002",
    "Tersoff_LAMMPS_Tersoff_1988T3_Si__MO_186459956893_003",
]

# Two-atom silicon and small networks; the mesh is dense enough for pw.x to be hit at work.
OVERRIDES: dict[str, Any] = {
    "n_members": 2,
    "n_pretrained": 1,
    # Without the twin, whose trainings are like the others.
    "train_scratch": False,
    "label": {"n_workers": 1},
    "train": {"n_workers": 1},
    "dft": {
        "n_lanes": 2,
        "scaling": {"conv_thr_per_atom": 1e-8},
        "pw_base": {
            "kpoints_distance": 0.6,
            "pseudo_family": FAMILY,
            "max_iterations": 1,
            "pw": {"parameters": {"ELECTRONS": {"electron_maxstep": 25}}},
        },
    },
    "network": {"n_radial": 4, "l_max": 2, "width": 16, "depth": 1},
    "pretrain": {"steps": 60},
    "classify": {"steps": 20},
    "finetune": {"steps": 20},
    "scratch": {"steps": 20},
    "split": {"test": 4, "initial": 4},
    "acquisition": {"n_select": 4},
    "stop": {"max_iterations": 2},
    # The gate is open, so that hopeless configurations come as far as pw.x.
    "gate": {"min_contact": 0.0},
}

# Writes down when pw.x begins and ends, and on which input: what AiiDA forgot would be here too.
LEDGER_PW = """#!/bin/bash
input=$(md5sum < aiida.in | cut -d' ' -f1)
echo "$(date +%s.%N) begin $input $PWD" >> {ledger}
{pw} "$@"
code=$?
echo "$(date +%s.%N) end $input $code" >> {ledger}
exit $code
"""

POLL_SECONDS = 0.5
# A loop in which nothing changes for so long hangs.
STUCK_SECONDS = 600.0


def small_pool(n: int, n_hopeless: int) -> Configurations:
    """Return two-atom silicon, some of it with atoms so close that pw.x does not converge."""
    rng = np.random.default_rng(0)
    frames, types = [], []
    for number in range(n):
        atoms = bulk("Si")
        atoms.set_cell(atoms.cell * rng.uniform(0.96, 1.04), scale_atoms=True)
        atoms.positions += rng.normal(0, 0.08, atoms.positions.shape)
        frames.append(atoms)
        types.append("strained" if number % 2 else "rattled")
    for _ in range(n_hopeless):
        atoms = bulk("Si")
        atoms.positions[1] = atoms.positions[0] + [rng.uniform(0.25, 0.4), 0, 0]
        frames.append(atoms)
        types.append("hopeless")
    return Configurations.from_atoms(frames, types)


def prepare(folder: Path) -> None:
    """Make the profile, the codes and the pseudopotential, with caching off.

    A run that is done twice must show, not be covered up by the cache.
    """
    environment.ensure_profile(PROFILE)
    config = get_config()
    config.set_option("caching.default_enabled", False, scope=PROFILE)
    config.store()
    environment.ensure_computer()
    script = folder / "pw-with-ledger"
    script.write_text(LEDGER_PW.format(ledger=folder / "ledger", pw=environment.find_pw(None)))
    script.chmod(0o755)
    (folder / "ledger").touch()
    environment.ensure_code(
        "pw", script, plugin=environment.PW_PLUGIN, prepend=environment.pw_prepend()
    )
    environment.ensure_code("eipnn-job", environment.find_job(None), prepend=environment.ONE_THREAD)
    upf = folder / "upf"
    upf.mkdir()
    shutil.copy(UPF, upf / "Si.upf")
    family = CutoffsPseudoPotentialFamily.create_from_folder(upf, FAMILY, pseudo_type=UpfData)
    cutoffs = {"Si": {"cutoff_wfc": 20.0, "cutoff_rho": 80.0}}
    family.set_cutoffs(cutoffs, "low", unit="Ry")


def start_loop(pool: Configurations, overrides: dict[str, Any]) -> int:
    """Submit the loop and return its PK."""
    builder = ActiveLearningWorkChain.get_builder_from_protocol(
        Codes(pw=load_code("pw@localhost"), job=load_code("eipnn-job@localhost")),
        Start(pool=ConfigurationsData.from_value(pool), eips=EIPS),
        protocol="demo",
        overrides=overrides,
    )
    return int(submit(builder).pk)


def start_daemon() -> None:
    """Start the daemon and wait for its broker, without which nothing can be submitted."""
    subprocess.run(["verdi", "-p", PROFILE, "daemon", "start", "1"], check=True)
    deadline = time.monotonic() + STUCK_SECONDS
    while not get_manager().get_broker().check_service_reachable():
        if time.monotonic() > deadline:
            sys.exit("the broker did not start")
        time.sleep(POLL_SECONDS)


# Accidents.


def daemon_processes() -> list[psutil.Process]:
    """Return circus with all its children: the broker, the workers and what they run."""
    pid = get_daemon_client().get_daemon_pid()
    if pid is None or not psutil.pid_exists(pid):
        return []
    circus = psutil.Process(pid)
    return [circus, *circus.children(recursive=True)]


def job_processes(folder: Path) -> list[psutil.Process]:
    """Return the processes of jobs: they work below the scratch folder of the profile."""
    scratch = str(folder / ".aiida" / "scratch")
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(scratch):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def kill_all(processes: list[psutil.Process]) -> None:
    """Send SIGKILL to all and wait until they are gone."""
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)


def names_of(processes: list[psutil.Process]) -> list[str]:
    """Return which of the codes are among the processes."""
    found = set()
    for process in processes:
        try:
            line = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        found |= {name for name in ("pw.x", "eipnn-job") if name in line}
    return sorted(found)


def phase_now() -> str:
    """Return what the newest active process was doing."""
    query = QueryBuilder().append(
        ProcessNode,
        filters={"attributes.process_state": {"in": ["created", "running", "waiting"]}},
        project=["id", "attributes.process_label", "attributes.process_status"],
        tag="process",
    )
    query.order_by({"process": {"id": "desc"}}).limit(1)
    found = query.first()
    return f"{found[1]}: {found[2] or 'no status'}" if found else "nothing active"


def last_change() -> float:
    """Return when a process last changed, in s."""
    query = QueryBuilder().append(ProcessNode, project="mtime", tag="process")
    query.order_by({"process": {"mtime": "desc"}}).limit(1)
    found = query.first(flat=True)
    return float(found.timestamp()) if found else 0.0


def accident(folder: Path, *, power_cut: bool, command: list[str]) -> dict[str, Any]:
    """Kill the daemon, with the jobs where the power is cut, and put it right by one command."""
    jobs = job_processes(folder)
    record: dict[str, Any] = {
        "kind": "power cut" if power_cut else "daemon killed",
        "phase": phase_now(),
        "jobs_running": names_of(jobs),
    }
    daemon = daemon_processes()
    record["processes_killed"] = len(daemon) + (len(jobs) if power_cut else 0)
    kill_all(daemon)
    if power_cut:
        # Again, for a job that began while the daemon died.
        kill_all(job_processes(folder))
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    record["restart_s"] = round(time.time() - began, 1)
    record["restart_said"] = (done.stdout + done.stderr).strip().splitlines()[-6:]
    if done.returncode:
        raise SystemExit(f"{command} failed: {done.stdout}{done.stderr}")
    while last_change() < began + record["restart_s"]:
        if time.time() - began > STUCK_SECONDS:
            break
        time.sleep(POLL_SECONDS)
    record["until_it_goes_on_s"] = round(last_change() - began, 1)
    return record


def n_ended() -> int:
    """Return how many processes have come to an end."""
    states = {"in": ["finished", "excepted", "killed"]}
    query = QueryBuilder().append(ProcessNode, filters={"attributes.process_state": states})
    return int(query.count())


def watch(pk: int, folder: Path, plan: list[dict[str, Any]], command: list[str]) -> dict[str, Any]:
    """Wait for the loop, and do the accidents of the plan.

    An accident is planned for a time after so many processes had ended, since a loop does not
    always go at one speed; `at_work`, for a time after the next job begins. ``timeline`` says when
    how many had ended.
    """
    accidents: list[dict[str, Any]] = []
    timeline: list[tuple[float, int]] = []
    began = reached = time.time()
    stuck = False
    while not call_of(pk).is_over:
        time.sleep(POLL_SECONDS)
        ended = n_ended()
        if not timeline or ended > timeline[-1][1]:
            timeline.append((round(time.time() - began, 1), ended))
        if time.time() - max(last_change(), began) > STUCK_SECONDS and not job_processes(folder):
            stuck = True
            break
        if not plan or ended < plan[0]["after"]:
            reached = time.time()
        elif plan[0]["at_work"] and not names_of(job_processes(folder)):
            # Jobs run for a small part of the time: a moment that chance draws mostly misses them.
            reached = time.time()
        elif time.time() - reached >= plan[0]["wait_s"]:
            planned = plan.pop(0)
            record = accident(folder, power_cut=planned["power_cut"], command=command)
            accidents.append({"at_s": round(time.time() - began, 1), "ended": ended, **record})
            print(f"  {accidents[-1]['at_s']:6.1f} s  {record['kind']:13} {record['phase']}")
            sys.stdout.flush()
            reached = time.time()
    seconds = round(time.time() - began, 1)
    return {"seconds": seconds, "timeline": timeline, "accidents": accidents, "stuck": stuck}


# What it came to.


def dataset_of(pk: int) -> dict[str, list[dict[str, Any]]]:
    """Return every DFT label of the loop by batch, as plain numbers: repr keeps all bits."""
    outputs = outputs_of(pk)
    found = {}
    for name, node in sorted(outputs.items()):
        if not name.endswith("labels") or name == "eip_labels":
            continue
        labels = node.value()
        failures = {failure.id: failure.reason for failure in labels.failures()}
        found[name] = [
            {
                "id": str(label_id),
                "energy": repr(float(labels.energy[row, 0])),
                "forces": [repr(float(x)) for x in labels.forces_of(row)[0].ravel()],
                "stress": [repr(float(x)) for x in labels.stress[row, 0]],
                "reason": failures.get(str(label_id), ""),
            }
            for row, label_id in enumerate(labels.ids)
        ]
    return found


def choices_of(pk: int) -> dict[str, list[str]]:
    """Return which configurations each iteration asked for, in order."""
    return {
        name: [str(item) for item in node.ids()]
        for name, node in sorted(outputs_of(pk).items())
        if name.endswith("choice")
    }


def weights_of(pk: int) -> str | None:
    """Return the hash of the weights of the committee."""
    committee = outputs_of(pk).get("committee")
    return committee.base.repository.hash() if committee is not None else None


def pw_runs() -> list[CalcJobNode]:
    """Return all runs of pw.x of the profile, in order."""
    query = QueryBuilder().append(
        CalcJobNode,
        filters={"process_type": "aiida.calculations:quantumespresso.pw"},
        tag="pw",
    )
    return list(query.order_by({"pw": "id"}).all(flat=True))


def counts_of_graph() -> dict[str, int]:
    """Return how many runs of pw.x finished and how many were done again, by the graph.

    A run is done again where one of the same structure and parameters had finished before it began
    or finishes too.
    """
    groups = defaultdict(list)
    for run in pw_runs():
        inputs = run.inputs
        key = (inputs.structure.base.caching.compute_hash(), str(inputs.parameters.get_dict()))
        groups[key].append(run)
    finished = repeated = 0
    for runs in groups.values():
        done = [run for run in runs if run.is_finished_ok]
        finished += bool(done)
        if done:
            later = [run for run in runs if run.ctime > done[0].mtime and run not in done]
            repeated += len(done) - 1 + len(later)
    return {"runs": sum(map(len, groups.values())), "finished": finished, "repeated": repeated}


def counts_of_ledger(ledger: Path) -> dict[str, int]:
    """Return how often pw.x began, came to its own end, and began after it had ended before."""
    ended: set[str] = set()
    begun = repeated = 0
    for line in ledger.read_text().splitlines():
        _, what, name = line.split()[:3]
        if what == "begin":
            begun += 1
            repeated += name in ended
        else:
            ended.add(name)
    return {"begun": begun, "ended": len(ended), "repeated": repeated}


def stop_of(pk: int) -> str | None:
    """Return why the loop ended, in its own words."""
    history = read_history(load_node(pk))
    return history.stop_text or history.exit_message


def status_of(pk: int) -> list[str]:
    """Return what `aiida-eipnn status` says."""
    command = ["aiida-eipnn", "status", str(pk), "--profile", PROFILE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).splitlines()


def states() -> dict[str, int]:
    """Return how many processes are in each state: none may be left over."""
    query = QueryBuilder().append(ProcessNode, project="attributes.process_state")
    found: dict[str, int] = defaultdict(int)
    for state in query.all(flat=True):
        found[state] += 1
    return dict(found)


def run(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Run one loop to its end."""
    prepare(folder)
    overrides = copy.deepcopy(OVERRIDES)
    electrons = overrides["dft"]["pw_base"]["pw"]["parameters"]["ELECTRONS"]
    electrons["electron_maxstep"] = plan.get("electron_maxstep", electrons["electron_maxstep"])
    start_daemon()
    try:
        pk = start_loop(small_pool(plan["n_pool"], plan["n_hopeless"]), overrides)
        watched = watch(pk, folder, plan["accidents"], plan["command"])
        loop = call_of(pk)
        return {
            **watched,
            "pk": pk,
            "state": loop.state,
            "exit_status": loop.exit_status,
            "exit_message": loop.exit_message,
            "graph": counts_of_graph(),
            "ledger": counts_of_ledger(folder / "ledger"),
            "states": states(),
            "dataset": dataset_of(pk),
            "choices": choices_of(pk),
            "committee": weights_of(pk),
            "stop": stop_of(pk),
            "status": status_of(pk),
        }
    finally:
        subprocess.run(["verdi", "-p", PROFILE, "daemon", "stop"], check=False)
        kill_all(job_processes(folder))


def main() -> None:
    """Run the loop that a plan describes and write what came of it."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    given = options.parse_args()
    if Path(os.environ["AIIDA_PATH"]) != given.folder:
        sys.exit("AIIDA_PATH must be the folder of the run")
    plan = json.loads((given.folder / "plan.json").read_text())
    (given.folder / "result.json").write_text(json.dumps(run(given.folder, plan), indent=1))


if __name__ == "__main__":
    main()
