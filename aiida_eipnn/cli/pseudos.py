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
from aiida_pseudo.data.pseudo.upf import UpfData
from aiida_pseudo.groups.family.cutoffs import CutoffsPseudoPotentialFamily

DEFAULT_FAMILY = "PseudoDojo/0.4/PBE/SR/standard/upf"
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

    A family of this name that is there already, whoever made it, is left as it is.

    Parameters
    ----------
    folder
        Take the UPF files from here, ``Si.upf`` and so on, instead of fetching the package.
    """
    if CutoffsPseudoPotentialFamily.collection.count(filters={"label": label}):
        return False
    with tempfile.TemporaryDirectory() as scratch:
        checked = Path(scratch) / "upf"
        checked.mkdir()
        if folder is None:
            read_upf = _wheel_reader(fetch_wheel(table.package, Path(scratch)), table.folder)
        else:
            read_upf = _folder_reader(folder)
        for element, pseudo in table.pseudos.items():
            content = read_upf(element)
            check_upf(element, content, pseudo.sha256)
            (checked / f"{element}.upf").write_bytes(content)
        _install(label, checked, table)
    return True
