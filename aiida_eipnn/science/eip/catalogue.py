"""Which KIM models are installed for given elements, and which of them to use as EIPs.

Everything is read from the installation: no network. Opening hundreds of models takes seconds, so
what they say is kept in the user's cache folder.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers

from aiida_eipnn import __version__
from aiida_eipnn.science.eip.checked import CheckedModels, shipped_checks
from aiida_eipnn.science.eip.isolation import Lost, each_apart
from aiida_eipnn.science.eip.kim import installed_kim_models
from aiida_eipnn.science.eip.potential import (
    PotentialDescription,
    describe_potential,
    open_potential,
)

# No fit covers that many elements: such models are one formula with tabulated radii.
UNIVERSAL = 60
SECONDS_TO_OPEN = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledModel:
    """A portable model of the installed KIM collection.

    Parameters
    ----------
    description
        Where it comes from.
    cutoff
        Its influence distance in Å; NaN if it cannot be opened.
    trouble
        Why it cannot be opened; empty if it can.
    """

    description: PotentialDescription
    cutoff: float
    trouble: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """What there is to know of one model for some elements.

    Parameters
    ----------
    model
        The model.
    checked
        Those of the elements for which it was checked.
    fault
        What is wrong with it for these elements; ``None`` if nothing is known.
    refresh_drift
        How far ASE's calculator gets from its energy in three calls, in eV per atom: no fault, as
        models are opened once here.
    same_as
        Other models that give the same numbers.
    left_out
        Why it is not used as an EIP unless asked for; ``None`` if it is.
    """

    model: InstalledModel
    checked: tuple[str, ...]
    fault: str | None
    refresh_drift: float
    same_as: tuple[str, ...]
    left_out: str | None

    @property
    def name(self) -> str:
        """The name that opens it."""
        return self.model.description.name


def usable_eips(elements: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the installed KIM models to use as EIPs for ``elements``, sorted.

    These know all elements, have no known fault, were not made by machine learning, and give
    numbers that no other one of them gives.

    Raises
    ------
    ValueError
        If there is no element, or one that does not exist.
    """
    return tuple(entry.name for entry in catalogue(elements) if entry.left_out is None)


def catalogue(
    elements: Iterable[str], *, checks: CheckedModels | None = None
) -> tuple[CatalogueEntry, ...]:
    """Return all installed portable KIM models that know all ``elements``, by name.

    Of models that give the same numbers for the pure element, the one for the fewest elements is
    the one to use, and among these the oldest. For several elements together nothing is known of
    equal numbers: models that share a pure element differ in what is between elements.

    Parameters
    ----------
    elements
        Chemical symbols.
    checks
        Results of the checks. [default: those shipped with this package]

    Raises
    ------
    ValueError
        If there is no element, or one that does not exist.
    """
    wanted = _known_elements(elements)
    checks = checks or shipped_checks()
    models = [
        model for model in installed_models() if set(wanted) <= set(model.description.species)
    ]
    groups = _groups(checks, wanted)
    reasons = {model.description.name: _reason(model, wanted, checks) for model in models}
    entries = []
    for model in models:
        name = model.description.name
        equal = [
            other for other in models if other.description.name in groups.get(name, frozenset())
        ]
        left_out = reasons[name] or _replaced(model, equal, reasons)
        entries.append(
            CatalogueEntry(
                model=model,
                checked=tuple(element for element in wanted if checks.is_checked(name, element)),
                fault=checks.fault_of(name, wanted),
                refresh_drift=checks.refresh_drift(name, wanted),
                same_as=tuple(other.description.name for other in equal if other is not model),
                left_out=left_out,
            )
        )
    return tuple(entries)


def installed_models(folder: Path | None = None) -> tuple[InstalledModel, ...]:
    """Return all portable models that are installed, by name.

    Parameters
    ----------
    folder
        Where to keep what the models say; one that cannot be written is no error.
        [default: :func:`cache_folder`]
    """
    names = installed_kim_models()
    text = "\n".join([__version__, *names])
    file = f"kim-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    path = (folder or cache_folder()) / file
    with suppress(OSError, ValueError, TypeError, KeyError):
        return _read(path)
    models = tuple(_look_at(names))
    with suppress(OSError):
        _write(models, path)
    return models


def cache_folder() -> Path:
    """Return the folder for what can be made again: ``$XDG_CACHE_HOME/aiida-eipnn``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is to be ignored, says the XDG specification.
    home = Path(base) if Path(base).is_absolute() else Path("~/.cache").expanduser()
    return home / "aiida-eipnn"


def look_at(name: str) -> InstalledModel:
    """Open a model and say what it is; it may take the process with it."""
    return InstalledModel(description=describe_potential(name), cutoff=open_potential(name).cutoff)


def _look_at(names: Sequence[str]) -> Iterable[InstalledModel]:
    for name, outcome in each_apart(look_at, names, seconds=SECONDS_TO_OPEN):
        if isinstance(outcome, Lost):
            yield InstalledModel(
                description=_describe(name), cutoff=math.nan, trouble=outcome.reason
            )
        else:
            yield outcome


def _describe(name: str) -> PotentialDescription:
    """Describe a model that could not be opened, by its metadata."""
    # Without metadata its elements are unknown, and it is listed for none.
    with suppress(ValueError):
        return describe_potential(name)
    return PotentialDescription(name=name)


def _known_elements(elements: Iterable[str]) -> tuple[str, ...]:
    wanted = tuple(dict.fromkeys(elements))
    if not wanted:
        raise ValueError("no element to list models for: give at least one, such as Si")
    if wrong := [element for element in wanted if not atomic_numbers.get(element)]:
        raise ValueError(f"there is no element {', '.join(wrong)}; write symbols, such as Si,Al")
    return wanted


def _reason(model: InstalledModel, wanted: Sequence[str], checks: CheckedModels) -> str | None:
    """Say why a model is no EIP to use, its equals aside."""
    if model.trouble:
        return f"cannot be opened: {model.trouble}"
    if model.description.machine_learned:
        return "made by machine learning"
    if len(model.description.species) >= UNIVERSAL:
        return f"one formula for {len(model.description.species)} elements, fitted to none"
    return checks.fault_of(model.description.name, wanted)


def _groups(checks: CheckedModels, wanted: Sequence[str]) -> dict[str, frozenset[str]]:
    """Return for each model the models that give the same numbers, itself among them."""
    if len(wanted) > 1:
        return {}
    return {name: frozenset(group) for group in checks.same_numbers(wanted[0]) for name in group}


def _replaced(
    model: InstalledModel, equal: Sequence[InstalledModel], reasons: Mapping[str, str | None]
) -> str | None:
    """Say which model is used in place of this one; ``None`` if none is."""
    usable = [other for other in equal if reasons[other.description.name] is None]
    first = min(usable, key=_rank, default=model)
    return None if first is model else f"same numbers as {first.description.name}"


def _rank(model: InstalledModel) -> tuple[int, int, str]:
    described = model.description
    return len(described.species), described.year or 9999, described.name


def _read(path: Path) -> tuple[InstalledModel, ...]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return tuple(_from_row(row) for row in rows)


def _from_row(row: dict[str, Any]) -> InstalledModel:
    described = row["description"]
    described["species"] = tuple(described["species"])
    cutoff = math.nan if row["cutoff"] is None else row["cutoff"]
    return InstalledModel(
        description=PotentialDescription(**described), cutoff=cutoff, trouble=row["trouble"]
    )


def _write(models: Sequence[InstalledModel], path: Path) -> None:
    """Write the file whole or not at all: another process may read it meanwhile."""
    rows = [asdict(model) for model in models]
    for row in rows:
        row["cutoff"] = row["cutoff"] if math.isfinite(row["cutoff"]) else None
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=path.stem, delete=False
    ) as file:
        json.dump(rows, file)
    Path(file.name).replace(path)
