"""A second device, pretended: its tensors are on the CPU, but refuse to meet those of the CPU.

So what is written for GPUs is tested on machines without one: a tensor that was made on the wrong
device, or read without being brought back, raises here as it does there. Its name is ``meta``,
for torch knows no other name of a device that is not there.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

PRETENDED = torch.device("meta")

# What asks which devices have an optimiser of one kernel.
_FUSED = "torch.optim.optimizer._get_fused_kernels_supported_devices"
# These go from one device to another one.
_CROSSING = {"aten::_to_copy", "aten::copy_"}
# The index may be on the CPU.
_INDEXING = {"aten::index.Tensor", "aten::index_put_", "aten::index_put"}


class Pretended(torch.Tensor):
    """A tensor of the pretended device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Pretended":
        """Wrap a tensor of the CPU."""
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=PRETENDED
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU, when nothing else is there."""
        return _compute(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    """Sees the tensors that are made, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Give a device that tensors can be brought to, inside."""
    fused = mock.patch(_FUSED, return_value=["cpu", PRETENDED.type])
    with _Device(), fused, warnings.catch_warnings():
        # It is one here.
        warnings.filterwarnings("ignore", ".*to a meta parameter.*which is a no-op")
        yield PRETENDED


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    flat = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, torch.Tensor)]
    here = [isinstance(item, Pretended) for item in flat]
    name = func._schema.name
    wanted = kwargs.get("device")
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if any(here) and name not in _CROSSING:
        _refuse_strangers(func, flat)
    result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if wanted is not None:
        there = torch.device(wanted).type == PRETENDED.type
    elif name == "aten::copy_":
        there = here[0]
    else:
        there = any(here)
    if not there:
        return result
    # What was changed in place stays the tensor that it was.
    known = {id(item.inner): item for item in flat if isinstance(item, Pretended)}
    return tree_map(lambda item: known[id(item)] if id(item) in known else _wrap(item), result)


def _refuse_strangers(func: Any, tensors: list[torch.Tensor]) -> None:
    for item in tensors:
        # A number on the CPU may be used anywhere.
        if isinstance(item, Pretended) or item.ndim == 0:
            continue
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")


def _inner(item: Any) -> Any:
    return item.inner if isinstance(item, Pretended) else item


def _wrap(item: Any) -> Any:
    return Pretended(item) if isinstance(item, torch.Tensor) else item
