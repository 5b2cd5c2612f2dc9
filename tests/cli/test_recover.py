"""`aiida-eipnn recover`: what it does to jobs; tests/workflows/test_accidents.py has the rest."""

import os

import pytest
from aiida.engine import ProcessState
from aiida.orm import CalcJobNode

from aiida_eipnn.cli import recover


@pytest.fixture
def running_job(aiida_profile_clean, aiida_localhost):
    """Return a function that stores a job which AiiDA believes to run as some process."""

    def make(number, folder):
        job = CalcJobNode(computer=aiida_localhost)
        job.set_process_state(ProcessState.WAITING)
        job.store()
        job.base.attributes.set_many({"state": "withscheduler", "remote_workdir": str(folder)})
        job.set_job_id(str(number))
        return job

    return make


def test_a_job_whose_number_a_stranger_has_is_told_to_have_ended(running_job, tmp_path):
    job = running_job(os.getpid(), tmp_path)

    assert recover.forget_reused_ids() == 1
    assert job.get_job_id() == recover.NO_PROCESS


def test_a_job_that_runs_or_has_ended_is_left_alone(running_job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = [running_job(os.getpid(), tmp_path), running_job(recover.NO_PROCESS, tmp_path)]

    assert recover.forget_reused_ids() == 0
    assert jobs[0].get_job_id() == str(os.getpid())


def test_the_parts_of_a_daemon_are_told_from_those_of_others():
    verdi = ["/bin/python", "/bin/verdi", "-p", "mine", "daemon"]
    assert recover.part_of([*verdi, "worker"], "mine", None) == "worker"
    assert recover.part_of([*verdi, "broker", "--service-dir", "x"], "mine", None) == "broker"
    assert recover.part_of([*verdi, "worker"], "other", None) is None
    assert recover.part_of([*verdi, "status"], "mine", None) is None
    statistics = ["python", "-c", "stats", "--endpoint", "ipc:///tmp/abc/circus.c.sock"]
    assert recover.part_of(statistics, "mine", "/tmp/abc") == "statistics"
    assert recover.part_of(statistics, "mine", "/tmp/ab") is None
