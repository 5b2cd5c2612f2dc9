"""`aiida-eipnn eip list` and `check`, as a user runs them."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from aiida_eipnn.cli import main

SW = "SW_StillingerWeber_1985_Si__MO_405512056662_005"
SNAP = "SNAP_ZuoChenLi_2019_Si__MO_869330304805_000"

pytestmark = pytest.mark.usefixtures("kim")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(cache):
    """Run a command with a cache folder of its own, kept between tests."""
    runner = CliRunner(env={"XDG_CACHE_HOME": str(cache)})
    return lambda *words: runner.invoke(main, ["eip", *words])


def test_list_shows_what_to_use(run):
    shown = run("list", "--elements", "Si")

    assert shown.exit_code == 0, shown.output
    row = next(line.split() for line in shown.output.splitlines() if line.startswith(SW))
    assert row[1:] == ["SW", "3.8", "1985", "10.1103/PhysRevB.31.5262"]
    assert SNAP not in shown.output
    assert "1 more with the same numbers" in shown.output
    assert shown.output.splitlines()[-1] == "33 models, 28 to use as EIPs; --all lists the other 5"


def test_list_all_says_why_a_model_is_left_out(run):
    shown = run("list", "--elements", "Si", "--all")

    row = next(line for line in shown.output.splitlines() if line.startswith(SNAP))
    assert row.endswith("left out: made by machine learning")


def test_list_as_json_has_citations_and_reasons(run):
    rows = {
        row["name"]: row
        for row in json.loads(run("list", "--elements", "Si", "--all", "--json").output)
    }

    assert "Stillinger, Frank H." in rows[SW]["citation"]
    assert rows[SW]["left_out"] is None
    assert rows[SNAP]["machine_learned"]
    assert rows[SNAP]["left_out"] == "made by machine learning"


def test_list_names_an_element_that_does_not_exist(run):
    refused = run("list", "--elements", "Si,Xy")

    assert refused.exit_code == 1
    assert refused.output == ("Error: there is no element Xy; write symbols, such as Si,Al\n")


def test_list_needs_no_aiida_and_no_torch(cache):
    code = (
        "import sys\n"
        "for name in ('aiida', 'torch', 'matplotlib'): sys.modules[name] = None\n"
        "from aiida_eipnn.cli import main\n"
        "main(['eip', 'list', '--elements', 'Si'])\n"
    )

    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={"XDG_CACHE_HOME": str(cache), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )

    assert shown.returncode == 0, shown.stderr


def test_check_says_what_is_wrong_and_writes_it(run, tmp_path):
    wrong = "EAM_IMD_BrommerGaehler_2006B_AlNiCo__MO_128037485276_003"
    output = tmp_path / "checks.json"

    shown = run("check", "--elements", "Al,Ni", "--models", wrong, "--output", str(output))

    assert shown.exit_code == 0, shown.output
    assert "2 checked, 1 with a fault" in shown.output
    assert f"Ni  {wrong}: forces are not minus the slope of the energy" in shown.output
    assert set(json.loads(output.read_text())["models"][wrong]) == {"Al", "Ni"}


def test_check_of_a_model_that_is_not_installed_names_the_closest(run):
    refused = run("check", "--models", "SW_StillingerWeber_1985_Si__MO_405512056662_004")

    assert refused.exit_code == 1
    assert f"not installed; close to it are {SW}" in refused.output
