"""``aiida-eipnn setup --computer``: the codes of a computer, and whether loops can run there."""

import json
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from aiida.common.exceptions import AiidaException, NotExistent
from aiida.manage.configuration import get_profile
from aiida.orm import AbstractCode, Computer, InstalledCode, QueryBuilder, User
from aiida.transports import Transport

from aiida_eipnn import __version__
from aiida_eipnn.cli import launch
from aiida_eipnn.cli.check_runs import (
    Outcome,
    file_of,
    n_processes,
    plan_runs,
    pw_processes,
    quiet_terminal,
    run_together,
)
from aiida_eipnn.cli.environment import ONE_THREAD, PW_PLUGIN
from aiida_eipnn.cli.stage_needs import (
    Finding,
    State,
    findings_of_job,
    other_version,
    pip_install,
    wants_gpu,
)
from aiida_eipnn.jobs.spec import STATUS
from aiida_eipnn.workflows.builder import DFT, ONE_CORE, STAGES, options_of, with_mpi
from aiida_eipnn.workflows.label_dft import slots_needed

PW, JOB = "pw", "eipnn-job"
HOW_TO_INSTALL = {
    PW: "install Quantum ESPRESSO there (Debian: quantum-espresso; at most centres it is a module)",
    JOB: "install aiida-eipnn there, without AiiDA: docs/howto/compute-node.md",
}
NO_MODULE = re.compile(r"No module named '(\w+)")

# What findings that are of no stage are listed under.
COMPUTER, DAEMON = "computer", "daemon"

Row = tuple[str, Finding]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What to check.

    Parameters
    ----------
    stages
        Stages that are to run on the computer.
    options
        ``metadata.options`` of all jobs, and below the name of a stage those of its jobs.
    eips
        EIPs that are to label; any where it is empty.
    gpu
        Whether trainings and predictions are to run on a GPU, whatever the options say.
    n_lanes
        DFT runs at a time, for the slots of the daemon.
    seconds
        How long jobs may take, the time in the queue included.
    """

    stages: Sequence[str] = STAGES
    options: Mapping[str, Any] = field(default_factory=dict)
    eips: Sequence[str] = ()
    gpu: bool = False
    n_lanes: int = 1
    seconds: float = 1800.0


def find_computer(label: str) -> Computer:
    """Return the computer of this label.

    Raises
    ------
    ValueError
        If there is none in the profile, or if its user has not said how to reach it.
    """
    try:
        computer = Computer.collection.get(label=label)
    except NotExistent as error:
        there = sorted(QueryBuilder().append(Computer, project="label").all(flat=True))
        raise ValueError(
            f"there is no computer {label!r} in the profile {get_profile().name!r}, only {there}: "
            "make it with `verdi computer setup`, and `verdi computer configure`"
        ) from error
    user = User.collection.get_default()
    if not computer.is_user_configured(user):
        raise ValueError(
            f"it is not known how to reach the computer {label!r}: "
            f"`verdi computer configure {computer.transport_type} {label}`"
        )
    if not computer.is_user_enabled(user):
        raise ValueError(
            f"the computer {label!r} is disabled: `verdi computer enable {label} {user.email}`"
        )
    return computer


def ensure_code(
    kind: str, label: str, computer: Computer, path: str | None, prepend: str | None
) -> tuple[AbstractCode | None, bool]:
    """Return the code ``label``, registered first if it is not there and ``path`` says where.

    Parameters
    ----------
    kind
        ``pw`` or ``eipnn-job``.
    label
        Label of the code, without the computer.
    computer
        Where it is.
    path
        The executable there. ``None`` registers nothing.
    prepend
        What a job script says before it runs it, such as ``module load``.

    Raises
    ------
    ValueError
        If the code is there and is not what ``path`` and ``prepend`` say: finished calculations
        refer to it, so it is not changed.
    """
    text = None if prepend is None else (ONE_THREAD if kind == PW else "") + prepend + "\n"
    there = find_code(label, computer)
    if there is not None:
        _refuse_other(there, path, text)
        return there, False
    if path is None:
        return None, False
    if not PurePosixPath(path).is_absolute():
        raise ValueError(f"name {kind} by its absolute path on {computer.label}, not as {path!r}")
    code = InstalledCode(
        computer=computer,
        filepath_executable=path,
        label=label,
        default_calc_job_plugin=PW_PLUGIN if kind == PW else None,
        prepend_text=text or (ONE_THREAD if kind == PW else ""),
        # Of pw.x the options of a job decide.
        with_mpi=None if kind == PW else False,
    )
    return code.store(), True


def find_code(label: str, computer: Computer) -> AbstractCode | None:
    """Return the code ``label`` on this computer, or one that is tied to none, or ``None``."""
    named = QueryBuilder().append(AbstractCode, filters={"label": label}).all(flat=True)
    here = [code for code in named if code.computer is not None and code.computer.pk == computer.pk]
    anywhere = [code for code in named if code.computer is None]
    return next(iter([*here, *anywhere]), None)


def _refuse_other(code: AbstractCode, path: str | None, prepend: str | None) -> None:
    runs = str(getattr(code, "filepath_executable", path))
    if path not in (None, runs) or prepend not in (None, code.prepend_text):
        raise ValueError(
            f"the code {code.full_label} is there already and runs {runs} after "
            f"{code.prepend_text!r}: finished calculations refer to it, so it stays; rename it "
            f"(`verdi code relabel {code.full_label} {code.label}-old`), or leave out the path and "
            "the prepend text to check it as it is"
        )


def check_computer(
    computer: Computer,
    codes: Mapping[str, AbstractCode | None],
    check: Check,
    tell: Callable[[str], None],
) -> Iterator[Row]:
    """Check a computer that can be reached; yield what was found, by stage.

    Parameters
    ----------
    computer
        The computer.
    codes
        The codes ``pw`` and ``eipnn-job``, ``None`` where there is none.
    check
        What to check.
    tell
        Called with a line for the user while jobs run.
    """
    unusable = {kind: _unusable(kind, code, computer) for kind, code in codes.items()}
    ready = [stage for stage in check.stages if unusable[kind_of(stage)] is None]
    of_stage = {stage: codes[kind_of(stage)] for stage in ready}
    runs = plan_runs(ready, of_stage, check.options, computer)
    outcomes = run_together(runs, seconds=check.seconds, tell=tell) if runs else []
    went = {
        stage: outcome for run, outcome in zip(runs, outcomes, strict=True) for stage in run.stages
    }
    for stage in check.stages:
        if (problem := unusable[kind_of(stage)]) is not None:
            yield stage, problem
        elif stage == DFT:
            yield stage, finding_of_pw(went[stage], check, computer)
        else:
            for finding in findings_of_stage(stage, went[stage], codes[JOB], check):
                yield stage, finding


def kind_of(stage: str) -> str:
    """Return which of the codes runs a stage."""
    return PW if stage == DFT else JOB


def check_connection(computer: Computer) -> list[Finding]:
    """Open a connection; look at the shell, the scheduler and the work directory.

    Raises
    ------
    ValueError
        If the computer cannot be reached.
    """
    with quiet_terminal():
        try:
            with computer.get_transport() as transport:
                user = transport.whoami()
                looks = (_look_at_shell, _look_at_scheduler, _look_at_work_directory)
                found = [_tried(look, computer, transport) for look in looks]
        except Exception as error:
            # Each transport has errors of its own.
            raise ValueError(
                f"cannot reach the computer {computer.label!r} ({computer.hostname}) by "
                f"{computer.transport_type}: {_named(error)}; mend it until `verdi computer test "
                f"{computer.label}` succeeds"
            ) from error
    reached = f"{computer.hostname} answers by {computer.transport_type}, as {user}"
    return [Finding(state=State.OK, text=reached), *found]


def _tried(
    look: Callable[[Computer, Transport], Finding], computer: Computer, transport: Transport
) -> Finding:
    try:
        return look(computer, transport)
    except Exception as error:
        # As above: one thing that does not work is a line, and the next is looked at.
        what = look.__name__.removeprefix("_look_at_").replace("_", " ")
        return Finding(
            state=State.MISSING,
            text=f"{what}: {_named(error)}",
            remedy=f"`verdi computer show {computer.label}`, `verdi computer test "
            f"{computer.label} --print-traceback`",
        )


def _look_at_shell(computer: Computer, transport: Transport) -> Finding:
    try:
        _, output, errors = transport.exec_command_wait("echo -n")
    except NotImplementedError:
        return Finding(state=State.OK, text="shell: this transport runs no commands")
    if spoken := (output + errors).strip():
        return Finding(
            state=State.MISSING,
            text=f"shell: it prints {spoken.splitlines()[0]!r} unasked, which AiiDA takes for "
            "answers",
            remedy="let ~/.bashrc and ~/.profile there print only in interactive shells",
        )
    return Finding(state=State.OK, text="shell: silent, as it should be")


def _look_at_scheduler(computer: Computer, transport: Transport) -> Finding:
    scheduler = computer.get_scheduler()
    scheduler.set_transport(transport)
    n_jobs = len(scheduler.get_jobs(as_dict=True))
    return Finding(
        state=State.OK, text=f"scheduler: {computer.scheduler_type} answers, {n_jobs} jobs in it"
    )


def _look_at_work_directory(computer: Computer, transport: Transport) -> Finding:
    authinfo = computer.get_authinfo(User.collection.get_default())
    folder = authinfo.get_workdir().format(username=transport.whoami())
    transport.makedirs(folder, ignore_existing=True)
    there = str(PurePosixPath(folder) / f"eipnn-{uuid.uuid4()}")
    with tempfile.NamedTemporaryFile() as here:
        Path(here.name).write_text("written")
        transport.putfile(here.name, there)
        transport.getfile(there, here.name)
        transport.remove(there)
    return Finding(state=State.OK, text=f"work directory: {folder} can be written")


def _unusable(kind: str, code: AbstractCode | None, computer: Computer) -> Finding | None:
    """Say why a code cannot even be tried."""
    option = "--pw" if kind == PW else "--job"
    if code is None:
        return Finding(
            state=State.MISSING,
            text=f"there is no code for {kind} on {computer.label}",
            remedy=f"{HOW_TO_INSTALL[kind]}, then add `{option} /its/path/there` to this command",
        )
    if not isinstance(code, InstalledCode):
        return None
    try:
        code.validate_filepath_executable()
    except AiidaException as error:
        return Finding(
            state=State.MISSING,
            text=f"{code.full_label}: {' '.join(str(error).split())}",
            remedy=f"{HOW_TO_INSTALL[kind]}; if it is elsewhere, `verdi code relabel "
            f"{code.full_label} {code.label}-old` and name it with {option}",
        )
    return None


def findings_of_stage(
    stage: str, outcome: Outcome, code: AbstractCode, check: Check
) -> list[Finding]:
    """Judge how the job of a stage went, and what it found."""
    if outcome.node is None or outcome.trouble:
        return [_trouble_of_job(outcome, code)]
    gpu = check.gpu or wants_gpu(options_of(stage, check.options))
    facts = outcome.node.outputs.metrics.get_dict()
    return findings_of_job(stage, facts, eips=check.eips, gpu=gpu)


def _trouble_of_job(outcome: Outcome, code: AbstractCode) -> Finding:
    # In an environment of its own, which is how it is to be installed, Python lies beside it.
    beside = PurePosixPath(getattr(code, "filepath_executable", JOB)).with_name("python")
    there = _version_that_ran(outcome)
    if there not in (None, __version__):
        return other_version(there, str(beside))
    if lacking := NO_MODULE.search(outcome.trouble):
        return Finding(
            state=State.MISSING,
            text=outcome.trouble,
            remedy=pip_install(str(beside), lacking[1]),
        )
    return Finding(state=State.MISSING, text=outcome.trouble, remedy=outcome.remedy)


def _version_that_ran(outcome: Outcome) -> str | None:
    """Return the version of aiida-eipnn that a job told, even if it did not know what to do."""
    if outcome.node is None:
        return None
    try:
        versions = json.loads(file_of(outcome.node, STATUS))["versions"]
    except (ValueError, KeyError):
        return None
    return versions.get("aiida-eipnn")


def finding_of_pw(outcome: Outcome, check: Check, computer: Computer) -> Finding:
    """Judge how pw.x went."""
    output = (
        file_of(outcome.node, outcome.node.get_option("output_filename")) if outcome.node else ""
    )
    version, ran_on = pw_processes(output)
    asked = n_processes({**ONE_CORE, **with_mpi(options_of(DFT, check.options))}, computer)
    if version and (len(ran_on) > 1 or ran_on[0] != asked):
        return Finding(
            state=State.MISSING,
            text=f"pw.x {version} ran {len(ran_on)} times, on {ran_on[0]} processes each, and not "
            f"once on {asked}",
            remedy=f"the MPI of `{computer.get_mpirun_command()}` is not that of pw.x: load the "
            "module that it was built with in its prepend text, or set the computer's mpirun "
            "command (`verdi computer duplicate`)",
        )
    if outcome.trouble:
        remedy = outcome.remedy if version else f"{outcome.remedy}; does it need `module load`?"
        return Finding(state=State.MISSING, text=outcome.trouble, remedy=remedy)
    on = f"{asked} process{'es' if asked > 1 else ''}"
    return Finding(state=State.OK, text=f"pw.x {version} labelled a hydrogen molecule on {on}")


def check_daemon(n_lanes: int) -> Finding:
    """Say whether a loop with so many DFT runs at a time can be submitted."""
    if get_profile().process_control_backend is None:
        return Finding(
            state=State.WARNING,
            text="the profile has no broker: loops run in the terminal, and --submit is refused",
            remedy="`verdi profile configure-broker core.zeromq`, or core.rabbitmq",
        )
    slots = slots_needed(n_lanes)
    try:
        problem = launch.too_few_slots(slots)
    except Exception as error:
        # The daemon may be of another version, or answer nothing.
        problem = f"the daemon does not answer: {_named(error)}"
    if problem:
        return Finding(state=State.WARNING, text=f"{n_lanes} DFT runs at a time: {problem}")
    room = f"there is room for a loop with {n_lanes} DFT runs at a time ({slots} slots)"
    return Finding(state=State.OK, text=room)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
