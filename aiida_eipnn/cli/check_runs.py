"""Jobs that check a computer: through its scheduler, with the options that a loop will use."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from aiida.common.exceptions import AiidaException
from aiida.common.log import AIIDA_LOGGER
from aiida.engine import CalcJob
from aiida.engine.runners import Runner
from aiida.manage import get_manager
from aiida.manage.caching import disable_caching
from aiida.manage.configuration import get_profile
from aiida.orm import AbstractCode, CalcJobNode, Computer, Group, Log
from aiida.orm.utils.log import DBLogHandler
from aiida_quantumespresso.calculations.pw import PwCalculation

from aiida_eipnn.calculations.check import CheckCalculation
from aiida_eipnn.cli.hydrogen import hydrogen_inputs
from aiida_eipnn.jobs.spec import LOG
from aiida_eipnn.workflows.builder import DFT, ONE_CORE, job_inputs, options_of, with_mpi

# Where the nodes of all checks are, for whoever wants to be rid of them.
GROUP = "eipnn-checks"
POLL_SECONDS = 0.5
# Seconds that a job which is to be ended has for it.
END_SECONDS = 60.0
# pw.x of hydrogen takes a second; the rest is starting it.
PW_SECONDS = 600
# AiiDA tries for five minutes what does not work; who waits at a terminal learns it at once.
ATTEMPTS = {"transport.task_maximum_attempts": 2, "transport.task_retry_initial_interval": 2}

STDERR = "_scheduler-stderr.txt"
BANNER = re.compile(r"Program PWSCF\s+v\.(?P<version>\S+)")
PROCESSES = re.compile(r"running on\s+(?P<number>\d+)\s+process")
TROUBLE = re.compile(r"error|not found|cannot|no such|denied|illegal|refused|fatal", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One job, for all stages that run in the same way.

    Parameters
    ----------
    stages
        The stages.
    process
        The CalcJob.
    inputs
        Its inputs.
    """

    stages: tuple[str, ...]
    process: type[CalcJob]
    inputs: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job went.

    Parameters
    ----------
    node
        The job, if it came to one.
    trouble
        Why it did not end as it should; empty if it did.
    remedy
        What to do about that.
    """

    node: CalcJobNode | None = None
    trouble: str = ""
    remedy: str = ""


def plan_runs(
    stages: Sequence[str],
    codes: Mapping[str, AbstractCode],
    options: Mapping[str, Any],
    computer: Computer,
) -> list[Run]:
    """Return the jobs that check some stages: one for all that run in the same way.

    Parameters
    ----------
    stages
        The stages.
    codes
        The code of each of them.
    options
        As :func:`aiida_eipnn.workflows.builder.options_of` takes them.
    computer
        Where codes run that are tied to no computer.

    Raises
    ------
    ValueError
        If the options of a stage cannot be read.
    """
    found: dict[str, Run] = {}
    for stage in stages:
        own = options_of(stage, options)
        if not isinstance(own.get("resources", {}), Mapping):
            raise ValueError(f"resources of {stage} are given by name, not as {own['resources']!r}")  # noqa: TRY004
        key = json.dumps([codes[stage].uuid, own], sort_keys=True, default=str)
        earlier = found[key].stages if key in found else ()
        make = pw_inputs if stage == DFT else check_inputs
        found[key] = Run(
            stages=(*earlier, stage),
            process=PwCalculation if stage == DFT else CheckCalculation,
            inputs=make(codes[stage], own, computer),
        )
    return list(found.values())


def check_inputs(
    code: AbstractCode, options: Mapping[str, Any], computer: Computer
) -> dict[str, Any]:
    """Return the inputs of a job that looks around, as the loop makes those of its jobs."""
    return _placed(job_inputs(code, options), computer)


def pw_inputs(code: AbstractCode, options: Mapping[str, Any], computer: Computer) -> dict[str, Any]:
    """Return the inputs of a run of pw.x that takes a second."""
    merged = {"max_wallclock_seconds": PW_SECONDS, **ONE_CORE, **with_mpi(options)}
    molecule = hydrogen_inputs(n_processes(merged, computer))
    return _placed({"code": code, **molecule, "metadata": {"options": merged}}, computer)


def _placed(inputs: dict[str, Any], computer: Computer) -> dict[str, Any]:
    inputs["metadata"]["label"] = "aiida-eipnn setup --computer"
    if inputs["code"].computer is None:
        inputs["metadata"]["computer"] = computer
    return inputs


def n_processes(options: Mapping[str, Any], computer: Computer) -> int:
    """Return how many MPI processes these options ask for."""
    if not options.get("withmpi"):
        return 1
    resources = options["resources"]
    if total := resources.get("tot_num_mpiprocs"):
        return int(total)
    default = computer.get_default_mpiprocs_per_machine() or 1
    each = resources.get("num_mpiprocs_per_machine") or default
    return int(resources.get("num_machines") or 1) * int(each)


def run_together(
    runs: Sequence[Run], *, seconds: float, tell: Callable[[str], None]
) -> list[Outcome]:
    """Run all jobs at once, here and without the daemon; return how each went.

    Parameters
    ----------
    runs
        The jobs.
    seconds
        Those that have not ended by then are ended.
    tell
        Called with a line for the user.
    """
    runner = get_manager().create_runner(communicator=None, poll_interval=POLL_SECONDS)
    with disable_caching(), few_attempts(), quiet_terminal():
        started = [_start(runner, run) for run in runs]
        processes = [item for item in started if isinstance(item, CalcJob)]
        for run, process in zip(runs, started, strict=True):
            if isinstance(process, CalcJob):
                tell(f"job {process.node.pk} for {', '.join(run.stages)}")
        collect([process.node for process in processes])
        tasks = [runner.loop.create_task(item.step_until_terminated()) for item in processes]
        try:
            runner.run_until_complete(_watch(processes, tasks, seconds))
        finally:
            states = {item.pid: _unfinished(item, seconds) for item in processes}
            runner.run_until_complete(_end(processes, tasks))
    return [
        item if isinstance(item, Outcome) else states[item.pid] or _finished(item.node)
        for item in started
    ]


def _start(runner: Runner, run: Run) -> CalcJob | Outcome:
    try:
        return runner.instantiate_process(run.process, **run.inputs)
    except (ValueError, TypeError, AiidaException) as error:
        return Outcome(
            trouble=f"AiiDA refuses the options of {', '.join(run.stages)}: {_one_line(error)}",
            remedy="correct the file that --options names",
        )


async def _watch(
    processes: Sequence[CalcJob], tasks: Sequence["asyncio.Task[None]"], seconds: float
) -> None:
    """Wait until all have ended, or stand still after AiiDA gave up on them, or time is up."""
    deadline = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < deadline:
        if all(
            task.done() or process.paused for process, task in zip(processes, tasks, strict=True)
        ):
            return
        await asyncio.sleep(POLL_SECONDS)


async def _end(processes: Sequence[CalcJob], tasks: Sequence["asyncio.Task[None]"]) -> None:
    """Leave nothing behind in the queue, nor a process that nobody runs."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for process in processes:
        if process.has_terminated():
            continue
        # What plumpy raises where a process has just got what it waited for: it steps on, and ends.
        with suppress(asyncio.InvalidStateError):
            done = process.kill("the check of the computer is over")
            if isinstance(done, asyncio.Future):
                await asyncio.wait([done], timeout=END_SECONDS)
    running = [
        task
        for process, task in zip(processes, tasks, strict=True)
        # One that AiiDA paused waits in vain, though it was killed.
        if not process.has_terminated() and not process.paused
    ]
    if running:
        await asyncio.wait(running, timeout=END_SECONDS)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in others:
        if task.done() and not task.cancelled():
            # What was interrupted says so, and asyncio would print it.
            task.exception()


def _unfinished(process: CalcJob, seconds: float) -> Outcome | None:
    """Say why a job has not ended; ``None`` if it has."""
    node = process.node
    if process.has_terminated():
        return None
    if process.paused:
        return Outcome(
            node=node,
            trouble=f"job {node.pk} could not be run: {last_error(node)}",
            remedy=f"`verdi process report {node.pk}` has all of it; often the queue, account or "
            "resources in --options are to be corrected",
        )
    job = node.get_last_job_info()
    state = node.get_scheduler_state()
    told = job is not None and job.annotation not in (None, "", "None")
    reason = f" ({job.annotation})" if told else ""
    return Outcome(
        node=node,
        trouble=f"job {node.pk} had not ended after {seconds / 60:g} minutes: "
        f"{state.value if state else 'not submitted'}{reason}",
        remedy="wait longer (--wait MINUTES), or ask for a shorter time or another queue",
    )


def _finished(node: CalcJobNode) -> Outcome:
    if node.is_finished_ok:
        return Outcome(node=node)
    why = node.exit_message or _one_line(node.exception or "it was ended")
    words = last_words(node)
    return Outcome(
        node=node,
        trouble=f"job {node.pk} failed: {why}" + (f" -- {words}" if words else ""),
        remedy=f"`verdi calcjob outputls {node.pk}` lists what it wrote, `outputcat` shows it",
    )


def last_error(node: CalcJobNode) -> str:
    """Return the last error that AiiDA noted of a job, in one line."""
    errors = [log.message for log in Log.collection.get_logs_for(node) if log.levelname == "ERROR"]
    return _last_line(errors[-1]) if errors else "AiiDA does not say why"


def last_words(node: CalcJobNode) -> str:
    """Return the line of a job's output that says best why it failed."""
    for name in (STDERR, LOG, node.get_option("output_filename")):
        lines = [line.strip() for line in file_of(node, name).splitlines() if line.strip()]
        if troubled := [line for line in lines if TROUBLE.search(line)]:
            return troubled[-1]
    return ""


def file_of(node: CalcJobNode, name: str | None) -> str:
    """Return what a job wrote into a file that came home; empty if there is none."""
    if not name or "retrieved" not in node.outputs:
        return ""
    try:
        return str(node.outputs.retrieved.base.repository.get_object_content(name))
    except OSError:
        return ""


def pw_processes(output: str) -> tuple[str, list[int]]:
    """Return the version of pw.x, and on how many processes each pw.x of an output ran."""
    banner = BANNER.search(output)
    numbers = [int(found["number"]) for found in PROCESSES.finditer(output)]
    # A pw.x without MPI says nothing of processes.
    starts = len(BANNER.findall(output))
    return (banner["version"] if banner else ""), numbers or [1] * starts


def collect(nodes: Sequence[CalcJobNode]) -> None:
    """Put the jobs into the group of all checks."""
    if nodes:
        group, _ = Group.collection.get_or_create(label=GROUP)
        group.add_nodes(list(nodes))


@contextmanager
def few_attempts() -> Iterator[None]:
    """Let AiiDA give up soon on what does not work."""
    profile = get_profile()
    before = dict(profile.options)
    for name, value in ATTEMPTS.items():
        profile.set_option(name, value)
    try:
        yield
    finally:
        for name in ATTEMPTS:
            profile.unset_option(name)
            if name in before:
                profile.set_option(name, before[name])


@contextmanager
def quiet_terminal() -> Iterator[None]:
    """Keep AiiDA's tracebacks off the terminal; ``verdi process report`` has them."""
    # Loading the storage sets up logging anew, and would undo what is done here.
    get_manager().get_profile_storage()
    consoles = [item for item in AIIDA_LOGGER.handlers if not isinstance(item, DBLogHandler)]

    def refuse(_: Any) -> bool:
        return False

    for console in consoles:
        console.addFilter(refuse)
    try:
        yield
    finally:
        for console in consoles:
            console.removeFilter(refuse)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
