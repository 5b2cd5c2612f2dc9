"""A choice of configurations as one node."""

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from aiida_eipnn.data.science import ScienceData
from aiida_eipnn.science.arrays import Arrays, FloatArray, StrArray
from aiida_eipnn.science.configurations import pick_fields


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """Configurations that were chosen, and the score for which each one was.

    Parameters
    ----------
    ids
        The configurations, by geometry hash, in the order of choice. Shape ``(n,)``.
    scores
        The uncertainty at the time of choice, in eV/Å; NaN where chance decided. Shape ``(n,)``.
    """

    ids: StrArray
    scores: FloatArray

    def __post_init__(self) -> None:
        if self.ids.shape != self.scores.shape:
            raise ValueError(f"{self.ids.shape} ids cannot have {self.scores.shape} scores")

    @classmethod
    def from_ids(cls, ids: StrArray, scores: FloatArray | None = None) -> Self:
        """Build from ids, without scores where chance decided."""
        return cls(ids=ids, scores=np.full(len(ids), np.nan) if scores is None else scores)

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Build from :meth:`arrays`."""
        return cls(**pick_fields(cls, arrays))

    def arrays(self) -> Arrays:
        """Return every field by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class ChoiceData(ScienceData):
    """A choice of configurations by id; the attribute ``strategy`` says who made it."""

    value_class = Choice

    @classmethod
    def facts(cls, value: Choice) -> dict[str, Any]:
        """Return the count."""
        return {"n_configurations": len(value.ids)}

    def ids(self) -> StrArray:
        """Return the ids in the order of choice."""
        return self.get_array("ids")

    def __len__(self) -> int:
        return int(self.base.attributes.get("n_configurations"))
