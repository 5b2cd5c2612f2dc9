"""`eipnn-job` of a wheel, on a node that has no AiiDA."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bare_node import make_node, run_bare
from three_jobs import (
    EVALUATE,
    LABEL,
    TRAIN,
    assert_equal_labels,
    assert_equal_predictions,
    copy_inputs,
    labels_in,
    predictions_in,
    run_here,
    weights_in,
)

from aiida_eipnn import __version__
from aiida_eipnn.jobs import spec

ROOT = Path(__file__).parent.parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kim", "torch")]


def pip(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """The `eipnn-job` of a node with this package, vesin and safetensors, as the docs say."""
    folder = tmp_path_factory.mktemp("wheel")
    python = make_node(folder / "node", "vesin", "safetensors")
    pip("wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("aiida_eipnn-*.whl")
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    return python.with_name("eipnn-job")


def test_the_node_has_no_aiida_and_runs_every_job(node, tmp_path):
    here = run_here(tmp_path / "here")
    there = tmp_path / "there"
    imported = run_bare(node.with_name("python3"), "-c", "import aiida", folder=tmp_path)
    assert "No module named 'aiida'" in imported.stderr

    for kind in (LABEL, TRAIN, EVALUATE):
        folder = copy_inputs(here / kind, there / kind)
        done = run_bare(node, folder=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        status = json.loads((folder / spec.STATUS).read_text())
        assert status["versions"]["aiida-eipnn"] == __version__

    assert_equal_labels(labels_in(there), labels_in(here))
    assert weights_in(there) == weights_in(here)
    assert_equal_predictions(predictions_in(there), predictions_in(here))
