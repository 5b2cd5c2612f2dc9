"""The loop on two-atom silicon with the real pw.x, KIM and torch."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from aiida.engine import run_get_node
from aiida.manage.caching import enable_caching
from aiida.orm import CalcJobNode, StructureData, WorkChainNode
from aiida.tools.archive import create_archive
from ase.build import bulk

from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.reports.lineage import trace, unexplained_inputs
from aiida_eipnn.reports.points import PointState
from aiida_eipnn.science.eip.engine import label_with_eips
from aiida_eipnn.science.labels import join_labels
from aiida_eipnn.workflows.active_learning import ActiveLearningWorkChain
from aiida_eipnn.workflows.builder import Codes, Start

EDIP = "EDIP_JustoBazantKaxiras_1998_Si__MO_958932894036_002"
# One loop serves all the tests that only look at it.
FINISHED: dict[str, WorkChainNode] = {}


@pytest.fixture
def builder(kim, torch, pw_code, job_code, pseudo_family, small_loop):
    def make(stored=None, **changes):
        overrides = copy.deepcopy(small_loop.overrides)
        for key, value in changes.items():
            overrides[key] = (
                {**overrides.get(key, {}), **value} if isinstance(value, dict) else value
            )
        pool = ConfigurationsData.from_value(small_loop.pool)
        return ActiveLearningWorkChain.get_builder_from_protocol(
            Codes(pw=None if stored else pw_code, job=job_code),
            Start(pool=pool, eips=small_loop.eips, stored_labels=stored),
            protocol="demo",
            overrides=overrides,
        )

    return make


@pytest.fixture
def loop(builder):
    if "loop" not in FINISHED:
        _, FINISHED["loop"] = run_get_node(builder())
    node = FINISHED["loop"]
    assert node.is_finished_ok, node.exit_message
    return node


def calculations_of(loop, kind):
    return [
        node
        for node in loop.called_descendants
        if isinstance(node, CalcJobNode) and node.process_type == f"aiida.calculations:{kind}"
    ]


def test_the_loop_stops_with_a_reason_after_the_iterations_it_was_given(loop):
    history = loop.outputs.history
    assert history["stop"]["reason"] == "max_iterations"
    assert len(history["iterations"]) == 2
    assert sorted(loop.outputs.iterations) == ["i001", "i002"]


def test_each_iteration_measures_the_committee_its_twin_and_the_best_eip(loop):
    for record in loop.outputs.history["iterations"]:
        for who in ("committee", "scratch", "best_eip"):
            assert record[who]["n_configurations"] > 0
            assert record[who]["forces_mae"] > 0
            assert record[who]["energy_mae"] > 0


def test_members_start_from_the_networks_that_were_pretrained(loop):
    pretrained, committee = loop.outputs.pretrained, loop.outputs.committee
    assert pretrained.base.attributes.get("n_members") == 1
    assert committee.base.attributes.get("n_members") == 2
    seeds = committee.base.attributes.get("seeds")
    assert pretrained.base.attributes.get("seeds") == seeds[:1]
    # Members that start from one network end apart.
    assert loop.outputs.predictions.value().forces_std.max() > 0


def test_held_out_labels_say_in_each_iteration_whether_eips_help(loop):
    for name, made in loop.outputs.iterations.items():
        verdict = made.verdict.get_dict()
        record = loop.outputs.history["iterations"][int(name[1:]) - 1]
        assert record["verdict"] == verdict
        assert verdict["text"].startswith("EIPs ")
        # Two members hold out one label each.
        assert verdict["n_held_out"] == 2
        # Forces of silicon potentials, and of DFT.
        assert 0.5 < verdict["agreement"] <= 1
    used = made.committee if verdict["eips_help"] else made.scratch
    assert loop.outputs.committee.uuid == used.uuid


def test_where_the_twin_from_scratch_is_clearly_better_it_is_used(loop, builder):
    made = builder(
        finetune={"learning_rate": 1e-9, "head_start": "new", "steps": 1, "min_epochs": 1},
        # Two held-out labels believe in what is clear only.
        scratch={"steps": 400},
        stop={"max_iterations": 1},
    )
    with enable_caching():
        outputs, node = run_get_node(made)
    assert node.is_finished_ok, node.exit_message
    iteration, record = outputs["iterations"]["i001"], outputs["history"]["iterations"][0]
    assert not iteration["verdict"]["eips_help"]
    assert outputs["committee"].uuid == iteration["scratch"].uuid
    assert outputs["predictions"].uuid == iteration["scratch_predictions"].uuid
    assert record["committee"] == record["scratch"]
    assert record["finetuned"]["forces_mae"] > record["scratch"]["forces_mae"]


def test_what_the_committee_finds_joins_the_pool(loop):
    (explored,) = calculations_of(loop, "eipnn.explore")
    assert "committee" in explored.inputs
    assert "eip" not in explored.inputs
    pool, extended = loop.inputs.pool.value(), loop.outputs.iterations.i001.pool.value()
    assert extended.ids[: len(pool)].tolist() == pool.ids.tolist()
    assert set(extended.ids[len(pool) :]) == set(explored.outputs.pool.value().ids)
    # EIPs say of it what they say of all, and so does the committee of the next iteration.
    labels = loop.outputs.iterations.i001.eip_labels.value()
    assert labels.ok[labels.rows_of(extended.ids[len(pool) :])].any(axis=1).all()
    predicted = set(loop.outputs.predictions.value().ids)
    assert set(extended.ids[len(pool) :]) <= predicted
    records = loop.outputs.history["iterations"]
    # One was asked for, and three were found.
    assert records[1]["n_candidates"] == records[0]["n_candidates"] + 2


def test_what_many_jobs_read_is_sent_once_and_linked_to(loop):
    uploads = {job.inputs.node.uuid: job for job in calculations_of(loop, "eipnn.upload")}
    extended = loop.outputs.iterations.i001
    large = (loop.inputs.pool, loop.outputs.eip_labels, extended.pool, extended.eip_labels)
    assert set(uploads) == {node.uuid for node in large}
    for kind in ("eipnn.train", "eipnn.evaluate"):
        for job in calculations_of(loop, kind):
            how = json.loads(job.base.repository.get_object_content(".aiida/calcinfo.json"))
            assert not {uuid for uuid, *_ in how["local_copy_list"]} & set(uploads)
            linked = {path for _, path, _ in how["remote_symlink_list"]}
            pool = job.inputs.configurations.pool
            assert f"{uploads[pool.uuid].get_remote_workdir()}/positions.npy" in linked


def test_folders_of_jobs_that_went_well_are_removed(loop):
    jobs = [
        job
        for kind in ("label", "train", "evaluate", "explore", "upload")
        for job in calculations_of(loop, f"eipnn.{kind}")
    ]
    assert len(jobs) > 10
    assert not [job for job in jobs if Path(job.get_remote_workdir()).exists()]


def test_a_continuation_may_explore_otherwise_or_no_more(loop):
    more = {"stop": {"max_iterations": 5}}
    go_on = ActiveLearningWorkChain.get_builder_continue
    recipes = [{"config_type": "md", "count": 7}]
    made = go_on(loop, {**more, "extend": {"recipes": recipes}})
    assert made.extend.recipes.get_list() == recipes
    assert made.extend.eip.uuid == loop.inputs.extend.eip.uuid
    # What drives dynamics is one of the EIPs.
    others = [EDIP, "Tersoff_LAMMPS_Tersoff_1989_Si__MO_000000000000_000"]
    made = go_on(loop, {**more, "eips": {"Si": others}})
    assert made["label"].job.eips.get_list() == others
    assert made.extend.eip.value == EDIP != loop.inputs.extend.eip.value
    assert "extend" not in go_on(loop, {**more, "extend": {"recipes": []}})._inputs(prune=True)
    made = go_on(loop, {**more, "extend": {"n_workers": 3}})
    assert made.extend.parameters.get_dict() == {"n_workers": 3}
    assert made.extend.recipes.get_list() == loop.inputs.extend.recipes.get_list()
    with pytest.raises(ValueError, match="recipes and n_workers can be changed"):
        go_on(loop, {**more, "extend": {"seed": 1}})


def test_labels_grow_by_what_was_asked_for(loop):
    first, second = (record["n_dft_labels"] for record in loop.outputs.history["iterations"])
    assert second - first == 1
    choice = loop.outputs.iterations.i001.choice
    assert set(choice.ids()) == set(loop.outputs.iterations.i001.labels.value().ids)
    assert np.isfinite(choice.value().scores).all()


def test_a_dft_run_that_fails_is_recorded_and_the_loop_goes_on(loop):
    failures = [
        failure
        for name in ("test_labels", "initial_labels")
        for failure in loop.outputs[name].value().failures()
    ]
    assert failures
    assert all("pw.x" in failure.reason for failure in failures)


def test_a_model_that_is_not_installed_is_recorded_and_never_chosen(loop, small_loop):
    missing = small_loop.eips[-1]
    failures = loop.outputs.eip_labels.value().failures()
    assert {missing} <= {failure.source for failure in failures}
    assert loop.outputs.selection.value().counts[missing] == 0


def test_an_eip_that_failed_on_a_configuration_is_not_chosen_there(loop):
    # The pool that it chose for had grown by then.
    labels = loop.outputs.iterations.i001.eip_labels.value()
    selection = loop.outputs.selection.value()
    ok = labels.ok[labels.rows_of(selection.ids)]
    for row, column in enumerate(selection.choice):
        assert column == ok.shape[1] or ok[row, column]


def test_no_training_ever_saw_a_test_configuration(loop):
    held_out = set(loop.outputs.test_labels.value().ids)
    trainings = calculations_of(loop, "eipnn.train")
    assert len(trainings) == 7  # one pre-training; classifier, committee and twin, twice each
    for training in trainings:
        excluded = {name for node in training.inputs.exclude.values() for name in node.ids()}
        assert held_out <= excluded
        links = training.base.links.get_incoming().all()
        nodes = [link.node for link in links if link.link_label.startswith("labels__")]
        assert not held_out & {name for node in nodes for name in node.value().ids}


def test_everything_that_made_the_committee_has_a_creator_or_came_from_the_user(loop):
    assert unexplained_inputs(loop.outputs.committee, loop) == []


def test_the_lineage_of_the_committee_lists_every_pw_run_that_taught_it(loop):
    lineage = trace(loop.outputs.committee)
    taught = {
        str(name)
        for labels in (loop.outputs.initial_labels, loop.outputs.iterations.i001.labels)
        for name in labels.value().labelled().ids
    }
    points = [point for point in lineage.points if point.state is PointState.DONE]
    assert {point.id for point in points} == taught
    runs = {node.uuid for node in calculations_of(loop, "quantumespresso.pw")}
    assert {point.pw_uuid for point in points} <= runs


def test_an_archive_of_a_loop_tells_elsewhere_what_the_loop_tells_here(loop, tmp_path):
    archive, page = tmp_path / "loop.aiida", tmp_path / "report.html"
    create_archive([loop], filename=archive)
    folder = Path(sys.executable).parent
    environment = os.environ | {"AIIDA_PATH": str(tmp_path), "PYTHONWARNINGS": "ignore"}

    def call(command, *arguments):
        return subprocess.run(
            [folder / command, *map(str, arguments)],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    make = ("profile", "setup", "core.sqlite_dos", "--non-interactive", "--profile-name", "other")
    call("verdi", *make, "--email", "reader@localhost", "--broker", "none")
    call("verdi", "archive", "import", archive)
    there = json.loads(call("aiida-eipnn", "lineage", loop.uuid, "--json"))
    here = json.loads(json.dumps(trace(loop).to_dict()))
    assert without_pks(there) == without_pks(here)
    assert "DFT points" in call("aiida-eipnn", "status", loop.uuid)
    call("aiida-eipnn", "report", loop.uuid, "-o", page)
    assert loop.uuid in page.read_text()


def without_pks(value):
    """Return nested values without PKs, which are others in each database."""
    if isinstance(value, dict):
        return {key: without_pks(item) for key, item in value.items() if not key.endswith("pk")}
    return [without_pks(item) for item in value] if isinstance(value, list) else value


def test_the_same_seed_gives_the_same_choices_labels_and_networks(loop, builder):
    first = loop.outputs
    by_dft = (first.test_labels, first.initial_labels, first.iterations.i001.labels)
    stored = join_labels([labels.value().labelled() for labels in by_dft])
    # DFT is looked up, everything of ours is computed again.
    outputs, again = run_get_node(
        builder(stored=LabelsData.from_value(stored, level=by_dft[0].level))
    )
    assert again.is_finished_ok, again.exit_message
    assert not any(
        node.base.caching.is_created_from_cache for node in calculations_of(again, "eipnn.train")
    )
    for mine, theirs in (
        (outputs["iterations"]["i001"]["choice"], first.iterations.i001.choice),
        (outputs["iterations"]["i001"]["labels"], by_dft[-1]),
        (outputs["eip_labels"], first.eip_labels),
        (outputs["selection"], first.selection),
    ):
        for name in mine.get_arraynames():
            # Where no DFT label is, pw.x has another reason than the stored labels.
            is_reason = name in ("status", "reasons") and theirs is by_dft[-1]
            if name != "origins" and not is_reason:
                np.testing.assert_array_equal(mine.get_array(name), theirs.get_array(name))
    weights = [
        node.base.repository.get_object_content("weights.safetensors", mode="rb")
        for node in (outputs["committee"], first.committee)
    ]
    assert weights[0] == weights[1]


def test_known_labels_are_learnt_and_pseudo_labels_are_an_option(loop, builder, small_loop):
    known = loop.outputs.initial_labels.value().labelled()
    pool = small_loop.pool
    made = builder(
        split={"test": 2, "initial": 0},
        train_scratch=False,
        use_pseudo_labels=True,
        stop={"max_iterations": 1},
    )
    made.known.configurations = ConfigurationsData.from_value(pool.take(pool.rows_of(known.ids)))
    made.known.labels = LabelsData.from_value(known)
    with enable_caching(identifier="aiida.calculations:quantumespresso.pw"):
        outputs, node = run_get_node(made)
    assert node.is_finished_ok, node.exit_message
    record = outputs["history"]["iterations"][0]
    assert record["n_training_labels"] == len(known)
    assert record["n_dft_labels"] == 2  # the test set alone was paid for
    assert not set(known.ids) & set(outputs["test_labels"].value().ids)
    (finetuning,) = (
        calculation
        for calculation in calculations_of(node, "eipnn.train")
        if calculation.inputs.training["stage"] == "finetune"
    )
    assert "pseudo_labels" in finetuning.inputs
    assert finetuning.outputs.metrics["label_model"]["n_labels"] == len(known)
    assert "scratch" not in outputs["iterations"]["i001"]


def test_a_step_that_cannot_be_done_says_why_and_what_was_done_is_free_with_caching(loop, builder):
    made = builder(acquisition={"n_select": 100, "allow_fewer": False}, stop={"max_iterations": 5})
    with enable_caching():
        _, node = run_get_node(made)
    assert node.exit_status == 410
    assert "cannot pick 100" in node.exit_message
    assert "committee" in node.outputs.iterations.i001
    jobs = [job for job in node.called_descendants if isinstance(job, CalcJobNode)]
    fresh = [job for job in jobs if not job.base.caching.is_created_from_cache]
    # A pw.x run that failed, and labels of a model that is not installed, are tried again; and
    # what the first loop had put on the computer is gone.
    again_wanted = {"quantumespresso.pw", "eipnn.label", "eipnn.upload"}
    assert {job.process_type.removeprefix("aiida.calculations:") for job in fresh} <= again_wanted
    assert not any(
        job.is_finished_ok
        for job in fresh
        if job.process_type == "aiida.calculations:quantumespresso.pw"
    )


def test_asking_for_more_than_the_pool_has_is_refused_at_once(builder):
    with pytest.raises(ValueError, match="the pool has 18"):
        run_get_node(builder(split={"test": 20, "initial": 20}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": {"dft_budget": 5}}, "asks for 6 DFT labels .* more than stop.dft_budget, 5"),
        ({"n_members": 1}, "one network without heads is sure of everything"),
        ({"gate": {"min_contacts": 0.6}}, r"gate holds min_contact only, not \['min_contacts'\]"),
        ({"gate": {"min_contact": "much"}}, "gate.min_contact must be a number from 0 on"),
        ({"split": {"test": "40"}}, "split holds whole numbers from 0 on, got {'test': '40'}"),
        ({"stop": {"max_iterations": None}}, "max_iterations is null"),
        ({"acquisition": {"min_uncertainty": -1.0}}, "min_uncertainty is -1.0"),
    ],
)
def test_what_would_only_break_later_is_refused_at_once(builder, changes, message):
    with pytest.raises(ValueError, match=message):
        run_get_node(builder(**changes))


def test_one_network_may_choose_by_something_else_than_its_spread(builder):
    for acquisition in ({"strategy": "farthest"}, {"measure": "atom_density"}):
        made = builder(n_members=1, acquisition=acquisition)
        assert ActiveLearningWorkChain.spec().inputs.validate(made._inputs(prune=True)) is None


def test_known_labels_of_another_level_are_refused_before_anything_is_paid(builder, small_loop):
    known = label_with_eips(small_loop.pool.take(range(4)), ["stillinger-weber"])
    labels = replace(known, sources=np.array(["dft"]))
    made = builder()
    made.known.configurations = ConfigurationsData.from_value(small_loop.pool)
    made.known.labels = LabelsData.from_value(labels, level={"functional": "PBE"})
    with pytest.raises(ValueError, match=r"of different levels of theory.*functional"):
        run_get_node(made)


def test_an_empty_pool_is_refused_at_once(builder):
    from aiida_eipnn.science.configurations import Configurations

    made = builder()
    made.pool = ConfigurationsData.from_value(Configurations.from_atoms([], []))
    with pytest.raises(ValueError, match="the pool is empty"):
        run_get_node(made)


def test_a_protocol_without_eips_for_an_element_says_so(pw_code, job_code, pseudo_family):
    with pytest.raises(ValueError, match=r"names EIPs for .*not for Sn"):
        ActiveLearningWorkChain.get_builder_from_protocol(
            Codes(pw=pw_code, job=job_code),
            Start(structures=[StructureData(ase=bulk("Sn", "diamond", a=6.49))]),
            protocol="demo",
        )


@pytest.mark.parametrize("protocol", ["demo", "fast", "balanced", "stringent"])
def test_each_protocol_fills_every_input(pw_code, job_code, pseudo_family, protocol):
    made = ActiveLearningWorkChain.get_builder_from_protocol(
        Codes(pw=pw_code, job=job_code),
        Start(structures=[StructureData(ase=bulk("Si"))]),
        protocol=protocol,
        overrides={"dft": {"pw_base": {"pseudo_family": pseudo_family}}},
    )
    assert len(made.label.job.eips.get_list()) >= 6
    assert made.finetune["stage"] == "finetune"
    assert made.dft.pw_base.pw.parameters["SYSTEM"]["occupations"] == "smearing"
    assert len(made.train.job.seeds.get_list()) >= 4


def test_the_number_of_heads_is_that_of_both_fine_tunings(builder):
    made = builder(n_members=1, n_heads=8, scratch={"n_heads": 4})
    assert (made.finetune["n_heads"], made.scratch["n_heads"]) == (8, 4)
    assert len(made.train.job.seeds.get_list()) == 1
    usual = builder()
    for name in ("pretrain", "classify", "finetune", "scratch"):
        assert "n_heads" not in usual[name].get_dict()
    with pytest.raises(ValueError, match=r"n_heads of finetune must be .* not -1"):
        builder(n_heads=-1)
    with pytest.raises(ValueError, match="only stage finetune draws heads"):
        builder(pretrain={"n_heads": 2})


def test_training_may_go_to_a_gpu_of_another_computer(builder, aiida_code_installed, job_code):
    other = aiida_code_installed(filepath_executable=str(job_code.filepath_executable), label="gpu")
    made = builder(train={"device": "cuda"}, finetune={"mixed_precision": "tf32"})
    for job in (made.train.job, made.evaluate):
        job.code = other
        job.metadata.options.queue_name = "gpu"
        job.metadata.options.custom_scheduler_commands = "#SBATCH --gpus=1"
    assert made.train.job.parameters["device"] == "cuda"
    assert made.finetune["mixed_precision"] == "tf32"
    assert made.train.job.metadata.options.max_wallclock_seconds
    assert "queue_name" not in made.label.job.metadata.options
    assert made.label.job.code.pk == job_code.pk


def test_each_stage_may_run_in_a_place_of_its_own(
    pw_code, job_code, aiida_code_installed, pseudo_family, small_loop
):
    gpu = aiida_code_installed(filepath_executable=str(job_code.filepath_executable), label="gpu")

    def made(options, **stages):
        return ActiveLearningWorkChain.get_builder_from_protocol(
            Codes(pw=pw_code, job=job_code, stages=stages),
            Start(structures=[StructureData(ase=bulk("Si"))]),
            protocol="fast",
            overrides={"dft": small_loop.overrides["dft"]},
            options=options,
        )

    options = {
        "account": "me",
        "max_wallclock_seconds": 600,
        "train": {"queue_name": "gpu", "max_wallclock_seconds": 7200},
        "dft": {"queue_name": "cpu", "resources": {"num_mpiprocs_per_machine": 16}},
        "explore": {"queue_name": "long"},
    }
    loop = made(options, train=gpu)
    places = {
        "label": loop.label.job,
        "train": loop.train.job,
        "evaluate": loop.evaluate,
        "explore": loop.explore,
        "extend": loop.extend,
        "dft": loop.dft.pw_base.pw,
    }
    found = {name: place.metadata.options for name, place in places.items()}
    assert {name: options.get("queue_name") for name, options in found.items()} == {
        **dict.fromkeys(("label", "evaluate")),
        **dict.fromkeys(("explore", "extend"), "long"),
        "train": "gpu",
        "dft": "cpu",
    }
    assert {options["account"] for options in found.values()} == {"me"}
    assert found["train"]["max_wallclock_seconds"] == 7200
    assert found["label"]["max_wallclock_seconds"] == 600
    assert found["dft"]["resources"] == {"num_machines": 1, "num_mpiprocs_per_machine": 16}
    # Several processes want MPI, and one does not.
    assert found["dft"]["withmpi"]
    assert not made({}).dft.pw_base.pw.metadata.options.withmpi
    assert loop.train.job.code.pk == gpu.pk
    assert loop.label.job.code.pk == job_code.pk
    with pytest.raises(ValueError, match=r"no stages \['training'\]"):
        made({}, training=gpu)
    with pytest.raises(ValueError, match="options of train are given by name"):
        made({"train": "gpu"})


def test_a_loop_without_anything_to_label_with_is_refused(job_code, small_loop):
    with pytest.raises(ValueError, match=r"give a code for pw\.x, or stored DFT labels"):
        ActiveLearningWorkChain.get_builder_from_protocol(
            Codes(job=job_code),
            Start(pool=ConfigurationsData.from_value(small_loop.pool), eips=small_loop.eips),
            protocol="demo",
            overrides=small_loop.overrides,
        )
