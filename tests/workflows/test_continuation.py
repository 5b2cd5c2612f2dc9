"""A loop goes on where another one ended or broke; DFT is not repeated."""

import copy
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from aiida.common.links import LinkType
from aiida.engine import run_get_node
from aiida.manage.caching import enable_caching
from aiida.orm import CalcJobNode, QueryBuilder, WorkChainNode, load_node

from aiida_eipnn.calculations import loop as loop_functions
from aiida_eipnn.calculations.evaluate import EvaluateCalculation
from aiida_eipnn.cli.dry_run import n_labelled
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.reports.history import read_history
from aiida_eipnn.reports.lineage import trace, unexplained_inputs
from aiida_eipnn.reports.points import PointState
from aiida_eipnn.reports.report import write_report
from aiida_eipnn.science.eip.engine import label_with_eips
from aiida_eipnn.workflows import label_dft
from aiida_eipnn.workflows.active_learning import ActiveLearningWorkChain
from aiida_eipnn.workflows.builder import Codes, Start
from aiida_eipnn.workflows.continuation import must_train
from aiida_eipnn.workflows.label_dft import pw_inputs

ROOT = Path(__file__).parents[2]
PW = "aiida.calculations:quantumespresso.pw"
EIPS = ["stillinger-weber[hauch-1999]", "lennard-jones[epsilon=0.4,sigma=2.1]"]
# Potentials in Python, labels to look up, two networks that learn next to nothing: what is asked
# here is who asks for what. Their heads are drawn by the seed too.
FAST = {
    "n_members": 2,
    "n_heads": 3,
    "n_pretrained": 1,
    "pretrain": {"steps": 10},
    "train_scratch": False,
    "split": {"test": 3, "initial": 3},
    "acquisition": {"n_select": 2},
    "extend": {"recipes": []},
}
WHOLE: dict[str, WorkChainNode] = {}


def merged(overrides, changes):
    overrides = copy.deepcopy(overrides)
    for key, value in changes.items():
        overrides[key] = {**overrides.get(key, {}), **value} if isinstance(value, dict) else value
    return overrides


@pytest.fixture
def stored(small_loop):
    """Return what stands for DFT labels."""
    truth = label_with_eips(small_loop.pool, ["stillinger-weber"])
    return replace(truth.labelled(), sources=np.array(["dft"]))


@pytest.fixture
def builder(torch, job_code, small_loop, stored):
    """Return a function that makes the builder of a small loop, without pw.x unless it is given."""

    def make(pw=None, **changes):
        pool = small_loop.pool
        known = {} if pw else {"stored_labels": LabelsData.from_value(stored, level={"code": "x"})}
        return ActiveLearningWorkChain.get_builder_from_protocol(
            Codes(pw=pw, job=job_code),
            Start(pool=ConfigurationsData.from_value(pool), eips=EIPS, **known),
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


def asked(loop):
    """Return for what a loop asked DFT."""
    links = loop.base.links.get_outgoing(link_type=LinkType.CALL_WORK).all_link_labels()
    return [label for label in links if label.startswith("dft_")]


def same_choices(one, other):
    np.testing.assert_array_equal(one.ids(), other.ids())
    np.testing.assert_allclose(one.value().scores, other.value().scores, rtol=1e-6)


def test_a_loop_on_stored_labels_needs_no_pw(whole, tmp_path):
    assert not jobs(whole)
    record = whole.outputs.history["iterations"][0]
    # Three were asked for; the hopeless ones have no stored label.
    assert 1 <= record["n_training_labels"] <= 3
    assert record["committee"]["forces_mae"] > 0
    facts = (whole.outputs.committee.base.attributes.get(key) for key in ("n_members", "n_drawn"))
    assert tuple(facts) == (2, 3)
    kinds = record["uncertainties"]
    assert kinds["forces_std"]["calibration"]["scale"] > 0
    assert kinds.keys() == {"forces_std", "energy_std", "strangeness", "atom_energy_std"}
    assert all(-1 <= found["panel"]["spearman"] <= 1 for found in kinds.values())
    assert all(found["panel"]["ence"] >= 0 for found in kinds.values())
    report = tmp_path / "report.html"
    write_report(whole, report)
    assert "meV/Å" in report.read_text()


def test_the_science_layer_alone_asks_for_the_same(whole, stored, small_loop, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import workchain_arm

    expected = workchain_arm.choices_of_workchain(whole)
    settings = workchain_arm.settings_of(whole.inputs)
    found = workchain_arm.choices_of_science(small_loop.pool, stored, settings)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]
    assert [len(ids) for ids in found] == [2]


def test_a_finished_loop_goes_on_as_if_it_had_had_the_larger_budget(whole, builder, tmp_path):
    first = one_iteration(builder)
    assert first.outputs.history["stop"]["reason"] == "max_iterations"

    second = go_on(first, overrides={"stop": {"max_iterations": 2}})

    same_choices(second.outputs.iterations.i001.choice, whole.outputs.iterations.i001.choice)
    assert second.outputs.history["iterations"][:1] == first.outputs.history["iterations"]
    assert [item["iteration"] for item in second.outputs.history["iterations"]] == [1, 2]
    errors = [loop.outputs.history["iterations"][1]["committee"] for loop in (second, whole)]
    assert errors[0]["forces_mae"] == pytest.approx(errors[1]["forces_mae"], rel=1e-6)
    # Of DFT, EIP labels and trainings only what was not there was made.
    assert asked(first) == ["dft_test", "dft_initial"]
    assert asked(second) == ["dft_i001"]
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
    assert any(point.state is PointState.DONE for point in lineage.points)
    assert unexplained_inputs(second.outputs.committee, second) == []
    write_report(second, tmp_path / "report.html")


def one_iteration(builder):
    """Return a loop of one iteration, of what the uninterrupted one has computed."""
    with enable_caching():
        _, node = run_get_node(builder(stop={"max_iterations": 1}))
    assert node.is_finished_ok, node.exit_message
    return node


def test_what_pw_had_finished_is_taken_when_a_loop_broke_over_its_labels(
    builder, pw_code, pseudo_family, monkeypatch
):
    assert pseudo_family
    started = iter(range(10))

    def start(*arguments):
        if next(started) == 2:
            raise RuntimeError("power failure")
        return pw_inputs(*arguments)

    made = builder(
        pw_code,
        split={"test": 3, "initial": 1},
        finetune={"validation_fraction": 0.0},
        stop={"max_iterations": 1},
    )
    with monkeypatch.context() as patch:
        patch.setattr(label_dft, "pw_inputs", start)
        patch.setattr(label_dft, "merge_all", lambda parts: [][len(parts)])
        _, broken = run_get_node(made)
    assert broken.exit_status == 403
    assert "test_labels" not in broken.outputs
    assert len(jobs(broken)) == 2
    cutoff = {"pw_base": {"pw": {"parameters": {"SYSTEM": {"ecutwfc": 25.0}}}}}
    with pytest.raises(ValueError, match="of different levels of theory"):
        ActiveLearningWorkChain.get_builder_continue(broken, {"dft": cutoff})

    made = ActiveLearningWorkChain.get_builder_continue(broken)
    assert n_labelled(made) == 2
    _, second = run_get_node(made)

    assert second.is_finished_ok, second.exit_message
    first, again = (
        {
            run.caller.base.links.get_incoming(link_type=LinkType.CALL_WORK).one().link_label
            for run in jobs(loop)
        }
        for loop in (broken, second)
    )
    assert len(again) == 2  # one of the test set, and the one to begin with
    assert not first & again
    history, lineage = read_history(second), trace(second)
    assert {f"dft_{point.id}" for point in history.points} == first | again
    points = [*lineage.points, *lineage.test_points]
    runs = {run.pk for loop in (broken, second) for run in jobs(loop)}
    assert {point.pw_pk for point in points} == runs


def test_predictions_that_take_longer_than_a_job_may_are_made_by_several(
    whole, builder, monkeypatch
):
    # After each batch of six the time is up.
    monkeypatch.setattr(EvaluateCalculation, "_max_seconds", lambda _: 0.0)
    with enable_caching():
        _, loop = run_get_node(builder(stop={"max_iterations": 1}, evaluate={"batch_size": 6}))

    assert loop.is_finished_ok, loop.exit_message
    evaluations = sorted(jobs(loop, "aiida.calculations:eipnn.evaluate"), key=lambda job: job.pk)
    assert [job.exit_status for job in evaluations] == [400, 400, 0]
    assert ["parent_folder" in job.inputs for job in evaluations] == [False, True, True]
    assert all(job.outputs.remote_folder.is_cleaned for job in evaluations)
    predictions, expected = (
        node.outputs.iterations.i001.predictions.value() for node in (loop, whole)
    )
    np.testing.assert_allclose(predictions.forces, expected.forces, rtol=1e-6)


def test_a_loop_that_excepted_has_its_labels_and_trains_again(whole, builder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("disk full")

    with monkeypatch.context() as patch, enable_caching():
        patch.setattr(loop_functions, "assess", fail)
        with pytest.raises(RuntimeError, match="disk full"):
            run_get_node(builder(stop={"max_iterations": 2}))
    query = QueryBuilder().append(WorkChainNode, filters={"attributes.process_state": "excepted"})
    broken = query.order_by({WorkChainNode: {"id": "desc"}}).first(flat=True)
    assert broken.is_excepted

    with enable_caching():
        second = go_on(broken)

    same_choices(second.outputs.iterations.i001.choice, whole.outputs.iterations.i001.choice)
    assert asked(broken) == ["dft_test", "dft_initial"]
    assert asked(second) == ["dft_i001"]
    assert [item.number for item in read_history(second).assessed] == [1, 2]


def test_a_loop_that_could_not_choose_goes_on_with_other_settings(whole, builder):
    wrong = {"n_select": 100, "allow_fewer": False}
    with enable_caching():
        _, broken = run_get_node(builder(acquisition=wrong, stop={"max_iterations": 2}))
    assert broken.exit_status == 410

    with enable_caching():
        second = go_on(broken, overrides={"acquisition": {"n_select": 2}})

    same_choices(second.outputs.iterations.i001.choice, whole.outputs.iterations.i001.choice)


def test_labels_that_are_added_are_learnt_before_more_is_asked_for(whole, builder, small_loop):
    first = one_iteration(builder)
    more = whole.outputs.iterations.i001.labels
    pool = small_loop.pool
    known = ConfigurationsData.from_value(pool.take(pool.rows_of(more.value().labelled().ids)))

    second = go_on(
        first,
        overrides={"stop": {"max_iterations": 2}},
        known_configurations=known,
        known_labels=LabelsData.from_value(more.value().labelled(), level=more.level),
    )

    assert not asked(second)
    one, two = second.outputs.history["iterations"]
    n_more = more.base.attributes.get("n_labels")
    assert two["n_training_labels"] == one["n_training_labels"] + n_more > one["n_training_labels"]
    # They were not paid for here.
    assert two["n_dft_labels"] == one["n_dft_labels"]
    assert {point.batch for point in trace(second).points} == {"initial", "known"}


def test_what_cannot_be_changed_is_refused_with_what_to_do(whole):
    go_on = ActiveLearningWorkChain.get_builder_continue
    more = {"stop": {"max_iterations": 5}}
    with pytest.raises(ValueError, match="would stop at once, since iteration 2 of 2 is done"):
        go_on(whole)
    with pytest.raises(ValueError, match="split cannot be changed"):
        go_on(whole, {**more, "split": {"test": 5}})
    with pytest.raises(ValueError, match=r"dft\.stored cannot be changed"):
        go_on(whole, {**more, "dft": {"stored": 1}})
    with pytest.raises(ValueError, match="explored nothing between its batches"):
        go_on(whole, {**more, "extend": {"recipes": [{"config_type": "md", "count": 7}]}})
    with pytest.raises(ValueError, match="is no loop"):
        go_on(whole.called[0])


@pytest.mark.parametrize(
    ("choices", "labels", "known", "trains"),
    [
        ((), {"initial": 8}, {}, False),
        ((), {"initial": 8, "known": 5}, {}, True),
        ((), {"initial": 8}, {"labels": None}, True),
        (("i001",), {"initial": 8, "known": 5}, {}, False),
        (("i001",), {"initial": 8, "i001": 2}, {}, True),
    ],
    ids=["nothing new", "taken and not learnt", "to be taken", "chosen first", "a batch"],
)
def test_a_loop_that_goes_on_trains_where_there_is_something_to_learn(
    choices, labels, known, trains
):
    history = {"iterations": [{"n_training_labels": 8}]}
    nodes = {
        name: SimpleNamespace(base=SimpleNamespace(attributes={"n_labels": number}))
        for name, number in {"test": 3, **labels}.items()
    }
    previous = {"history": history, "choices": dict.fromkeys(choices), "labels": nodes}
    assert must_train(previous, known) == trains


def test_what_is_made_again_is_what_the_overrides_change(whole):
    def previous(**overrides):
        changes = {"stop": {"max_iterations": 5}, **overrides}
        return dict(ActiveLearningWorkChain.get_builder_continue(whole, changes).previous)

    assert {"eip_labels", "pretrained"} <= previous().keys()
    changed = previous(network={"width": 8})
    assert "eip_labels" in changed
    assert "pretrained" not in changed
    assert not {"eip_labels", "pretrained"} & previous(label={"timeout": 9.0}).keys()
    assert previous()["labels"]["test"].uuid == whole.outputs.test_labels.uuid


def test_a_loop_that_goes_on_may_draw_heads(whole):
    made = ActiveLearningWorkChain.get_builder_continue(
        whole, {"n_heads": 8, "stop": {"max_iterations": 5}}
    )

    assert made.finetune["n_heads"] == made.scratch["n_heads"] == 8
    assert made.finetune["stage"] == "finetune"
    assert "n_heads" not in made.pretrain.get_dict()


def test_a_loop_that_goes_on_may_treat_its_files_otherwise(whole):
    assert whole.inputs.train.clean_workdir
    made = ActiveLearningWorkChain.get_builder_continue(
        whole, {"clean_workdir": False, "upload_above": 100, "stop": {"max_iterations": 5}}
    )

    assert made.upload_above == 100
    assert not any(place.clean_workdir for place in (made, made["label"], made["train"])), (
        "all jobs are treated alike"
    )


def test_a_loop_that_seems_to_run_is_continued_only_if_it_is_said_to_be_lost(whole):
    lost = WorkChainNode()
    lost.base.attributes.set_many(
        {"process_label": "ActiveLearningWorkChain", "process_state": "waiting"}
    )
    lost.process_type = whole.process_type
    lost.set_metadata_inputs(whole.get_metadata_inputs())
    for entry in whole.base.links.get_incoming(link_type=LinkType.INPUT_WORK).all():
        lost.base.links.add_incoming(entry.node, LinkType.INPUT_WORK, entry.link_label)
    lost.store()
    with pytest.raises(ValueError, match=r"is waiting.*--lost"):
        ActiveLearningWorkChain.get_builder_continue(lost)
    made = ActiveLearningWorkChain.get_builder_continue(lost, is_lost=True)
    assert made.pool.uuid == whole.inputs.pool.uuid
    assert "test" not in dict(made.previous.choices)


def test_the_command_of_the_page_says_what_would_be_done(whole, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "howto" / "continue.md").read_text()
    command, changes, code = (
        re.search(rf"```{language}\n(.*?)```", page, re.DOTALL)[1]
        for language in ("bash", "yaml", "python")
    )
    monkeypatch.chdir(tmp_path)
    Path("more.yaml").write_text(changes)
    words = [str(whole.pk) if word == "PK" else word for word in command.split()]
    assert words[:3] == ["verdi", "run", "workflows/active_learning.py"]

    monkeypatch.setattr(sys, "argv", [*words[2:], "--dry-run"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / words[2]), run_name="__main__")
    assert stop.value.code == 0
    # Six are there, and two that were chosen; ten at the end of each of four iterations.
    assert "DFT points: 48 at most" in (shown := capsys.readouterr().out)
    assert "8 of them are there already" in shown
    assert "nothing was stored" in shown

    monkeypatch.setattr(sys, "argv", [*words[2:], "--pool", "pool.xyz"])
    with pytest.raises(SystemExit, match="--pool cannot be given with --continue"):
        runpy.run_path(str(ROOT / words[2]), run_name="__main__")

    names = {"PK": whole.pk, "load_node": load_node}
    exec(code, {**names, "ActiveLearningWorkChain": ActiveLearningWorkChain}, names)
    assert names["builder"].stop["max_iterations"] == 6
