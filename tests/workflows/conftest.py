"""One small loop with the real codes, shared by the tests that look at it."""

from types import SimpleNamespace

import numpy as np
import pytest
from ase.build import bulk

from aiida_eipnn.science.configurations import Configurations

EIPS = [
    "SW_StillingerWeber_1985_Si__MO_405512056662_005",
    "EDIP_JustoBazantKaxiras_1998_Si__MO_958932894036_002",
    "Tersoff_LAMMPS_Tersoff_1988T3_Si__MO_186459956893_003",
    "SW_NobodyWroteThis_1985_Si__MO_000000000000_000",
]

# Two-atom silicon, a coarse mesh and small networks: a minute, and every stage of the real loop.
OVERRIDES = {
    "n_members": 2,
    "n_pretrained": 1,
    # As if its pool was large.
    "upload_above": 0,
    # One process each: starting one costs more than these trainings.
    "label": {"n_workers": 1},
    "train": {"n_workers": 1},
    "dft": {
        "n_lanes": 2,
        "scaling": {"conv_thr_per_atom": 1e-7},
        "pw_base": {
            "kpoints_distance": 0.9,
            "pseudo_family": "tests/LDA",
            # A hopeless configuration fails once, and soon.
            "max_iterations": 1,
            "pw": {"parameters": {"ELECTRONS": {"electron_maxstep": 25}}},
        },
    },
    "network": {"n_radial": 4, "l_max": 2, "width": 16, "depth": 1},
    "pretrain": {"steps": 60},
    "classify": {"steps": 20},
    "finetune": {"steps": 20},
    "scratch": {"steps": 20},
    "split": {"test": 3, "initial": 3},
    # The gate is open, so that a hopeless configuration comes as far as pw.x.
    "gate": {"min_contact": 0.0},
    "acquisition": {"n_select": 1},
    "extend": {
        "n_workers": 1,
        "recipes": [
            {"config_type": "md", "count": 3, "temperatures": [300], "spacing": 3, "min_atoms": 2}
        ],
    },
    # Networks of twenty steps are not to be trusted, and that is what is asked here.
    "extension": {"trusted_forces_mae": 1e3},
    "stop": {"max_iterations": 2},
}


def small_pool(seed: int = 0) -> Configurations:
    """Return two-atom silicon of two types, and two configurations that no label can be had for."""
    rng = np.random.default_rng(seed)
    frames, types = [], []
    for number in range(16):
        atoms = bulk("Si")
        atoms.set_cell(atoms.cell * rng.uniform(0.96, 1.04), scale_atoms=True)
        atoms.positions += rng.normal(0, 0.08, atoms.positions.shape)
        frames.append(atoms)
        types.append("strained" if number % 2 else "rattled")
    for shift in (0.3, 0.35):
        atoms = bulk("Si")
        atoms.positions[1] = atoms.positions[0] + [shift, 0, 0]
        frames.append(atoms)
        types.append("hopeless")
    return Configurations.from_atoms(frames, types)


@pytest.fixture
def small_loop():
    """What the small loop is made of."""
    return SimpleNamespace(eips=EIPS, overrides=OVERRIDES, pool=small_pool())
