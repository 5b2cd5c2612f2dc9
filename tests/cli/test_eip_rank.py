"""``aiida-eipnn eip rank``, without a profile."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from click.testing import CliRunner

from aiida_eipnn.cli.commands import main
from aiida_eipnn.cli.eip_rank import default_eips
from aiida_eipnn.science.eip.potential import open_potential

SW = "SW_StillingerWeber_1985_Si__MO_405512056662_005"
T3 = "Tersoff_LAMMPS_Tersoff_1988T3_Si__MO_186459956893_003"
ARGON = "lennard-jones[epsilon=0.0104,sigma=3.4,cutoff=6]"
STIFF = "lennard-jones[epsilon=0.0104,sigma=3.1,cutoff=6]"


def labelled_frames(symbol, potential, n=30):
    rng = np.random.default_rng(0)
    frames = []
    for number in range(n):
        atoms = bulk(symbol, cubic=True)
        strain = np.eye(3) + 0.02 * rng.normal(size=(3, 3))
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        atoms.positions += 0.1 * rng.normal(size=(len(atoms), 3))
        energy, forces, _ = potential.label(atoms)
        atoms.calc = SinglePointCalculator(atoms, energy=energy - 7.0 * len(atoms), forces=forces)
        atoms.info["split"] = "test" if number % 3 == 0 else "train"
        atoms.info["good"] = number < 28
        frames.append(atoms)
    return frames


@pytest.fixture(scope="module")
def argon(tmp_path_factory):
    """Argon, labelled by a Lennard-Jones potential in the place of DFT."""
    path = tmp_path_factory.mktemp("data") / "argon.extxyz"
    write(path, labelled_frames("Ar", open_potential(ARGON)), format="extxyz")
    return path


def call(*arguments, expect=0):
    result = CliRunner().invoke(main, ["eip", "rank", *map(str, arguments)])
    assert result.exit_code == expect, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


def test_the_table_names_the_best_and_gives_a_verdict(argon):
    shown = call(argon, "--eips", f"{STIFF},{ARGON}", "--workers", 1).stdout

    assert "argon.extxyz: 30 configurations of Ar (unknown 30), 0 of them copies" in shown
    assert "energies aligned on 30 labels: a scale for each EIP and one shift" in shown
    assert f"best single EIP       {ARGON} in energy, {ARGON} in forces" in shown
    assert "cross-validation, energy MAE (meV/atom)" in shown
    assert "verdict: EIPs help here: with 24 labels to learn from, the energy of" in shown


def test_everything_is_written_as_json(argon, tmp_path):
    out = tmp_path / "rank.json"

    call(argon, "--eips", ARGON, "--json", out)

    content = json.loads(out.read_text())
    assert content["standings"][0]["eip"] == ARGON
    assert content["standings"][0]["energy_mae"] < 1e-6
    assert content["worth"]["answer"] == "help"
    assert content["elements"] == ["Ar"]


def test_errors_are_shown_outside_the_training_part(argon):
    shown = call(argon, "--eips", ARGON, "--split-key", "split", "--train", "train").stdout

    assert "errors on 10 distinct ones outside split=train" in shown
    assert "aligned on 20 labels" in shown


def test_frames_can_be_left_out(argon):
    shown = call(argon, "--eips", ARGON, "--only", "good=T").stdout

    assert "argon.extxyz: 28 configurations" in shown


def test_an_eip_that_knows_no_such_element_is_missing_with_the_reason(argon, kim):
    shown = call(argon, "--eips", f"{ARGON},{SW}").stdout

    assert "missing               SW_StillingerWeber_1985_Si: 30 × " in shown
    assert "does not know Ar" in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--only", "good"), "write KEY=VALUE"),
        (("--only", "good=yes"), "no frame has good=yes; there are ['F', 'T']"),
        (("--split-key", "part"), "no frame of"),
        (("--split-key", "split", "--train", "tran"), "0 are in the training part"),
        (("--eips", "no-such-potential"), "no EIP gave a label"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(argon, arguments, text, kim):
    given = arguments if "--eips" in arguments else (*arguments, "--eips", ARGON)

    result = call(argon, *given, expect=1)

    assert text in result.output


def test_a_file_without_labels_is_refused(tmp_path):
    write(tmp_path / "bare.extxyz", bulk("Si"), format="extxyz")

    result = call(tmp_path / "bare.extxyz", "--eips", ARGON, expect=1)

    assert "no energy under 'dft_energy', nor from a calculator" in result.output


def test_the_protocol_names_the_default_eips():
    assert SW in default_eips(["Si"], None)
    assert len(default_eips(["W"], None)) == 8


@pytest.mark.parametrize("symbol", ["Si", "Al", "W", "Cu", "Ni", "Mo", "Fe", "Ta", "Ge"])
def test_each_default_may_be_used_and_gives_numbers_of_its_own(symbol, kim):
    from aiida_eipnn.science.eip.catalogue import catalogue

    names = default_eips([symbol], None)
    left_out = {entry.name: entry.left_out or "" for entry in catalogue([symbol])}
    stand_ins = [left_out[name].removeprefix("same numbers as ") for name in names]

    assert not set(names) & set(stand_ins)
    assert set(stand_ins) <= {"", *left_out}


def test_all_are_those_that_no_machine_learned(kim):
    names = default_eips(["Si"], "all")

    assert len(names) > 20
    assert not [name for name in names if name.startswith(("SNAP", "LJ_", "LennardJones"))]


def test_silicon_with_a_real_kim_model_as_dft(tmp_path, kim):
    path = tmp_path / "silicon.extxyz"
    write(path, labelled_frames("Si", open_potential(SW), n=21), format="extxyz")

    shown = call(path, "--eips", f"{SW},{T3}").stdout

    assert "best single EIP       SW_StillingerWeber_1985_Si in energy" in shown
    assert "verdict: EIPs help here" in shown


def test_no_profile_and_no_aiida_is_needed(argon, tmp_path):
    code = (
        "import sys; from aiida_eipnn.cli import main\n"
        f"try: main(['eip', 'rank', {str(argon)!r}, '--eips', {ARGON!r}])\n"
        "finally: assert 'aiida' not in sys.modules\n"
    )
    environment = {**os.environ, "AIIDA_PATH": str(tmp_path)}

    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )

    assert shown.returncode == 0, shown.stderr
    assert not list(tmp_path.iterdir())
