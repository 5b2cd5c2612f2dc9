"""Losses, what is reported of them, and those that doubtful labels cannot dominate."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from aiida_eipnn.science.arrays import FloatArray
from aiida_eipnn.science.nn.trunk import Batch
from aiida_eipnn.science.reference import MAD_TO_SIGMA

# 95 % efficiency for normal errors.
TUKEY_C = 4.6851
# Keeps a batch that is met exactly from dividing by zero, in the unit of the labels.
_MIN_MAD = 1e-12


def huber(residual: Tensor, delta: float, n: int | None = None) -> Tensor:
    """Return the mean Huber loss; 0 of nothing. Of a share, the sum over the ``n`` of all."""
    each = nn.functional.huber_loss(
        residual, torch.zeros_like(residual), reduction="none", delta=delta
    )
    return each.sum() / max(1, residual.numel() if n is None else n)


def absolute(residual: Tensor) -> tuple[Tensor, int]:
    """Return the sum of absolute values, and how many there are."""
    return residual.detach().abs().sum(), residual.numel()


def virial_error(virial: Tensor, stress: FloatArray, batch: Batch) -> Tensor:
    """Return the errors of the virial per atom, in eV/atom, where there is a stress."""
    wanted = torch.as_tensor(stress, device=virial.device) * batch.graph.volumes[:, None]
    error = (virial - wanted.nan_to_num()) / batch.graph.n_atoms[:, None]
    return error[torch.isfinite(wanted)]


def weighted_huber(residual: Tensor, weight: Tensor, delta: float, n: int | None = None) -> Tensor:
    """Return the sum of weighted Huber losses over the number of rows; of a share, of all ``n``."""
    each = nn.functional.huber_loss(
        residual, torch.zeros_like(residual), reduction="none", delta=delta
    )
    return (weight * each).sum() / (len(residual) if n is None else n)


class PseudoWeight(NamedTuple):
    """How much pseudo-labels count.

    Parameters
    ----------
    total
        Weight of the mean over the pseudo-labels of a batch, relative to the mean over its labels.
    c
        Tukey's constant, in standard deviations.
    """

    total: float
    c: float = TUKEY_C


def tukey_biweight(r: Tensor, c: float = TUKEY_C) -> Tensor:
    r"""Return Tukey's biweight loss of each standardised residual; any shape.

    :math:`\ell(r) = \frac{c^2}{6} \left[ 1 - (1 - (r / c)^2)^3 \right]` up to :math:`|r| = c`, and
    :math:`c^2 / 6` beyond it, where a residual pulls no more [1]_.

    References
    ----------
    .. [1] Beaton & Tukey, Technometrics 16, 147 (1974).
    """
    # Clamped, the formula gives the constant beyond c, and the slope of zero.
    inside = 1 - torch.clamp((r / c) ** 2, max=1.0)
    return c**2 / 6 * (1 - inside**3)


def standardise_residuals(residual: Tensor, of: Tensor) -> Tensor:
    r"""Return ``residual`` over 1.4826 MAD, the median absolute value of the residuals ``of``.

    Not centred, so a common offset counts as spread, and without gradient through the median.
    """
    mad = of.detach().abs().median()
    return residual / (MAD_TO_SIGMA * torch.clamp(mad, min=_MIN_MAD))


def mse_with_pseudo_labels(
    predicted: Tensor, target: Tensor, is_pseudo: Tensor, weight: PseudoWeight
) -> Tensor:
    r"""Return :math:`L = L_\mathrm{mse} + w\, L_\mathrm{Tukey}` of a batch.

    The squared error is averaged over the labels, in the square of their unit. Tukey's loss, which
    has none, is averaged over the pseudo-labels, standardised by the MAD of the whole batch [1]_.
    A part that is not in the batch counts nothing.

    Parameters
    ----------
    predicted, target
        Shape ``(n,)``.
    is_pseudo
        Which targets are pseudo-labels. Shape ``(n,)``.
    weight
        :math:`w` and Tukey's constant.

    References
    ----------
    .. [1] Shui et al., NeurIPS 2022, arXiv:2210.08047.
    """
    residual = target - predicted
    loss = _mean(residual[~is_pseudo] ** 2)
    if is_pseudo.any():
        standardised = standardise_residuals(residual[is_pseudo], residual)
        loss = loss + weight.total * tukey_biweight(standardised, weight.c).mean()
    return loss


def masked_mse(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over the targets that are finite; 0 of nothing."""
    known = torch.isfinite(target)
    return _mean((predicted[known] - target[known]) ** 2)


def _mean(values: Tensor) -> Tensor:
    return values.mean() if values.numel() else values.sum()
