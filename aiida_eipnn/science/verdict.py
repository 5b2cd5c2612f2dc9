"""Whether a network that learnt from EIPs is to be used, or its twin from scratch."""

import math
from dataclasses import dataclass

import numpy as np

from aiida_eipnn.science.labels import Labels

# What a training reports of labels that are held out: how well it does, and how many there are.
SCORE, N_HELD_OUT = "validation_score", "n_held_out"
# What it reports of EIPs: how much forces of the best one are like those of DFT.
AGREEMENT = "eip_agreement"
# Standard deviation of what one held-out label says of two networks: of the difference of their
# scores on n labels less that on a large test set, times the root of n. On 36 pairs of the
# injection benchmark with 2 to 80 held-out labels it was 0.88. The twin must be better than by
# chance, because labels are few where EIPs help most.
SCORE_NOISE = 0.9
# EIPs whose agreement is below this know nothing of the material, whatever a few held-out labels
# say. The best of 8 to 28 EIPs reaches 0.77 to 1.00 on three sets of DFT labels, 5 to 400 of them,
# and at most 0.08 where its labels belong to other configurations.
MIN_AGREEMENT = 0.3


def force_agreement(labels: Labels, eip_labels: Labels) -> float | None:
    r"""Return how much forces of the EIP that is best at it are like those of DFT.

    :math:`\max_k \sum_i F^k_i \cdot F_i / \sqrt{\sum_i |F^k_i|^2 \sum_i |F_i|^2}` over the atoms of
    configurations that both labelled: 1 for forces that are right up to one factor, 0 for forces
    that have nothing to do with one another. ``None`` where there is nothing to compare, such as
    atoms that all rest by symmetry.

    Parameters
    ----------
    labels
        DFT labels.
    eip_labels
        Labels of the EIPs, for these and other configurations.
    """
    both = labels.take(np.flatnonzero(np.isin(labels.ids, eip_labels.ids)))
    true, said = both.forces[0], eip_labels.take(eip_labels.rows_of(both.ids)).forces
    known = np.isfinite(said).all(axis=2) & np.isfinite(true).all(axis=1)
    said, true = np.where(known[..., None], said, 0.0), np.where(known[..., None], true, 0.0)
    work = (said * true).sum(axis=(1, 2))
    sizes = np.sqrt((said**2).sum(axis=(1, 2)) * (true**2).sum(axis=(1, 2)))
    moved = sizes > 0
    return float((work[moved] / sizes[moved]).max()) if moved.any() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What labels that neither had learnt say.

    Parameters
    ----------
    score, scratch_score
        ``validation_score`` of the network that learnt from EIPs and of its twin; the smaller the
        better.
    n_held_out
        Labels that were asked.
    agreement
        Of the EIPs, from :func:`force_agreement`; ``None`` where that is not known.
    """

    score: float
    scratch_score: float
    n_held_out: int
    agreement: float | None = None

    def __post_init__(self) -> None:
        if self.n_held_out < 1:
            raise ValueError("a verdict needs at least one label that is held out, not 0")

    @property
    def eips_know(self) -> bool:
        """Whether EIPs know anything about the material."""
        return self.agreement is None or self.agreement >= MIN_AGREEMENT

    @property
    def eips_help(self) -> bool:
        """Whether to use the network that learnt from EIPs."""
        chance = SCORE_NOISE / math.sqrt(self.n_held_out)
        return self.eips_know and self.score <= self.scratch_score + chance

    @property
    def text(self) -> str:
        """The verdict in a sentence."""
        what = "EIPs help" if self.eips_help else "EIPs do not help here: the twin is used"
        if not self.eips_know:
            return (
                f"{what} (no EIP has forces like those of DFT: the best agreement is "
                f"{self.agreement:.2f}, and it must be {MIN_AGREEMENT} at least)"
            )
        # A score is the sum of the logarithms of two errors.
        change = math.expm1((self.score - self.scratch_score) / 2)
        return (
            f"{what} (errors on {self.n_held_out} held-out DFT labels {100 * change:+.0f} % "
            "against the twin from scratch)"
        )
