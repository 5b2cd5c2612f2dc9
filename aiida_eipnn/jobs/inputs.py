"""How every job reads the sets that lie in its folder."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from aiida_eipnn.jobs import spec
from aiida_eipnn.science.arrays import StrArray, load_arrays
from aiida_eipnn.science.configurations import Configurations, join_configurations
from aiida_eipnn.science.labels import Labels, join_labels


def read_configurations(folder: Path, *, mapped: bool = False) -> Configurations:
    """Join all sets of configurations, less those that the job must not see.

    Parameters
    ----------
    folder
        Of the job.
    mapped
        Leave a single set on disk, and read of it what is asked for.

    Raises
    ------
    ValueError
        If there are none.
    """
    parts = [
        Configurations.from_arrays(load_arrays(path, mapped=mapped))
        for path in _sets(folder, spec.CONFIGURATIONS)
    ]
    if not parts or not any(len(part) for part in parts):
        raise ValueError("the pool is empty: give at least one configuration")
    together = join_configurations([part for part in parts if len(part)])
    excluded = excluded_ids(folder)
    if not excluded:
        return together
    return together.take(np.flatnonzero(~np.isin(together.ids, excluded)))


def read_labels(folder: Path, name: str) -> Labels | None:
    """Join all labels below ``folder/name``, less those that the job must not see."""
    parts = [Labels.from_arrays(load_arrays(path)) for path in _sets(folder, name)]
    if not parts:
        return None
    together = join_labels(parts)
    return together.take(np.flatnonzero(~np.isin(together.ids, excluded_ids(folder))))


def ids_of_sets(folder: Path, name: str, sets: Iterable[str]) -> StrArray:
    """Return the ids of the labels in the sets of these names below ``folder/name``."""
    wanted = set(sets)
    parts = [
        Labels.from_arrays(load_arrays(path)).ids
        for path in _sets(folder, name)
        if path.name in wanted
    ]
    return np.concatenate([np.array([], dtype="<U1"), *parts])


def excluded_ids(folder: Path) -> list[str]:
    """Return the ids of the configurations that the job must not see (held out for the test)."""
    return [str(name) for path in _sets(folder, spec.EXCLUDE) for name in load_arrays(path)["ids"]]


def digest_of(folder: Path, names: Iterable[str], facts: bytes = b"") -> str:
    """Return what a checkpoint is known by: a digest of facts, and of the inputs of these names."""
    digest = hashlib.blake2b(facts, digest_size=16)
    for name in names:
        for path in sorted((folder / name).rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(folder)).encode())
                with path.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def _sets(folder: Path, name: str) -> list[Path]:
    root = folder / name
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
