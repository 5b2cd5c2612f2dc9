"""Files of named tensors in the safetensors format: the only import of that library.

Where it is not installed, :func:`write_tensors` and :func:`read_file` do the same here: the length
of a JSON header (8 bytes, little endian), the header with type, shape and place of each tensor, the
raw bytes. Only the order of the metadata, which the library leaves to chance, may differ.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import safetensors
    from safetensors.torch import save_file
except ModuleNotFoundError:
    safetensors = None  # type: ignore[assignment]

_METADATA = "__metadata__"
# In the order of the library, which puts tensors of the last type first.
_TYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_ORDER = {dtype: -place for place, dtype in enumerate(_TYPES.values())}
_LENGTH = 8


class TensorFile(NamedTuple):
    """What is in a file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, and texts about them."""
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if safetensors is None:
        write_tensors(path, content, metadata)
    else:
        save_file(content, path, None if metadata is None else dict(metadata))


def load_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors whose names start with ``prefix``, by what comes after it.

    Raises
    ------
    ValueError
        If the file cannot be read.
    FileNotFoundError
        If there is none.
    """
    if safetensors is None:
        found = read_file(path, prefix).tensors
    else:
        found = _read_by_library(path, prefix).tensors
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """Read the texts; errors are those of :func:`load_tensors`."""
    return (read_file if safetensors is None else _read_by_library)(path, None).metadata


def _read_by_library(path: Path, prefix: str | None) -> TensorFile:
    try:
        with safetensors.safe_open(path, "pt") as content:
            found = [] if prefix is None else content.keys()
            names = [name for name in found if name.startswith(prefix)]
            tensors = {name: content.get_tensor(name) for name in names}
            return TensorFile(tensors, content.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name} holds no tensors: {error}") from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors without the library.

    Raises
    ------
    TypeError
        If a tensor is of a type that the files of this package never hold.
    """
    header: dict[str, object] = (
        {} if metadata is None else {_METADATA: dict(sorted(metadata.items()))}
    )
    if unknown := sorted({str(t.dtype) for t in tensors.values() if t.dtype not in _NAMES}):
        raise TypeError(f"tensors of {unknown} cannot be written, only of {sorted(_TYPES)}")
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name.encode()))
    begin = 0
    for name in names:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # The tensors begin at a multiple of 8.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(_LENGTH, "little"))
        stream.write(text)
        for name in names:
            stream.write(_bytes_of(tensors[name]))


def _bytes_of(tensor: Tensor) -> bytes:
    # NumPy has no bfloat16, so all types go as bytes.
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def read_file(path: Path, prefix: str | None = "") -> TensorFile:
    """Read tensors without the library.

    Parameters
    ----------
    path
        The file.
    prefix
        Only tensors whose names start so; ``None`` for none of them.

    Raises
    ------
    ValueError
        If the file is cut short, or if it is none of tensors.
    """
    with path.open("rb") as stream:
        size = path.stat().st_size - _LENGTH
        length = int.from_bytes(stream.read(_LENGTH), "little")
        if not 0 < length <= size:
            raise ValueError(f"{path.name} holds no tensors: it has no header of {length} bytes")
        try:
            header = json.loads(stream.read(length))
            metadata = header.pop(_METADATA, {})
            places = {name: _place(item, size - length) for name, item in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} holds no tensors: {error!r}") from error
        tensors = {}
        for name, (dtype, shape, begin, end) in places.items():
            if prefix is not None and name.startswith(prefix):
                stream.seek(_LENGTH + length + begin)
                tensors[name] = _tensor(stream.read(end - begin), dtype, shape)
    return TensorFile(tensors, metadata)


def _place(item: Mapping[str, Any], size: int) -> tuple[torch.dtype, list[int], int, int]:
    """Return type, shape, begin and end of a tensor."""
    dtype, shape, (begin, end) = _TYPES[item["dtype"]], item["shape"], item["data_offsets"]
    if not 0 <= begin <= end <= size or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"bytes {begin} to {end} of {size} are no {dtype} of shape {shape}")
    return dtype, shape, begin, end


def _tensor(content: bytes, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if not content:
        return torch.zeros(shape, dtype=dtype)
    # A copy that may be written to, and begins where this type may.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).reshape(shape)
