"""What DFT costs: electrons, plane waves and k-points."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.dft_cost import count_kpoints, estimate_cost, valence_electrons


def costs_of(*frames, **options):
    return estimate_cost(Configurations.from_atoms(list(frames)), **options)


def test_valence_electrons_are_those_of_the_periodic_table():
    expected = {"H": 1, "He": 2, "C": 4, "Si": 4, "Ar": 8, "K": 1, "Fe": 8, "Cu": 11, "Zn": 12}
    expected |= {"Ga": 3, "Ge": 4, "Sn": 4, "Hf": 4, "W": 6, "Au": 11, "Pb": 4, "Rn": 8}
    numbers = np.array([atomic_numbers[symbol] for symbol in expected])
    assert dict(zip(expected, valence_electrons(numbers).tolist(), strict=True)) == expected


def test_more_electrons_cost_more():
    aluminium, copper = (bulk(name, "fcc", a=4.0) for name in ("Al", "Cu"))
    few, many = costs_of(aluminium, copper)
    assert many / few == pytest.approx((11 / 3) ** 2)


def test_a_mesh_is_that_of_its_distance():
    # Edges of 3, 6 and 12 Å: 2.09, 1.05 and 0.52 1/Å.
    cells = np.array([np.diag([3.0, 6.0, 12.0])])
    assert count_kpoints(cells, 0.2).tolist() == [np.ceil(11 * 6 * 3 / 2)]
    assert count_kpoints(cells, 3.0).tolist() == [1]
    # Planes of a face-centred cube of 4 Å are 2.31 Å apart.
    assert count_kpoints(bulk("Al", "fcc", a=4.0).cell.array[None], 1.0).tolist() == [14]


def test_repeating_a_cell_costs_what_k_points_do_not_save():
    cell = bulk("Si", cubic=True)
    small, large = costs_of(cell, cell * 2, kpoints_distance=0.1)
    # 64 times for electrons, 8 for plane waves, an eighth for k-points.
    assert large / small == pytest.approx(64 * 8 / 8, rel=0.15)
    small, large = costs_of(cell, cell * 2, kpoints_distance=5.0)
    assert large / small == pytest.approx(64 * 8)


def test_molecules_have_a_cost_too():
    molecules = [Atoms("H2", [[0, 0, 0], [0, 0, 0.74]]), Atoms("CO", [[0, 0, 0], [0, 0, 1.1]])]
    few, many = costs_of(*molecules)
    assert many / few == pytest.approx((10 / 2) ** 2)
    assert few > 0
    assert costs_of().tolist() == []
