"""Whether a network that learnt from EIPs is to be used, or its twin from scratch."""

import math
from dataclasses import dataclass

# What a training reports of labels that are held out: how well it does, and how many there are.
SCORE, N_HELD_OUT = "validation_score", "n_held_out"
# Standard deviation of the difference of two scores that one held-out label gives: a score is the
# sum of two logarithms, so this is 15 % of an error. The twin must be better than by chance,
# because labels are few where EIPs help most.
SCORE_NOISE = 0.3


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
    """

    score: float
    scratch_score: float
    n_held_out: int

    def __post_init__(self) -> None:
        if self.n_held_out < 1:
            raise ValueError("a verdict needs at least one label that is held out, not 0")

    @property
    def eips_help(self) -> bool:
        """Whether to use the network that learnt from EIPs."""
        return self.score <= self.scratch_score + SCORE_NOISE / math.sqrt(self.n_held_out)

    @property
    def text(self) -> str:
        """The verdict in a sentence."""
        what = "EIPs help" if self.eips_help else "EIPs do not help here: the twin is used"
        # A score is the sum of the logarithms of two errors.
        change = math.expm1((self.score - self.scratch_score) / 2)
        return (
            f"{what} (errors on {self.n_held_out} held-out DFT labels {100 * change:+.0f} % "
            "against the twin from scratch)"
        )
