"""The commands about a loop."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from aiida.manage.configuration import get_config
from aiida.orm import Dict
from click.testing import CliRunner

from aiida_eipnn.cli import loop as commands
from aiida_eipnn.cli.commands import main
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.reports.history import read_history
from aiida_eipnn.science.io import read_configurations, read_labelled
from aiida_eipnn.science.labels import Labels

# The synthetic loop belongs to the tests of the reports; under the name that pytest gives it there
# the loops that are made serve both.
SYNTHETIC = "tests.reports.conftest"
if SYNTHETIC not in sys.modules:
    path = Path(__file__).parent.parent / "reports" / "conftest.py"
    spec = importlib.util.spec_from_file_location(SYNTHETIC, path)
    sys.modules[SYNTHETIC] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[SYNTHETIC])
synthetic = sys.modules[SYNTHETIC]
make_loop = synthetic.make_loop


@pytest.fixture
def call():
    """Return a function that runs ``aiida-eipnn`` and checks that no traceback came out."""

    def run(*arguments, expect=0):
        result = CliRunner().invoke(main, [str(item) for item in arguments])
        assert result.exit_code == expect, (result.output, result.exception)
        assert "Traceback" not in result.output
        return result

    return run


def test_status_shows_points_errors_and_the_reason_to_stop(make_loop, call):
    loop = make_loop()
    shown = call("status", loop.node.pk).stdout
    assert f"loop {loop.node.pk}: finished" in shown
    assert "iteration    2 of at most 2" in shown
    assert "DFT points   8 done, 1 failed" in shown
    assert "best EIP" in shown
    (failure,) = read_history(loop.node).failures
    assert f"{failure.id[:12]} " in shown
    assert "pw.x exit 410: The electronic minimization did not converge." in shown
    assert "stopped      iteration 2 of 2 is done" in shown


def test_a_uuid_does_as_well_as_a_pk(make_loop, call):
    loop = make_loop()
    assert call("status", loop.node.uuid).stdout.splitlines()[0] == f"loop {loop.node.pk}: finished"


def test_status_of_a_running_loop_shows_the_batch_at_work(make_loop, call):
    shown = call("status", make_loop("waiting", n_iterations=1).node.pk).stdout
    assert "labelling the points of iteration 1 with DFT" in shown
    assert "i001       1 running, 1 waiting" in shown


def test_following_ends_with_the_loop_and_shows_what_is_new(make_loop, call, monkeypatch):
    loop = make_loop("waiting", n_iterations=1)

    def finish(_):
        loop.node.base.attributes.set_many({"process_state": "finished", "exit_status": 0})

    # The loop ends while the command waits.
    monkeypatch.setattr(commands.time, "sleep", finish)
    try:
        shown = call("status", loop.node.pk, "--follow").stdout
    finally:
        loop.node.base.attributes.set("process_state", "waiting")
        loop.node.base.attributes.delete("exit_status")
    assert shown.splitlines()[-1] == f"loop {loop.node.pk}: finished"
    assert shown.count("iteration    1") == 1


def test_a_submitted_loop_without_a_daemon_says_how_to_start_it(make_loop, call):
    result = call("status", make_loop("created").node.pk, expect=1)
    assert "waiting to start" in result.stdout
    assert "verdi daemon start" in result.stderr or "no daemon" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("follow", [(), ("--follow",)])
def test_a_submitted_loop_whose_daemon_stopped_midway_says_so(make_loop, call, follow):
    node = make_loop("waiting", n_iterations=1).node
    node.base.extras.set("eipnn_submitted", True)
    try:
        result = call("status", node.pk, *follow, expect=1)
    finally:
        node.base.extras.delete("eipnn_submitted")
    assert "iteration    1" in result.stdout
    assert "verdi daemon start" in result.stderr or "no daemon" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_following_ends_when_the_daemon_stops(make_loop, call, monkeypatch):
    node = make_loop("waiting", n_iterations=1).node

    # Stands for a daemon that stops while the command waits: from then on the loop needs one.
    monkeypatch.setattr(
        commands.time, "sleep", lambda _: node.base.extras.set("eipnn_submitted", True)
    )
    try:
        result = call("status", node.pk, "--follow", expect=1)
    finally:
        node.base.extras.delete("eipnn_submitted")
    assert "verdi daemon start" in result.stderr or "no daemon" in result.stderr


def test_a_loop_that_a_script_runs_needs_no_daemon(make_loop, call):
    assert not call("status", make_loop("waiting", n_iterations=1).node.pk).stderr


def test_lineage_lists_each_point_with_its_calculation(make_loop, call):
    loop = make_loop()
    shown = call("lineage", loop.node.pk).stdout
    point = read_history(loop.node).points[-1]
    (row,) = [line for line in shown.splitlines() if point.id[:12] in line]
    assert str(point.pw_pk) in row
    assert "i001" in row
    assert "Stillinger and Weber" in shown
    trainings = [line for line in shown.splitlines() if "seeds 11, 12" in line]
    assert [line.endswith("8 heads each") for line in trainings] == [
        "finetune" in line for line in trainings
    ]
    assert any("finetune" in line for line in trainings)


def test_lineage_as_json_is_json_alone(make_loop, call):
    loop = make_loop()
    content = json.loads(call("lineage", loop.committee.pk, "--json").stdout)
    assert content["committee_uuid"] == loop.committee.uuid
    assert len(content["points"]) == 6


def test_report_writes_one_page(make_loop, call, tmp_path):
    path = tmp_path / "page.html"
    call("report", make_loop().node.pk, "-o", path)
    assert path.read_text().startswith("<!doctype html>")


def test_export_writes_committee_labels_and_how_to_use_them(make_loop, call, tmp_path):
    loop = make_loop()
    call("export", loop.node.pk, "-o", tmp_path / "potential")
    assert sorted(path.name for path in (tmp_path / "potential").iterdir()) == [
        "README.txt",
        "config.json",
        "dataset.extxyz",
        "weights.safetensors",
    ]
    assert "from_folder" in (tmp_path / "potential" / "README.txt").read_text()


def test_exported_labels_are_those_of_the_loop(make_loop, call, tmp_path):
    loop = make_loop()
    call("export", loop.node.pk, "-o", tmp_path)
    name = synthetic.EIPS[0]
    configurations, labels = read_labelled(
        tmp_path / "dataset.extxyz", f"{name}_energy", f"{name}_forces", source=name
    )
    assert len(configurations) == 24
    assert set(labels.ids.tolist()) == set(loop.pool.value().ids.tolist())
    assert (tmp_path / "dataset.extxyz").read_text().count("dft_energy") == 8


def test_export_without_a_folder_makes_one_named_after_the_loop(
    make_loop, call, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    loop = make_loop()
    shown = call("export", loop.node.pk).stdout
    assert f"are in export-{loop.node.pk}" in shown
    assert (tmp_path / f"export-{loop.node.pk}" / "config.json").is_file()


def test_the_readme_of_an_export_names_the_keys(make_loop, call, tmp_path):
    call("export", make_loop().node.pk, "-o", tmp_path)
    text = (tmp_path / "README.txt").read_text()
    assert {"dft", *synthetic.EIPS} <= {line.strip() for line in text.splitlines()}


def pretrained_loop(**settings):
    """Return a loop that got as far as the pre-training, without any DFT label of its own."""
    maker = synthetic.Maker(n_iterations=1, state="waiting", **settings)
    maker.start()
    maker.explore()
    maker.label_with_eips()
    committee = maker.train("pretrain", {"eip_labels__pool": maker.eip_labels})["committee"]
    maker.graph.give_back(maker.loop, pretrained=committee)
    return maker.loop


def dft_labels_of(configurations):
    n, n_atoms = len(configurations), len(configurations.numbers)
    return replace(
        Labels.missing(configurations, ["dft"]),
        energy=np.full((n, 1), -7.5),
        forces=np.zeros((1, n_atoms, 3)),
        status=np.zeros((n, 1), dtype=np.int64),
    )


def given_labels(configurations):
    """Return the inputs of a loop that was given DFT labels."""
    return {
        "known__configurations": ConfigurationsData.from_value(configurations),
        "known__labels": LabelsData.from_value(dft_labels_of(configurations), level={}),
    }


def test_export_works_before_there_is_a_dft_label_and_for_any_name(make_loop, call, tmp_path):
    make_loop("created")
    loop = pretrained_loop(eips=("lennard-jones[sigma=2.1]", "python:module:callable"))

    call("export", loop.pk, "-o", tmp_path)

    text = (tmp_path / "dataset.extxyz").read_text()
    assert "dft_energy" not in text
    assert text.count("lennard-jones_sigma_2.1_energy") == 24
    assert text.count("python_module_callable_energy") == 24


def test_export_holds_the_labels_that_the_loop_was_given(
    make_loop, call, tmp_path, rattled_silicon
):
    make_loop("created")
    known = rattled_silicon(3, seed=8)
    loop = pretrained_loop(extra=given_labels(known))

    call("export", loop.pk, "-o", tmp_path)

    text = (tmp_path / "dataset.extxyz").read_text()
    assert len(read_configurations(tmp_path / "dataset.extxyz")) == 24 + 3
    assert text.count("dft_energy") == 3
    assert all(str(name) in text for name in known.ids)


def test_a_label_made_by_the_loop_counts_before_a_given_one(make_loop):
    outputs = {"test_labels": make_loop().labels["test"]}
    made = outputs["test_labels"].value()
    pool = make_loop().pool.value()
    both = pool.take([int(pool.rows_of(made.ids)[0]), 20])

    (labels,) = commands.dft_labels([given_labels(both)["known__labels"].value()], outputs)

    assert labels.ids.tolist() == [*made.ids, both.ids[1]]
    assert labels.energy[0, 0] == made.energy[0, 0]


@pytest.mark.parametrize("command", ["status", "report", "lineage"])
def test_a_wrong_pk_is_one_line(make_loop, call, command):
    make_loop("created")
    result = call(command, 987654321, expect=1)
    assert "there is no node '987654321'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["status", "report", "lineage"])
def test_a_node_of_another_kind_is_one_line(make_loop, call, command):
    make_loop("created")
    result = call(command, Dict({}).store().pk, expect=1)
    assert "is a Dict, not a" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_export_before_there_is_a_committee_is_one_line(make_loop, call, tmp_path):
    result = call("export", make_loop("created").node.pk, "-o", tmp_path / "x", expect=1)
    assert "has no committee yet" in result.stderr
    assert not (tmp_path / "x").exists()


def test_a_profile_that_is_not_there_is_one_line_with_those_that_are(make_loop, call):
    make_loop("created")
    result = call("status", "-p", "nowhere", 1, expect=1)
    assert "profile `nowhere` does not exist" in result.stderr
    assert get_config().profile_names[0] in result.stderr


def test_no_aiida_at_all_leads_to_the_setup(tmp_path):
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "from aiida_eipnn.cli import main; main()",
            "status",
            "1",
        ],
        env={**os.environ, "AIIDA_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "`aiida-eipnn setup` makes one" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["status", "lineage", "report", "export"])
def test_each_command_explains_itself_in_one_sentence_without_aiida(command):
    code = (
        "import sys\nsys.modules['aiida'] = None\n"
        f"from aiida_eipnn.cli import main\nmain(['{command}', '--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[2].strip().endswith(".")
