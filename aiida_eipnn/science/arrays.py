"""Array types, and folders of ``.npy`` files: how every job and every node keeps its numbers."""

import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
StrArray = NDArray[np.str_]
Arrays = dict[str, NDArray[Any]]


def save_arrays(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write each array to ``folder/<name>.npy``, without pickles."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        partial = folder / f".{name}.npy"
        with partial.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        # A rename is atomic: a job killed here leaves the old file or the new one, never half.
        partial.replace(folder / f"{name}.npy")


def write_whole(path: Path, text: str) -> None:
    """Write a text file as a whole or not at all, as :func:`save_arrays` does with arrays.

    Of several processes that write the same file, the last one counts.
    """
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def load_arrays(folder: Path, *, mapped: bool = False) -> Arrays:
    """Read every ``.npy`` file of ``folder``, keyed by its name.

    Parameters
    ----------
    folder
        Where the files are.
    mapped
        Leave the arrays on disk, and read of them what is asked for.

    Raises
    ------
    FileNotFoundError
        If the folder holds none.
    """
    paths = sorted(path for path in folder.glob("*.npy") if not path.name.startswith("."))
    if not paths:
        raise FileNotFoundError(f"no .npy file in {folder}")
    mode: Literal["r"] | None = "r" if mapped else None
    return {path.stem: np.load(path, mmap_mode=mode, allow_pickle=False) for path in paths}


def forget(arrays: Iterable[NDArray[Any]]) -> None:
    """Give back the memory that was read of arrays on disk; they are read again when needed."""
    for array in arrays:
        if isinstance(array, np.memmap):
            array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
