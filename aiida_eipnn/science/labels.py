"""Labels: energy, forces and stress of configurations, from one source or from many."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from aiida_eipnn.science.arrays import Arrays, BoolArray, FloatArray, IntArray, StrArray
from aiida_eipnn.science.configurations import (
    Configurations,
    check_offsets,
    join_offsets,
    pick_fields,
    ragged_rows,
    rows_of,
)

DFT = "dft"
NOT_RUN = "not run"

# What a checksum covers.
CHECKED_ARRAYS = ("ids", "offsets", "sources", "energy", "forces", "stress", "ok")


class Failure(NamedTuple):
    """A label that could not be had: which configuration, from which source, and why."""

    id: str
    source: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labels:
    """What ``m`` sources say about ``n`` configurations with ``N`` atoms in all.

    Forces, stress and energies of atoms may be of single precision, as those of EIPs are.

    Parameters
    ----------
    ids
        The configurations, by geometry hash. Shape ``(n,)``.
    offsets
        The atoms of configuration ``i`` are rows ``offsets[i]`` to ``offsets[i + 1]``.
        Shape ``(n + 1,)``.
    sources
        Who labelled: ``dft``, a KIM model id, ``committee``. Shape ``(m,)``.
    energy
        Total energy, in eV, each source on its own zero; NaN where there is none. Shape ``(n, m)``.
    forces
        Forces, in eV/Å. Shape ``(m, N, 3)``.
    stress
        Stress in eV/Å³, ASE's sign (negative = compressed) and order (xx, yy, zz, yz, xz, xy);
        NaN where the source gives none. Shape ``(n, m, 6)``.
    status
        0 where the label is there, else ``k`` for ``reasons[k - 1]``. Shape ``(n, m)``.
    reasons
        Why labels are missing. Shape ``(n_reasons,)``.
    origins
        UUID of the process that made the label of each configuration, empty where one job made
        all. Shape ``(n,)``.
    atomic_energy
        Energy of each atom, in eV, where that was asked for; NaN where a source tells none.
        Shape ``(m, N)``.

    Raises
    ------
    ValueError
        If the shapes do not fit one another.
    """

    ids: StrArray
    offsets: IntArray
    sources: StrArray
    energy: FloatArray
    forces: FloatArray
    stress: FloatArray
    status: IntArray
    reasons: StrArray
    origins: StrArray
    atomic_energy: FloatArray | None = None

    def __post_init__(self) -> None:
        n, m = len(self.ids), len(self.sources)
        n_atoms = int(self.offsets[-1]) if len(self.offsets) else 0
        expected = {
            "offsets": (n + 1,),
            "energy": (n, m),
            "forces": (m, n_atoms, 3),
            "stress": (n, m, 6),
            "status": (n, m),
            "origins": (n,),
            "atomic_energy": (m, n_atoms),
        }
        for name, shape in expected.items():
            if name == "atomic_energy" and self.atomic_energy is None:
                continue
            if getattr(self, name).shape != shape:
                raise ValueError(
                    f"{name} has shape {getattr(self, name).shape}, but {n} configurations with "
                    f"{n_atoms} atoms and {m} sources need {shape}"
                )
        check_offsets(self.offsets, n_atoms)
        if (self.status < 0).any() or (self.status > len(self.reasons)).any():
            raise ValueError(f"status must be 0 or number one of the {len(self.reasons)} reasons")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_atoms(self) -> IntArray:
        """Number of atoms of each configuration. Shape ``(n,)``."""
        return np.diff(self.offsets)

    @property
    def ok(self) -> BoolArray:
        """Where there is a label. Shape ``(n, m)``."""
        return np.asarray(self.status == 0)

    @classmethod
    def missing(
        cls, configurations: Configurations, sources: Sequence[str], reason: str = NOT_RUN
    ) -> Self:
        """Return labels of which not one is there yet."""
        n, m = len(configurations), len(sources)
        return cls(
            ids=configurations.ids,
            offsets=configurations.offsets,
            sources=np.array(sources, dtype=np.str_),
            energy=np.full((n, m), np.nan),
            forces=np.full((m, len(configurations.numbers), 3), np.nan),
            stress=np.full((n, m, 6), np.nan),
            status=np.ones((n, m), dtype=np.int64),
            reasons=np.array([reason], dtype=np.str_),
            origins=np.full(n, "", dtype="<U36"),
        )

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Build from :meth:`arrays`."""
        return cls(**pick_fields(cls, arrays))

    def arrays(self) -> Arrays:
        """Return every field by name, ready for :func:`~.arrays.save_arrays`."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in arrays.items() if array is not None}

    def forces_of(self, row: int, source: int = 0) -> FloatArray:
        """Return the forces of one configuration, in eV/Å. Shape ``(n_atoms, 3)``."""
        return self.forces[source, self.offsets[row] : self.offsets[row + 1]]

    def take(self, rows: Iterable[int]) -> Self:
        """Return the given rows, in the given order."""
        chosen = np.fromiter(rows, dtype=np.int64)
        return type(self)(
            ids=self.ids[chosen],
            offsets=np.concatenate([[0], np.cumsum(self.n_atoms[chosen])]).astype(np.int64),
            sources=self.sources,
            energy=self.energy[chosen],
            forces=self.forces[:, ragged_rows(self.offsets, chosen)],
            stress=self.stress[chosen],
            status=self.status[chosen],
            reasons=self.reasons,
            origins=self.origins[chosen],
            atomic_energy=(
                None
                if self.atomic_energy is None
                else self.atomic_energy[:, ragged_rows(self.offsets, chosen)]
            ),
        )

    def rows_of(self, ids: Iterable[str]) -> IntArray:
        """Return the row of each id; ``KeyError`` names one that is not here."""
        return rows_of(self.ids, ids)

    def labelled(self) -> Self:
        """Return the rows that every source labelled."""
        return self.take(np.flatnonzero(self.ok.all(axis=1)))

    def failures(self) -> tuple[Failure, ...]:
        """Return every label that is missing, with the reason."""
        return tuple(
            Failure(
                str(self.ids[row]),
                str(self.sources[source]),
                str(self.reasons[self.status[row, source] - 1]),
            )
            for row, source in np.argwhere(self.status > 0)
        )


def join_labels(parts: Sequence[Labels]) -> Labels:
    """Put labels of the same sources one after the other.

    Raises
    ------
    ValueError
        If the sources differ, or if a configuration occurs twice.
    """
    if not parts:
        raise ValueError("nothing to join: give at least one set of labels")
    for part in parts[1:]:
        if part.sources.tolist() != parts[0].sources.tolist():
            raise ValueError(
                f"cannot join labels of {parts[0].sources.tolist()} with labels of "
                f"{part.sources.tolist()}: join only labels of the same sources"
            )
    ids = np.concatenate([part.ids for part in parts])
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"configuration {values[counts > 1][0]} is labelled twice; drop one of its labels"
        )
    reasons = list(dict.fromkeys(str(reason) for part in parts for reason in part.reasons))
    return Labels(
        ids=ids,
        offsets=join_offsets([part.offsets for part in parts]),
        sources=parts[0].sources,
        energy=np.concatenate([part.energy for part in parts]),
        forces=np.concatenate([part.forces for part in parts], axis=1),
        stress=np.concatenate([part.stress for part in parts]),
        status=np.concatenate([_renumber(part, reasons) for part in parts]),
        reasons=np.array(reasons, dtype=np.str_),
        origins=np.concatenate([part.origins for part in parts]),
        atomic_energy=_join_atomic_energies(parts),
    )


def checksum(labels: Labels) -> str:
    """Return the SHA-256 of what labels say: which configuration, which source, which numbers.

    Equal labels have equal checksums on every machine, whoever made them; why labels are missing
    and which process made them do not enter.
    """
    digest = hashlib.sha256()
    for name in CHECKED_ARRAYS:
        array = getattr(labels, name)
        digest.update(f"{name} {array.shape} ".encode())
        digest.update(_portable(array))
    return digest.hexdigest()


def _portable(array: NDArray[Any]) -> bytes:
    """Return the bytes of an array, whatever the width of its text and the sign of its NaN."""
    if array.dtype.kind == "U":
        return "\0".join(array.tolist()).encode()
    if array.dtype.kind == "f":
        # + 0.0 turns -0.0 into 0.0.
        return np.where(np.isnan(array), np.nan, array + 0.0).astype("<f8").tobytes()
    return array.astype("<i8").tobytes()


def _join_atomic_energies(parts: Sequence[Labels]) -> FloatArray | None:
    """Return the energies of all atoms, if every part has them."""
    energies = [part.atomic_energy for part in parts if part.atomic_energy is not None]
    return np.concatenate(energies, axis=1) if len(energies) == len(parts) else None


def _renumber(part: Labels, reasons: list[str]) -> IntArray:
    """Return the status of ``part`` with its reasons numbered as in ``reasons``."""
    new = np.array([0] + [reasons.index(str(reason)) + 1 for reason in part.reasons])
    return new[part.status]
