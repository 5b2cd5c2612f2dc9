"""How far a job is, in a file of its checkpoint that fits the same inputs only."""

import json
import shutil
from pathlib import Path
from typing import Any

from aiida_eipnn.science.arrays import write_whole


def read_progress(path: Path, mark: str) -> Any:
    """Return what was written, ``None`` where nothing was.

    Raises
    ------
    ValueError
        If the checkpoint is that of a job with other inputs, which have another ``mark``.
    """
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    if content["mark"] != mark:
        raise ValueError(
            "the checkpoint is that of another job: its inputs are not those of this one; start "
            "without `parent_folder`"
        )
    return content["progress"]


def remove_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of a job that is done, all of it as one.

    Under another name first: a job that is killed half way would leave one that looks whole.
    """
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        shutil.rmtree(folder.rename(hidden))


def write_progress(path: Path, mark: str, progress: Any) -> None:
    """Write how far the job is, once what it tells of is there."""
    write_whole(path, json.dumps({"mark": mark, "progress": progress}, sort_keys=True))
