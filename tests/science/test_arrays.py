"""Arrays in folders."""

import numpy as np
import pytest

from aiida_eipnn.science.arrays import load_arrays, save_parts


def test_arrays_in_parts_read_as_if_they_were_written_at_once(tmp_path):
    forces = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    ids = np.array(["a", "bb", "ccc"], dtype="<U3")
    parts = [{"ids": ids[:1], "forces": forces[:2]}, {"ids": ids[1:], "forces": forces[2:]}]

    save_parts(tmp_path, {"ids": 3, "forces": 5}, iter(parts))

    found = load_arrays(tmp_path)
    np.testing.assert_array_equal(found["ids"], ids)
    np.testing.assert_array_equal(found["forces"], forces)
    assert found["forces"].dtype == np.float32


def test_parts_that_stop_early_leave_no_array(tmp_path):
    with pytest.raises(ValueError, match=r"have \{'x': 2\} rows, not \{'x': 3\}"):
        save_parts(tmp_path, {"x": 3}, [{"x": np.zeros(2)}])

    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path)
