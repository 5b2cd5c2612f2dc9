"""Which KIM models pass the checks for which elements: the shipped results and how to remake them.

The shipped file is made by ``aiida-eipnn eip check --output FILE``.
"""

import datetime as dt
import importlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

from aiida_eipnn.science.eip.checks import CHECKS, CRYSTALS, Measured, crystals, faults_of, measure
from aiida_eipnn.science.eip.checks import refresh_drift as drift_of
from aiida_eipnn.science.eip.isolation import Lost, each_apart
from aiida_eipnn.science.eip.potential import describe_potential, open_potential

ELEMENTS = ("Si", "Al", "Cu", "Ni", "Mo", "W", "Fe", "Ta")
# Not a path: this package may lie in an archive.
SHIPPED = files("aiida_eipnn.science.eip") / "checked_models.json"
COMMAND = f"aiida-eipnn eip check --elements {','.join(ELEMENTS)} --output FILE"

# Two models give the same numbers where all crystals agree to this: re-tabulations of one potential
# differ by less than 1e-5 eV/atom and by up to 6e-4 eV/Å, and among some 7000 pairs of models there
# are four between 1e-5 and 1e-4 eV/atom.
SAME_ENERGY = 1e-5
SAME_FORCE = 1e-3
# Models of an alloy that were not made for the pure element are far from all others: their energy
# differences between the crystals are off the median of all models by 0.7 eV/atom and more, the
# others' by 0.4 at most. The median of a few models says nothing.
FAR = 0.5
MANY = 5
# An energy that ASE's refresh leaves alone repeats to round-off.
DRIFT = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementResult:
    """What the checks say of one model on one element.

    Parameters
    ----------
    faults
        What is wrong; empty if it passed.
    energy, force
        Energy in eV per atom and largest force in eV/Å on each crystal, in the order of
        :data:`~.checks.CRYSTALS`: the fingerprint. Empty where one is missing.
    refresh_drift
        How far ASE's calculator gets from the right energy in three calls, in eV per atom; 0 where
        it repeats.
    residuals
        The largest of each check, by name.
    """

    faults: tuple[str, ...] = ()
    energy: tuple[float, ...] = ()
    force: tuple[float, ...] = ()
    refresh_drift: float = 0.0
    residuals: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedModels:
    """Results of the checks.

    Parameters
    ----------
    made
        When and of what, for people.
    results
        By model and element.
    """

    made: Mapping[str, Any]
    results: Mapping[tuple[str, str], ElementResult]

    def fault_of(self, name: str, elements: Iterable[str]) -> str | None:
        """Say what is wrong with a model for these elements; ``None`` if nothing is known."""
        found = [
            f"{element}: {fault}"
            for element in elements
            for fault in self._result(name, element).faults
        ]
        return "; ".join(found) or None

    def is_checked(self, name: str, element: str) -> bool:
        """Say whether there is a result."""
        return (name, element) in self.results

    def refresh_drift(self, name: str, elements: Iterable[str]) -> float:
        """Return the largest drift of ASE's calculator for these elements, in eV per atom."""
        return max(self._result(name, element).refresh_drift for element in elements)

    def same_numbers(self, element: str) -> tuple[tuple[str, ...], ...]:
        """Return the groups of models that give the same numbers for the pure element."""
        return _groups(
            {
                name: np.array([result.energy, result.force])
                for (name, other), result in self.results.items()
                if other == element and result.energy
            }
        )

    def _result(self, name: str, element: str) -> ElementResult:
        return self.results.get((name, element), ElementResult())


def fault_of(name: str, elements: Iterable[str]) -> str | None:
    """Say what is known to be wrong with an EIP for these elements.

    Parameters
    ----------
    name
        The name that opens it.
    elements
        Chemical symbols.

    Returns
    -------
    str or None
        The reason not to use it, by the checks shipped with this package; ``None`` if it passed
        them and if it was never checked.
    """
    return shipped_checks().fault_of(name, elements)


@cache
def shipped_checks() -> CheckedModels:
    """Return the results that come with this package."""
    return read_checks(SHIPPED)


def check_models(
    names: Sequence[str],
    elements: Sequence[str],
    *,
    seconds: float = 300.0,
    on_result: Callable[[str, str, ElementResult], None] | None = None,
) -> CheckedModels:
    """Check each model on each of the elements that it knows, in a process of its own.

    Parameters
    ----------
    names
        KIM ids.
    elements
        Chemical symbols, of elements of which ASE knows a crystal.
    seconds
        How long one model may take for one element.
    on_result
        Called with model, element and result when there is one, before models are compared.
    """
    for element in elements:
        crystals(element)
    results = {}
    for name in names:
        known = set(describe_potential(name).species)
        items = [(name, element) for element in elements if element in known]
        for item, outcome in each_apart(check_model, items, seconds=seconds):
            result = (
                ElementResult(faults=(outcome.reason,)) if isinstance(outcome, Lost) else outcome
            )
            results[item] = result
            if on_result:
                on_result(*item, result)
    return CheckedModels(made=_made(), results=_mark_far(results))


def check_model(item: tuple[str, str]) -> ElementResult:
    """Check one KIM model on one element, ``(name, element)``, in this process."""
    name, element = item
    pool = crystals(element)
    outcomes = dict(measure(partial(open_potential, name), pool))
    measured = [outcome for outcome in outcomes.values() if isinstance(outcome, Measured)]
    faults = faults_of(outcomes)
    if len(measured) < len(outcomes):
        return ElementResult(faults=faults)
    first = next(iter(pool.values()))
    drift = drift_of(name, first, measured[0].energy * len(first))
    return ElementResult(
        faults=faults,
        energy=tuple(one.energy for one in measured),
        force=tuple(one.force for one in measured),
        refresh_drift=drift if drift > DRIFT else 0.0,
        residuals={check: max(one.residuals[check] for one in measured) for check in CHECKS},
    )


def read_checks(path: Traversable) -> CheckedModels:
    """Read what :func:`write_checks` wrote.

    Raises
    ------
    OSError
        If there is no such file.
    """
    made = json.loads(path.read_text(encoding="utf-8"))
    results = {
        (name, element): ElementResult(
            faults=tuple(row.get("faults", ())),
            energy=tuple(row.get("energy", ())),
            force=tuple(row.get("force", ())),
            refresh_drift=row.get("refresh_drift", 0.0),
            residuals=dict(zip(CHECKS, row.get("residuals", ()), strict=False)),
        )
        for name, rows in made.pop("models").items()
        for element, row in rows.items()
    }
    return CheckedModels(made=made, results=results)


def write_checks(checks: CheckedModels, path: Path) -> None:
    """Write the results as JSON, one line for each model and element."""
    header = json.dumps(dict(checks.made), indent=1, ensure_ascii=False)[:-2]
    models: dict[str, list[str]] = {}
    for (name, element), result in sorted(checks.results.items()):
        row = json.dumps(_row(result), ensure_ascii=False, separators=(",", ":"))
        models.setdefault(name, []).append(f'  "{element}":{row}')
    body = ",\n".join(f' "{name}":{{\n' + ",\n".join(rows) + "}" for name, rows in models.items())
    path.write_text(f'{header},\n "models":{{\n{body}\n}}}}\n', encoding="utf-8")


def _row(result: ElementResult) -> dict[str, Any]:
    """Return what is worth writing of a result."""
    row = {
        "faults": list(result.faults),
        "energy": [round(energy, 8) for energy in result.energy],
        "force": [round(force, 6) for force in result.force],
        "refresh_drift": float(f"{result.refresh_drift:.2g}"),
        "residuals": [float(f"{residual:.0e}") for residual in result.residuals.values()],
    }
    return {key: value for key, value in row.items() if value}


def _made() -> dict[str, Any]:
    """Return the head of the file."""
    return {
        "made_by": COMMAND,
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "kim_api": _kim_api(),
        "openkim_models": _debian_version("openkim-models"),
        "crystals": list(CRYSTALS),
        "tolerances": {name: f"{check.tolerance:g} {check.unit}" for name, check in CHECKS.items()},
        "same_numbers": f"{SAME_ENERGY:g} eV/atom and {SAME_FORCE:g} eV/Å on all crystals",
        "far": f"{FAR:g} eV/atom",
        "residuals": list(CHECKS),
    }


def _kim_api() -> str:
    return str(importlib.import_module("kimpy").sem_ver.get_sem_ver())


def _debian_version(package: str) -> str | None:
    """Return the version of a Debian package, ``None`` where there is none."""
    if not shutil.which("dpkg-query"):
        return None
    command = ["dpkg-query", "--show", "--showformat=${Version}", package]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout or None


def _mark_far(
    results: dict[tuple[str, str], ElementResult],
) -> dict[tuple[str, str], ElementResult]:
    """Add a fault to models whose energy differences are far from those of all others."""
    marked = dict(results)
    for element in {element for _, element in results}:
        rows = {key: row for key, row in results.items() if key[1] == element and row.energy}
        if len(rows) < MANY:
            continue
        energies = np.array([row.energy for row in rows.values()])
        differences = energies - energies[:, :1]
        far = np.abs(differences - np.median(differences, axis=0)).max(axis=1)
        for (key, row), distance in zip(rows.items(), far, strict=True):
            if distance > FAR:
                marked[key] = _with_fault(row, _far_from_all(float(distance)))
    return marked


def _far_from_all(distance: float) -> str:
    return (
        f"energy differences of crystals are {distance:.1f} eV/atom off the median of all models; "
        "it was not made for the pure element"
    )


def _with_fault(row: ElementResult, fault: str) -> ElementResult:
    return ElementResult(
        faults=(*row.faults, fault),
        energy=row.energy,
        force=row.force,
        refresh_drift=row.refresh_drift,
        residuals=row.residuals,
    )


def _groups(fingerprints: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Return the groups of two and more that are linked by equal fingerprints."""
    tolerance = np.array([[SAME_ENERGY], [SAME_FORCE]])
    group = {name: {name} for name in fingerprints}
    names = sorted(fingerprints)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            close = np.abs(fingerprints[one] - fingerprints[other]) <= tolerance
            if close.all() and group[one] is not group[other]:
                group[one] |= group[other]
                for member in group[other]:
                    group[member] = group[one]
    return tuple(sorted({tuple(sorted(members)) for members in group.values() if len(members) > 1}))
