"""Processes, on one node or several, that take each step of a training together.

Each computes its share of the batch; then they add up their gradients, and take the same step. The
hooks of torch's ``DistributedDataParallel`` do not see forces, which are gradients themselves, so
gradients are added up once they are complete.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from aiida_eipnn.science.nn.device import CUDA
from aiida_eipnn.science.nn.shares import Share

# Processes wait that long for one another: the first one makes pseudo-labels and judges alone.
TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")


class LostProcess(ConnectionError):  # noqa: N818 - an outcome, not a fault of the program
    """Another process died, or was not heard of for too long."""


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that take each step together: the number of this one, and how many there are.

    Whatever is asked here, all must ask; with one process it costs nothing.
    """

    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes what is written."""
        return self.number == 0

    def shares(self, n_parts: int) -> list[Share]:
        """Return the shares of a batch that this process computes, one after the other."""
        first = self.number * n_parts
        return [Share(first + part, self.count * n_parts) for part in range(n_parts)]

    def wait(self) -> None:
        """Wait until all are here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Return whether one of them says so."""
        return self.add([float(flag)])[0] > 0 if self.count > 1 else flag

    def add(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes, which are the same numbers in all of them."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        _together(distributed.all_reduce, total)
        added: list[float] = total.tolist()
        return added

    def as_first(self, value: T) -> T:
        """Return the value that the first one has."""
        if self.count == 1:
            return value
        box = [value]
        _together(distributed.broadcast_object_list, box)
        return box[0]

    def copy_first(self, tensors: Mapping[str, Tensor]) -> None:
        """Give tensors the values that the first one has: other machines round otherwise."""
        if self.count == 1:
            return
        with torch.no_grad():
            for tensor in tensors.values():
                values = tensor.contiguous()
                _together(distributed.broadcast, values, 0)
                tensor.copy_(values)

    def add_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Give all weights the sum of the gradients of all processes.

        A weight that no process has a gradient of is left without: the optimiser passes it over.
        """
        if self.count == 1:
            return
        weights = list(weights)
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        flags = gradients[0].new_tensor([float(weight.grad is not None) for weight in weights])
        flat = torch.cat([gradient.flatten() for gradient in gradients] + [flags])
        _together(distributed.all_reduce, flat)
        sizes = [weight.numel() for weight in weights]
        *parts, flags = torch.split(flat, [*sizes, len(sizes)])
        for weight, part, flag in zip(weights, parts, flags.tolist(), strict=True):
            weight.grad = part.view_as(weight) if flag else None


ONE_PROCESS = Processes()


@contextmanager
def gathered(number: int, count: int, device: torch.device) -> Iterator[Processes]:
    """Let ``count`` processes find one another, at ``MASTER_ADDR`` and ``MASTER_PORT``.

    Parameters
    ----------
    number, count
        Of this process, and of all.
    device
        Where this one computes. GPUs add up gradients by NCCL; everything else goes by Gloo.

    Raises
    ------
    LostProcess
        If they do not find one another in time.
    ValueError
        If some have a GPU and some have none.
    """
    if count == 1:
        yield ONE_PROCESS
        return
    backend = "gloo"
    if device.type == CUDA:
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    options: dict[str, Any] = {"rank": number, "world_size": count, "timeout": TIMEOUT}
    _together(distributed.init_process_group, backend, **options)
    processes = Processes(number, count)
    n_gpus = round(processes.add([float(device.type == CUDA)])[0])
    if n_gpus not in (0, count):
        raise ValueError(
            f"{n_gpus} of {count} processes see a GPU: give each one its own, or set device to "
            "'cpu'"
        )
    yield processes
    # After an error nobody waits for the others, and the end of the process closes everything.
    distributed.destroy_process_group()


def _together(ask: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    try:
        ask(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostProcess(f"a process of this training was lost: {error}") from error
