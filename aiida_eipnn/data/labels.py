"""Labels of a set of configurations as one node."""

from typing import Any

from aiida_eipnn.data.science import ScienceData
from aiida_eipnn.science.labels import DFT, Labels, checksum

# Names of attributes.
CORE_SECONDS = "core_seconds"
CHECKSUM = "checksum"


class LabelsData(ScienceData):
    """Labels, joined to configurations by id.

    The attribute ``level`` says how they were made: for DFT the fingerprint of the calculation,
    for EIPs the empty dictionary (the names of the sources say all). DFT labels, which nobody wants
    to compute again, carry the attribute ``checksum``.
    """

    value_class = Labels

    @classmethod
    def facts(cls, value: Labels) -> dict[str, Any]:
        """Return sources and counts."""
        sources = value.sources.tolist()
        return {
            **({CHECKSUM: checksum(value)} if sources == [DFT] else {}),
            "sources": sources,
            "n_configurations": len(value),
            "n_labels": int(value.ok.sum()),
            "n_failures": int((~value.ok).sum()),
        }

    def value(self) -> Labels:
        """Return the labels.

        Raises
        ------
        ValueError
            If they are DFT labels and not those that were stored.
        """
        labels: Labels = super().value()
        stored = self.base.attributes.get(CHECKSUM, None)
        if stored and checksum(labels) != stored:
            raise ValueError(
                f"the labels of node {self.pk or self.uuid} are not those that were stored: their "
                f"checksum is {checksum(labels)}, and was {stored}; the file repository of the "
                "profile is damaged, restore it from a backup (`verdi storage backup`)"
            )
        return labels

    @property
    def checksum(self) -> str:
        """SHA-256 of what the labels say; see :func:`aiida_eipnn.science.labels.checksum`."""
        # Labels of EIPs have none, and labels that were stored before there was one.
        return str(self.base.attributes.get(CHECKSUM, "")) or checksum(self.value())

    @property
    def level(self) -> dict[str, Any]:
        """Fingerprint of the level of theory."""
        return dict(self.base.attributes.get("level", {}))

    @property
    def core_seconds(self) -> float:
        """What it took to make them, in seconds times cores; 0 where they were there already."""
        return float(self.base.attributes.get(CORE_SECONDS, 0.0))
