"""`aiida-eipnn setup`, run as a user does, each time in a folder of its own."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click import Context
from click.testing import CliRunner

from aiida_eipnn.cli import main
from aiida_eipnn.cli.commands import COMMANDS
from aiida_eipnn.cli.setup import cmd_setup

BIN = Path(sys.executable).parent
PROFILE = "eipnn"
FAMILY = "PseudoDojo/0.4/PBE/SR/standard"


def run(*command, folder, **environment):
    """Run a command of this environment with AiiDA's folder in ``folder``."""
    return subprocess.run(
        [BIN / command[0], *command[1:]],
        env=os.environ | {"AIIDA_PATH": str(folder)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def require_pw():
    if not shutil.which("pw.x"):
        skip_or_fail("qe", "pw.x is missing")


def skip_or_fail(code, reason):
    if code in os.environ.get("EIPNN_REQUIRE", "").split(","):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder in which `aiida-eipnn setup` ran, with what it said."""
    require_pw()
    folder = tmp_path_factory.mktemp("site")
    done = run("aiida-eipnn", "setup", folder=folder)
    if "could not fetch" in done.stderr:
        skip_or_fail("qe", done.stderr)
    return folder, done


def config_of(folder):
    return json.loads((folder / ".aiida" / "config.json").read_text())


def test_setup_makes_everything(site):
    _, done = site

    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["made"] * 5


def test_setup_makes_a_profile_without_services_and_with_caching(site):
    profile = config_of(site[0])["profiles"][PROFILE]

    assert profile["storage"]["backend"] == "core.sqlite_dos"
    assert profile["process_control"]["backend"] == "core.zeromq"
    assert profile["options"] == {"caching.default_enabled": True, "runner.poll.interval": 1}


def test_a_second_setup_changes_nothing(site):
    folder, _ = site
    before = config_of(folder), snapshot(folder)

    again = run("aiida-eipnn", "setup", folder=folder)

    assert [line[:13] for line in again.stdout.splitlines()] == ["there already"] * 5
    assert (config_of(folder), snapshot(folder)) == before


def snapshot(folder):
    script = folder / "snapshot.py"
    script.write_text(
        "from aiida.orm import Computer, Group, Node, QueryBuilder\n"
        "for kind in (Node, Computer, Group):\n"
        "    print(kind.__name__, sorted(QueryBuilder().append(kind, project='uuid').all()))\n"
    )
    return run("verdi", "run", script, folder=folder).stdout


def test_setup_registers_the_codes_and_the_cutoffs_of_silicon(site):
    folder, _ = site
    script = folder / "look.py"
    script.write_text(
        "from aiida.orm import load_code, load_group\n"
        "pw, job = load_code('pw@localhost'), load_code('eipnn-job@localhost')\n"
        f"family = load_group({FAMILY!r})\n"
        "print(pw.default_calc_job_plugin, pw.with_mpi, job.with_mpi)\n"
        "print(job.filepath_executable)\n"
        "for stringency in (None, 'low'):\n"
        "    print(family.get_recommended_cutoffs(\n"
        "        elements=('Si',), stringency=stringency, unit='Ry'))\n"
    )

    shown = run("verdi", "run", script, folder=folder)

    assert shown.stdout.splitlines() == [
        "quantumespresso.pw False False",
        str(BIN / "eipnn-job"),
        "(36.0, 144.0)",
        "(28.0, 112.0)",
    ]


def test_setup_leaves_the_profile_of_a_user_alone(tmp_path):
    require_pw()
    run("verdi", "presto", "--profile-name", "mine", "--no-broker", folder=tmp_path)
    before = config_of(tmp_path)

    refused = run("aiida-eipnn", "setup", "--profile-name", "mine", folder=tmp_path)

    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: the profile 'mine'")
    assert refused.stderr.count("\n") == 1
    assert config_of(tmp_path) == before


def test_setup_without_pw_says_how_to_get_it_and_makes_nothing(tmp_path):
    refused = run("aiida-eipnn", "setup", "--pw", str(tmp_path / "pw.x"), folder=tmp_path)

    assert refused.returncode == 1
    assert "install Quantum ESPRESSO" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / ".aiida" / "config.json").exists()


def test_a_job_that_is_started_twice_in_one_folder_runs_once(tmp_path):
    from aiida_eipnn.cli import environment

    script = tmp_path / "job"
    work = "echo ran >> ledger; sleep 0.5\n"
    script.write_text(environment.JOB_ONCE + work + environment.JOB_ENDED)
    jobs = [subprocess.Popen(["bash", script], cwd=tmp_path) for _ in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    assert (tmp_path / "ledger").read_text().split() == ["ran"]


def test_a_job_whose_first_start_died_runs_in_its_second(tmp_path):
    from aiida_eipnn.cli import environment

    script = tmp_path / "job"
    work = "if mkdir first 2> /dev/null; then kill -9 $$; fi\necho ran >> ledger\n"
    script.write_text(environment.JOB_ONCE + work + environment.JOB_ENDED)
    jobs = [subprocess.Popen(["bash", script], cwd=tmp_path) for _ in range(2)]
    assert sorted(job.wait() for job in jobs) == [-9, 0]
    assert (tmp_path / "ledger").read_text().split() == ["ran"]


@pytest.mark.usefixtures("aiida_profile_clean")
def test_the_computer_of_the_setup_runs_each_job_once(tmp_path):
    from aiida.orm import load_computer

    from aiida_eipnn.cli import environment

    environment.ensure_computer()
    computer = load_computer(environment.COMPUTER)
    assert computer.get_prepend_text() == environment.JOB_ONCE
    assert computer.get_append_text() == environment.JOB_ENDED
    assert not environment.ensure_computer()
    computer.set_prepend_text("module load mine")
    assert not environment.ensure_computer()
    assert load_computer(environment.COMPUTER).get_prepend_text() == "module load mine"


@pytest.mark.usefixtures("aiida_profile_clean")
def test_a_code_that_moved_is_replaced_and_the_old_one_kept(tmp_path):
    from aiida.orm import load_node

    from aiida_eipnn.cli import environment

    environment.ensure_computer()
    environment.ensure_code("pw", tmp_path / "old")
    old = environment.find_code("pw")

    assert environment.ensure_code("pw", tmp_path / "new")
    assert not environment.ensure_code("pw", tmp_path / "new")
    assert environment.find_code("pw").filepath_executable == tmp_path / "new"
    assert load_node(old.pk).filepath_executable == tmp_path / "old"
    assert load_node(old.pk).is_hidden


# The header of a real file of this generation, which is all that AiiDA reads of it.
UPF = '<UPF version="2.0.1">\n<PP_HEADER element="Si" z_valence="4.00"/>\n</UPF>\n'


@pytest.fixture
def table():
    from aiida_eipnn.cli.pseudos import Pseudo, PseudoTable

    silicon = Pseudo(low=28, normal=36, sha256=hashlib.sha256(UPF.encode()).hexdigest())
    return PseudoTable(package="none", folder="none", pseudos={"Si": silicon})


@pytest.mark.usefixtures("aiida_profile_clean")
def test_a_family_comes_from_a_folder_of_checked_files(tmp_path, table):
    from aiida.orm import load_group

    from aiida_eipnn.cli.pseudos import ensure_family

    (tmp_path / "Si.upf").write_text(UPF)

    assert ensure_family("mine", table, folder=tmp_path)
    assert not ensure_family("mine", table, folder=tmp_path)
    cutoffs = load_group("mine").get_recommended_cutoffs(elements=("Si",), unit="Ry")
    assert cutoffs == pytest.approx((36, 144))


@pytest.mark.usefixtures("aiida_profile_clean")
@pytest.mark.parametrize(
    ("content", "message"),
    [(UPF + " ", "not the pseudopotential whose cutoffs are known"), (None, "there is no Si.upf")],
)
def test_a_wrong_file_is_refused_before_anything_is_installed(tmp_path, table, content, message):
    from aiida.orm import Group, QueryBuilder

    from aiida_eipnn.cli.pseudos import ensure_family

    if content:
        (tmp_path / "Si.upf").write_text(content)

    with pytest.raises(ValueError, match=message):
        ensure_family("mine", table, folder=tmp_path)
    assert QueryBuilder().append(Group).count() == 0


@pytest.mark.usefixtures("aiida_profile_clean")
def test_a_family_that_breaks_off_leaves_nothing_behind(tmp_path, table):
    from aiida.common.exceptions import ValidationError
    from aiida.orm import Group, QueryBuilder

    from aiida_eipnn.cli.pseudos import ensure_family

    (tmp_path / "Si.upf").write_text(UPF)
    unusable = replace(table.pseudos["Si"], normal=float("nan"))

    with pytest.raises(ValidationError, match="nan"):
        ensure_family("mine", replace(table, pseudos={"Si": unusable}), folder=tmp_path)
    assert QueryBuilder().append(Group).count() == 0


def test_a_package_that_pip_cannot_fetch_is_one_clear_error(tmp_path, table):
    from aiida_eipnn.cli.pseudos import fetch_upfs

    with pytest.raises(OSError, match="--pseudo-folder"):
        fetch_upfs(replace(table, package="./nothing-here"), tmp_path)


def test_cutoffs_of_the_shipped_table_make_sense():
    from aiida_eipnn.cli.pseudos import read_table

    pseudos = read_table().pseudos

    assert len(pseudos) == 45
    assert all(20 < pseudo.low <= pseudo.normal < 120 for pseudo in pseudos.values())
    assert len({pseudo.sha256 for pseudo in pseudos.values()}) == len(pseudos)


def test_setup_makes_the_family_that_the_protocols_name():
    protocols = Path(__file__).parents[2] / "aiida_eipnn/workflows/protocols/active_learning.yaml"
    named = yaml.safe_load(protocols.read_text())["default_inputs"]["dft"]["pw_base"]

    family = next(option for option in cmd_setup.params if option.name == "pseudo_family")

    assert family.default == named["pseudo_family"] == FAMILY


@pytest.mark.parametrize("name", COMMANDS)
def test_list_of_commands_says_what_the_command_says(name):
    command = main.get_command(Context(main), name)

    assert command.name == name
    assert command.help.splitlines()[0] == COMMANDS[name][1]


def test_errors_for_the_user_show_no_traceback_unless_asked(tmp_path):
    missing = str(tmp_path / "pw.x")

    brief = CliRunner().invoke(main, ["setup", "--pw", missing])
    long = CliRunner().invoke(main, ["--traceback", "setup", "--pw", missing])

    assert brief.exit_code == 1
    assert brief.output.startswith("Error: there is no executable")
    assert isinstance(long.exception, ValueError)


def test_an_unknown_command_is_refused():
    result = CliRunner().invoke(main, ["setupp"])

    assert result.exit_code == 2
    assert "No such command 'setupp'" in result.output
