"""The pool: new configurations made out of a few seeds, by recipe."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np
from ase import Atoms

from aiida_eipnn.science import perturbation
from aiida_eipnn.science.configurations import Configurations, configuration_id
from aiida_eipnn.science.dynamics import Dynamics, Trajectory
from aiida_eipnn.science.gate import MIN_CONTACT, geometry_fault
from aiida_eipnn.science.settings import build

MD = "md"

# Tries for each configuration before a recipe is called impossible.
MAX_TRIES = 100


class Kind(NamedTuple):
    """A kind of perturbation: what makes it, and its settings."""

    make: Callable[[Atoms, np.random.Generator, Any], Atoms]
    settings: type[Any]


KINDS: dict[str, Kind] = {
    "rattled": Kind(perturbation.rattled, perturbation.Rattle),
    "strained": Kind(perturbation.strained, perturbation.Strain),
    "vacancy": Kind(perturbation.vacancy, perturbation.Vacancy),
    "surface": Kind(perturbation.cut_surface, perturbation.Surface),
    "dimer": Kind(perturbation.dimer, perturbation.Dimer),
    "random": Kind(perturbation.scattered, perturbation.Scatter),
    "interstitial": Kind(perturbation.interstitial, perturbation.Interstitial),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MolecularDynamics:
    """Snapshots of molecular dynamics, run after run until there are enough.

    Parameters
    ----------
    temperatures
        Taken in turn by the runs, in K.
    pressures
        Likewise, in GPa; without any the volume is constant.
    snapshots_per_run, spacing, timestep, friction, max_temperature_factor, max_uncertainty
        See :class:`aiida_eipnn.science.dynamics.Dynamics`.
    amplitude
        Displacement of the atoms before each run; see
        :class:`aiida_eipnn.science.perturbation.Rattle`.
    """

    temperatures: tuple[float, ...] = (300.0, 600.0, 1000.0)
    pressures: tuple[float, ...] = ()
    snapshots_per_run: int = 10
    spacing: int = 20
    timestep: float = 1.0
    friction: float = 0.01
    max_temperature_factor: float = 10.0
    max_uncertainty: float | None = None
    amplitude: tuple[float, float] = (0.01, 0.05)

    def __post_init__(self) -> None:
        perturbation.check_range("amplitude", self.amplitude, lowest=0.0)
        if not isinstance(self.temperatures, tuple) or not self.temperatures:
            raise ValueError(f"temperatures is {self.temperatures}; give a list of at least one")
        if not all(isinstance(pressure, int | float) for pressure in self.pressures):
            raise ValueError(f"pressures is {self.pressures!r}; give a list of numbers, in GPa")
        for turn in range(len(self.conditions)):
            self.run(turn, MIN_CONTACT)

    @property
    def conditions(self) -> list[tuple[float, float | None]]:
        """Every temperature at every pressure."""
        return [(t, p) for p in self.pressures or (None,) for t in self.temperatures]

    def run(self, turn: int, min_contact: float) -> Dynamics:
        """Return the settings of one run; they take the conditions in turn."""
        temperature, pressure = self.conditions[turn % len(self.conditions)]
        return Dynamics(
            temperature=temperature,
            pressure=pressure,
            n_snapshots=self.snapshots_per_run,
            spacing=self.spacing,
            timestep=self.timestep,
            friction=self.friction,
            max_temperature_factor=self.max_temperature_factor,
            max_uncertainty=self.max_uncertainty,
            min_contact=min_contact,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to make.

    Parameters
    ----------
    config_type
        ``md``, or a kind of perturbation (:data:`KINDS`).
    count
        How many configurations.
    settings
        The settings of that kind.
    n_atoms
        Prefer seeds with that many atoms, counted before the supercell: they alone are used where
        there are any, else all are. All seeds in turn by default.
    supercell
        Three repetitions, or a 3 × 3 integer matrix.
    min_atoms
        Repeat each seed, after the supercell, along its shortest cell vector until it has at least
        that many atoms; see :func:`aiida_eipnn.science.perturbation.enlarge`.
    min_contact
        Smallest distance of two atoms, as a fraction of the sum of their covalent radii.
    """

    config_type: str
    count: int
    settings: Any
    n_atoms: int | None = None
    supercell: tuple[Any, ...] = (1, 1, 1)
    min_atoms: int | None = None
    min_contact: float = MIN_CONTACT

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Recipe":
        """Build from plain values: the fields above and, beside them, the settings of the kind.

        Raises
        ------
        ValueError
            If the kind is unknown, or a setting is unknown or out of range.
        """
        kind = content.get("config_type")
        if kind != MD and kind not in KINDS:
            raise ValueError(f"no recipe for config_type {kind!r}, only {sorted([*KINDS, MD])}")
        settings_class = MolecularDynamics if kind == MD else KINDS[kind].settings
        common = {item.name for item in fields(cls)} - {"settings"}
        own = {item.name for item in fields(settings_class)}
        if unknown := sorted(set(content) - common - own):
            raise ValueError(f"recipe {kind!r}: no setting {unknown}, only {sorted(common | own)}")
        what = f"recipe {kind!r}"
        try:
            settings = build(
                settings_class, {key: content[key] for key in own if key in content}, what
            )
            given = {key: content[key] for key in common if key in content}
            return build(cls, {**given, "settings": settings}, what)
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(what) else f"{what}: {text}") from None

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"count is {self.count!r}; make at least one configuration")
        for name in ("n_atoms", "min_atoms"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; give a whole number above zero, or nothing")
        perturbation.repetition_matrix(self.supercell)


class Stopped(Exception):  # noqa: N818 - an outcome, not a fault of the program
    """What was under way had to stop."""


class Run(NamedTuple):
    """One run of molecular dynamics: where it starts, its random numbers, and its settings."""

    start: Atoms
    rng: np.random.Generator
    settings: Dynamics


class Driver(Protocol):
    """What runs molecular dynamics."""

    @property
    def has_uncertainty(self) -> bool:
        """Whether it knows how uncertain its forces are."""
        ...

    def run(self, runs: Sequence[Run]) -> Iterable[Trajectory]:
        """Return the trajectory of each run, in order, however many run side by side.

        Raises
        ------
        Stopped
            If they had to stop.
        """
        ...


def make_pool(
    seeds: Configurations,
    recipes: Sequence[Mapping[str, Any]],
    rng: np.random.Generator,
    driver: Driver | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> tuple[Configurations, tuple[str, ...]]:
    """Make configurations by recipe.

    Every recipe draws from a random stream of its own, so a change of one leaves the
    configurations of the others as they were. A recipe that these seeds do not allow (a vacancy in
    a single atom, a surface of a molecule) is a note, not an error, as long as others made any.

    Parameters
    ----------
    seeds
        Where to start from; they are not part of the pool.
    recipes
        Each with ``config_type``, ``count`` and settings; see :class:`Recipe`.
    rng
        The source of all randomness.
    driver
        Runs molecular dynamics; needed only where a recipe asks for it. It gets equal runs in the
        same order for the same ``rng``.
    must_stop
        Asked between configurations.

    Returns
    -------
    tuple
        The pool, each geometry once, and notes about what did not go as planned.

    Raises
    ------
    ValueError
        If a recipe is wrong, or if nothing at all could be made.
    Stopped
        If it had to stop before the pool was complete.
    """
    if not len(seeds):
        raise ValueError("no seeds: give at least one configuration to start from")
    if not recipes:
        raise ValueError("no recipes: say what to make, such as config_type rattled, count 10")
    parsed = [Recipe.from_dict(content) for content in recipes]
    driven = [recipe for recipe in parsed if recipe.config_type == MD]
    if driver is None and driven:
        raise ValueError(
            "molecular dynamics needs an EIP or a committee to drive it: name one, or give one"
        )
    asked = any(recipe.settings.max_uncertainty is not None for recipe in driven)
    if driver is not None and asked and not driver.has_uncertainty:
        raise ValueError(
            "max_uncertainty is what a committee has, and an EIP has none: give a committee to "
            "drive molecular dynamics, or leave max_uncertainty out"
        )
    seen: set[str] = set()
    frames: list[Atoms] = []
    types: list[str] = []
    notes: list[str] = []
    for recipe, stream in zip(parsed, rng.spawn(len(parsed)), strict=True):
        if recipe.config_type == MD and driver is not None:
            source = _dynamics(recipe, seeds, stream, driver, notes)
        else:
            source = _perturbed(recipe, seeds, stream)
        made, fault = _collect(source, recipe, seen, must_stop)
        if len(made) < recipe.count:
            text = f"{recipe.config_type}: {len(made)} of {recipe.count} were made"
            notes.append(f"{text}: {fault}" if fault else text)
        frames += made
        types += [recipe.config_type] * len(made)
    if not frames:
        raise ValueError("not one configuration could be made: " + "; ".join(notes))
    return Configurations.from_atoms(frames, types), tuple(notes)


def counts_by_type(configurations: Configurations) -> dict[str, int]:
    """Return how many configurations there are of each type."""
    return dict(sorted(Counter(configurations.config_types.tolist()).items()))


def _starts(seeds: Configurations, recipe: Recipe) -> list[Atoms]:
    n_atoms = seeds.n_atoms.tolist()
    preferred = [row for row, n in enumerate(n_atoms) if n == recipe.n_atoms]
    starts = [
        perturbation.repeat(seeds.atoms(row), recipe.supercell)
        for row in preferred or range(len(seeds))
    ]
    if recipe.min_atoms is None:
        return starts
    return [perturbation.enlarge(atoms, recipe.min_atoms) for atoms in starts]


def _collect(
    source: Iterator[Atoms], recipe: Recipe, seen: set[str], must_stop: Callable[[], bool]
) -> tuple[list[Atoms], str]:
    """Return what is new, and why it is less than the recipe asks for, if a reason is known."""
    made: list[Atoms] = []
    try:
        for atoms in source:
            name = configuration_id(atoms)
            if name not in seen:
                seen.add(name)
                made.append(atoms)
            if len(made) == recipe.count:
                break
            if must_stop():
                raise Stopped
    except ValueError as error:
        return made, str(error)
    return made, ""


def _perturbed(recipe: Recipe, seeds: Configurations, rng: np.random.Generator) -> Iterator[Atoms]:
    kind = KINDS[recipe.config_type]
    starts = deque(_starts(seeds, recipe))
    fault: str | None = None
    for _ in range(MAX_TRIES * recipe.count):
        try:
            atoms = kind.make(starts[0], rng, recipe.settings)
        except ValueError:
            # This seed does not allow it; another may.
            starts.popleft()
            if not starts:
                raise
            continue
        starts.rotate(-1)
        fault = geometry_fault(atoms, recipe.min_contact)
        if fault is None:
            yield atoms
    raise ValueError(
        f"{MAX_TRIES * recipe.count} tries did not give more different configurations"
        + (f" (the last one failed: {fault})" if fault else "")
        + "; make the perturbation weaker, lower min_contact, or ask for fewer"
    )


def _dynamics(
    recipe: Recipe,
    seeds: Configurations,
    rng: np.random.Generator,
    driver: Driver,
    notes: list[str],
) -> Iterator[Atoms]:
    settings: MolecularDynamics = recipe.settings
    runs = _runs(_starts(seeds, recipe), recipe, rng)
    n_frames = 0
    # Runs that blow up are made good by others, but not for ever.
    n_left = 3 * _n_runs(settings, recipe.count) + 3
    while n_left:
        n_asked = min(n_left, max(_n_runs(settings, recipe.count - n_frames), 1))
        n_left -= n_asked
        asked = [next(runs) for _ in range(n_asked)]
        for run, trajectory in zip(asked, driver.run(asked), strict=True):
            if trajectory.fault:
                notes.append(f"{_name(run)}: {trajectory.fault}")
            n_frames += len(trajectory.frames)
            yield from trajectory.frames


def _n_runs(settings: MolecularDynamics, n_frames: int) -> int:
    """Return how many runs have that many snapshots, if nothing ends them."""
    return -(-n_frames // settings.snapshots_per_run)


def _runs(starts: list[Atoms], recipe: Recipe, rng: np.random.Generator) -> Iterator[Run]:
    """Yield runs without end, each with random numbers of its own."""
    rattle = perturbation.Rattle(amplitude=recipe.settings.amplitude)
    for turn in count():
        (stream,) = rng.spawn(1)
        # Every seed meets every condition before any pair comes again.
        start = perturbation.rattled(starts[turn % len(starts)], stream, rattle)
        settings = recipe.settings.run(turn // len(starts), recipe.min_contact)
        yield Run(start, stream, settings)


def _name(run: Run) -> str:
    pressure = run.settings.pressure
    where = "" if pressure is None else f" and {pressure:g} GPa"
    return f"{MD} at {run.settings.temperature:.0f} K{where}, {len(run.start)} atoms"
