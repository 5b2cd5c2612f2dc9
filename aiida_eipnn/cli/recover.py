"""``aiida-eipnn recover``: after an accident, everything goes on."""

import contextlib
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aiida_eipnn.cli.loop import profile_option, use_profile

if TYPE_CHECKING:
    from aiida.orm import CalcJobNode

# What AiiDA calls the parts of its daemon on their command lines, and what circus runs beside them.
STATISTICS = "statistics"
PARTS = ("start-circus", "worker", "broker", STATISTICS)
GRACE_SECONDS = 10.0
READY_SECONDS = 120.0
POLL_SECONDS = 0.2

# No process has this number: Linux stops at 2**22.
NO_PROCESS = str(2**22 + 1)


@click.command("recover")
@click.option(
    "-w",
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Workers of the daemon.",
)
@profile_option
def cmd_recover(workers: int, profile: str | None) -> None:
    """Start the daemon after an accident, so that all goes on.

    For a daemon that was killed, a machine that was rebooted, processes that hang. What is left of
    the old daemon is ended, and processes that the accident cut off from it are taken up again
    where they were. Jobs that run go on; what finished is not repeated. It is safe to call at any
    time, and twice.
    """
    use_profile(profile)
    from aiida.manage import get_manager

    name = get_manager().get_profile().name
    if get_manager().get_broker() is None:
        raise ValueError(
            f"the profile {name!r} has no broker, so that no daemon runs anything in it"
        )
    ended = end_daemon(name)
    click.echo(f"daemon       {f'{ended} old processes ended' if ended else 'was not running'}")
    forgotten = forget_reused_ids()
    if forgotten:
        click.echo(f"jobs         {forgotten} died, and other processes have their numbers")
    click.echo(f"processes    {repair()} had lost their task, {n_active()} go on")
    start_daemon(workers)
    click.echo(f"daemon       runs, workers: {workers}")


def end_daemon(profile: str) -> int:
    """End every process of the daemon of a profile, and remove what would mislead the next one.

    Returns
    -------
    int
        How many processes there were.
    """
    import psutil

    found = list(daemon_processes(profile))
    for process in found:
        _quietly(process.terminate)
    _, alive = psutil.wait_procs(found, timeout=GRACE_SECONDS)
    for process in alive:
        _quietly(process.kill)
    psutil.wait_procs(alive, timeout=GRACE_SECONDS)
    for path in left_over_files():
        path.unlink(missing_ok=True)
    return len(found)


def daemon_processes(profile: str) -> Iterator[Any]:
    """Yield the processes of the daemon of a profile: circus, which starts others anew, first."""
    import psutil
    from aiida.manage.configuration import get_config

    folder, sockets = str(Path(get_config().dirpath)), _sockets()
    found: dict[str, list[Any]] = {part: [] for part in PARTS}
    for process in psutil.process_iter():
        try:
            part = part_of(process.cmdline(), profile, sockets)
            if part and process.environ().get("AIIDA_PATH") == folder:
                found[part].append(process)
        except psutil.Error:
            continue
    for part in PARTS:
        yield from found[part]


def part_of(words: list[str], profile: str, sockets: str | None) -> str | None:
    """Return which part of the daemon of a profile a command line is, if it is one."""
    for part in PARTS[:-1]:
        if any(words[place : place + 4] == ["-p", profile, "daemon", part] for place in (1, 2)):
            return part
    if sockets and any(word.startswith(f"ipc://{sockets}/") for word in words):
        return STATISTICS
    return None


def _sockets() -> str | None:
    """Return where circus, and what it runs beside the daemon, have their sockets."""
    from aiida.engine.daemon.client import get_daemon_client

    path = Path(get_daemon_client().circus_socket_file)
    return path.read_text(encoding="utf8").strip() if path.exists() else None


def left_over_files() -> list[Path]:
    """Return the files in which a daemon says where it is to be found.

    A worker that starts before the new broker would connect to the old one, for ever.
    """
    from aiida.engine.daemon.client import get_daemon_client
    from aiida.manage import get_manager

    broker = get_manager().get_broker()
    folder = getattr(broker, "_service_dir", None)
    names = ("broker.pid", "broker.sockets", "broker.status")
    files = [folder / name for name in names] if folder else []
    return [*files, Path(get_daemon_client().circus_pid_file)]


def forget_reused_ids() -> int:
    """Tell AiiDA of jobs on this machine that died whose process number another process has now.

    After a reboot numbers begin anew. AiiDA asks for the number only, and would wait for a
    stranger.
    """
    forgotten = 0
    for job in jobs_here():
        if not _is_job(job):
            job.set_job_id(NO_PROCESS)
            forgotten += 1
    return forgotten


def jobs_here() -> "Iterator[CalcJobNode]":
    """Yield the active jobs that are plain processes of this machine."""
    from aiida.orm import CalcJobNode, Computer, QueryBuilder

    query = QueryBuilder()
    here = {"transport_type": "core.local", "scheduler_type": "core.direct"}
    query.append(Computer, filters=here, tag="computer")
    active = {"attributes.process_state": "waiting", "attributes.state": "withscheduler"}
    query.append(CalcJobNode, with_computer="computer", filters=active)
    yield from (job for job in query.all(flat=True) if job.get_job_id())


def _is_job(job: "CalcJobNode") -> bool:
    """Return whether the process with the number of a job works in its folder, or none does."""
    import psutil

    try:
        return bool(psutil.Process(int(job.get_job_id())).cwd() == job.get_remote_workdir())
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def repair() -> int:
    """Give every active process that lost its task in the queue a new one; return how many did."""
    from aiida.cmdline.commands.cmd_process import process_repair
    from aiida.engine.processes.control import get_active_processes, get_process_tasks
    from aiida.manage import get_manager

    tasks = set(get_process_tasks(get_manager().get_broker()))
    lost = set(get_active_processes(project="id")) - tasks
    # `verdi process repair`, without the seconds that a second Python takes to start.
    with contextlib.redirect_stdout(io.StringIO()):
        process_repair.callback(dry_run=False, force=True)
    return len(lost)


def n_active() -> int:
    """Return how many processes have not ended."""
    from aiida.engine.processes.control import get_active_processes

    return len(get_active_processes(project="id"))


def start_daemon(workers: int) -> None:
    """Start the daemon and wait until its broker takes tasks."""
    from aiida.engine.daemon.client import get_daemon_client
    from aiida.manage import get_manager

    get_daemon_client().start_daemon(workers)
    broker = get_manager().get_broker()
    reachable = getattr(broker, "check_service_reachable", lambda: True)
    deadline = time.monotonic() + READY_SECONDS
    while not reachable():
        if time.monotonic() > deadline:
            raise OSError("the daemon started, but not its broker: see `verdi daemon logshow`")
        time.sleep(POLL_SECONDS)


def _quietly(action: Any) -> None:
    import psutil

    try:
        action()
    except psutil.NoSuchProcess:
        return
