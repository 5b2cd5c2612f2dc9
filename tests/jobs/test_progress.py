"""Checkpoints that fit the same inputs only, and go as a whole."""

import shutil

import pytest

from aiida_eipnn.jobs import progress
from aiida_eipnn.jobs.progress import read_progress, remove_checkpoint, write_progress


def test_progress_is_that_of_a_job_with_the_same_inputs(tmp_path):
    path = tmp_path / "progress.json"
    assert read_progress(path, "mark") is None
    write_progress(path, "mark", {"rows": 3})
    assert read_progress(path, "mark") == {"rows": 3}
    with pytest.raises(ValueError, match="the checkpoint is that of another job"):
        read_progress(path, "other")


def test_a_checkpoint_that_is_removed_never_looks_whole(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "mark.json").write_text("{}")

    def killed(path, **_):
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(folder)
    assert not folder.exists()
    # What an earlier one left is in nobody's way.
    folder.mkdir()
    remove_checkpoint(folder)
    remove_checkpoint(folder)
    assert not any(tmp_path.iterdir())
    assert shutil.rmtree is progress.shutil.rmtree
