"""Where networks compute, and how exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aiida_eipnn.science.arrays import FloatArray

if TYPE_CHECKING:
    from aiida_eipnn.science.nn.network import Network, NetworkParameters

AUTO, CPU, CUDA = "auto", "cpu", "cuda"
DEVICES = (AUTO, CPU, CUDA)
ON_CPU = torch.device(CPU)

FULL, TF32, BFLOAT16 = "none", "tf32", "bfloat16"
MIXED_PRECISIONS = (FULL, TF32, BFLOAT16)


def choose_device(name: str, number: int = 0) -> torch.device:
    """Return the device of this name: ``cpu``, ``cuda``, or ``auto``, a GPU where there is one.

    Parameters
    ----------
    name
        The name.
    number
        Of several GPUs, the one that is ``number`` places after the first one, in turn.

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
    if name == CPU or not available:
        return ON_CPU
    return torch.device(CUDA, number % torch.cuda.device_count())


def array_of(tensor: Tensor) -> FloatArray:
    """Return the numbers of a tensor that may be anywhere."""
    array: FloatArray = tensor.detach().cpu().numpy()
    return array


def located(device: torch.device) -> torch.device:
    """Return the device with its number, as tensors name it."""
    return torch.empty(0, device=device).device


def check_mixed_precision(parameters: "NetworkParameters", name: str) -> None:
    """Raise ``ValueError`` where networks of these parameters cannot compute less exactly."""
    if name == FULL:
        return
    if parameters.precision != "float32":
        raise ValueError(
            f"mixed_precision {name!r} needs a network of precision 'float32', not "
            f"{parameters.precision!r}"
        )
    if name == BFLOAT16 and not parameters.has_reducible_layers:
        raise ValueError(
            f"the layers of trunk {parameters.trunk!r} do not compute in bfloat16; set "
            f"mixed_precision to {FULL!r} or {TF32!r}"
        )


@contextmanager
def mixed_precision(network: "Network", name: str) -> Iterator[None]:
    """Let a step compute less exactly inside: ``none``, ``tf32`` or ``bfloat16``.

    With ``tf32`` a GPU rounds the factors of all products of matrices to 10 bits, forward and
    back. With ``bfloat16`` the layers of the trunk round what they read, their weights and what
    they return to 8 bits; sums over neighbours, descriptors, energies, and the weights that are
    kept and trained are not rounded.
    """
    exactness = torch.get_float32_matmul_precision()
    try:
        if name == TF32:
            torch.set_float32_matmul_precision("high")
        elif name == BFLOAT16:
            network.trunk.reduced_dtype = torch.bfloat16
        yield
    finally:
        torch.set_float32_matmul_precision(exactness)
        network.trunk.reduced_dtype = None
