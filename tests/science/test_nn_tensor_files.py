"""Files of tensors without the library safetensors: the same as with it."""

import re

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402

from aiida_eipnn.science.nn import tensor_files  # noqa: E402

METADATA = {"facts": '{"step": 3, "of": "Å\n\u2028"}'}


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    one = torch.rand(3, 2, generator=generator)
    types = (torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8)
    return {
        "single": one,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "flag": torch.tensor([True, False, True]),
        'a "name" \n of its own, Å': one.clone(),
        **{str(dtype): (10 * one).to(dtype) for dtype in types},
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.fixture(params=[True, False], ids=["library", "own"])
def with_library(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(tensor_files, "safetensors", None)


@pytest.mark.parametrize("metadata", [None, METADATA])
def test_the_bytes_are_those_of_the_library(tmp_path, tensors, metadata):
    tensor_files.write_tensors(tmp_path / "own", tensors, metadata)

    safetensors.torch.save_file(tensors, tmp_path / "library", metadata)
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()


def test_the_library_reads_what_was_written_without_it_and_the_other_way(tmp_path, tensors):
    tensor_files.write_tensors(tmp_path / "own", tensors, METADATA)
    safetensors.torch.save_file(tensors, tmp_path / "library", METADATA)

    assert_equal(safetensors.torch.load_file(tmp_path / "own"), tensors)
    assert_equal(tensor_files.read_file(tmp_path / "library").tensors, tensors)
    assert tensor_files.read_file(tmp_path / "library").metadata == METADATA


@pytest.mark.usefixtures("with_library")
def test_a_part_is_read_by_its_prefix(tmp_path):
    tensor_files.save_tensors(
        tmp_path / "file", {"best.a": torch.ones(2).t(), "last.a": torch.zeros(3)}, METADATA
    )

    assert_equal(tensor_files.load_tensors(tmp_path / "file", "best."), {"a": torch.ones(2)})
    assert tensor_files.read_metadata(tmp_path / "file") == METADATA


@pytest.mark.usefixtures("with_library")
def test_tensors_that_were_read_may_be_changed(tmp_path):
    tensor_files.save_tensors(tmp_path / "file", {"a": torch.ones(2)})

    tensor = tensor_files.load_tensors(tmp_path / "file")["a"]
    tensor += 1

    assert tensor.tolist() == [2.0, 2.0]


@pytest.mark.usefixtures("with_library")
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: b"half a file", id="none of them"),
        pytest.param(lambda content: content[:20], id="half a header"),
        pytest.param(lambda content: content[:-1], id="a byte short"),
        pytest.param(lambda content: re.sub(rb"F32", b"X32", content), id="unknown type"),
        pytest.param(lambda content: re.sub(rb'shape":\[3', b'shape":[4', content), id="shape"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, tensors, change):
    path = tmp_path / "file"
    tensor_files.save_tensors(path, tensors)
    path.write_bytes(change(path.read_bytes()))

    with pytest.raises(ValueError, match="file holds no tensors"):
        tensor_files.load_tensors(path)


def test_a_type_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(TypeError, match="complex64"):
        tensor_files.write_tensors(tmp_path / "file", {"a": torch.zeros(1, dtype=torch.complex64)})
