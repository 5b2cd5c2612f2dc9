"""Predictions of a committee as one node."""

from typing import Any

from aiida_eipnn.data.science import ScienceData
from aiida_eipnn.science.predictions import Predictions


class PredictionsData(ScienceData):
    """Energies, forces, stresses and uncertainties that a committee gives for configurations."""

    value_class = Predictions

    @classmethod
    def facts(cls, value: Predictions) -> dict[str, Any]:
        """Return the count."""
        return {"n_configurations": len(value)}
