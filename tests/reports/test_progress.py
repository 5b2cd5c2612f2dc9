"""The lines that a running loop shows."""

import io
import logging
import re

import pytest
from aiida.common.log import AIIDA_LOGGER, LOG_LEVEL_REPORT
from aiida.engine import WorkChain, run
from aiida.orm import Dict

from aiida_eipnn.reports.progress import ProgressHandler, clock_text, show_progress


def record(process: str, text: str, pk: int = 1) -> logging.LogRecord:
    message = f"[{pk}|{process}|step]: {text}"
    return logging.LogRecord("aiida.x", LOG_LEVEL_REPORT, "", 0, message, (), None)


def lines_of(*records: logging.LogRecord) -> list[str]:
    stream = io.StringIO()
    times = iter([0.0, *(60.0 * number for number in range(1, 100))])
    handler = ProgressHandler(stream, lambda: next(times))
    for item in records:
        handler.emit(item)
    return stream.getvalue().splitlines()


def test_dft_points_are_counted_over_all_lanes_of_a_batch():
    assert lines_of(
        record("ActiveLearningWorkChain", "DFT labels: 3 configurations (initial)"),
        record("DftLaneWorkChain", "DFT labelled: configuration abcdef12, 1 of 2 in this lane"),
        record("DftLaneWorkChain", "DFT failed (402): configuration 12345678, 1 of 1 in this lane"),
        record("DftLaneWorkChain", "DFT labelled: configuration 87654321, 2 of 2 in this lane"),
    ) == [
        "[01:00] DFT labels (initial): 3 configurations",
        "[02:00] DFT labels (initial): 1 of 3 done",
        "[03:00] DFT labels (initial): 1 of 3 done, 1 failed",
        "[04:00] DFT labels (initial): 2 of 3 done, 1 failed",
    ]


def test_the_next_batch_counts_from_zero():
    lines = lines_of(
        record("ActiveLearningWorkChain", "DFT labels: 1 configurations (test)"),
        record("DftLaneWorkChain", "DFT labelled: configuration abcdef12, 1 of 1 in this lane"),
        record("ActiveLearningWorkChain", "DFT labels: 2 configurations (i001)"),
        record("DftLaneWorkChain", "DFT labelled: configuration abcdef12, 1 of 1 in this lane"),
    )
    assert lines[-1] == "[04:00] DFT labels (i001): 1 of 2 done"


def test_what_other_work_chains_say_is_dropped_but_an_interruption_is_not():
    assert lines_of(
        record("PwBaseWorkChain", "launching PwCalculation<90> iteration #1"),
        record("TrainBaseWorkChain", "launching TrainCalculation<9> iteration #1"),
        record("TrainBaseWorkChain", "TrainCalculation 9 was interrupted: it goes on"),
        logging.LogRecord("aiida", logging.WARNING, "", 0, "no report", (), None),
    ) == ["[01:00] TrainCalculation 9 was interrupted: it goes on"]


def test_an_iteration_is_shown_with_the_most_there_may_be(make_loop):
    loop = make_loop()
    text = "iteration 1: training on 5 DFT labels"
    assert lines_of(record("ActiveLearningWorkChain", text, loop.node.pk)) == [
        "[01:00] iteration 1 of at most 2: training on 5 DFT labels"
    ]


class ActiveLearningWorkChain(WorkChain):
    """Says what the real loop says, and does nothing."""

    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.input("stop", valid_type=Dict)
        spec.outline(cls.say)

    def say(self):
        self.report("pre-training on EIP labels")
        self.logger.warning("look here")


def test_a_real_report_is_one_line_and_aiida_itself_is_silent(aiida_profile, capsys):
    stream, console = io.StringIO(), io.StringIO()
    shown = logging.StreamHandler(console)
    AIIDA_LOGGER.addHandler(shown)
    try:
        with show_progress(stream) as handler:
            run(ActiveLearningWorkChain, stop=Dict({}))
        assert handler not in AIIDA_LOGGER.handlers
        run(ActiveLearningWorkChain, stop=Dict({}))
    finally:
        AIIDA_LOGGER.removeHandler(shown)
    # On a busy machine the first second may be over.
    assert re.fullmatch(r"\[00:\d\d\] pre-training on EIP labels\n", stream.getvalue())
    silent, spoken = console.getvalue().split("look here\n", 1)
    assert silent == ""  # a warning of a work chain remains
    assert "pre-training on EIP labels" in spoken


def test_the_database_log_stays_complete(aiida_profile):
    from aiida.engine import run_get_node
    from aiida.orm import Log

    with show_progress(io.StringIO()):
        _, node = run_get_node(ActiveLearningWorkChain, stop=Dict({}))
    messages = [log.message for log in Log.collection.get_logs_for(node)]
    assert any("pre-training on EIP labels" in message for message in messages)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "00:00"), (192, "03:12"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_time_is_short(seconds, text):
    assert clock_text(seconds) == text
