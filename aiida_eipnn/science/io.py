"""Files of configurations and labels: the one place that knows their keys.

Labels lie in extended XYZ under ``<source>_energy`` (eV), ``<source>_forces`` (eV/Å) and
``<source>_stress`` (eV/Å³, 3 × 3, negative = compressed), so that one file can hold many sources
and ASE takes none of them for the result of a calculator; :func:`source_key` makes a key of any
name. Numbers are written with all digits:
what is read back is equal to the last bit, and so are the ids.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from aiida_eipnn.science.arrays import FloatArray, StrArray
from aiida_eipnn.science.configurations import Configurations, configuration_id
from aiida_eipnn.science.duplicates import SAME_ENERGY
from aiida_eipnn.science.gate import geometry_fault
from aiida_eipnn.science.labels import DFT, Labels

# What ASE takes for one key.
KEY = r"[A-Za-z_][A-Za-z0-9_.-]*"

# Where the energy, forces and stress of DFT are.
DFT_KEYS = ("dft_energy", "dft_forces", "dft_stress")


# What is near the beginning of a file that pw.x writes.
PW_XML, PW_STDOUT = b"qes:espresso", b"Program PWSCF"
PW_HEAD = 4096


def read_configurations(path: str | Path) -> Configurations:
    """Read configurations from any file that ASE reads; labels in it are ignored.

    A geometry that occurs again is dropped.

    Raises
    ------
    ValueError
        If there is no such file, if it cannot be read, holds no configuration, or holds one with
        positions that are not finite or a periodic cell without volume.
    """
    frames: dict[str, Atoms] = {}
    for atoms in _frames(Path(path)):
        frames.setdefault(configuration_id(atoms), atoms)
    return Configurations.from_atoms(list(frames.values()))


def read_labelled(
    path: str | Path,
    energy_key: str = "dft_energy",
    forces_key: str = "dft_forces",
    stress_key: str = "dft_stress",
    source: str = DFT,
) -> tuple[Configurations, Labels]:
    """Read configurations with their labels.

    A geometry that occurs again with the same energy is dropped.

    Parameters
    ----------
    path
        Any file that ASE reads.
    energy_key, forces_key, stress_key
        Where the labels are; a frame that lacks the energy or the forces there is asked for the
        results of its calculator (the bare keys ``energy``, ``forces``, ``stress`` of extended
        XYZ). Stress may be missing.
    source
        What to call the source of the labels.

    Raises
    ------
    ValueError
        As :func:`read_configurations`, and if a frame lacks a label, or if one geometry has two
        energies.
    """
    keys = (energy_key, forces_key, stress_key)
    frames, found, _ = _labelled_frames(Path(path), keys)
    configurations = Configurations.from_atoms(list(frames.values()))
    return configurations, _labels(configurations, found, source)


def read_counted(path: str | Path) -> tuple[Configurations, Labels, int]:
    """Read as :func:`read_labelled`, and count the frames that repeat an earlier one."""
    frames, found, n_frames = _labelled_frames(Path(path), DFT_KEYS)
    configurations = Configurations.from_atoms(list(frames.values()))
    return configurations, _labels(configurations, found, DFT), n_frames - len(frames)


def read_tagged(
    path: str | Path, tags: Sequence[str]
) -> tuple[Configurations, Labels, dict[str, StrArray]]:
    """Read configurations with their labels, and what else the file says about each.

    Parameters
    ----------
    path
        As for :func:`read_labelled`.
    tags
        Keys of the comment line, such as ``split``.

    Returns
    -------
    tuple
        The configurations, their labels, and the values of each tag as text, empty where a frame
        has none; logical values are ``T`` and ``F``.

    Raises
    ------
    ValueError
        As :func:`read_labelled`, and if no frame has a tag.
    """
    frames, found, _ = _labelled_frames(Path(path), DFT_KEYS)
    configurations = Configurations.from_atoms(list(frames.values()))
    values = {tag: _tag_values(Path(path), frames, tag) for tag in tags}
    return configurations, _labels(configurations, found, DFT), values


def _tag_values(path: Path, frames: dict[str, Atoms], tag: str) -> StrArray:
    values = [atoms.info.get(tag, "") for atoms in frames.values()]
    if not any(tag in atoms.info for atoms in frames.values()):
        keys = sorted({key for atoms in frames.values() for key in atoms.info})
        raise ValueError(f"no frame of {path} says {tag!r}; they say {keys}")
    logical = {"True": "T", "False": "F"}
    return np.array([logical.get(str(value), str(value)) for value in values], dtype=np.str_)


def _labelled_frames(
    path: Path, keys: tuple[str, str, str]
) -> tuple[dict[str, Atoms], dict[str, tuple[float, FloatArray, FloatArray]], int]:
    """Return frames and labels by id, each geometry once, and how many frames there are."""
    frames: dict[str, Atoms] = {}
    found: dict[str, tuple[float, FloatArray, FloatArray]] = {}
    number = -1
    for number, atoms in enumerate(_frames(path)):
        try:
            label = (_energy(atoms, keys[0]), _forces(atoms, keys[1]), _stress(atoms, keys[2]))
        except ValueError as error:
            raise ValueError(f"{path}, frame {number}: {error}") from error
        name = configuration_id(atoms)
        if name in found and abs(label[0] - found[name][0]) > SAME_ENERGY * len(atoms):
            raise ValueError(
                f"{path}, frame {number}: this geometry came before with another energy "
                f"({found[name][0]:.6f} and {label[0]:.6f} eV); drop one of the two frames"
            )
        frames.setdefault(name, atoms)
        found.setdefault(name, label)
    return frames, found, number + 1


def pw_mark(path: Path) -> bytes | None:
    """Return ``PW_XML`` or ``PW_STDOUT`` where a file is what pw.x writes, else ``None``."""
    with path.open("rb") as stream:
        head = stream.read(PW_HEAD)
    return next((mark for mark in (PW_XML, PW_STDOUT) if mark in head), None)


def write_labelled(
    path: str | Path, configurations: Configurations, labels: Sequence[Labels] = ()
) -> None:
    """Write configurations with all labels there are, as extended XYZ.

    Parameters
    ----------
    path
        File to write; one that exists is replaced.
    configurations
        What to write, in this order.
    labels
        Labels of any number of sources; they are matched by id, and what is missing is left out.
        The keys begin with the :func:`source_key` of each source.

    Raises
    ------
    ValueError
        If a source occurs twice, or if two have the same key.
    """
    keys = [source_key(str(name)) for part in labels for name in part.sources]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"a source occurs twice: {twice} of the keys {keys}; write each one once")
    tables = [{str(name): row for row, name in enumerate(part.ids)} for part in labels]
    with Path(path).open("w", encoding="utf-8") as stream:
        for row, name in enumerate(configurations.ids.tolist()):
            info: dict[str, Any] = {"config_type": configurations.config_types[row], "id": name}
            columns: dict[str, FloatArray] = {}
            for part, table in zip(labels, tables, strict=True):
                if name in table:
                    _collect(part, table[name], info, columns)
            stream.write(_extended_xyz(configurations.atoms(row), info, columns))


def source_key(source: str) -> str:
    """Return what the keys of a source begin with: its name, ``_`` for what no key may hold.

    ``lennard-jones[sigma=2.1]`` becomes ``lennard-jones_sigma_2.1``.

    Raises
    ------
    ValueError
        If the name holds no letter or digit.
    """
    if re.fullmatch(KEY, source):
        return source
    key = re.sub(r"[^A-Za-z0-9_.-]+", "_", source).strip("_")
    if not re.search("[A-Za-z0-9]", key):
        raise ValueError(f"source {source!r} cannot be a key; name it with letters or digits")
    return key if re.fullmatch(KEY, key) else f"_{key}"


def _frames(path: Path) -> Iterator[Atoms]:
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    number = -1
    for number, atoms in enumerate(_read(path)):
        if fault := geometry_fault(atoms, min_contact=0.0):
            raise ValueError(f"{path}, frame {number}: {fault}; repair or drop this frame")
        yield atoms
    if number < 0:
        raise ValueError(f"{path} holds no configuration")


def _read(path: Path) -> Iterator[Atoms]:
    number = 0
    try:
        for atoms in ase.io.iread(path, ":"):
            yield atoms
            number += 1
    except Exception as error:
        # ASE's many readers raise whatever they stumble upon.
        raise ValueError(
            f"cannot read {path} after {number} configurations "
            f"({type(error).__name__}: {error}); give a file that ASE reads, such as extended XYZ"
        ) from error


def _energy(atoms: Atoms, key: str) -> float:
    value = atoms.info.get(key, _result(atoms, "energy"))
    if value is None:
        raise ValueError(
            f"no energy under {key!r}, nor from a calculator (there are {sorted(atoms.info)}); "
            "name the key that holds it, or drop this frame"
        )
    return float(_finite(value, (), f"the energy under {key!r}"))


def _forces(atoms: Atoms, key: str) -> FloatArray:
    value = atoms.arrays.get(key, _result(atoms, "forces"))
    if value is None:
        raise ValueError(
            f"no forces under {key!r}, nor from a calculator (there are {sorted(atoms.arrays)}); "
            "name the key that holds them, or drop this frame"
        )
    return _finite(value, (len(atoms), 3), f"the forces under {key!r}")


def _stress(atoms: Atoms, key: str) -> FloatArray:
    value = atoms.info.get(key, _result(atoms, "stress"))
    if value is None:
        return np.full(6, np.nan)
    stress = np.asarray(value, dtype=float)
    if stress.size == 9:
        stress = full_3x3_to_voigt_6_stress(stress.reshape(3, 3))
    return _finite(stress, (6,), f"the stress under {key!r}")


def _result(atoms: Atoms, name: str) -> NDArray[np.float64] | float | None:
    # Only what the file holds: asking the calculator might start a calculation.
    return None if atoms.calc is None else atoms.calc.results.get(name)


def _finite(value: Any, shape: tuple[int, ...], what: str) -> FloatArray:
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"{what} is not a number but {value!r}") from None
    if array.shape != shape:
        raise ValueError(f"{what} has shape {array.shape}, not {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} is not finite; drop this frame")
    return array


def _labels(
    configurations: Configurations,
    found: dict[str, tuple[float, FloatArray, FloatArray]],
    source: str,
) -> Labels:
    parts = [found[name] for name in configurations.ids.tolist()]
    n = len(parts)
    return Labels(
        ids=configurations.ids,
        offsets=configurations.offsets,
        sources=np.array([source], dtype=np.str_),
        energy=np.array([energy for energy, _, _ in parts])[:, None],
        forces=np.concatenate([forces for _, forces, _ in parts])[None],
        stress=np.array([stress for _, _, stress in parts])[:, None],
        status=np.zeros((n, 1), dtype=np.int64),
        reasons=np.zeros(0, dtype="<U1"),
        origins=np.full(n, "", dtype="<U36"),
    )


def _collect(part: Labels, row: int, info: dict[str, Any], columns: dict[str, FloatArray]) -> None:
    for column, source in enumerate(part.sources.tolist()):
        if not part.ok[row, column]:
            continue
        key = source_key(source)
        info[f"{key}_energy"] = part.energy[row, column]
        columns[f"{key}_forces"] = part.forces_of(row, column)
        if np.isfinite(part.stress[row, column]).all():
            # 3 × 3, because programs disagree on the order of six components.
            info[f"{key}_stress"] = voigt_6_to_full_3x3_stress(part.stress[row, column])


def _extended_xyz(atoms: Atoms, info: dict[str, Any], columns: dict[str, FloatArray]) -> str:
    properties = "species:S:1:pos:R:3" + "".join(f":{name}:R:3" for name in columns)
    header = [
        f'Lattice="{_numbers(atoms.cell.array)}"',
        f"Properties={properties}",
        *(f'{key}="{_value(value)}"' for key, value in info.items()),
        f'pbc="{" ".join("T" if periodic else "F" for periodic in atoms.pbc)}"',
    ]
    table = np.hstack([atoms.positions, *columns.values()])
    rows = [
        f"{symbol} {_numbers(values)}"
        for symbol, values in zip(atoms.get_chemical_symbols(), table, strict=True)
    ]
    return "\n".join([str(len(atoms)), " ".join(header), *rows]) + "\n"


def _value(value: Any) -> str:
    return str(value).replace('"', "'") if isinstance(value, str) else _numbers(np.asarray(value))


def _numbers(values: NDArray[np.float64]) -> str:
    # repr is the shortest text that reads back as the same double.
    return " ".join(repr(float(value)) for value in np.ravel(values))
