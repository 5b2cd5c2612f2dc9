"""Labels of a set of configurations as one node."""

from typing import Any

from aiida_eipnn.data.science import ScienceData
from aiida_eipnn.science.labels import Labels

# Name of the attribute.
CORE_SECONDS = "core_seconds"


class LabelsData(ScienceData):
    """Labels, joined to configurations by id.

    The attribute ``level`` says how they were made: for DFT the fingerprint of the calculation,
    for EIPs the empty dictionary (the names of the sources say all).
    """

    value_class = Labels

    @classmethod
    def facts(cls, value: Labels) -> dict[str, Any]:
        """Return sources and counts."""
        return {
            "sources": value.sources.tolist(),
            "n_configurations": len(value),
            "n_labels": int(value.ok.sum()),
            "n_failures": int((~value.ok).sum()),
        }

    @property
    def level(self) -> dict[str, Any]:
        """Fingerprint of the level of theory."""
        return dict(self.base.attributes.get("level", {}))

    @property
    def core_seconds(self) -> float:
        """What it took to make them, in seconds times cores; 0 where they were there already."""
        return float(self.base.attributes.get(CORE_SECONDS, 0.0))
