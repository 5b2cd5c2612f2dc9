"""A loop goes on where another one ended or broke; DFT is not repeated."""

import copy

import numpy as np
import pytest
from aiida.engine import run_get_node
from aiida.manage.caching import enable_caching
from aiida.orm import CalcJobNode

from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.reports.history import read_history
from aiida_eipnn.reports.lineage import trace, unexplained_inputs
from aiida_eipnn.reports.points import PointState
from aiida_eipnn.reports.report import write_report
from aiida_eipnn.workflows.active_learning import ActiveLearningWorkChain
from aiida_eipnn.workflows.builder import Codes, Start

PW = "aiida.calculations:quantumespresso.pw"
# Two-atom silicon with an easy gate; a committee of one network pre-trained in no time.
FAST = {"pretrain": {"steps": 20}, "train_scratch": False, "acquisition": {"n_select": 2}}
WHOLE: dict[str, object] = {}


def merged(overrides, changes):
    overrides = copy.deepcopy(overrides)
    for key, value in changes.items():
        overrides[key] = {**overrides.get(key, {}), **value} if isinstance(value, dict) else value
    return overrides


@pytest.fixture
def builder(kim, torch, pw_code, job_code, pseudo_family, small_loop):
    """Return a function that makes the builder of the small loop with the real pw.x."""

    def make(**changes):
        return ActiveLearningWorkChain.get_builder_from_protocol(
            Codes(pw=pw_code, job=job_code),
            Start(pool=ConfigurationsData.from_value(small_loop.pool), eips=small_loop.eips[:3]),
            protocol="demo",
            overrides=merged(merged(small_loop.overrides, FAST), changes),
        )

    return make


@pytest.fixture
def whole(builder):
    """An uninterrupted loop of two iterations."""
    if "loop" not in WHOLE:
        _, WHOLE["loop"] = run_get_node(builder(stop={"max_iterations": 2}))
    node = WHOLE["loop"]
    assert node.is_finished_ok, node.exit_message
    return node


def go_on(loop, **settings):
    """Run the continuation of a loop without any cache."""
    _, node = run_get_node(ActiveLearningWorkChain.get_builder_continue(loop, **settings))
    assert node.is_finished_ok, node.exit_message
    return node


def jobs(loop, kind=PW):
    return [
        node
        for node in loop.called_descendants
        if isinstance(node, CalcJobNode) and node.process_type == kind
    ]


def same_choices(one, other):
    np.testing.assert_array_equal(one.ids(), other.ids())
    np.testing.assert_allclose(one.value().scores, other.value().scores, rtol=1e-6)


def test_a_finished_loop_goes_on_as_if_it_had_had_the_larger_budget(whole, builder, tmp_path):
    with enable_caching():
        _, first = run_get_node(builder(stop={"max_iterations": 1}))
    assert first.outputs.history["stop"]["reason"] == "max_iterations"

    second = go_on(first, overrides={"stop": {"max_iterations": 2}})

    same_choices(second.outputs.iterations.i001.choice, whole.outputs.iterations.i001.choice)
    assert second.outputs.history["iterations"][:1] == first.outputs.history["iterations"]
    assert [item["iteration"] for item in second.outputs.history["iterations"]] == [1, 2]
    errors = [loop.outputs.history["iterations"][1]["committee"] for loop in (second, whole)]
    assert errors[0]["forces_mae"] == pytest.approx(errors[1]["forces_mae"], rel=1e-6)
    # Of DFT, EIP labels and trainings only what was not there was made.
    assert len(jobs(second)) == len(second.outputs.iterations.i001.choice)
    assert not jobs(second, "aiida.calculations:eipnn.label")
    assert len(jobs(second, "aiida.calculations:eipnn.train")) == 2
    assert second.outputs.pretrained.uuid == first.outputs.pretrained.uuid

    history = read_history(second)
    assert history.batches == ("test", "initial", "i001")
    assert [item.number for item in history.assessed] == [1, 2]
    assert {point.id for point in history.points} == {
        point.id for point in read_history(whole).points
    }
    lineage = trace(second)
    assert {point.batch for point in lineage.points} == {"initial", "i001"}
    assert len(lineage.test_points) == 3
    runs = {node.uuid for loop in (first, second) for node in jobs(loop)}
    done = [point for point in lineage.points if point.state is PointState.DONE]
    assert done
    assert {point.pw_uuid for point in done} <= runs
    assert unexplained_inputs(second.outputs.committee, second) == []
    write_report(second, tmp_path / "report.html")
