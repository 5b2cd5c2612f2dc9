"""Sets of atomic configurations as flat arrays."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray

from aiida_eipnn.science.arrays import Arrays, BoolArray, FloatArray, IntArray, StrArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Configurations:
    """A set of ``n`` configurations with ``N`` atoms in all, kept as flat arrays.

    Parameters
    ----------
    ids
        Geometry hash of each configuration, 32 hexadecimal digits. Shape ``(n,)``.
    numbers
        Atomic numbers of all atoms, one configuration after the other. Shape ``(N,)``.
    positions
        Cartesian positions, in Å. Shape ``(N, 3)``.
    offsets
        The atoms of configuration ``i`` are rows ``offsets[i]`` to ``offsets[i + 1]``.
        Shape ``(n + 1,)``.
    cells
        Cell vectors as rows, in Å. Shape ``(n, 3, 3)``.
    pbc
        Periodicity along each cell vector. Shape ``(n, 3)``.
    config_types
        What kind of configuration each one is (``rattled``, ``vacancy``, ...). Shape ``(n,)``.

    Raises
    ------
    ValueError
        If the shapes do not fit one another.
    """

    ids: StrArray
    numbers: IntArray
    positions: FloatArray
    offsets: IntArray
    cells: FloatArray
    pbc: BoolArray
    config_types: StrArray

    def __post_init__(self) -> None:
        n, n_atoms = len(self.ids), len(self.numbers)
        expected = {
            "numbers": (n_atoms,),
            "positions": (n_atoms, 3),
            "offsets": (n + 1,),
            "cells": (n, 3, 3),
            "pbc": (n, 3),
            "config_types": (n,),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(
                    f"{name} has shape {getattr(self, name).shape}, but {n} configurations "
                    f"with {n_atoms} atoms need {shape}"
                )
        check_offsets(self.offsets, n_atoms)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_atoms(self) -> IntArray:
        """Number of atoms of each configuration. Shape ``(n,)``."""
        return np.diff(self.offsets)

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur, ascending."""
        return tuple(int(number) for number in np.unique(self.numbers))

    @property
    def symbols(self) -> tuple[str, ...]:
        """Their chemical symbols, in the same order."""
        return tuple(chemical_symbols[number] for number in self.elements)

    @classmethod
    def from_atoms(
        cls, frames: Sequence[Atoms], config_types: Sequence[str] | str | None = None
    ) -> Self:
        """Collect ASE atoms; the type defaults to ``info["config_type"]``, else ``unknown``."""
        if config_types is None:
            config_types = [str(atoms.info.get("config_type", "unknown")) for atoms in frames]
        elif isinstance(config_types, str):
            config_types = [config_types] * len(frames)
        counts = [len(atoms) for atoms in frames]
        return cls(
            ids=np.array([configuration_id(atoms) for atoms in frames], dtype="<U32"),
            numbers=_stack([atoms.numbers for atoms in frames], (0,), np.int64),
            positions=_stack([atoms.positions for atoms in frames], (0, 3), np.float64),
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            cells=np.array([atoms.cell.array for atoms in frames], float).reshape(-1, 3, 3),
            pbc=np.array([atoms.pbc for atoms in frames], bool).reshape(-1, 3),
            config_types=np.array(config_types, dtype=np.str_).reshape(len(frames)),
        )

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Build from :meth:`arrays`."""
        return cls(**pick_fields(cls, arrays))

    def arrays(self) -> Arrays:
        """Return every field by name, ready for :func:`~.arrays.save_arrays`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def atoms(self, row: int) -> Atoms:
        """Return configuration ``row`` as ASE atoms."""
        part = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return Atoms(
            numbers=self.numbers[part],
            positions=self.positions[part],
            cell=self.cells[row],
            pbc=self.pbc[row],
            info={"config_type": str(self.config_types[row])},
        )

    def take(self, rows: Iterable[int]) -> Self:
        """Return the given rows, in the given order."""
        chosen = np.fromiter(rows, dtype=np.int64)
        atom_rows = ragged_rows(self.offsets, chosen)
        return type(self)(
            ids=self.ids[chosen],
            numbers=self.numbers[atom_rows],
            positions=self.positions[atom_rows],
            offsets=np.concatenate([[0], np.cumsum(self.n_atoms[chosen])]).astype(np.int64),
            cells=self.cells[chosen],
            pbc=self.pbc[chosen],
            config_types=self.config_types[chosen],
        )

    def rows_of(self, ids: Iterable[str]) -> IntArray:
        """Return the row of each id.

        Raises
        ------
        KeyError
            If an id is not here.
        """
        return rows_of(self.ids, ids)


def join_configurations(parts: Sequence[Configurations]) -> Configurations:
    """Put several sets one after the other; a configuration seen before is dropped."""
    if not parts:
        raise ValueError("nothing to join: give at least one set of configurations")
    if len(parts) == 1:
        return _without_copies(parts[0])
    ids = np.concatenate([part.ids for part in parts])
    together = Configurations(
        ids=ids,
        numbers=np.concatenate([part.numbers for part in parts]),
        positions=np.concatenate([part.positions for part in parts]),
        offsets=join_offsets([part.offsets for part in parts]),
        cells=np.concatenate([part.cells for part in parts]),
        pbc=np.concatenate([part.pbc for part in parts]),
        config_types=np.concatenate([part.config_types for part in parts]),
    )
    return _without_copies(together)


def _without_copies(configurations: Configurations) -> Configurations:
    """Return each configuration once, where it occurs first."""
    first = np.sort(np.unique(configurations.ids, return_index=True)[1])
    return configurations if len(first) == len(configurations) else configurations.take(first)


def configuration_id(atoms: Atoms) -> str:
    """Return the geometry hash of a configuration: equal geometry, equal id, on every machine."""
    digest = hashlib.blake2b(digest_size=16)
    for array, dtype in (
        (atoms.numbers, "<i8"),
        (atoms.positions, "<f8"),
        (atoms.cell.array, "<f8"),
        (atoms.pbc, "<i8"),
    ):
        # + 0.0 turns -0.0 into 0.0: the same point in space must not get two ids.
        digest.update(np.ascontiguousarray(np.asarray(array, dtype=dtype) + 0).tobytes())
    return digest.hexdigest()


def check_offsets(offsets: IntArray, n_atoms: int) -> None:
    """Raise ``ValueError`` unless ``offsets`` cuts ``n_atoms`` atoms into consecutive pieces."""
    if (
        len(offsets) == 0
        or offsets[0] != 0
        or offsets[-1] != n_atoms
        or (np.diff(offsets) < 0).any()
    ):
        raise ValueError(f"offsets must rise from 0 to the {n_atoms} atoms there are")


def join_offsets(offsets: Sequence[IntArray]) -> IntArray:
    """Return the offsets of several ragged arrays laid one after the other."""
    return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part) for part in offsets]))])


def ragged_rows(offsets: IntArray, chosen: IntArray) -> IntArray:
    """Return the atom rows of the chosen configurations, in the chosen order."""
    counts = np.diff(offsets)[chosen]
    starts = np.repeat(offsets[chosen] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    return starts + np.arange(counts.sum())


def rows_of(ids: StrArray, wanted: Iterable[str]) -> IntArray:
    """Return the row in ``ids`` of each wanted id; ``KeyError`` names the first that is missing."""
    table = {str(name): row for row, name in enumerate(ids)}
    try:
        return np.array([table[str(name)] for name in wanted], dtype=np.int64)
    except KeyError as error:
        raise KeyError(f"configuration {error.args[0]} is not in this set of {len(ids)}") from None


def pick_fields(cls: type, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Return the arrays that are fields of the dataclass ``cls``; name those that are missing."""
    needed = [field.name for field in fields(cls) if field.default is MISSING]
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise ValueError(f"{cls.__name__} needs the arrays {missing}; got {sorted(arrays)}")
    return {field.name: arrays[field.name] for field in fields(cls) if field.name in arrays}


def _stack(parts: Sequence[NDArray[Any]], empty: tuple[int, ...], dtype: type) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(empty, dtype)
