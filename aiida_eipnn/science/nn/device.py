"""Where networks compute, and how exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aiida_eipnn.science.arrays import FloatArray

if TYPE_CHECKING:
    from aiida_eipnn.science.nn.network import Network

AUTO, CPU, CUDA = "auto", "cpu", "cuda"
DEVICES = (AUTO, CPU, CUDA)
ON_CPU = torch.device(CPU)

FULL, TF32, BFLOAT16 = "none", "tf32", "bfloat16"
MIXED_PRECISIONS = (FULL, TF32, BFLOAT16)


def choose_device(name: str) -> torch.device:
    """Return the device of this name: ``cpu``, ``cuda``, or ``auto``, the GPU where there is one.

    Raises
    ------
    ValueError
        If there is no such name, or no such device.
    """
    if name not in DEVICES:
        raise ValueError(f"device must be one of {DEVICES}, not {name!r}")
    available = torch.cuda.is_available()
    if name == CUDA and not available:
        raise ValueError(
            "device 'cuda' was asked for, and torch sees no GPU here: ask the scheduler for one "
            "(metadata.options), install a torch that is built for CUDA, or set device to 'auto' "
            "or 'cpu'"
        )
    return torch.device(CUDA, torch.cuda.current_device()) if available and name != CPU else ON_CPU


def array_of(tensor: Tensor) -> FloatArray:
    """Return the numbers of a tensor that may be anywhere."""
    array: FloatArray = tensor.detach().cpu().numpy()
    return array


@contextmanager
def mixed_precision(network: "Network", name: str) -> Iterator[None]:
    """Let the layers of the trunk compute less exactly inside: ``none``, ``tf32``, ``bfloat16``.

    Positions, descriptors, energies and weights keep their precision. ``tf32`` rounds the factors
    of matrix products to 10 bits, where a GPU gains from it; ``bfloat16`` keeps 8 bits of what
    layers return.

    Raises
    ------
    ValueError
        If the trunk cannot.
    """
    if name == FULL:
        yield
        return
    trunk, settings = network.trunk, network.settings
    if settings.precision != "float32":
        raise ValueError(
            f"mixed_precision {name!r} needs a network of precision 'float32', not "
            f"{settings.precision!r}"
        )
    if name == BFLOAT16 and not trunk.has_reduced_layers:
        raise ValueError(
            f"the layers of trunk {settings.trunk!r} do not compute in bfloat16; set "
            f"mixed_precision to {FULL!r} or {TF32!r}"
        )
    exactness = torch.get_float32_matmul_precision()
    try:
        if name == TF32:
            torch.set_float32_matmul_precision("high")
        else:
            trunk.reduced_dtype = torch.bfloat16
        yield
    finally:
        torch.set_float32_matmul_precision(exactness)
        trunk.reduced_dtype = None
