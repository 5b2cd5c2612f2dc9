"""Array types, and folders of ``.npy`` files: how every job and every node keeps its numbers."""

import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.lib import format as npy
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


def save_parts(
    folder: Path,
    rows: Mapping[str, int],
    parts: Iterable[Mapping[str, NDArray[Any]]],
    done: Mapping[str, int] | None = None,
    report: Callable[[dict[str, int]], None] = lambda _: None,
) -> bool:
    """Write arrays that come in parts, so that no more than a part is in memory.

    Parameters
    ----------
    folder
        Where to write them, as :func:`save_arrays` does.
    rows
        Length of each array, all parts together.
    parts
        Arrays of the same names, each as many rows as it has. They may end early.
    done
        How many rows of each are there from an earlier call that ended early, or was killed: the
        parts go on from there. Rows beyond are written anew.
    report
        Is told after each part how many rows of each are there.

    Returns
    -------
    bool
        Whether all rows are there: before, :func:`load_arrays` does not see the arrays.

    Raises
    ------
    ValueError
        If the parts have more rows than announced, or differ in type, or if what should be there
        is not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = dict(done) if done else dict.fromkeys(rows, 0)
    types = dict[str, np.dtype[Any]]()
    with ExitStack() as stack:
        streams = {}
        for name in rows:
            path = folder / f".{name}.npy"
            if found[name] and not path.exists():
                # All rows were there once: the name of the whole says so.
                (folder / f"{name}.npy").replace(path)
            streams[name] = stack.enter_context(path.open("r+b" if found[name] else "wb"))
            if found[name]:
                types[name] = _go_to(streams[name], found[name])
        for part in parts:
            for name, stream in streams.items():
                array = np.ascontiguousarray(part[name])
                if name not in types:
                    types[name] = array.dtype
                    _write_header(stream, array, rows[name])
                if array.dtype != types[name]:
                    raise ValueError(f"parts of {name} are of {types[name]} and {array.dtype}")
                stream.write(array.tobytes())
                found[name] += len(array)
                stream.flush()
            report(dict(found))
    if any(found[name] > rows[name] for name in rows):
        raise ValueError(f"the parts have {found} rows, not {dict(rows)}")
    if found != dict(rows):
        return False
    for name in rows:
        (folder / f".{name}.npy").replace(folder / f"{name}.npy")
    return True


def _write_header(stream: IO[bytes], array: NDArray[Any], n_rows: int) -> None:
    shape = (n_rows, *array.shape[1:])
    header = npy.header_data_from_array_1_0(array) | {"shape": shape, "fortran_order": False}
    npy.write_array_header_1_0(stream, header)


def _go_to(stream: IO[bytes], n_rows: int) -> np.dtype[Any]:
    """Go to where that many rows of an array end; return its type."""
    npy.read_magic(stream)
    shape, _, dtype = npy.read_array_header_1_0(stream)
    size = stream.tell() + n_rows * int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    if size > stream.seek(0, os.SEEK_END):
        raise ValueError(f"{stream.name} is shorter than the {n_rows} rows that it should have")
    stream.seek(size)
    return dtype


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
