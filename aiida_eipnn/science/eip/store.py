"""Labels on disk while they are being made: in chunks, so that memory does not grow with the pool.

Each chunk is a folder of arrays that the process at work writes to directly (memory-mapped): what
it had labelled when it died, was killed or ran out of time is there, and stays there.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from aiida_eipnn.science.arrays import FloatArray, IntArray, forget, save_arrays, write_whole
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import NOT_RUN

PLAN = "plan.json"
REASONS = "reasons.json"

# What is kept of forces and stress: the error of an EIP is a million times the rounding.
STORED_FLOAT = np.float32

# A chunk should take seconds, not minutes, and its arrays fit into any memory.
CHUNK_BYTES = 16 * 2**20
SMALLEST_CHUNK = 50

# Values of ChunkArrays.state.
MISSING, LABELLED, FAILED, REFUSED = 0, 1, 2, 3


class ChunkArrays(NamedTuple):
    """The labels of one chunk: ``m`` EIPs, ``n`` configurations, ``N`` atoms.

    Parameters
    ----------
    energy
        In eV. Shape ``(m, n)``.
    forces
        In eV/Å. Shape ``(m, N, 3)``.
    stress
        In eV/Å³. Shape ``(m, n, 6)``.
    atomic_energy
        In eV. Shape ``(m, N)``, or ``(m, 0)`` where it was not asked for.
    state
        Missing, labelled, failed, or refused: failed, but nobody has written down why yet.
        Shape ``(m, n)``.
    reason
        Where it failed, the number of the reason. Shape ``(m, n)``.
    seconds
        Time that each EIP took. Shape ``(m,)``.
    """

    energy: FloatArray
    forces: NDArray[np.float32]
    stress: NDArray[np.float32]
    atomic_energy: NDArray[np.float32]
    state: NDArray[np.int8]
    reason: NDArray[np.int16]
    seconds: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be labelled, and how it is cut.

    Parameters
    ----------
    eips
        Names of the EIPs.
    ids
        Checksum of the ids of the configurations.
    bounds
        Chunk ``i`` holds rows ``bounds[i]`` to ``bounds[i + 1]``.
    atomic_energies
        Whether the energy of each atom is kept.
    """

    eips: tuple[str, ...]
    ids: str
    bounds: tuple[int, ...]
    atomic_energies: bool = False

    @classmethod
    def of(
        cls,
        configurations: Configurations,
        eips: Sequence[str],
        n_workers: int,
        *,
        atomic_energies: bool = False,
    ) -> Self:
        """Plan chunks of about equal size, several for each worker."""
        return cls(
            eips=tuple(map(str, eips)),
            ids=hashlib.blake2b("".join(configurations.ids).encode()).hexdigest(),
            bounds=tuple(_cut(configurations.offsets, len(eips), n_workers)),
            atomic_energies=atomic_energies,
        )

    def fits(self, other: "Plan") -> bool:
        """Return whether labels made by one plan go on under the other, however it is cut."""
        return (self.eips, self.ids, self.atomic_energies) == (
            other.eips,
            other.ids,
            other.atomic_energies,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a labelling came.

    Parameters
    ----------
    n_done
        Labels that are made, or that cannot be had.
    n_labels
        Labels there will be.
    """

    n_done: int
    n_labels: int


@dataclass(slots=True)
class Store:
    """A folder with the labels of a pool.

    Parameters
    ----------
    folder
        Where it is.
    plan
        What it holds.
    configurations
        What is labelled.
    reasons
        Why labels are missing; only ever appended to.
    """

    folder: Path
    plan: Plan
    configurations: Configurations
    reasons: list[str]

    @classmethod
    def open(cls, folder: Path, plan: Plan, configurations: Configurations) -> Self:
        """Open the store in ``folder``, with what an interrupted run left there.

        Raises
        ------
        ValueError
            If other EIPs or configurations are labelled there.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / PLAN
        if path.exists():
            content = json.loads(path.read_text())
            old = Plan(**{**content, "eips": tuple(content["eips"])})
            if not plan.fits(old):
                raise ValueError(
                    f"{folder} holds labels of other configurations or EIPs (it has "
                    f"{', '.join(old.eips)}): take an empty folder, or the same input as before"
                )
            plan = old
        else:
            # Of a store that was being removed: what its chunks hold nobody knows any more.
            for stale in folder.glob("chunk_*"):
                shutil.rmtree(stale)
            write_whole(path, json.dumps(asdict(plan)))
        reasons = [NOT_RUN]
        if (folder / REASONS).exists():
            reasons = json.loads((folder / REASONS).read_text())
        return cls(folder, plan, configurations, reasons)

    @property
    def n_chunks(self) -> int:
        """How many chunks there are."""
        return len(self.plan.bounds) - 1

    def rows(self, chunk: int) -> slice:
        """Return the rows of a chunk."""
        return slice(self.plan.bounds[chunk], self.plan.bounds[chunk + 1])

    def path(self, chunk: int) -> Path:
        """Return the folder of a chunk."""
        return self.folder / f"chunk_{chunk:06d}"

    def part(self, chunk: int) -> Configurations:
        """Return the configurations of a chunk."""
        rows = self.rows(chunk)
        part = self.configurations.take(range(rows.start, rows.stop))
        forget(self.configurations.arrays().values())
        return part

    def is_begun(self, chunk: int) -> bool:
        """Return whether a chunk has its arrays."""
        return (self.path(chunk) / "state.npy").exists()

    def begin(self, chunk: int) -> ChunkArrays:
        """Open a chunk to label it; what failed without a reason is to be tried again."""
        arrays = self.arrays(chunk, mode="r+")
        arrays.state[arrays.state == REFUSED] = MISSING
        return arrays

    def arrays(self, chunk: int, mode: str = "r") -> ChunkArrays:
        """Return the arrays of a chunk, memory-mapped; they are made where there are none."""
        if not self.is_begun(chunk):
            self._create(chunk)
        return open_chunk(self.path(chunk), mode)

    def fail(self, arrays: ChunkArrays, column: int, place: int, reason: str) -> None:
        """Record why a label cannot be had; the reason is on disk before it is used."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            write_whole(self.folder / REASONS, json.dumps(self.reasons, ensure_ascii=False))
        arrays.reason[column, place] = self.reasons.index(reason)
        arrays.state[column, place] = FAILED

    def fail_rest(self, arrays: ChunkArrays, column: int, reason: str) -> None:
        """Record why an EIP will label nothing more of a chunk."""
        for place in np.flatnonzero(arrays.state[column] == MISSING):
            self.fail(arrays, column, int(place), reason)

    def progress(self) -> Progress:
        """Say how far the labelling is."""
        states = [
            np.load(self.path(chunk) / "state.npy")
            for chunk in range(self.n_chunks)
            if self.is_begun(chunk)
        ]
        return Progress(
            n_done=sum(int(((state == LABELLED) | (state == FAILED)).sum()) for state in states),
            n_labels=len(self.configurations) * len(self.plan.eips),
        )

    def seconds(self) -> dict[str, float]:
        """Return the time that each EIP has taken."""
        total = np.zeros(len(self.plan.eips))
        for chunk in range(self.n_chunks):
            if self.is_begun(chunk):
                total += self.arrays(chunk).seconds
        return dict(zip(self.plan.eips, map(float, total), strict=True))

    def write_labels(self, folder: Path) -> None:
        """Write everything as the arrays of :class:`~.labels.Labels`, one chunk at a time."""
        part, eips = self.configurations, self.plan.eips
        n, m = len(part), len(eips)
        whole = {
            "ids": part.ids,
            "offsets": part.offsets,
            "sources": np.array(eips, dtype=np.str_),
            "reasons": np.array(self.reasons, dtype=np.str_),
            "origins": np.full(n, "", dtype="<U1"),
        }
        save_arrays(folder, {name: np.asarray(array) for name, array in whole.items()})
        _stream(folder / "energy.npy", (n, m), np.float64, self._by_row("energy"))
        _stream(folder / "stress.npy", (n, m, 6), STORED_FLOAT, self._by_row("stress"))
        _stream(folder / "status.npy", (n, m), np.int32, self._status())
        n_atoms = len(part.numbers)
        _stream(folder / "forces.npy", (m, n_atoms, 3), STORED_FLOAT, self._by_source("forces", m))
        if self.plan.atomic_energies:
            energies = self._by_source("atomic_energy", m)
            _stream(folder / "atomic_energy.npy", (m, n_atoms), STORED_FLOAT, energies)

    def _by_row(self, name: str) -> Any:
        """Yield an array of each chunk with the configurations first."""
        for chunk in range(self.n_chunks):
            yield np.moveaxis(getattr(self.arrays(chunk), name), 0, 1)

    def _by_source(self, name: str, m: int) -> Any:
        """Yield an array of each EIP and chunk."""
        for source in range(m):
            for chunk in range(self.n_chunks):
                yield getattr(self.arrays(chunk), name)[source]

    def _status(self) -> Any:
        """Yield the status of each chunk: 0 where there is a label, else the number of a reason."""
        not_run = self.reasons.index(NOT_RUN)
        for chunk in range(self.n_chunks):
            arrays = self.arrays(chunk)
            number = np.where(arrays.state == FAILED, arrays.reason, not_run).astype(np.int32)
            yield np.where(arrays.state == LABELLED, 0, number + 1).T

    def _create(self, chunk: int) -> None:
        """Make the arrays of a chunk, with nothing in them."""
        rows, m = self.rows(chunk), len(self.plan.eips)
        offsets = self.configurations.offsets
        n = rows.stop - rows.start
        n_atoms = int(offsets[rows.stop] - offsets[rows.start])
        n_kept = n_atoms if self.plan.atomic_energies else 0
        arrays = ChunkArrays(
            energy=np.full((m, n), np.nan),
            forces=np.full((m, n_atoms, 3), np.nan, dtype=STORED_FLOAT),
            stress=np.full((m, n, 6), np.nan, dtype=STORED_FLOAT),
            atomic_energy=np.full((m, n_kept), np.nan, dtype=STORED_FLOAT),
            state=np.zeros((m, n), dtype=np.int8),
            reason=np.zeros((m, n), dtype=np.int16),
            seconds=np.zeros(m),
        )._asdict()
        # The state says that there is a chunk: it comes last.
        state = arrays.pop("state")
        save_arrays(self.path(chunk), arrays)
        save_arrays(self.path(chunk), {"state": state})


def open_chunk(folder: Path, mode: str) -> ChunkArrays:
    """Return the arrays in the folder of a chunk, memory-mapped."""
    return ChunkArrays(
        **{
            name: np.load(folder / f"{name}.npy", mmap_mode=mode)  # type: ignore[arg-type]
            for name in ChunkArrays._fields
        }
    )


def _cut(offsets: IntArray, n_eips: int, n_workers: int) -> list[int]:
    """Return where to cut a pool into chunks."""
    n = len(offsets) - 1
    most_atoms = max(CHUNK_BYTES // (3 * np.dtype(STORED_FLOAT).itemsize * n_eips), 1)
    most_rows = max(-(-n // max(2 * n_workers, 1)), SMALLEST_CHUNK)
    bounds = [0]
    while bounds[-1] < n:
        start = bounds[-1]
        fitting = int(np.searchsorted(offsets, offsets[start] + most_atoms, side="right")) - 1
        bounds.append(min(max(fitting, start + 1), start + most_rows, n))
    return bounds if n else [0, 0]


def _stream(path: Path, shape: tuple[int, ...], dtype: Any, parts: Any) -> None:
    """Write an array of this shape whose parts come one after the other."""
    with path.open("wb") as stream:
        header = {
            "descr": npy.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": shape,
        }
        npy.write_array_header_2_0(stream, header)
        for part in parts:
            stream.write(np.ascontiguousarray(part, dtype=dtype).tobytes())
