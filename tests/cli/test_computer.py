"""`aiida-eipnn setup --computer`: real jobs on a computer that lacks one thing or another."""

import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import aiida_eipnn
from aiida_eipnn import __version__
from aiida_eipnn.cli import main
from aiida_eipnn.cli.stage_needs import State, findings_of_job

PACKAGE = Path(aiida_eipnn.__file__).parent
JOB = Path(sys.executable).with_name("eipnn-job")
EIP = "SW_StillingerWeber_1985_Si__MO_405512056662_005"
# Most tests look at something else: without these packages a job takes a second.
HEAVY = ("torch", "kimpy", "numba")
# Take away what mpirun tells the processes that it starts: each is then alone, as with another MPI.
ALONE = """\
for name in $(compgen -e | grep -E '^(PMIX_|PMI_|OMPI_COMM|OMPI_MCA_(ess|orte|pmix)|ORTE)'); do
  unset $name
done
"""


@pytest.fixture
def computer(aiida_profile_clean, aiida_localhost):
    """A computer that can be reached."""
    aiida_localhost.set_minimum_job_poll_interval(0.0)
    aiida_localhost.configure(safe_interval=0.0, use_login_shell=False)
    return aiida_localhost


@pytest.fixture
def setup(computer):
    """Check the computer as a user does."""

    def run(*arguments, label=computer.label):
        return CliRunner().invoke(main, ["setup", "--computer", label, *map(str, arguments)])

    return run


@pytest.fixture
def executable(tmp_path):
    """Write a shell script that takes the place of an executable."""

    def write(name, text):
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        return path

    return write


@pytest.fixture
def job_without(executable, tmp_path):
    """Make an eipnn-job that finds some packages missing."""

    def write(*packages, before=""):
        hidden = tmp_path / "hidden"
        hidden.mkdir()
        for name in packages:
            missing = f'ModuleNotFoundError("No module named {name!r}", name={name!r})'
            (hidden / f"{name}.py").write_text(f"raise {missing}\n")
        path = f"{hidden}:{before}:{os.environ.get('PYTHONPATH', '')}"
        return executable("eipnn-job", f'PYTHONPATH="{path}" exec {JOB} "$@"')

    return write


@pytest.fixture
def options(tmp_path):
    """Write a file for ``--options``."""

    def write(**values):
        path = tmp_path / "options.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def pw():
    """The real pw.x."""
    path = shutil.which("pw.x")
    if path is None:
        pytest.skip("pw.x is missing: apt-get install quantum-espresso")
    return path


def rows_of(result, part):
    """Return state, text and remedy of what was found of a part."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    lines = result.output.splitlines()
    return [
        (line[10:18].strip(), line[19:], after.strip().removeprefix("-> "))
        for line, after in zip(lines, [*lines[1:], ""], strict=True)
        if line[:10].strip() == part
    ]


def only(result, part):
    (row,) = rows_of(result, part)
    return row


@pytest.mark.qe
def test_a_computer_that_has_everything_can_run_each_stage(setup, pw, kim, torch):
    from aiida.orm import load_code

    done = setup("--pw", pw, "--job", JOB, "--eip", EIP)

    assert done.exit_code == 0, done.output
    last = done.output.splitlines()[-1]
    assert last == "localhost can run explore, label, dft, train, evaluate"
    state, text, _ = only(done, "dft")
    assert state == "ok"
    assert re.fullmatch(r"pw.x \d\.\S+ labelled a hydrogen molecule on 1 process", text)
    assert "all that were named" in rows_of(done, "label")[-1][1]
    assert load_code("pw@localhost").with_mpi is None
    assert load_code("eipnn-job@localhost").filepath_executable == JOB


def test_what_is_missing_comes_with_what_to_type(setup, job_without):
    done = setup("--job", job_without("torch", "kimpy"))

    assert done.exit_code == 1
    python = sys.executable
    assert rows_of(done, "train")[-1][:2] == ("missing", "torch is not installed")
    assert rows_of(done, "train")[-1][2].startswith(f"{python} -m pip install torch")
    assert rows_of(done, "label")[-1][:2] == ("missing", "kimpy is not installed")
    assert f"{python} -m pip install kimpy" in rows_of(done, "label")[-1][2]
    assert rows_of(done, "explore")[-1][0] == "warning"
    state, text, remedy = only(done, "dft")
    assert (state, text) == ("missing", "there is no code for pw on localhost")
    assert "--pw /its/path/there" in remedy
    assert "can run explore; localhost cannot run label, dft, train, evaluate" in done.output


def test_an_eipnn_job_that_does_not_start_names_the_package_it_lacks(setup, job_without):
    job = job_without("numpy")

    state, text, remedy = only(setup("--job", job, "--stage", "train"), "train")

    assert state == "missing"
    assert "No module named 'numpy'" in text
    assert remedy == f"{job.with_name('python')} -m pip install numpy"


@pytest.mark.parametrize("knows_checks", [True, False])
def test_another_version_there_is_told_even_if_it_knows_no_checks(
    setup, job_without, tmp_path, knows_checks
):
    other = tmp_path / "other"
    shutil.copytree(PACKAGE, other / "aiida_eipnn")
    root = other / "aiida_eipnn" / "__init__.py"
    root.write_text(root.read_text().replace(__version__, "0.0.9"))
    about = other / "aiida_eipnn-0.0.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: aiida-eipnn\nVersion: 0.0.9\n")
    if not knows_checks:
        spec = other / "aiida_eipnn" / "jobs" / "spec.py"
        spec.write_text(spec.read_text().replace("EvaluateJob, CheckJob)", "EvaluateJob)"))

    done = setup("--job", job_without(*HEAVY, before=other), "--stage", "explore")

    state, text, remedy = only(done, "explore")
    assert state == "missing"
    assert text == f"aiida-eipnn 0.0.9 there, {__version__} here: they must be the same"
    assert remedy.endswith(f"-m pip install --no-deps aiida-eipnn=={__version__}")


def test_a_path_that_is_not_there_needs_no_job(setup, tmp_path):
    from aiida.orm import CalcJobNode, QueryBuilder

    done = setup("--pw", tmp_path / "pw.x", "--stage", "dft")

    state, text, remedy = only(done, "dft")
    assert state == "missing"
    assert "does not exist on the computer" in text
    assert "install Quantum ESPRESSO there" in remedy
    assert QueryBuilder().append(CalcJobNode).count() == 0


def test_a_pw_that_dies_tells_its_last_words(setup, executable):
    lacks = "pw.x: error while loading shared libraries: libmkl_rt.so: cannot open"
    pw = executable("pw.x", f'echo "{lacks}" >&2; exit 127')

    state, text, _ = only(setup("--pw", pw, "--stage", "dft"), "dft")

    assert state == "missing"
    assert lacks in text


@pytest.mark.qe
def test_a_pw_that_knows_nothing_of_this_mpi_is_found_out(setup, pw, executable, options):
    from aiida_eipnn.cli import environment

    alone = executable("pw.x", f'{ALONE}exec {pw} "$@"')
    two = {"num_machines": 1, "num_mpiprocs_per_machine": 2}
    given = options(dft={"resources": two, "prepend_text": environment.pw_prepend()})

    state, text, remedy = only(setup("--pw", alone, "--stage", "dft", "--options", given), "dft")

    assert state == "missing"
    assert "ran 2 times, on 1 processes each, and not once on 2" in text
    assert "mpirun" in remedy


@pytest.mark.qe
def test_pw_runs_on_as_many_processes_as_the_options_say(setup, pw, options):
    from aiida_eipnn.cli import environment

    two = {"num_machines": 1, "num_mpiprocs_per_machine": 2}
    given = options(dft={"resources": two, "prepend_text": environment.pw_prepend()})

    state, text, _ = only(setup("--pw", pw, "--stage", "dft", "--options", given), "dft")

    assert (state, text[-14:]) == ("ok", "on 2 processes")


def test_stages_with_equal_options_share_a_job(setup, job_without, options):
    from aiida.orm import Group, load_group

    given = options(train={"max_wallclock_seconds": 300})

    stages = ("--stage", "explore", "--stage", "label", "--stage", "train")
    setup("--job", job_without(*HEAVY), "--options", given, *stages)

    assert isinstance(load_group("eipnn-checks"), Group)
    walltimes = [
        node.get_option("max_wallclock_seconds") for node in load_group("eipnn-checks").nodes
    ]
    assert sorted(walltimes) == [300, 600]


def test_options_that_aiida_refuses_are_a_row(setup, options):
    given = options(quue_name="cpu")

    state, text, remedy = only(setup("--job", JOB, "--stage", "label", "--options", given), "label")

    assert state == "missing"
    assert "'quue_name'" in text
    assert "--options" in remedy


def test_a_job_that_waits_too_long_is_ended(setup, executable, tmp_path):
    job = executable("eipnn-job", f"echo $$ > {tmp_path}/pid; exec sleep 120")

    state, text, remedy = only(setup("--job", job, "--stage", "label", "--wait", "0.1"), "label")

    assert state == "missing"
    assert "had not ended after 0.1 minutes" in text
    assert "--wait" in remedy
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.1)


def test_a_scheduler_that_refuses_a_job_is_quoted_at_once(
    setup, aiida_computer, executable, tmp_path
):
    # What core.slurm calls, in a queue where nothing may be submitted.
    executable("squeue", "exit 0")
    executable("sbatch", 'echo "sbatch: error: invalid partition specified: fast" >&2; exit 1')
    slurm = aiida_computer(label="slurm", scheduler_type="core.slurm")
    slurm.configure(safe_interval=0.0, use_login_shell=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        done = setup("--job", JOB, "--stage", "train", label="slurm")

    state, text, remedy = only(done, "train")
    assert state == "missing"
    assert "invalid partition specified: fast" in text
    assert "verdi process report" in remedy


def test_a_work_directory_that_cannot_be_made_stops_the_check(setup, computer, tmp_path):
    (tmp_path / "file").touch()
    computer.set_workdir(str(tmp_path / "file" / "work"))

    done = setup("--job", JOB)

    assert done.exit_code == 1
    assert [row[0] for row in rows_of(done, "computer")] == ["ok", "ok", "ok", "missing"]
    assert not rows_of(done, "explore")
    computer.set_workdir(str(tmp_path))


def test_a_shell_that_talks_unasked_is_told(setup, computer, tmp_path, monkeypatch):
    (tmp_path / ".bash_profile").write_text("echo welcome\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    computer.configure(safe_interval=0.0, use_login_shell=True)

    done = setup("--job", JOB)

    state, text, remedy = rows_of(done, "computer")[1]
    assert (state, "'welcome'" in text) == ("missing", True)
    assert "interactive" in remedy


def test_a_computer_that_cannot_be_reached_is_one_clear_error(setup, aiida_computer):
    away = aiida_computer(label="away", hostname="away.invalid", transport_type="core.ssh_async")
    away.configure()

    done = setup("--job", JOB, label="away")

    assert done.exit_code == 1
    assert done.output.startswith("Error: cannot reach the computer 'away' (away.invalid)")
    assert "verdi computer test away" in done.output
    assert done.output.count("\n") == 1


def test_an_unknown_computer_is_refused_with_those_that_are_there(setup):
    done = setup(label="nowhere")

    assert done.exit_code == 1
    assert "no computer 'nowhere'" in done.output
    assert "['localhost']" in done.output


def test_a_code_that_is_there_is_not_changed(setup, tmp_path):
    from aiida.orm import load_code

    setup("--pw", tmp_path / "old", "--stage", "dft")
    before = load_code("pw@localhost").uuid

    refused = setup("--pw", tmp_path / "new", "--stage", "dft")

    assert refused.exit_code == 1
    assert "verdi code relabel pw@localhost pw-old" in refused.output
    assert load_code("pw@localhost").uuid == before
    assert "there already  code pw@localhost" in setup("--stage", "dft").output


def test_codes_of_other_computers_with_this_label_are_left_alone(setup, aiida_computer, tmp_path):
    from aiida.orm import InstalledCode, load_code

    for name in ("one", "two"):
        elsewhere = aiida_computer(label=name)
        InstalledCode(computer=elsewhere, filepath_executable="/opt/pw.x", label="pw").store()

    done = setup("--pw", tmp_path / "pw.x", "--stage", "dft")

    assert "made           code pw@localhost" in done.output
    assert load_code("pw@localhost").filepath_executable == tmp_path / "pw.x"


def test_resources_without_names_are_one_clear_error(setup, options):
    given = options(dft={"resources": 4})

    refused = setup("--pw", sys.executable, "--stage", "dft", "--options", given)

    assert refused.exit_code == 1
    assert "Error: resources of dft are given by name, not as 4" in refused.output


def test_the_command_knows_the_stages_of_a_loop():
    from aiida_eipnn.cli import setup as command
    from aiida_eipnn.workflows import builder

    assert command.STAGES == builder.STAGES


def test_modules_are_loaded_before_pw(setup, tmp_path):
    from aiida.orm import load_code

    setup("--pw", tmp_path / "pw.x", "--pw-prepend-text", "module load qe", "--stage", "dft")

    assert load_code("pw@localhost").prepend_text == "export OMP_NUM_THREADS=1\nmodule load qe\n"


def test_a_profile_without_broker_is_told_of_submit(setup):
    state, text, remedy = only(setup("--stage", "dft"), "daemon")

    assert state == "warning"
    assert "--submit is refused" in text
    assert "verdi profile configure-broker" in remedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "--stage", "train"], "--gpu, --stage: only with --computer"),
        (["--computer", "x", "--pseudo-family", "y"], "--pseudo-family: only without --computer"),
    ],
)
def test_options_of_the_other_way_to_call_it_are_refused(arguments, message):
    refused = CliRunner().invoke(main, ["setup", *arguments])

    assert refused.exit_code == 2
    assert message in refused.output


@pytest.fixture
def facts():
    """What a job finds where nothing is missing."""
    from aiida_eipnn.cli.stage_needs import protocol_eips
    from aiida_eipnn.jobs.check import PACKAGES, sources_digest

    packages = {name: {"version": "2.3", "compiled": True} for name in PACKAGES}
    packages["torch"] |= {"cuda": "12.6", "gpus": [], "gpu_trouble": ""}
    models = [name for names in protocol_eips().values() for name in names]
    packages["kimpy"] |= {"models": models, "models_trouble": ""}
    return {
        "aiida_eipnn": {"version": __version__, "sources": sources_digest()},
        "python": {"version": "3.12.1", "executable": "/env/bin/python"},
        "packages": packages,
        "driver": [],
        "n_cores": 8,
        "environment": {"PYTHONDONTWRITEBYTECODE": None, "CUDA_VISIBLE_DEVICES": None},
    }


def worst_of(stage, facts, **settings):
    """Return the finding that matters most."""
    found = findings_of_job(stage, facts, **settings)
    return max(found, key=lambda finding: list(State).index(finding.state))


@pytest.mark.parametrize("stage", ["explore", "label", "train", "evaluate"])
def test_nothing_is_missing_where_nothing_is_missing(stage, facts):
    assert worst_of(stage, facts).state is State.OK


H200 = "NVIDIA H200, 570.86"


@pytest.mark.parametrize(
    ("change", "settings", "state", "words"),
    [
        ({"driver": [H200], "cuda": None}, {}, "missing", "built for CPUs"),
        ({"driver": [H200], "cuda": "13.0"}, {}, "missing", "built for CUDA 13.0"),
        (
            {"driver": [H200], "CUDA_VISIBLE_DEVICES": ""},
            {},
            "missing",
            "CUDA_VISIBLE_DEVICES",
        ),
        ({}, {"gpu": True}, "missing", "the job was given none"),
        (
            {"gpus": ["H200"], "gpu_trouble": "GPU 0: no kernel image"},
            {},
            "missing",
            "no kernel image",
        ),
        ({"gpus": ["H200", "H200"], "driver": [H200]}, {"gpu": True}, "ok", None),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_with_the_reason(facts, change, settings, state, words):
    for part in (facts, facts["environment"], facts["packages"]["torch"]):
        part |= {name: value for name, value in change.items() if name in part}

    found = worst_of("train", facts, **settings)

    assert found.state == state
    assert words is None or (words in found.text and found.remedy)


def test_a_stage_that_asks_for_a_gpu_is_known_by_its_options():
    from aiida_eipnn.cli.stage_needs import wants_gpu

    assert wants_gpu({"custom_scheduler_commands": "#SBATCH --gres=gpu:1"})
    assert wants_gpu({"queue_name": "gpu_a100"})
    assert not wants_gpu({"queue_name": "cpu", "max_wallclock_seconds": 60})


def test_an_eip_that_was_named_must_be_there(facts):
    found = worst_of("label", facts, eips=["mine__MO_123456789012_000"])

    assert found.state is State.MISSING
    assert "mine__MO_123456789012_000" in found.text
    assert "kim-api-collections-management install user mine__MO" in found.remedy


def test_eips_without_kim_need_no_kimpy(facts):
    facts["packages"]["kimpy"] = {"trouble": "is not installed"}

    assert worst_of("label", facts, eips=["stillinger-weber"]).state is State.OK
    assert worst_of("label", facts).state is State.MISSING


def test_models_of_the_protocol_that_are_missing_are_named(facts):
    facts["packages"]["kimpy"]["models"].remove(EIP)

    found = worst_of("label", facts)

    assert found.state is State.WARNING
    assert EIP in found.text
    facts["packages"]["kimpy"]["models"].clear()
    assert worst_of("label", facts).state is State.MISSING


def test_sources_that_differ_under_one_version_are_told(facts):
    facts["aiida_eipnn"]["sources"] = "another"

    found = worst_of("explore", facts)

    assert found.state is State.WARNING
    assert "other source files" in found.text


def test_another_major_version_of_numpy_is_told(facts):
    facts["packages"]["numpy"]["version"] = "1.26.4"

    found = worst_of("explore", facts)

    assert found.state is State.WARNING
    assert "numpy 1.26.4 there" in found.text


def test_a_torch_that_each_job_compiles_is_told(facts):
    facts["packages"]["torch"]["compiled"] = False

    assert worst_of("train", facts).state is State.OK
    facts["environment"]["PYTHONDONTWRITEBYTECODE"] = "1"
    assert "compiles torch anew" in worst_of("train", facts).text
