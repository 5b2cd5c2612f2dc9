"""`aiida-eipnn portable-code`, and jobs where torch, ase and kimpy are all there is."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from aiida.engine import run_get_node
from aiida.orm import PortableCode, QueryBuilder
from bare_node import make_node
from click.testing import CliRunner
from three_jobs import (
    COMMITTEE,
    EIPS,
    NETWORK,
    TRAIN,
    TRAINING,
    WEIGHTS,
    assert_equal_labels,
    assert_equal_predictions,
    labels_in,
    pool,
    predictions_in,
    run_here,
    weights_in,
)

from aiida_eipnn.calculations.evaluate import EvaluateCalculation
from aiida_eipnn.calculations.train import TrainCalculation
from aiida_eipnn.cli import main
from aiida_eipnn.cli.portable import ARCHIVE, EXECUTABLE, ensure_portable_code, write_files
from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.jobs import spec
from aiida_eipnn.reports.lineage import job_versions
from aiida_eipnn.workflows.builder import label_inputs
from aiida_eipnn.workflows.restart import LabelBaseWorkChain


def codes():
    return QueryBuilder().append(PortableCode).all(flat=True)


def test_equal_sources_give_equal_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_files(tmp_path / name)

    for name in (EXECUTABLE, ARCHIVE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_archive_holds_the_two_rooms_and_nothing_that_was_compiled(tmp_path):
    write_files(tmp_path)

    names = zipfile.ZipFile(tmp_path / ARCHIVE).namelist()
    rooms = {Path(name).parts[1] for name in names}
    assert rooms == {"__init__.py", "science", "jobs"}
    assert {Path(name).suffix for name in names} == {".py", ".json"}
    assert len(names) == len(set(names))


def test_no_file_of_a_job_has_a_name_of_the_code():
    of_jobs = [value for name, value in vars(spec).items() if name.isupper()]

    assert spec.LOG in of_jobs
    assert not {EXECUTABLE, ARCHIVE} & {value for value in of_jobs if isinstance(value, str)}


def test_an_old_python_is_one_clear_line(tmp_path):
    (tmp_path / "python3.6").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3.6").chmod(0o755)
    write_files(tmp_path, python=str(tmp_path / "python3.6"))

    done = subprocess.run([tmp_path / EXECUTABLE], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "needs Python 3.11 or newer, which" in done.stderr
    assert "python3.6 is not here" in done.stderr


def test_numba_is_left_alone_because_it_would_compile_in_every_job(tmp_path):
    pytest.importorskip("numba")
    write_files(tmp_path)
    code = "from aiida_eipnn.science.eip import batch; print(batch.COMPILED, batch.__file__)"

    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path / ARCHIVE)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout.split()[0] == "False", done.stderr
    assert ARCHIVE in done.stdout


@pytest.mark.usefixtures("aiida_profile_clean")
def test_the_same_code_is_made_once_and_another_takes_its_name():
    made = [
        ensure_portable_code("job"),
        ensure_portable_code("job"),
        ensure_portable_code("job", python="python3.12"),
    ]

    assert made == [True, False, True]
    old, new = sorted(codes(), key=lambda code: code.pk)
    assert (old.label, old.is_hidden) == (f"job-{old.pk}", True)
    assert (new.label, new.is_hidden) == ("job", False)
    assert b"python=python3.12" in new.base.repository.get_object_content(EXECUTABLE, "rb")


def test_the_command_makes_it_in_the_profile(aiida_profile_clean):
    arguments = ["portable-code", "--prepend-text", "module load torch"]
    arguments += ["--profile", aiida_profile_clean.name]

    done = CliRunner().invoke(main, arguments, catch_exceptions=False)

    assert done.output.split() == ["made", "code", "eipnn-job-portable"]
    (code,) = codes()
    assert code.prepend_text == "module load torch"
    assert code.with_mpi is False
    content = code.base.repository.get_object_content(ARCHIVE, "rb")
    assert "aiida_eipnn/jobs/__main__.py" in zipfile.ZipFile(io.BytesIO(content)).namelist()


def test_where_it_runs_is_asked_for(aiida_profile_clean):
    ensure_portable_code("job")
    (code,) = codes()

    with pytest.raises(ValueError, match="belongs to no computer: name the one to run it on"):
        label_inputs({"label": {}}, code, ["Si"], EIPS, {})
    with pytest.raises(ValueError, match="'moon', which is not there"):
        label_inputs({"label": {}}, code, ["Si"], EIPS, {"computer": "moon"})


@pytest.fixture
def code(tmp_path, aiida_localhost):
    """The code on a Python that sees torch, ase and kimpy, and what these bring."""
    aiida_localhost.set_minimum_job_poll_interval(0.0)
    aiida_localhost.configure(safe_interval=0.0, use_login_shell=False)
    python = make_node(tmp_path / "node")
    # A job inherits what this Python was told to see.
    prepend = "unset PYTHONPATH\nexport OMP_NUM_THREADS=1"
    ensure_portable_code("job", python=str(python), prepend_text=prepend)
    return max(codes(), key=lambda code: code.pk)


@pytest.mark.slow
@pytest.mark.usefixtures("kim", "torch")
def test_every_job_finds_the_same_with_torch_ase_and_kimpy_alone(code, aiida_localhost, tmp_path):
    here = run_here(tmp_path / "here")
    configurations = {"pool": ConfigurationsData.from_value(pool())}
    asked = label_inputs({"label": {}}, code, ["Si"], EIPS, {"computer": aiida_localhost.label})
    metadata = asked["metadata"]

    labelled, node = run_get_node(
        LabelBaseWorkChain, job={**asked, "configurations": configurations}
    )
    assert node.is_finished_ok, node.exit_message
    assert_equal_labels(labelled["labels"].value(), labels_in(here))

    trained, node = run_get_node(
        TrainCalculation,
        code=code,
        configurations=configurations,
        eip_labels={"pool": LabelsData.from_value(labels_in(here))},
        training={"stage": "pretrain", **TRAINING},
        seeds=[1, 2],
        network=NETWORK,
        parameters={"device": "cpu"},
        metadata=metadata,
    )
    assert node.is_finished_ok, node.exit_message
    assert {"vesin", "safetensors", "numba"}.isdisjoint(job_versions(node))
    weights = trained["committee"].base.repository.get_object_content(WEIGHTS, "rb")
    assert weights == weights_in(here)

    predicted, node = run_get_node(
        EvaluateCalculation,
        code=code,
        configurations=configurations,
        committee=CommitteeData.from_folder(here / TRAIN / COMMITTEE),
        parameters={"device": "cpu"},
        metadata=metadata,
    )
    assert node.is_finished_ok, node.exit_message
    assert_equal_predictions(predicted["predictions"].value(), predictions_in(here))
