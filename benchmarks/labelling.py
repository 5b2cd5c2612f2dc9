"""How fast the EIP engine labels, against ASE's KIM calculator on the same configurations.

    python benchmarks/labelling.py [--output labelling.json]

CPU time of one thread, medians of interleaved repeats in one process. ASE's calculator is created
once and reused, which is the fastest way to use it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.kim import KIM

from aiida_eipnn.science.eip.potential import open_potential

MODELS = (
    "SW_StillingerWeber_1985_Si__MO_405512056662_005",
    "Tersoff_LAMMPS_Tersoff_1988T3_Si__MO_186459956893_003",
    "EDIP_JustoBazantKaxiras_1998_Si__MO_958932894036_002",
    "MEAM_LAMMPS_LenoskySadighAlonso_2000_Si__MO_533426548156_000",
)
REPEATS = 5


def configurations(n: int, seed: int = 0) -> list[Atoms]:
    """Return rattled, strained silicon of 8 to 64 atoms."""
    rng = np.random.default_rng(seed)
    frames = []
    for number in range(n):
        atoms = bulk("Si", cubic=True).repeat(
            [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2)][number % 4]
        )
        atoms.set_cell(
            atoms.cell.array @ (np.eye(3) + rng.normal(0, 0.02, (3, 3))), scale_atoms=True
        )
        atoms.positions += rng.normal(0, 0.08, atoms.positions.shape)
        frames.append(atoms)
    return frames


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the CPU time of one call, in s."""
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(model: str, frames: list[Atoms]) -> dict[str, float | str]:
    """Return the time of a label in µs, ours and ASE's, and the largest difference in eV."""
    ours, theirs = open_potential(model), KIM(model)

    def with_ase() -> list[float]:
        energies = []
        for atoms in frames:
            theirs.calculate(atoms, ["energy", "forces"])
            energies.append(float(theirs.results["energy"]))
        return energies

    def with_ours() -> list[float]:
        return [ours.label(atoms).energy for atoms in frames]

    difference = max(abs(a - b) for a, b in zip(with_ase(), with_ours(), strict=True))
    times = [(cpu_seconds(with_ours), cpu_seconds(with_ase)) for _ in range(REPEATS)]
    mine, peer = (
        statistics.median(column) / len(frames) * 1e6 for column in zip(*times, strict=True)
    )
    return {
        "model": model,
        "ours_us": mine,
        "ase_us": peer,
        "ratio": peer / mine,
        "largest_difference_eV": difference,
    }


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100, help="configurations")
    parser.add_argument("--output", type=Path, default=Path("labelling.json"))
    given = parser.parse_args()
    frames = configurations(given.n)
    rows = [compare(model, frames) for model in MODELS]
    print(f"{'model':62} {'ours µs':>9} {'ASE µs':>9} {'ratio':>6}")
    for row in rows:
        print(f"{row['model']:62} {row['ours_us']:9.0f} {row['ase_us']:9.0f} {row['ratio']:6.1f}")
    given.output.write_text(
        json.dumps({"n_configurations": given.n, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
