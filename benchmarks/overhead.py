"""What AiiDA costs: for each DFT point, and for an iteration of the loop.

    make bench-overhead         # few points
    make bench-overhead-full

Two parts. Each row has a profile and a daemon of its own, which are removed afterwards:

pw
    `eipnn.label_dft` on two-atom silicon with the real pw.x, in runs as short as can be, so that
    what is measured is all around them: wall time for each point, also less the time in which a
    pw.x ran, CPU time of the workers of the daemon, nodes, and bytes of the profile. The profile is
    the one of `aiida-eipnn setup` (core.sqlite_dos, core.zeromq) or has its data in PostgreSQL,
    with one worker or two. The floor is the same job scripts in folders of their own, as many at a
    time, started by a thread each.
loop
    Loops on stored labels, which ask for 10, 100 or 1000 DFT points at a time: wall time outside
    the jobs, CPU time of the worker, and nodes of the second iteration, and the size of the profile
    at the end.

PostgreSQL is a private server with Debian's settings in a temporary folder, with AiiDA's own
broker; a server that runs already is not touched. Where it is not installed its rows are left out.
Rows that the output has already are not measured again, but for `--fresh`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import postgres  # type: ignore[import-not-found]
import psutil
import scale  # type: ignore[import-not-found]

RESULTS = Path(__file__).parent / "results" / "overhead.json"
PARTS = ("pw", "loop")
SQLITE, POSTGRESQL = "core.sqlite_dos", "core.psql_dos"
PROFILES = {
    "pw": ((SQLITE, 1), (POSTGRESQL, 1), (POSTGRESQL, 2)),
    "loop": ((SQLITE, 1), (POSTGRESQL, 1)),
}
POINTS = {"pw": (40,), "loop": (10, 100, 1000)}
QUICK_POINTS = {"pw": (6,), "loop": (10, 40)}
# Runs of pw.x at a time. As many come first that do not count, for workers load code by then.
LANES = 2
# Of the loops. All batches come from a pool of one size, for that costs too.
N_FIRST, N_TEST, ITERATIONS = 20, 40, 2
# How often a process is looked at, in s.
EVERY = 0.5
KILO, MEGA = 2**10, 2**20
# Who used CPU time: what workers started is the `ps` and the like by which they look after jobs.
USERS = ("worker", "commands", "broker", "database")

# Writes down when pw.x began and ended, without a process of its own.
PW_WRAPPER = """#!/bin/bash
LC_ALL=C
start=$EPOCHREALTIME
{pw} "$@"
code=$?
echo "{{\\"start\\": $start, \\"end\\": $EPOCHREALTIME}}" >> {usage}
exit $code
"""


@dataclass(frozen=True)
class Case:
    """What a row is of."""

    part: str
    storage: str
    workers: int
    points: int


@dataclass(frozen=True)
class Sample:
    """CPU time that was used until ``time``, in s, by each of `USERS`."""

    time: float
    cpu: Mapping[str, float]


@dataclass(frozen=True)
class State:
    """What a profile holds."""

    nodes: int
    database: int
    repository: int

    @property
    def size(self) -> int:
        """Bytes of everything."""
        return self.database + self.repository


def cases_of(parts: Iterable[str], *, quick: bool, with_postgres: bool) -> list[Case]:
    """Return all rows of some parts."""
    return [
        Case(part, storage, workers, points)
        for part in parts
        for storage, workers in PROFILES[part]
        if storage == SQLITE or with_postgres
        for points in (QUICK_POINTS if quick else POINTS)[part]
    ]


def missing(cases: Sequence[Case], rows: Sequence[Mapping[str, Any]]) -> list[Case]:
    """Return the cases that have no row yet."""
    there = [{name: row[name] for name in Case.__annotations__} for row in rows]
    return [case for case in cases if asdict(case) not in there]


# What is measured, in the process that has the profile. AiiDA is imported where it is used.


def label_points(case: Case, server: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what labelling by pw.x cost."""
    from aiida_eipnn.cli import environment

    make_profile(server)
    ledger = write_pw_wrapper(environment.find_pw(None))
    pool = scale.two_atoms(LANES + case.points)
    with daemon(case.workers):
        run_to_end(scale.pw_builder(pool, range(LANES), n_lanes=LANES), server)
        before = state_of(server)
        ledger.write_text("")
        node, samples = run_to_end(
            scale.pw_builder(pool, range(LANES, LANES + case.points), n_lanes=LANES), server
        )
        after = state_of(server)
    runs = read_lines(ledger)
    return {
        "lanes": LANES,
        **per_point(case.points, node_window(node), runs, samples, before, after),
        "floor_s_per_point": round(floor(node) / case.points, 3),
    }


def per_point(
    n: int,
    window: tuple[float, float],
    runs: Sequence[Mapping[str, float]],
    samples: Sequence[Sample],
    before: State,
    after: State,
) -> dict[str, Any]:
    """Return what each of ``n`` points cost."""
    start, end = window
    cpu = cpu_between(samples, start, end)
    return {
        "wall_s_per_point": round((end - start) / n, 3),
        "pw_runs": len(runs),
        "pw_s_per_run": round(sum(run["end"] - run["start"] for run in runs) / len(runs), 3),
        "outside_pw_s_per_point": round((end - start - inside(runs, start, end)) / n, 3),
        **{f"{name}_cpu_s_per_point": round(cpu[name] / n, 3) for name in cpu},
        "nodes_per_point": round((after.nodes - before.nodes) / n, 1),
        "database_kb_per_point": round((after.database - before.database) / n / KILO, 1),
        "repository_kb_per_point": round((after.repository - before.repository) / n / KILO, 1),
        "profile_kb_per_point": round((after.size - before.size) / n / KILO, 1),
    }


def iterate(case: Case, n_pool: int, server: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the second iteration of a loop on stored labels cost."""
    usage = make_profile(server)
    builder = scale.loop_builder(
        n_pool, n_iterations=ITERATIONS, n_select=case.points, n_first=N_FIRST, n_test=N_TEST
    )
    with daemon(case.workers):
        node, samples = run_to_end(builder, server)
        state = state_of(server)
    jobs = read_lines(usage)
    first, last = (
        node.outputs.iterations[f"i{number:03d}"]["history"]
        for number in (ITERATIONS - 1, ITERATIONS)
    )
    start, end = first.ctime.timestamp(), last.ctime.timestamp()
    cpu = cpu_between(samples, start, end)
    return {
        "pool": n_pool,
        "dft_labels": node.outputs.history["iterations"][-1]["n_training_labels"],
        "jobs_per_iteration": sum(start <= job["start"] < end for job in jobs),
        "wall_s_per_iteration": round(end - start, 2),
        "outside_jobs_s_per_iteration": round(end - start - inside(jobs, start, end), 2),
        **{f"{name}_cpu_s_per_iteration": round(cpu[name], 2) for name in cpu},
        "nodes_per_iteration": count_nodes(first.pk, last.pk),
        "nodes": state.nodes,
        "database_mb": round(state.database / MEGA, 2),
        "repository_mb": round(state.repository / MEGA, 2),
        "profile_mb": round(state.size / MEGA, 2),
    }


def inside(runs: Iterable[Mapping[str, float]], start: float, end: float) -> float:
    """Return how long of a window at least one run was going on, in s."""
    # One that is not of the window ends before it starts, which counts as nothing.
    clipped = [{"start": max(run["start"], start), "end": min(run["end"], end)} for run in runs]
    return float(scale.covered(clipped))


def cpu_between(samples: Sequence[Sample], start: float, end: float) -> dict[str, float]:
    """Return the CPU time that each used in a window, in s."""
    times = [sample.time for sample in samples]
    used = {}
    for name in samples[0].cpu:
        values = [sample.cpu[name] for sample in samples]
        used[name] = float(np.interp(end, times, values) - np.interp(start, times, values))
    return used


def read_lines(path: Path) -> list[dict[str, float]]:
    """Return what jobs wrote down of themselves."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# Profile, daemon, processes.


def make_profile(server: Mapping[str, Any] | None) -> Path:
    """Make and load the profile of `aiida-eipnn setup`, or the same one with PostgreSQL.

    Returns the file into which jobs of `eipnn-job` write what they used.
    """
    from aiida.manage.configuration import create_profile, get_config
    from aiida.plugins import BrokerFactory

    from aiida_eipnn.cli import environment

    if server is not None:
        config = get_config(create=True)
        repository = Path(os.environ["AIIDA_PATH"]) / "repository"
        create_profile(
            config,
            name=scale.PROFILE,
            email=environment.USER_EMAIL,
            storage_backend=POSTGRESQL,
            storage_config={
                **{key: value for key, value in server.items() if key != "pid"},
                "repository_uri": repository.as_uri(),
            },
            broker_backend=environment.BROKER,
            broker_config=BrokerFactory(environment.BROKER).get_default_config(),
        )
        for option, value in environment.OPTIONS.items():
            config.set_option(option, value, scope=scale.PROFILE)
        config.set_default_profile(scale.PROFILE)
        config.store()
    usage: Path = scale.make_profile()
    return usage


def write_pw_wrapper(pw: Path) -> Path:
    """Make the code and the family of pw.x; return the file into which runs write their times."""
    folder = Path(os.environ["AIIDA_PATH"])
    ledger, wrapper = folder / "pw.jsonl", folder / "pw"
    wrapper.write_text(PW_WRAPPER.format(pw=pw, usage=ledger))
    wrapper.chmod(0o755)
    scale.make_pw(wrapper)
    return ledger


@contextmanager
def daemon(workers: int) -> Iterator[None]:
    """Run the daemon of the profile."""
    scale.verdi("daemon", "start", str(workers))
    try:
        yield
    finally:
        scale.verdi("daemon", "stop", "--timeout", "120")


def run_to_end(builder: Any, server: Mapping[str, Any] | None) -> tuple[Any, list[Sample]]:
    """Submit a process and return its node when it ended, with CPU times until then."""
    from aiida.engine import submit

    samples = [sample_cpu(server)]
    node = submit(builder)
    while not node.is_terminated:
        time.sleep(EVERY)
        samples.append(sample_cpu(server))
    if not node.is_finished_ok:
        raise SystemExit(f"{node.process_label} ended with {node.exit_status}: {node.exit_message}")
    return node, samples


def node_window(node: Any) -> tuple[float, float]:
    """Return when a process was made and when it ended, in s."""
    return node.ctime.timestamp(), node.mtime.timestamp()


def sample_cpu(server: Mapping[str, Any] | None) -> Sample:
    """Return the CPU time of the daemon and of the database so far."""
    from aiida.engine.daemon.client import get_daemon_client

    circus = psutil.Process(get_daemon_client().get_daemon_pid())
    cpu = dict.fromkeys(USERS, 0.0)
    for process in [circus, *circus.children()]:
        times = process.cpu_times()
        if process.cmdline()[-1] == "worker":
            cpu["worker"] += times.user + times.system
            cpu["commands"] += times.children_user + times.children_system
        else:
            cpu["broker"] += times.user + times.system
    if server is None:
        del cpu["database"]
    else:
        cpu["database"] = family_cpu(psutil.Process(server["pid"]))
    return Sample(time.time(), cpu)


def family_cpu(parent: psutil.Process) -> float:
    """Return the CPU time of a process and of its children, those that ended too."""
    times = parent.cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in parent.children():
        try:
            used = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system
    return float(total)


def state_of(server: Mapping[str, Any] | None) -> State:
    """Return what the profile holds now."""
    from aiida.manage.configuration import get_profile

    config = get_profile().storage_config
    if server is not None:
        folder = Path(config["repository_uri"].removeprefix("file://"))
        return State(count_nodes(), postgres.database_size(server), bytes_below(folder))
    folder = Path(config["filepath"])
    database = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return State(count_nodes(), database, bytes_below(folder) - database)


def bytes_below(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def count_nodes(after: int = 0, until: int | None = None) -> int:
    """Return how many nodes there are, or were made after one and until another."""
    from aiida.orm import Node, QueryBuilder

    numbers = {">": after} | ({} if until is None else {"<=": until})
    filters = {"and": [{"id": {sign: number}} for sign, number in numbers.items()]}
    return int(QueryBuilder().append(Node, filters=filters).count())


def floor(chain: Any) -> float:
    """Run the job scripts of all runs of pw.x again, without AiiDA; return how long it took."""
    from aiida.orm import CalcJobNode

    runs = [node for node in chain.called_descendants if isinstance(node, CalcJobNode)]
    with tempfile.TemporaryDirectory() as there:
        folders = [copy_inputs(run, Path(there) / str(run.pk)) for run in runs]
        start = time.perf_counter()
        with ThreadPoolExecutor(LANES) as lanes:
            codes = list(lanes.map(run_script, folders))
        wall = time.perf_counter() - start
        if any(codes):
            raise SystemExit(f"pw.x without AiiDA ended with {sorted(set(codes))}")
    return wall


def copy_inputs(run: Any, folder: Path) -> Path:
    """Write into a folder what AiiDA copied to the computer for a run of pw.x."""
    run.base.repository.copy_tree(folder)
    (folder / "out").mkdir()
    (folder / "pseudo").mkdir()
    for pseudo in run.inputs.pseudos.values():
        with pseudo.open(mode="rb") as source:
            (folder / "pseudo" / pseudo.filename).write_bytes(source.read())
    return folder


def run_script(folder: Path) -> int:
    """Run the job script in a folder; return its exit code."""
    output = subprocess.DEVNULL
    command = ["bash", "_aiidasubmit.sh"]
    return subprocess.run(command, cwd=folder, stdout=output, stderr=output, check=False).returncode


# The rows.


def run_case(case: Case, server: Mapping[str, Any] | None, *, quick: bool) -> dict[str, Any]:
    """Return a row, measured in the profile of AIIDA_PATH."""
    from aiida import __version__
    from aiida.manage.configuration import get_profile

    load, sync = os.getloadavg()[0], sync_time(Path(os.environ["AIIDA_PATH"]))
    if case.part == "pw":
        found = label_points(case, server)
        found["ratio"] = round(found["wall_s_per_point"] / found["floor_s_per_point"], 2)
    else:
        # Whatever the largest batches leave over.
        largest = max((QUICK_POINTS if quick else POINTS)["loop"])
        found = iterate(case, ITERATIONS * largest + 4 * (N_FIRST + N_TEST), server)
    broker = get_profile().process_control_backend
    # What wall times depend on, besides AiiDA: the disk, for each change of a process is written to
    # it, and other programs.
    machine = {
        "aiida": __version__,
        "cpus": psutil.cpu_count(),
        "load_before": round(load, 1),
        "disk_sync_ms": round(1000 * sync, 2),
    }
    return {**asdict(case), "broker": broker, **found, **machine}


def sync_time(folder: Path, times: int = 50) -> float:
    """Return how long the disk takes to write a page for good, in s."""
    found = []
    with tempfile.TemporaryFile(dir=folder) as stream:
        for _ in range(times):
            start = time.perf_counter()
            os.pwrite(stream.fileno(), bytes(4096), 0)
            os.fsync(stream.fileno())
            found.append(time.perf_counter() - start)
    return float(np.median(found))


def run_apart(case: Case, *, quick: bool) -> dict[str, Any]:
    """Run one row in a process, with a profile and if need be a server of its own."""
    with (
        nullcontext() if case.storage == SQLITE else postgres.private_server() as server,
        tempfile.TemporaryDirectory(prefix="eipnn-overhead-") as folder,
    ):
        output = Path(folder) / "row.json"
        given = json.dumps({"case": asdict(case), "server": server, "quick": quick})
        command = [sys.executable, __file__, "--one", given, "--output", str(output)]
        environment = os.environ | {
            "AIIDA_PATH": folder,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        try:
            subprocess.run(command, env=environment, check=True)
            row: dict[str, Any] = json.loads(output.read_text())
        finally:
            # There is one still where the process was killed.
            if (Path(folder) / ".aiida").exists():
                stop = [str(Path(sys.executable).with_name("verdi")), "daemon", "stop"]
                subprocess.run(stop, env=environment, capture_output=True, check=False)
        return row


COLUMNS = {
    "pw": {
        "storage": "storage",
        "broker": "broker",
        "workers": "workers",
        "points": "points",
        "wall_s_per_point": "wall, s",
        "floor_s_per_point": "floor, s",
        "ratio": "ratio",
        "outside_pw_s_per_point": "no pw.x, s",
        "worker_cpu_s_per_point": "CPU of workers, s",
        "nodes_per_point": "nodes",
        "profile_kb_per_point": "profile, kB",
    },
    "loop": {
        "storage": "storage",
        "broker": "broker",
        "workers": "workers",
        "points": "points",
        "wall_s_per_iteration": "wall, s",
        "outside_jobs_s_per_iteration": "outside jobs, s",
        "worker_cpu_s_per_iteration": "CPU of worker, s",
        "nodes_per_iteration": "nodes",
        "profile_mb": "profile, MB",
    },
}
TITLES = {"pw": "For each DFT point by pw.x", "loop": "For the second iteration of a loop"}


def table(part: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the rows of a part in Markdown."""
    names = COLUMNS[part]
    lines = [[str(row[name]) for name in names] for row in rows if row["part"] == part]
    ruler = ["---", "---", *["---:"] * (len(names) - 2)]
    return "\n".join("| " + " | ".join(line) + " |" for line in ([*names.values()], ruler, *lines))


def sort_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows in the order of the tables."""
    order = [(part, *profile) for part in PARTS for profile in PROFILES[part]]
    return sorted(
        rows,
        key=lambda row: (
            order.index((row["part"], row["storage"], row["workers"])),
            row["points"],
        ),
    )


def main() -> None:
    """Measure the rows that are missing, print tables, write JSON."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--quick", action="store_true", help="fewer points")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--fresh", action="store_true", help="measure rows again that are there")
    options.add_argument("--one", help=argparse.SUPPRESS)
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args()
    if given.one:
        one = json.loads(given.one)
        row = run_case(Case(**one["case"]), one["server"], quick=one["quick"])
        given.output.write_text(json.dumps(row))
        return
    # So that servers and daemons are stopped too where this is killed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    has_postgres = postgres.find_binaries() is not None
    if not has_postgres:
        print(postgres.REMEDY)
    parts = [part for part in given.parts if part != "pw" or scale.has_pw()]
    if parts != given.parts:
        print("pw.x is not installed, so its rows are left out: apt-get install quantum-espresso")
    cases = cases_of(parts, quick=given.quick, with_postgres=has_postgres)
    rows = json.loads(given.output.read_text()) if given.output.exists() else []
    if given.fresh:
        rows = [row for row in rows if row not in rows_of(cases, rows)]
    for case in missing(cases, rows):
        start = time.perf_counter()
        row = run_apart(case, quick=given.quick)
        rows = sort_rows([*rows, row])
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{time.perf_counter() - start:.0f} s  {row}", flush=True)
    for part in given.parts:
        print(f"\n{TITLES[part]}:\n\n{table(part, rows)}")


def rows_of(cases: Sequence[Case], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of some cases."""
    return [row for row in rows if len(missing(cases, [row])) < len(cases)]


if __name__ == "__main__":
    main()
