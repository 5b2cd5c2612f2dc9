"""The profile, the computer and the codes that the launch scripts expect.

Each ``ensure_`` function makes what is missing, leaves alone what is there, and says whether there
was anything to do.
"""

import shutil
import sys
from pathlib import Path

from aiida.manage.configuration import create_profile, get_config, get_profile, load_profile
from aiida.orm import Computer, InstalledCode, QueryBuilder
from aiida.plugins import BrokerFactory

# Marks the profiles that `aiida-eipnn setup` made, and so may change.
USER_EMAIL = "eipnn@localhost"

STORAGE = "core.sqlite_dos"
# Named rather than looked for: the profile must not depend on a RabbitMQ that happens to run.
BROKER = "core.zeromq"
OPTIONS = {"caching.default_enabled": True, "runner.poll.interval": 1}

COMPUTER = "localhost"
POLL_SECONDS = 1.0

PW_PLUGIN = "quantumespresso.pw"
# Two jobs, or two workers of one, at once on two cores beat one that uses both.
ONE_THREAD = "export OMP_NUM_THREADS=1\n"
# OpenMPI, with which Debian builds pw.x, refuses root and listens on every network interface unless
# it is told otherwise.
PW_PREPEND = """\
export OMPI_ALLOW_RUN_AS_ROOT=1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
"""
PW_PREPEND_LINUX = """\
export OMPI_MCA_btl=self,vader
export OMPI_MCA_oob_tcp_if_include=lo
export PMIX_MCA_ptl_tcp_if_include=lo
"""

# A daemon that dies just after it started a job has not noted down its number, and starts it once
# more in the same folder. The second waits for the first, and has nothing to do if that one ended.
JOB_ONCE = """\
if command -v flock > /dev/null; then exec 9> .running; flock 9; fi
if [ -e .ended ]; then exit 0; fi
"""
JOB_ENDED = "touch .ended\n"


def ensure_profile(name: str) -> bool:
    """Load the profile ``name``, made first if there is none: SQLite, ZeroMQ, caching on.

    Raises
    ------
    ValueError
        If there is a profile of this name that `aiida-eipnn setup` did not make.
    """
    config = get_config(create=True)
    made = name not in config.profile_names
    if made:
        create_profile(
            config,
            name=name,
            email=USER_EMAIL,
            storage_backend=STORAGE,
            storage_config={},
            broker_backend=BROKER,
            broker_config=BrokerFactory(BROKER).get_default_config(),
        )
        for option, value in OPTIONS.items():
            config.set_option(option, value, scope=name)
        # Another profile that is the default already stays it.
        config.set_default_profile(name, overwrite=False)
        config.store()
    elif config.get_profile(name).default_user_email != USER_EMAIL:
        raise ValueError(
            f"the profile {name!r} in {config.dirpath} was not made by `aiida-eipnn setup`, so it "
            "is left alone; choose another name with --profile-name"
        )
    load_profile(name)
    return made


def ensure_computer(label: str = COMPUTER) -> bool:
    """Make the computer that runs jobs right here, without waiting for anything."""
    if Computer.collection.count(filters={"label": label}):
        return ensure_jobs_run_once(Computer.collection.get(label=label))
    scratch = Path(get_config().dirpath) / "scratch" / get_profile().name
    computer = Computer(
        label=label,
        hostname="localhost",
        description="This machine, set up by aiida-eipnn setup",
        transport_type="core.local",
        scheduler_type="core.direct",
        workdir=str(scratch),
    ).store()
    # A login shell costs 0.15 s for each command, against 5 ms.
    computer.configure(safe_interval=0, use_login_shell=False)
    computer.set_minimum_job_poll_interval(POLL_SECONDS)
    computer.set_default_mpiprocs_per_machine(1)
    ensure_jobs_run_once(computer)
    return True


def ensure_jobs_run_once(computer: Computer) -> bool:
    """Let no job run twice in one folder; a computer with texts of its user's is left alone."""
    if computer.get_prepend_text() or computer.get_append_text():
        return False
    computer.set_prepend_text(JOB_ONCE)
    computer.set_append_text(JOB_ENDED)
    return True


def ensure_code(
    label: str, executable: Path, *, plugin: str | None = None, prepend: str = ""
) -> bool:
    """Register ``executable`` as the code ``label`` on the computer of :func:`ensure_computer`.

    A code of this name that runs something else is renamed and hidden, not changed: finished
    calculations refer to it.
    """
    there = find_code(label)
    if there is not None:
        if there.filepath_executable == executable and there.prepend_text == prepend:
            return False
        there.label = f"{label}-{there.pk}"
        there.is_hidden = True
    InstalledCode(
        computer=Computer.collection.get(label=COMPUTER),
        filepath_executable=str(executable),
        label=label,
        default_calc_job_plugin=plugin,
        prepend_text=prepend,
        with_mpi=False,
    ).store()
    return True


def find_code(label: str) -> InstalledCode | None:
    """Return the code ``label`` on this machine's computer, or None."""
    query = QueryBuilder()
    query.append(Computer, filters={"label": COMPUTER}, tag="computer")
    query.append(InstalledCode, with_computer="computer", filters={"label": label})
    return query.first(flat=True)


def pw_prepend() -> str:
    """Return what the job script of pw.x says before it runs pw.x."""
    # The shared-memory transport and the loopback interface have other names elsewhere.
    return ONE_THREAD + PW_PREPEND + (PW_PREPEND_LINUX if sys.platform == "linux" else "")


def find_pw(path: str | None) -> Path:
    """Return the absolute path of pw.x: ``path``, or what is on ``PATH``."""
    return _find_executable(
        path or "pw.x",
        "install Quantum ESPRESSO (Debian and Ubuntu: the package quantum-espresso) or name it "
        "with --pw",
    )


def find_job(path: str | None) -> Path:
    """Return the absolute path of eipnn-job: ``path``, or the one beside this Python."""
    return _find_executable(
        path or str(Path(sys.executable).with_name("eipnn-job")),
        "install aiida-eipnn into this Python environment or name it with --job",
    )


def _find_executable(name: str, remedy: str) -> Path:
    found = shutil.which(name)
    if found is None:
        raise ValueError(f"there is no executable {name}; {remedy}")
    return Path(found).absolute()
