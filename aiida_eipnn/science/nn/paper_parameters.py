"""Settings of the method as published, with a switch for each fault that was repaired."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from aiida_eipnn.science.nn.losses import TUKEY_C
from aiida_eipnn.science.settings import build

NONE, SHIFT, AFFINE, LEGACY = "none", "shift", "affine", "legacy"
SCHNET, SOAPNET = "schnet", "soapnet"
FLOAT64, FLOAT32 = "float64", "float32"

_CHOICES = {
    "network": (SCHNET, SOAPNET),
    "padding": (NONE, LEGACY),
    "alignment": (NONE, SHIFT, AFFINE),
    "precision": (FLOAT64, FLOAT32),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperParameters:
    """Everything that can be chosen of Shui et al. [1]_; the defaults are theirs.

    Two defaults differ: ``padding`` and ``nan_fix`` repair faults of the published code.

    Parameters
    ----------
    network
        ``schnet``, or ``soapnet`` for configurations of one element.
    cutoff
        Distance up to which an atom sees its neighbours, in Å: 5 for silicon, 7 for aluminium.
    n_interactions
        Layers of SchNet that pass messages.
    padding
        ``none``: an edge leads to the atom itself, wherever its image is. ``legacy``: images within
        the cutoff are nodes of their own, which do not learn what happened to the atom they copy,
        so that beyond one interaction the energy is not extensive.
    alignment
        How energies of EIPs are brought onto DFT's before anything is learnt from them: ``none``;
        ``shift``, an energy of each element; ``affine``, a scale too. Fitted on the training part.
    tolerance
        Largest error of the energy per atom, in eV/atom, of an EIP that is right.
    nan_fix
        Whether an EIP that failed is out of the question. ``False``: it is the best one of all,
        since NaN is the smallest number to ``argmin`` and never above the tolerance.
    alpha
        Weight of pseudo-labels; the paper tries 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10.
    rho
        Whether ``alpha`` is multiplied by the ratio of labels to pseudo-labels, which makes
        accepting more of them count less.
    tukey_c
        Constant of Tukey's loss, in standard deviations.
    epochs
        How often every configuration is seen. (The published patience of 200 never ends 100.)
    batch_size
        Configurations of a step; what is left at the end of an epoch is dropped.
    learning_rate
        Largest rate of Adam.
    gradient_clip
        Largest norm of the gradient.
    precision
        ``float32``, or ``float64``.

    References
    ----------
    .. [1] Shui et al., Injecting Domain Knowledge from Empirical Interatomic Potentials to Neural
       Networks for Predicting Material Properties, NeurIPS 2022, arXiv:2210.08047.
    """

    network: str = SCHNET
    cutoff: float = 5.0
    n_interactions: int = 5
    padding: str = NONE
    alignment: str = NONE
    tolerance: float = 0.1
    nan_fix: bool = True
    alpha: float = 1.0
    rho: bool = True
    tukey_c: float = TUKEY_C
    epochs: int = 100
    batch_size: int = 32
    learning_rate: float = 1e-3
    gradient_clip: float = 5.0
    precision: str = FLOAT32

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {list(allowed)}, not {getattr(self, name)!r}"
                )
        for name in ("n_interactions", "epochs", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")
        for name in ("cutoff", "tolerance", "tukey_c", "learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, and finite: {getattr(self, name)}")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must not be below 0, and finite: {self.alpha}")
        for name in ("nan_fix", "rho"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.network == SOAPNET and self.padding == LEGACY:
            raise ValueError(f"only {SCHNET} has images to pad with; take padding {NONE!r}")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build from plain values; ``ValueError`` names an unknown key."""
        return build(cls, content, "paper")

    @property
    def dtype(self) -> torch.dtype:
        """Precision as torch knows it."""
        return torch.float64 if self.precision == FLOAT64 else torch.float32

    @property
    def architecture(self) -> dict[str, Any]:
        """What a trunk must share with one that its weights are copied to."""
        names = ("network", "cutoff", "n_interactions", "padding", "precision")
        return {name: getattr(self, name) for name in names}
