"""Parts of a batch that are computed one after the other, or each in a process of its own."""

from dataclasses import dataclass

from aiida_eipnn.science.arrays import IntArray


@dataclass(frozen=True, slots=True)
class Share:
    """One of ``count`` shares of a batch, the one with this ``number``.

    What shares draw is drawn for the whole batch, and losses are divided by what the whole batch
    counts: so the losses of all shares add up to that of the batch, and gradients too.
    """

    number: int = 0
    count: int = 1

    def bounds(self, n: int) -> tuple[int, int]:
        """Return where the share of ``n`` rows begins and ends; nowhere, if they are too few."""
        return n * self.number // self.count, n * (self.number + 1) // self.count

    def of(self, rows: IntArray) -> IntArray:
        """Return the share of these rows."""
        first, last = self.bounds(len(rows))
        return rows[first:last]


WHOLE = Share()
