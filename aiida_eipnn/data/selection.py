"""Which EIP is believed for each configuration, as one node."""

from typing import Any

from aiida_eipnn.data.science import ScienceData
from aiida_eipnn.science.eip.selection import Selection


class SelectionData(ScienceData):
    """The EIP chosen for each configuration, with the probability of each class."""

    value_class = Selection

    @classmethod
    def facts(cls, value: Selection) -> dict[str, Any]:
        """Return how often each EIP, and none, is chosen."""
        return {"n_configurations": len(value.ids), "counts": value.counts}
