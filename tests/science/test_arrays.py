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


def test_parts_that_end_early_leave_no_array_and_go_on(tmp_path):
    rows = {"x": 5, "y": 4}
    x, y = np.arange(10.0).reshape(5, 2), np.array(["a", "bb", "c", "d"])
    told = []

    assert not save_parts(tmp_path, rows, [{"x": x[:2], "y": y[:1]}], report=told.append)
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path)
    # What a killed process wrote and did not tell is written anew.
    assert not save_parts(tmp_path, rows, [{"x": -x[2:4], "y": y[1:3]}], told[-1])
    rest = [{"x": x[2:3], "y": y[1:3]}, {"x": x[3:], "y": y[3:]}]
    assert save_parts(tmp_path, rows, rest, told[-1], told.append)

    assert told == [{"x": 2, "y": 1}, {"x": 3, "y": 3}, {"x": 5, "y": 4}]
    found = load_arrays(tmp_path)
    np.testing.assert_array_equal(found["x"], x)
    np.testing.assert_array_equal(found["y"], y)


def test_more_rows_than_announced_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"have \{'x': 4\} rows, not \{'x': 3\}"):
        save_parts(tmp_path, {"x": 3}, [{"x": np.zeros(4)}])


def test_rows_that_should_be_there_and_are_not_are_an_error(tmp_path):
    save_parts(tmp_path, {"x": 5}, [{"x": np.zeros(2)}])

    with pytest.raises(ValueError, match="shorter than the 3 rows"):
        save_parts(tmp_path, {"x": 5}, [{"x": np.zeros(2)}], {"x": 3})


def test_arrays_that_were_complete_before_their_checkpoint_said_so_go_on(tmp_path):
    x, told = np.arange(5.0), []
    save_parts(tmp_path, {"x": 5}, [{"x": x[:2]}, {"x": x[2:]}], report=told.append)

    assert save_parts(tmp_path, {"x": 5}, [{"x": x[2:]}], told[0])

    np.testing.assert_array_equal(load_arrays(tmp_path)["x"], x)
