"""OpenKIM models. The only import of kimpy.

A model is created once and never refreshed: ``Model.clear_then_refresh`` changes the energies of
some MEAM models at every call (Wagner 2007, Pascuet & Fernandez 2015), without an error.
"""

import ctypes
import difflib
import json
import re
from collections.abc import Iterable
from functools import cache, cached_property
from typing import Any, NamedTuple

import kimpy
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray

from aiida_eipnn.science.arrays import BoolArray, FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.batch import COMPILED, Batch, BatchLabels, Reach, reason_of
from aiida_eipnn.science.eip.potential import (
    Label,
    PotentialDescription,
    refuse_unknown_elements,
    virial_stress,
)

if COMPILED:
    from aiida_eipnn.science.eip.neighbours import (
        Particles,
        callback_address,
        fold,
        make_particles,
    )

# KIM's integers are C ints.
Codes = NDArray[np.intc]

# Values of "potential-type" in the models' own metadata.
MACHINE_LEARNED = frozenset({"snap", "dunn", "hnn", "nn", "gap", "agni", "mtp", "ace"})
_NAMES = kimpy.compute_argument_name
_PORTABLE = kimpy.collection_item_type.portableModel
# KIM's own species codes are small numbers, chosen by each model.
_NOT_ASKED, _UNKNOWN = np.iinfo(np.intc).min, np.iinfo(np.intc).min + 1


class _Desk(NamedTuple):
    """Memory that a model reads and writes; KIM's compute arguments, and the lists of neighbours.

    KIM keeps pointers into these arrays: they must live as long as it computes.
    """

    number: Codes
    codes: Codes
    contributing: Codes
    positions: FloatArray
    energy: FloatArray
    forces: FloatArray
    atomic_energy: FloatArray
    lists: IntArray

    @classmethod
    def of(cls, n: int) -> "_Desk":
        """Return memory for ``n`` particles."""
        return cls(
            number=np.zeros(1, dtype=np.intc),
            codes=np.zeros(n, dtype=np.intc),
            contributing=np.zeros(n, dtype=np.intc),
            positions=np.zeros((n, 3)),
            energy=np.zeros(1),
            forces=np.zeros((n, 3)),
            atomic_energy=np.zeros(n),
            lists=np.zeros(2 * n + 2, dtype=np.int64),
        )


class KimPotential:
    """A portable OpenKIM model, created once.

    Parameters
    ----------
    name
        Full KIM id.
    model
        The model, in Å and eV.
    """

    def __init__(self, name: str, model: Any) -> None:
        self.name = name
        self._model = model
        self.cutoff = float(model.get_influence_distance())
        self._cutoffs, hints = model.get_neighbor_list_cutoffs_and_hints()
        self._images_need_neighbours = not np.all(hints)
        self._neighbours = kimpy.neighlist.create()
        self._arguments = model.compute_arguments_create()
        # Species code by atomic number, asked when an element is first met: asking for all takes
        # longer than opening the model.
        self._codes = np.full(len(chemical_symbols), _NOT_ASKED, dtype=np.intc)
        status = self._arguments.get_argument_support_status(_NAMES.partialParticleEnergy)
        self.tells_atomic_energies = bool(status != kimpy.support_status.notSupported)
        self._desk: _Desk | None = None
        self._callback = _new_capsule(callback_address(), None, None) if COMPILED else None

    @cached_property
    def elements(self) -> frozenset[int]:
        """Atomic numbers it knows."""
        return frozenset(
            number
            for number in range(1, len(chemical_symbols))
            if self._ask_code(number) != _UNKNOWN
        )

    @cached_property
    def description(self) -> PotentialDescription:
        """Where it comes from."""
        return describe_kim_model(self.name)

    @property
    def reach(self) -> Reach | None:
        """What it needs to know about an atom's surroundings, ``None`` where lists are its own."""
        # No installed model has lists of several lengths; one that has gets kimpy's.
        if not COMPILED or len(self._cutoffs) != 1:
            return None
        return Reach(self.cutoff, self._images_need_neighbours)

    def label(self, atoms: Atoms) -> Label:
        """Return energy, forces and stress of one configuration.

        Raises
        ------
        ValueError
            If it does not know an element of the configuration.
        RuntimeError
            If the model cannot compute it, for instance because the atoms are too close.
        """
        if self.reach is None:
            return self._label_alone(atoms)
        refuse_unknown_elements(self.name, atoms.numbers, self._known(atoms.numbers))
        labels = self.label_batch(Batch(Configurations.from_atoms([atoms]), [self.reach]))
        if labels.errors:
            raise RuntimeError(labels.errors[0])
        return Label(float(labels.energy[0]), labels.forces, labels.stress[0])

    def label_batch(
        self, batch: Batch, rows: Iterable[int] | None = None, *, atomic_energies: bool = False
    ) -> BatchLabels:
        """Return what it says about configurations, on neighbour lists shared with other EIPs.

        Parameters
        ----------
        batch
            The configurations.
        rows
            Label only these.
        atomic_energies
            Ask for the energy of each atom too, where the model tells it.
        """
        part = batch.configurations
        labels = BatchLabels.empty(part)
        todo = range(len(part)) if rows is None else rows
        if self.reach is None:
            for row in todo:
                labels.ask(self._label_alone, part, int(row))
            return labels
        codes = self._codes_of(part.numbers)
        unknown = np.flatnonzero(codes == _UNKNOWN)
        strangers = set(map(int, np.searchsorted(part.offsets, unknown, side="right") - 1))
        particles = make_particles(
            batch.pairs(self.reach),
            part.offsets,
            codes,
            float(self._cutoffs[0]),
            self.cutoff,
            of_images=self._images_need_neighbours,
        )
        atomic_energies = atomic_energies and self.tells_atomic_energies
        desk = self._clear_desk(particles, atomic_energies=atomic_energies)
        for row in map(int, todo):
            try:
                if row in strangers:
                    refuse_unknown_elements(self.name, part.atoms(row).numbers, self.elements)
                self._compute_row(desk, particles, row)
                labels.energy[row] = particles.energy[row]
            except (RuntimeError, ValueError) as error:
                labels.errors[row] = reason_of(error)
        forces, energies, stress = fold(particles, len(part.numbers), part.cells, part.pbc)
        told = np.isfinite(labels.energy)
        labels.stress[told] = stress[told]
        labels.forces[:] = forces
        if atomic_energies:
            labels.atomic_energy[:] = energies
        return labels

    def _compute_row(self, desk: _Desk, particles: "Particles", row: int) -> None:
        """Let the model compute one configuration of these.

        It reads and writes on a desk that stays where it is: telling KIM of a new place for each
        array takes longer than some models need to compute.
        """
        if particles.collided[row]:
            raise RuntimeError("two atoms are in one place")
        start, stop = int(particles.offsets[row]), int(particles.offsets[row + 1])
        n = stop - start
        desk.number[0] = n
        desk.codes[:n] = particles.codes[start:stop]
        desk.contributing[:n] = particles.contributing[start:stop]
        desk.positions[:n] = particles.positions[start:stop]
        # Some models add to what is there, or leave out what is not an atom.
        desk.forces[:n] = 0.0
        desk.lists[: 2 * n + 2] = particles.lists[2 * (row + start) : 2 * (row + stop) + 2]
        desk.atomic_energy[:n] = 0.0
        self._model.compute(self._arguments)
        particles.energy[row] = desk.energy[0]
        particles.forces[start:stop] = desk.forces[:n]
        particles.atomic_energy[start:stop] = desk.atomic_energy[:n]

    def _clear_desk(self, particles: "Particles", *, atomic_energies: bool) -> _Desk:
        """Tell the model where to read and to write; the largest configuration must fit."""
        most = int(np.diff(particles.offsets).max(initial=1))
        if self._desk is None or most > len(self._desk.codes):
            self._desk = _Desk.of(2 * most)
        desk, point = self._desk, self._arguments.set_argument_pointer
        point(_NAMES.numberOfParticles, desk.number)
        point(_NAMES.particleSpeciesCodes, desk.codes)
        point(_NAMES.particleContributing, desk.contributing)
        point(_NAMES.coordinates, desk.positions)
        point(_NAMES.partialEnergy, desk.energy)
        point(_NAMES.partialForces, desk.forces)
        if atomic_energies:
            point(_NAMES.partialParticleEnergy, desk.atomic_energy)
        elif self.tells_atomic_energies:
            self._arguments.set_argument_null_pointer(_NAMES.partialParticleEnergy)
        self._arguments.set_callback_pointer(
            kimpy.compute_callback_name.GetNeighborList,
            self._callback,
            _new_capsule(desk.lists.ctypes.data, None, None),
        )
        return desk

    def _label_alone(self, atoms: Atoms) -> Label:
        """Return the label of one configuration, on kimpy's own lists."""
        n_atoms = len(atoms)
        coordinates, codes, image_of = self._with_images(atoms)
        need = np.ones(len(codes), dtype=np.intc)
        if not self._images_need_neighbours:
            need[n_atoms:] = 0
        self._neighbours.build(coordinates, self.cutoff, self._cutoffs, need)
        self._arguments.set_callback_pointer(
            kimpy.compute_callback_name.GetNeighborList,
            kimpy.neighlist.get_neigh_kim(),
            self._neighbours,
        )
        energy, forces = self._compute(coordinates, codes, n_atoms)
        folded = forces[:n_atoms].copy()
        np.add.at(folded, image_of, forces[n_atoms:])
        stress = np.full(6, np.nan)
        if atoms.pbc.all():
            stress = virial_stress(coordinates, forces, atoms.cell.volume)
        return Label(energy, folded, stress)

    def _with_images(self, atoms: Atoms) -> tuple[FloatArray, Codes, Codes]:
        """Return coordinates and species codes of atoms and images, and what each is an image of.

        KIM takes no periodic cell: images within the influence distance become extra atoms.
        """
        coordinates = np.ascontiguousarray(atoms.positions, dtype=np.float64)
        codes = self._species_codes(atoms.numbers)
        if not atoms.pbc.any():
            return coordinates, codes, np.zeros(0, dtype=np.intc)
        cell = atoms.cell if atoms.pbc.all() else atoms.cell.complete()
        # kimpy reads the memory row by row whatever the strides; complete() returns columns.
        cell = np.ascontiguousarray(cell.array)
        coordinates = _into_cell(coordinates, cell, atoms.pbc)
        images, image_codes, image_of = kimpy.neighlist.create_paddings(
            self.cutoff, cell, atoms.pbc.astype(np.intc), coordinates, codes
        )
        if len(image_of) == 0:
            return coordinates, codes, np.zeros(0, dtype=np.intc)
        return (
            np.concatenate([coordinates, images]),
            np.concatenate([codes, image_codes]).astype(np.intc, copy=False),
            image_of,
        )

    def _compute(
        self, coordinates: FloatArray, codes: Codes, n_atoms: int
    ) -> tuple[float, FloatArray]:
        """Return the energy of the atoms and the forces on atoms and images."""
        energy, forces = np.zeros(1), np.zeros_like(coordinates)
        contributing = np.zeros(len(codes), dtype=np.intc)
        contributing[:n_atoms] = 1
        name = kimpy.compute_argument_name
        # KIM keeps pointers into these arrays: they must live, and be of these types, until
        # compute returns.
        arrays = (
            (name.numberOfParticles, np.array([len(codes)], dtype=np.intc)),
            (name.particleSpeciesCodes, codes),
            (name.particleContributing, contributing),
            (name.coordinates, coordinates),
            (name.partialEnergy, energy),
            (name.partialForces, forces),
        )
        for argument, array in arrays:
            self._arguments.set_argument_pointer(argument, array)
        if self.tells_atomic_energies:
            # Left pointing at the memory of a batch, which may be shorter.
            self._arguments.set_argument_null_pointer(name.partialParticleEnergy)
        self._model.compute(self._arguments)
        return float(energy[0]), forces

    def _species_codes(self, numbers: IntArray) -> Codes:
        """Return the model's species code of each atom; ``ValueError`` if it lacks one."""
        refuse_unknown_elements(self.name, numbers, self._known(numbers))
        return self._codes_of(numbers)

    def _codes_of(self, numbers: IntArray) -> Codes:
        """Return the model's species code of each atom, ``_UNKNOWN`` where it has none."""
        codes = self._codes[numbers]
        if (codes == _NOT_ASKED).any():
            for number in np.unique(numbers):
                self._codes[number] = self._ask_code(int(number))
            codes = self._codes[numbers]
        return codes

    def _known(self, numbers: IntArray) -> frozenset[int]:
        """Return all elements it knows, as far as that matters for these."""
        codes = self._codes_of(numbers)
        return self.elements if (codes == _UNKNOWN).any() else frozenset(map(int, numbers))

    def _ask_code(self, number: int) -> int:
        """Return the model's species code of an element."""
        species = kimpy.species_name.SpeciesName(chemical_symbols[number])
        supported, code = self._model.get_species_support_and_code(species)
        return int(code) if supported else _UNKNOWN


def open_kim_potential(name: str) -> KimPotential:
    """Open an installed portable KIM model.

    Raises
    ------
    ValueError
        If it is not installed, not a portable model, or cannot give energy and forces in eV and Å.
    """
    _silence()
    _require_installed(name)
    try:
        accepted, model = kimpy.model.create(
            kimpy.numbering.zeroBased,
            kimpy.length_unit.A,
            kimpy.energy_unit.eV,
            kimpy.charge_unit.e,
            kimpy.temperature_unit.K,
            kimpy.time_unit.ps,
            name,
        )
    except RuntimeError as error:
        raise ValueError(f"the KIM model {name} cannot be opened: {error}") from error
    if not accepted:
        raise ValueError(f"the KIM model {name} does not work in Å and eV; choose another")
    _require_energy_and_forces(name, model)
    return KimPotential(name, model)


def describe_kim_model(name: str) -> PotentialDescription:
    """Say where a KIM model comes from, by the metadata installed with it.

    Raises
    ------
    ValueError
        If it is not installed, or not a portable model.
    """
    _silence()
    _require_installed(name)
    spec = _metadata(name)
    if not spec:
        # The examples of the KIM API come without metadata.
        potential = open_kim_potential(name)
        return PotentialDescription(
            name=name, species=tuple(chemical_symbols[z] for z in sorted(potential.elements))
        )
    paper = _primary_citation(spec)
    return PotentialDescription(
        name=name,
        kim_id=name.rpartition("__")[2],
        title=spec.get("title", ""),
        species=tuple(spec.get("species", ())),
        family=spec.get("model-driver", spec.get("potential-type", "")).partition("__")[0],
        citation=_one_line(paper),
        doi=paper.get("doi", spec.get("doi", "")),
        year=_year(paper),
        machine_learned=spec.get("potential-type", "") in MACHINE_LEARNED,
    )


def installed_kim_models() -> tuple[str, ...]:
    """Return the names of all portable models that are installed, sorted."""
    _silence()
    collections = kimpy.collections.create()
    count = collections.cache_list_of_item_names_by_type(_PORTABLE)
    return tuple(sorted(collections.get_item_name_by_type(index) for index in range(count)))


def read_edn(text: str) -> Any:
    """Read the part of EDN that KIM metadata uses: maps, vectors and strings."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[{}\[\]]|[^\s,{}\[\]"]+', text, flags=re.DOTALL)
    tokens.reverse()
    return _read_value(tokens)


def _read_value(tokens: list[str]) -> Any:
    """Read one value from the end of ``tokens``."""
    token = tokens.pop()
    if token not in "{[":
        return json.loads(token, strict=False) if token.startswith('"') else token
    closing, items = {"{": "}", "[": "]"}[token], []
    while tokens[-1] != closing:
        items.append(_read_value(tokens))
    tokens.pop()
    return items if token == "[" else dict(zip(items[::2], items[1::2], strict=True))


# An address as kimpy takes it.
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def _into_cell(positions: FloatArray, cell: FloatArray, pbc: BoolArray) -> FloatArray:
    """Return the positions with every atom inside the cell along the periodic directions.

    ``create_paddings`` misses images of atoms that have drifted far out, and the energy is wrong
    without an error.
    """
    shifts = np.where(pbc, np.floor(positions @ np.linalg.inv(cell)), 0.0)
    return positions - shifts @ cell if shifts.any() else positions


def _metadata(name: str) -> dict[str, Any]:
    """Return the model's ``kimspec.edn``, empty where there is none."""
    collections = kimpy.collections.create()
    count = collections.cache_list_of_item_metadata_files(_PORTABLE, name)
    for index in range(count):
        file_name, _, _, is_text, content = collections.get_item_metadata_file(index)
        if file_name == "kimspec.edn" and is_text:
            spec: dict[str, Any] = read_edn(content)
            return spec
    return {}


def _primary_citation(spec: dict[str, Any]) -> dict[str, str]:
    """Return the publication that introduced the model, empty where none is recorded."""
    papers: list[dict[str, str]] = spec.get("source-citations", [])
    return next(
        (paper for paper in papers if "recordprimary" in paper), papers[0] if papers else {}
    )


def _year(paper: dict[str, str]) -> int | None:
    found = re.search(r"\d{4}", paper.get("year", ""))
    return int(found[0]) if found else None


def _one_line(paper: dict[str, str]) -> str:
    """Return a citation as one line."""
    where = [paper.get(key, "") for key in ("journal", "volume", "pages")]
    parts = [paper.get("author", ""), paper.get("title", ""), " ".join(filter(None, where))]
    text = ", ".join(filter(None, parts))
    year = _year(paper)
    return f"{text} ({year})" if year else text


def _require_installed(name: str) -> None:
    try:
        kind = kimpy.collections.create().get_item_type(name)
    except RuntimeError:
        raise ValueError(_not_installed(name)) from None
    if kind != _PORTABLE:
        raise ValueError(
            f"{name} is a {kind}, not a portable model; only portable KIM models run here"
        )


def _not_installed(name: str) -> str:
    """Say that a model is missing, and which installed ones have a similar name."""
    close = difflib.get_close_matches(name, installed_kim_models(), n=3, cutoff=0.5)
    hint = f"; close to it are {', '.join(close)}" if close else ""
    return f"the KIM model {name} is not installed{hint}"


def _require_energy_and_forces(name: str, model: Any) -> None:
    """Raise ``ValueError`` if the model gives no energy or forces, or demands more than these."""
    arguments = model.compute_arguments_create()
    names, support = kimpy.compute_argument_name, kimpy.support_status
    given = (names.partialEnergy, names.partialForces)
    for index in range(names.get_number_of_compute_argument_names()):
        argument = names.get_compute_argument_name(index)
        status = arguments.get_argument_support_status(argument)
        if argument in given and status == support.notSupported:
            raise ValueError(f"the KIM model {name} gives no {argument}; choose another")
    callbacks = kimpy.compute_callback_name
    for index in range(callbacks.get_number_of_compute_callback_names()):
        callback = callbacks.get_compute_callback_name(index)
        status = arguments.get_callback_support_status(callback)
        if callback != callbacks.GetNeighborList and status == support.required:
            raise ValueError(f"the KIM model {name} demands {callback}, which is not offered here")


@cache
def _silence() -> None:
    """Keep the KIM API from writing ``kim.log`` into the working directory."""
    kimpy.log.Log.push_default_verbosity(kimpy.log_verbosity.silent)
