"""Losses, and what is reported of them."""

import torch
from torch import Tensor, nn

from aiida_eipnn.science.arrays import FloatArray
from aiida_eipnn.science.nn.descriptor import Described


def huber(residual: Tensor, delta: float) -> Tensor:
    """Return the mean Huber loss; 0 of nothing."""
    if not residual.numel():
        return torch.zeros((), dtype=torch.float64)
    return nn.functional.huber_loss(residual, torch.zeros_like(residual), delta=delta)


def absolute(residual: Tensor) -> tuple[float, int]:
    """Return the sum of absolute values, and how many there are."""
    return float(residual.detach().abs().sum()), residual.numel()


def virial_error(virial: Tensor, stress: FloatArray, batch: Described) -> Tensor:
    """Return the errors of the virial per atom, in eV/atom, where there is a stress."""
    wanted = torch.from_numpy(stress) * batch.graph.volumes[:, None]
    error = (virial - wanted.nan_to_num()) / batch.graph.n_atoms[:, None]
    return error[torch.isfinite(wanted)]


def weighted_huber(residual: Tensor, weight: Tensor, delta: float) -> Tensor:
    """Return the sum of weighted Huber losses over the number of rows."""
    each = nn.functional.huber_loss(
        residual, torch.zeros_like(residual), reduction="none", delta=delta
    )
    return (weight * each).sum() / len(residual)
