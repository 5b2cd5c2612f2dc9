"""A hydrogen molecule for pw.x: the least that shows that it runs, without any pseudopotential.

The potential is made here, of one formula, because a profile may have no family yet. It is good for
nothing else.
"""

import io
import math
from typing import Any

import numpy as np
from aiida.orm import Dict, KpointsData, StructureData
from aiida_pseudo.data.pseudo import UpfData
from ase import Atoms

from aiida_eipnn.science.arrays import FloatArray

BOND = 0.75
# Å: some planes of the grids for each process, or pw.x has nothing for it to do and stops.
SMALLEST_CELL = 4.0
LENGTH_PER_PROCESS = 0.5
# Bohr: the charge of the nucleus is smeared this wide, so that few plane waves do.
WIDTH = 0.4
N_POINTS = 401
LARGEST_RADIUS = 20.0
PARAMETERS = {
    "CONTROL": {"calculation": "scf"},
    "SYSTEM": {"ecutwfc": 15.0},
    "ELECTRONS": {"conv_thr": 1e-6},
}
# Two bands cannot be shared by many processes.
PARALLELIZATION = {"ndiag": 1}


def hydrogen_inputs(n_processes: int) -> dict[str, Any]:
    """Return structure, pseudopotential, parameters and the like for PwCalculation.

    Parameters
    ----------
    n_processes
        MPI processes that share the work: the cell grows with them.
    """
    kpoints = KpointsData()
    kpoints.set_kpoints_mesh([1, 1, 1])
    return {
        "structure": StructureData(ase=molecule(n_processes)),
        "pseudos": {"H": UpfData(io.BytesIO(pseudopotential().encode()), filename="H.upf")},
        "parameters": Dict(PARAMETERS),
        "kpoints": kpoints,
        "parallelization": Dict(PARALLELIZATION),
    }


def molecule(n_processes: int) -> Atoms:
    """Return H₂ in a cell that is large enough for so many processes."""
    width = max(SMALLEST_CELL, LENGTH_PER_PROCESS * math.sqrt(2 * n_processes))
    length = max(SMALLEST_CELL, LENGTH_PER_PROCESS * n_processes)
    positions = [(0.0, 0.0, 0.0), (0.0, 0.0, BOND)]
    return Atoms("H2", positions=positions, cell=[width, width, length], pbc=True)


def pseudopotential() -> str:
    """Return hydrogen as a UPF file: a local potential, −2 erf(r / √2 w) / r in Ry and bohr."""
    logarithm = np.linspace(math.log(1e-4), math.log(LARGEST_RADIUS), N_POINTS)
    r = np.exp(logarithm)
    potential = -2.0 / r * np.array([math.erf(radius / (math.sqrt(2.0) * WIDTH)) for radius in r])
    density = 4.0 * r**2 * np.exp(-2.0 * r)
    mesh = _field("PP_R", r) + _field("PP_RAB", r * (logarithm[1] - logarithm[0]))
    return (
        '<UPF version="2.0.1">\n'
        '<PP_HEADER element="H" pseudo_type="NC" relativistic="no" is_ultrasoft="F" is_paw="F" '
        'is_coulomb="F" has_so="F" has_wfc="F" has_gipaw="F" core_correction="F" functional="PZ" '
        'z_valence="1.0" total_psenergy="0.0" rho_cutoff="0.0" l_max="0" l_local="0" '
        f'mesh_size="{N_POINTS}" number_of_wfc="0" number_of_proj="0"/>\n'
        f'<PP_MESH mesh="{N_POINTS}">\n{mesh}</PP_MESH>\n'
        f"{_field('PP_LOCAL', potential)}"
        "<PP_NONLOCAL>\n</PP_NONLOCAL>\n<PP_PSWFC>\n</PP_PSWFC>\n"
        f"{_field('PP_RHOATOM', density)}"
        "</UPF>\n"
    )


def _field(name: str, values: FloatArray) -> str:
    numbers = "\n".join(f"{value:.10E}" for value in values)
    return f'<{name} size="{len(values)}">\n{numbers}\n</{name}>\n'
