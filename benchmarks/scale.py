"""What a large pool and a long loop cost: time, memory, nodes, disk, answers of the daemon.

    make bench-scale         # smaller pools, a loop of 3 iterations
    make bench-scale-full

Four parts, each in a profile of its own that is removed afterwards:

evaluate
    `eipnn.evaluate` on pools of growing size. CPU time and the largest memory are those of the
    job's process, as the operating system counts them; disk is what the predictions take in the
    repository.
steering
    The calcfunctions of the loop, which run in the daemon, on a pool of 100,000: time, and how far
    the memory of the process rose while it ran.
nodes
    Small loops on stored labels: nodes made by one more iteration, for pools of different sizes and
    for batches of different sizes; and nodes that one DFT point makes where pw.x runs.
loop
    20 iterations of 20 points on stored labels through the daemon: nodes, size of the profile, how
    long the loop takes outside its jobs, and how soon `verdi process list`, and a process that is
    paused and played, answer while it runs.

The networks are small: what is measured here is everything around them.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from ase import Atoms
from ase.build import bulk

from aiida_eipnn.science.arrays import FloatArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import DFT, Labels

RESULTS = Path(__file__).parent / "results" / "scale.json"
PARTS = ("evaluate", "steering", "nodes", "loop")
PROFILE = "scale"
EIPS = (
    "SW_StillingerWeber_1985_Si__MO_405512056662_005",
    "EDIP_JustoBazantKaxiras_1998_Si__MO_958932894036_002",
)
# What stands for DFT in the loops.
ORACLE = "Tersoff_LAMMPS_Tersoff_1988T3_Si__MO_186459956893_003"
SI_PSEUDO = Path("/usr/share/espresso/pseudo/Si.pz-vbc.UPF")
# Of the members, where nothing is said of their quality.
NETWORK = {"n_radial": 4, "l_max": 2, "width": 32, "depth": 1}
MEMBERS = 2
SIZES = (1_000, 10_000, 100_000)
QUICK_SIZES = (1_000, 10_000)
REPEATS = ((1, 1, 1), (2, 1, 1), (3, 1, 1), (2, 2, 1))
MEGA = 2**20
# How often the daemon is asked, and how long an answer is waited for, in s.
EVERY, PATIENCE = 30, 60


def make_pool(n: int, seed: int = 0) -> Configurations:
    """Return rattled and strained silicon of 2 to 8 atoms."""
    rng = np.random.default_rng(seed)
    cells = [bulk("Si").repeat(repeat) for repeat in REPEATS]
    frames = []
    for number in range(n):
        start: Atoms = cells[number % len(cells)]
        strain = np.eye(3) + rng.normal(0, 0.02, (3, 3))
        atoms = Atoms(
            numbers=start.numbers,
            positions=start.positions @ strain + rng.normal(0, 0.08, start.positions.shape),
            cell=start.cell.array @ strain,
            pbc=True,
        )
        frames.append(atoms)
    return Configurations.from_atoms(frames, [f"atoms{2 + 2 * (i % 4)}" for i in range(n)])


# The parts. AiiDA is imported where it is used, for the folder of its profile is set by then.


def evaluate(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return a row for each size of the pool."""
    from aiida.engine import run_get_node
    from aiida.orm import load_code

    from aiida_eipnn.calculations.evaluate import EvaluateCalculation
    from aiida_eipnn.data.configurations import ConfigurationsData

    usage = make_profile()
    committee = make_committee()
    rows = []
    for size in sizes:
        pool = ConfigurationsData.from_value(make_pool(size)).store()
        start = time.perf_counter()
        outputs, node = run_get_node(
            EvaluateCalculation,
            code=load_code("eipnn-job@localhost"),
            configurations={"pool": pool},
            committee=committee,
            metadata={"options": {"max_wallclock_seconds": 7200}},
        )
        wall = time.perf_counter() - start
        if not node.is_finished_ok:
            raise SystemExit(f"the job ended with {node.exit_status}: {node.exit_message}")
        row = {
            "configurations": size,
            "atoms": len(pool.value().numbers),
            "members": MEMBERS,
            "wall_s": round(wall, 1),
            **last_usage(usage),
            "predictions_mb": round(stored_bytes(outputs["predictions"]) / MEGA, 2),
            "pool_mb": round(stored_bytes(pool) / MEGA, 2),
        }
        rows.append(row)
        print(f"evaluate  {row}", flush=True)
    return rows


def make_committee() -> Any:
    """Return the node of a committee whose networks know nothing."""
    from aiida_eipnn.data.committee import CommitteeData
    from aiida_eipnn.science.nn.committee import Committee
    from aiida_eipnn.science.nn.network import Network, NetworkParameters

    members = []
    for seed in range(MEMBERS):
        member = Network(NetworkParameters(), (14,), (DFT,))
        member.initialise(seed)
        members.append(member)
    committee = Committee(members=tuple(members), stage="finetune", seeds=tuple(range(MEMBERS)))
    with tempfile.TemporaryDirectory() as folder:
        committee.save(Path(folder))
        return CommitteeData.from_folder(Path(folder)).store()


def steering(n: int, n_labelled: int = 400, n_test: int = 40) -> list[dict[str, Any]]:
    """Return a row for each calcfunction of the loop, on a pool of ``n``."""
    from aiida.orm import Dict, Int

    from aiida_eipnn.calculations import loop
    from aiida_eipnn.data.choice import Choice, ChoiceData
    from aiida_eipnn.data.configurations import ConfigurationsData
    from aiida_eipnn.data.labels import LabelsData
    from aiida_eipnn.data.predictions import PredictionsData
    from aiida_eipnn.science.acquisition import Strategy

    make_profile()
    pool = make_pool(n)
    truth, eips, predicted = made_up(pool)
    rows = np.random.default_rng(1).permutation(n)
    taken = {"test": rows[:n_test], "initial": rows[n_test : n_test + n_labelled]}
    labels = {
        name: LabelsData.from_value(truth.take(part), level={}).store()
        for name, part in taken.items()
    }
    choices = {
        f"{loop.TAKEN}{name}": ChoiceData.from_value(
            Choice.from_ids(pool.ids[part]), strategy="random"
        ).store()
        for name, part in taken.items()
    }
    nodes = [
        ConfigurationsData.from_value(pool).store(),
        PredictionsData.from_value(predicted).store(),
    ]
    eip_labels = LabelsData.from_value(eips).store()
    new = LabelsData.from_value(truth.take(rows[-20:]), level={}).store()
    del pool, truth, eips, predicted
    stop, seed = Dict({"max_iterations": 20}), Int(0)
    choose = {"n_select": 20}
    calls: dict[str, Any] = {
        "refuse": lambda: loop.refuse(nodes[0], Dict({})),
        **{
            f"split_pool, {first}": partial(
                loop.split_pool,
                nodes[0],
                Dict({"test": 40, "initial": 20, "first": first}),
                seed,
                eip_labels,
            )
            for first in (loop.RANDOM, loop.DISPUTED)
        },
        "refuse_dft_labels": lambda: loop.refuse_dft_labels(
            nodes[0], new, eip_labels, initial=labels["initial"]
        ),
        "assess": lambda: loop.assess(
            *nodes,
            labels["test"],
            eip_labels,
            Dict(choose),
            stop,
            **{f"{loop.LABELS}initial": labels["initial"]},
            **choices,
        ),
    }
    made: dict[str, Any] = {}

    def acquire(strategy: Strategy) -> Any:
        parameters = Dict({**choose, "strategy": str(strategy)})
        return loop.acquire(*nodes, parameters, stop, made["assess"], seed, **choices)

    calls |= {f"acquire, {strategy}": partial(acquire, strategy) for strategy in Strategy}
    found = []
    for name, call in calls.items():
        before = start_counting_memory()
        wall, cpu = time.perf_counter(), time.process_time()
        made[name] = call()
        row = {
            "function": name,
            "configurations": n,
            "labelled": n_labelled,
            "wall_s": round(time.perf_counter() - wall, 2),
            "cpu_s": round(time.process_time() - cpu, 2),
            "memory_rise_mb": round(peak_memory() - before),
        }
        found.append(row)
        print(f"steering  {row}", flush=True)
    return found


def made_up(pool: Configurations) -> tuple[Labels, Labels, Any]:
    """Return DFT labels, labels of eight EIPs and predictions that look like real ones."""
    from aiida_eipnn.science.predictions import Predictions

    rng = np.random.default_rng(2)
    n, n_atoms, n_eips, width = len(pool), len(pool.numbers), 8, 128
    energy = -5.0 * pool.n_atoms + rng.normal(0, 0.1, n) * pool.n_atoms
    forces = rng.normal(0, 1.0, (n_atoms, 3))
    truth = labels_of(pool, [DFT], energy[:, None], forces[None])
    eips = labels_of(
        pool,
        [f"eip{number}" for number in range(n_eips)],
        energy[:, None] + rng.normal(0, 0.05, (n, n_eips)) * pool.n_atoms[:, None],
        (forces + rng.normal(0, 0.3, (n_eips, n_atoms, 3))).astype(np.float32),
    )
    predicted = Predictions(
        ids=pool.ids,
        offsets=pool.offsets,
        energy=energy + rng.normal(0, 0.02, n) * pool.n_atoms,
        forces=forces + rng.normal(0, 0.1, (n_atoms, 3)),
        stress=np.zeros((n, 6)),
        energy_std=rng.uniform(0.001, 0.1, n),
        forces_std=rng.uniform(0.01, 0.5, n_atoms),
        features=(rng.normal(0, 1, (n, 20)) @ rng.normal(0, 1, (20, width))).astype(np.float32),
    )
    return truth, eips, predicted


def labels_of(pool: Configurations, sources: list[str], energy: FloatArray, forces: Any) -> Labels:
    """Return complete labels."""
    n, m = energy.shape
    return Labels(
        ids=pool.ids,
        offsets=pool.offsets,
        sources=np.array(sources),
        energy=energy,
        forces=forces,
        stress=np.full((n, m, 6), np.nan, dtype=forces.dtype),
        status=np.zeros((n, m), dtype=np.int64),
        reasons=np.array([], dtype="<U1"),
        origins=np.full(n, "", dtype="<U36"),
    )


def nodes() -> dict[str, Any]:
    """Return nodes of one more iteration by size of pool and batch, and of one run of pw.x."""
    from aiida.engine import run_get_node

    make_profile()
    rows = []
    for n_pool, n_select in ((100, 5), (1_000, 5), (100, 20)):
        builder = loop_builder(n_pool, n_iterations=2, n_select=n_select, n_first=10)
        outputs, node = run_get_node(builder)
        if not node.is_finished_ok:
            raise SystemExit(f"the loop ended with {node.exit_status}: {node.exit_message}")
        # Nothing else makes nodes here, so that their numbers count them.
        first, second = (outputs["iterations"][name]["history"].pk for name in ("i001", "i002"))
        rows.append({"pool": n_pool, "points": n_select, "nodes_per_iteration": second - first})
        print(f"nodes     {rows[-1]}", flush=True)
    found = {"stored_labels": rows, "nodes_per_pw_point": nodes_of_pw()}
    print(f"nodes     of one point with pw.x: {found['nodes_per_pw_point']}", flush=True)
    return found


def nodes_of_pw() -> float | None:
    """Return how many nodes a DFT point makes more, where pw.x is installed."""
    from aiida.engine import run_get_node
    from aiida.orm import Node, QueryBuilder

    from aiida_eipnn.cli import environment

    if not has_pw():
        return None
    make_pw(environment.find_pw(None))
    pool = two_atoms(4)
    counts: list[int] = []
    for n in (1, 3):
        before = QueryBuilder().append(Node).count()
        _, node = run_get_node(pw_builder(pool, range(n), n_lanes=1))
        if not node.is_finished_ok:
            raise SystemExit(f"labelling ended with {node.exit_status}: {node.exit_message}")
        counts.append(QueryBuilder().append(Node).count() - before)
    return (counts[1] - counts[0]) / 2


def has_pw() -> bool:
    """Return whether pw.x and a pseudopotential for it are installed."""
    return shutil.which("pw.x") is not None and SI_PSEUDO.exists()


def make_pw(executable: Path) -> None:
    """Make the code of pw.x and the family of its pseudopotential."""
    from aiida_pseudo.data.pseudo import UpfData
    from aiida_pseudo.groups.family import CutoffsPseudoPotentialFamily

    from aiida_eipnn.cli import environment

    environment.ensure_code(
        "pw", executable, plugin=environment.PW_PLUGIN, prepend=environment.pw_prepend()
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(SI_PSEUDO, Path(folder) / "Si.upf")
        family = CutoffsPseudoPotentialFamily.create_from_folder(
            Path(folder), PROFILE, pseudo_type=UpfData
        )
    family.set_cutoffs({"Si": {"cutoff_wfc": 16.0, "cutoff_rho": 64.0}}, "low", unit="Ry")


def two_atoms(n: int) -> Any:
    """Return the node of ``n`` configurations of two atoms."""
    from aiida_eipnn.data.configurations import ConfigurationsData

    every = len(REPEATS)
    pool = make_pool(every * n).take(range(0, every * n, every))
    return ConfigurationsData.from_value(pool).store()


def pw_builder(pool: Any, rows: range, *, n_lanes: int) -> Any:
    """Return a labelling of some configurations by as short runs of pw.x as can be."""
    from aiida.orm import load_code

    from aiida_eipnn.data.choice import Choice, ChoiceData
    from aiida_eipnn.workflows.label_dft import DftLabelWorkChain

    return DftLabelWorkChain.get_builder_from_protocol(
        load_code("pw@localhost"),
        pool,
        ChoiceData.from_value(Choice.from_ids(pool.value().ids[rows]), strategy="random"),
        protocol="demo",
        overrides={
            "dft": {
                "n_lanes": n_lanes,
                "scaling": {"conv_thr_per_atom": 1e-6},
                "pw_base": {"kpoints_distance": 2.0, "pseudo_family": PROFILE},
            }
        },
    )


def loop(n_iterations: int, n_select: int, n_pool: int) -> dict[str, Any]:
    """Run a loop through the daemon and watch how soon the daemon answers."""
    from aiida.engine import submit
    from aiida.manage.configuration import get_profile
    from aiida.orm import Node, QueryBuilder

    usage = make_profile()
    builder = loop_builder(
        n_pool, n_iterations=n_iterations, n_select=n_select, n_first=20, n_test=40
    )
    verdi("daemon", "start", "1")
    try:
        idle = [timed(verdi, "process", "list") for _ in range(3)]
        before = QueryBuilder().append(Node).count()
        start = time.time()
        node = submit(builder)
        answers = watch(node)
        end = time.time()
        worker = worker_usage()
    finally:
        verdi("daemon", "stop", "--timeout", "120")
    if not node.is_finished_ok:
        raise SystemExit(f"the loop ended with {node.exit_status}: {node.exit_message}")
    iterations = len(node.outputs.history["iterations"])
    storage = Path(get_profile().storage_config["filepath"])
    in_jobs = covered([json.loads(line) for line in usage.read_text().splitlines()])
    found = {
        "iterations": iterations,
        "points_per_iteration": n_select,
        "pool": n_pool,
        "dft_labels": node.outputs.history["iterations"][-1]["n_training_labels"],
        "wall_s": round(end - start),
        "in_jobs_s": round(in_jobs),
        "outside_jobs_s_per_iteration": round((end - start - in_jobs) / iterations, 1),
        "nodes": QueryBuilder().append(Node).count() - before,
        "nodes_per_iteration": nodes_by_iteration(node),
        "process_list_idle_s": round(float(np.median(idle)), 2),
        **{
            f"{name}_{kind}": round(float(number), 2)
            for name, times in answers.items()
            for kind, number in (
                ("median_s", np.median(times)),
                ("max_s", np.max(times)),
                ("n", len(times)),
            )
        },
        **worker,
        **storage_size(storage),
        "storage": str(storage),
    }
    print(f"loop      {found}", flush=True)
    return found


def nodes_by_iteration(node: Any) -> list[int]:
    """Return how many nodes each iteration after the first made.

    Nothing else makes nodes in this profile, so that their numbers count them.
    """
    iterations = node.outputs.iterations
    pks = [iterations[name]["history"].pk for name in sorted(iterations)]
    return [second - first for first, second in itertools.pairwise(pks)]


def watch(node: Any) -> dict[str, list[float]]:
    """Return how long answers took until a process ended."""
    from aiida.engine.processes import control

    times: dict[str, list[float]] = {"process_list": [], "pause": [], "play": []}
    while not node.is_terminated:
        times["process_list"].append(timed(verdi, "process", "list"))
        # Through the broker to the worker that runs the loop, and back.
        for name in ("pause", "play"):
            action = getattr(control, f"{name}_processes")
            if node.is_terminated:
                break
            start = time.perf_counter()
            try:
                action([node], timeout=PATIENCE)
            except control.ProcessTimeoutException:
                print(f"loop      no answer to {name} within {PATIENCE} s", flush=True)
            times[name].append(time.perf_counter() - start)
        time.sleep(EVERY)
    return {name: found for name, found in times.items() if found}


def worker_usage() -> dict[str, float]:
    """Return what the daemon and its worker used."""
    from aiida.engine.daemon.client import get_daemon_client

    daemon = psutil.Process(get_daemon_client().get_daemon_pid())
    family = [daemon, *daemon.children(recursive=True)]
    times = [process.cpu_times() for process in family]
    return {
        "daemon_cpu_s": round(sum(item.user + item.system for item in times), 1),
        "worker_rss_mb": round(max(process.memory_info().rss for process in family) / MEGA),
    }


def covered(jobs: list[dict[str, float]]) -> float:
    """Return the time in which at least one job ran."""
    total, reached = 0.0, 0.0
    for job in sorted(jobs, key=lambda item: item["start"]):
        total += max(0.0, job["end"] - max(job["start"], reached))
        reached = max(reached, job["end"])
    return total


def storage_size(folder: Path) -> dict[str, float]:
    """Return the size of the database and of the repository, in MB."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    database = sum(path.stat().st_size for path in files if path.parent == folder)
    everything = sum(path.stat().st_size for path in files)
    return {
        "database_mb": round(database / MEGA, 1),
        "repository_mb": round((everything - database) / MEGA, 1),
    }


def packed_size(storage: Path, aiida_path: str) -> dict[str, float]:
    """Return the same when all is packed, which AiiDA does where no process uses the profile."""
    command = ["--profile", PROFILE, "storage", "maintain", "--full", "--force", "--compress"]
    verdi(*command, aiida_path=aiida_path)
    return {f"packed_{name}": size for name, size in storage_size(storage).items()}


def loop_builder(
    n_pool: int, *, n_iterations: int, n_select: int, n_first: int, n_test: int = 10
) -> Any:
    """Return a loop on labels of an EIP that stand for DFT."""
    from aiida.orm import load_code

    from aiida_eipnn.data.configurations import ConfigurationsData
    from aiida_eipnn.data.labels import LabelsData
    from aiida_eipnn.science.eip.engine import label_with_eips
    from aiida_eipnn.workflows.active_learning import ActiveLearningWorkChain
    from aiida_eipnn.workflows.builder import Codes, Start

    pool = make_pool(n_pool, seed=n_pool)
    stored = replace(label_with_eips(pool, [ORACLE]), sources=np.array([DFT]))
    return ActiveLearningWorkChain.get_builder_from_protocol(
        Codes(job=load_code("eipnn-job@localhost")),
        Start(
            pool=ConfigurationsData.from_value(pool),
            eips=list(EIPS),
            stored_labels=LabelsData.from_value(stored, level={}),
        ),
        protocol="demo",
        overrides={
            "n_members": MEMBERS,
            "n_pretrained": 1,
            "train_scratch": False,
            "use_pseudo_labels": False,
            "label": {"n_workers": 1},
            "train": {"n_workers": 1},
            "network": NETWORK,
            "pretrain": {"steps": 60},
            "classify": {"steps": 20},
            "finetune": {"steps": 20},
            "split": {"test": n_test, "initial": n_first},
            "acquisition": {"n_select": n_select, "strategy": "lcmd"},
            "stop": {"max_iterations": n_iterations},
        },
    )


def verdi(*arguments: str, aiida_path: str | None = None) -> None:
    """Run a command of AiiDA, with the profiles of another folder if one is given."""
    environment = os.environ | ({} if aiida_path is None else {"AIIDA_PATH": aiida_path})
    command = [str(Path(sys.executable).with_name("verdi")), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stdout}{done.stderr}")


def timed(call: Any, *arguments: Any) -> float:
    """Return how long a call takes, in s."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


# What all parts need.


def make_profile() -> Path:
    """Make and load the profile; return the file into which jobs write what they used."""
    import aiida_eipnn
    from aiida_eipnn.cli import environment

    environment.ensure_profile(PROFILE)
    environment.ensure_computer()
    folder = Path(os.environ["AIIDA_PATH"])
    usage = folder / "usage.jsonl"
    wrapper = folder / "eipnn-job"
    wrapper.write_text(
        WRAPPER.format(
            python=sys.executable,
            usage=str(usage),
            path=str(Path(aiida_eipnn.__file__).parents[1]),
        )
    )
    wrapper.chmod(0o755)
    environment.ensure_code("eipnn-job", wrapper, prepend=environment.ONE_THREAD)
    return usage


WRAPPER = """#!{python}
import json, os, resource, subprocess, sys, time
start = time.time()
os.environ["PYTHONPATH"] = {path!r}
code = subprocess.call([sys.executable, "-m", "aiida_eipnn.jobs", *sys.argv[1:]])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open({usage!r}, "a") as stream:
    found = dict(start=start, end=time.time(), cpu_s=round(used.ru_utime + used.ru_stime, 1),
                 peak_rss_mb=round(used.ru_maxrss / 1024))
    stream.write(json.dumps(found) + "\\n")
sys.exit(code)
"""


def last_usage(path: Path) -> dict[str, float]:
    """Return what the last job used."""
    found = json.loads(path.read_text().splitlines()[-1])
    return {
        "job_s": round(found["end"] - found["start"], 1),
        "cpu_s": found["cpu_s"],
        "peak_rss_mb": found["peak_rss_mb"],
    }


def stored_bytes(node: Any) -> int:
    """Return the bytes of the files of a node."""
    repository = node.base.repository
    return sum(repository.get_object_size(name) for name in repository.list_object_names())


def start_counting_memory() -> float:
    """Return the memory of this process, in MB, and count its peak from here on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status").read_text()
    line = next(row for row in status.splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def run_part(name: str, *, quick: bool) -> Any:
    """Run one part here."""
    if name == "evaluate":
        return evaluate(QUICK_SIZES if quick else SIZES)
    if name == "steering":
        return steering(20_000 if quick else 100_000)
    if name == "nodes":
        return nodes()
    if name == "loop":
        return loop(3, 5, 200) if quick else loop(20, 20, 2_000)
    raise SystemExit(f"no part {name!r}, only {PARTS}")


def run_apart(name: str, *, quick: bool) -> Any:
    """Run one part in a process and a profile of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "part.json"
        command = [sys.executable, __file__, "--part", name, "--output", str(output)]
        subprocess.run(
            [*command, *(["--quick"] if quick else [])],
            env=os.environ | {"AIIDA_PATH": folder, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        found = json.loads(output.read_text())
        if name == "loop":
            found |= packed_size(Path(found.pop("storage")), folder)
        return found


def main() -> None:
    """Run the parts, print their rows, write JSON."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--quick", action="store_true", help="smaller pools and a shorter loop")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args()
    if given.part:
        given.output.write_text(json.dumps(run_part(given.part, quick=given.quick)))
        return
    content = json.loads(given.output.read_text()) if given.output.exists() else {}
    for name in given.parts:
        content[name] = run_apart(name, quick=given.quick)
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
