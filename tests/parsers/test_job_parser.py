"""How a job ended, from its status and its checkpoint: one test for each exit code."""

import io
import json

import pytest
from aiida.common import LinkType
from aiida.orm import CalcJobNode, Dict, FolderData
from aiida.plugins import ParserFactory

from aiida_eipnn.science.arrays import save_arrays
from aiida_eipnn.science.labels import Labels


@pytest.fixture
def parse(aiida_localhost, tmp_path):
    """Parse a job that left this status and these files."""

    def run(status: dict | str | None, *, entry_point: str = "eipnn.label", exit_status: int = 0):
        node = CalcJobNode(
            computer=aiida_localhost, process_type=f"aiida.calculations:{entry_point}"
        )
        node.set_option("resources", {"num_machines": 1, "num_mpiprocs_per_machine": 1})
        training = Dict({"stage": "finetune"}).store()
        node.base.links.add_incoming(training, LinkType.INPUT_CALC, "training")
        node.store()
        if exit_status:
            node.set_exit_status(exit_status)
            node.set_exit_message("the scheduler said so")
        retrieved = FolderData()
        if status is not None:
            content = status if isinstance(status, str) else json.dumps(status)
            retrieved.base.repository.put_object_from_filelike(
                io.BytesIO(content.encode()), "status.json"
            )
        retrieved.base.links.add_incoming(node, LinkType.CREATE, "retrieved")
        retrieved.store()
        parser = ParserFactory(entry_point)
        return parser.parse_from_node(
            node, store_provenance=False, retrieved_temporary_folder=str(tmp_path)
        )

    return run


def test_no_status_means_that_the_job_never_ran(parse):
    _, node = parse(None)
    assert node.exit_status == 300


def test_a_status_that_is_no_json_is_no_status(parse):
    _, node = parse("{half a fi")
    assert node.exit_status == 300


def test_the_reason_of_a_failed_job_reaches_the_user(parse):
    _, node = parse({"state": "failed", "reason": "the pool is empty"})
    assert node.exit_status == 310
    assert "the pool is empty" in node.exit_message


def test_a_job_that_is_done_without_results_is_an_error(parse):
    _, node = parse({"state": "done"})
    assert node.exit_status == 302


def test_a_job_that_still_runs_by_its_status_was_killed(parse):
    _, node = parse({"state": "running"})
    assert node.exit_status == 401


@pytest.mark.parametrize("state", ["running", "killed"])
def test_a_killed_job_with_a_checkpoint_can_go_on(parse, tmp_path, state):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "member_0.json").write_text("{}")
    outputs, node = parse({"state": state})
    assert node.exit_status == 400
    assert list(outputs["checkpoint"]["checksums"]) == ["checkpoint/member_0.json"]


def test_what_a_checkpoint_says_changes_with_what_it_holds(parse, tmp_path):
    (tmp_path / "checkpoint" / "chunk_000000").mkdir(parents=True)
    (tmp_path / "checkpoint" / "plan.json").write_text("{}")
    state, said = tmp_path / "checkpoint" / "chunk_000000" / "state.npy", []
    for content in (b"00", b"00", b"01"):
        state.write_bytes(content)
        outputs, _ = parse({"state": "interrupted"})
        said.append(outputs["checkpoint"].get_dict())
    assert sorted(said[0]["checksums"]) == [
        "checkpoint/chunk_000000/state.npy",
        "checkpoint/plan.json",
    ]
    assert said[0] == said[1]
    assert said[1] != said[2]


def test_a_job_whose_inputs_are_gone_says_which(parse):
    status = {"state": "inputs_gone", "reason": "configurations/pool/ids.npy was /a/ids.npy"}
    _, node = parse(status)
    assert node.exit_status == 403
    assert "configurations/pool/ids.npy was /a/ids.npy" in node.exit_message


def test_what_the_scheduler_found_is_not_hidden(parse):
    _, node = parse({"state": "running"}, exit_status=110)
    assert node.exit_status == 110


def test_a_job_without_memory_says_so_and_leaves_its_checkpoint(parse, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "member_0.json").write_text("{}")
    status = {"state": "out_of_memory", "reason": "OutOfMemoryError: tried to allocate 2 GiB"}
    outputs, node = parse(status, entry_point="eipnn.train")
    assert node.exit_status == 402
    assert "tried to allocate 2 GiB" in node.exit_message
    assert list(outputs["checkpoint"]["checksums"]) == ["checkpoint/member_0.json"]


def test_a_training_that_the_scheduler_killed_for_its_memory_says_so_with_its_checkpoint(
    parse, tmp_path
):
    _, node = parse({"state": "running"}, entry_point="eipnn.train", exit_status=110)
    assert node.exit_status == 402
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "member_0.json").write_text("{}")
    outputs, node = parse({"state": "running"}, entry_point="eipnn.train", exit_status=110)
    assert (node.exit_status, "the scheduler said so" in node.exit_message) == (402, True)
    assert "checkpoint" in outputs
    # Labels go on where they were.
    _, node = parse({"state": "running"}, exit_status=110)
    assert node.exit_status == 400


def test_labels_without_a_single_label_are_an_error_with_the_labels_attached(
    parse, tmp_path, rattled_silicon
):
    labels = Labels.missing(rattled_silicon(2), ["a"], "the model crashed")
    save_arrays(tmp_path / "output" / "labels", labels.arrays())
    (tmp_path / "output" / "metrics.json").write_text("{}")
    outputs, node = parse({"state": "done"})
    assert node.exit_status == 410
    assert outputs["labels"].value().failures()[0].reason == "the model crashed"
