"""A set of configurations as one node."""

from collections import Counter
from typing import Any

from aiida.orm import StructureData

from aiida_eipnn.data.science import ScienceData
from aiida_eipnn.science.configurations import Configurations


class ConfigurationsData(ScienceData):
    """A set of configurations: thousands of them are one node, not thousands of nodes."""

    value_class = Configurations

    @classmethod
    def facts(cls, value: Configurations) -> dict[str, Any]:
        """Return counts, elements and types; ``has_Si`` since SQLite cannot search in lists."""
        symbols = list(value.symbols)
        return {
            "n_configurations": len(value),
            "n_atoms": len(value.numbers),
            "elements": symbols,
            "config_types": dict(sorted(Counter(value.config_types.tolist()).items())),
            **{f"has_{symbol}": True for symbol in symbols},
        }

    @classmethod
    def from_structures(
        cls, structures: list[StructureData], config_type: str
    ) -> "ConfigurationsData":
        """Build the node of a few AiiDA structures."""
        frames = [structure.get_ase() for structure in structures]
        return cls.from_value(Configurations.from_atoms(frames, config_type))

    def __len__(self) -> int:
        return int(self.base.attributes.get("n_configurations"))
