"""How the pool is extended while the loop runs: who drives the dynamics, and how far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from aiida_eipnn.science.pool import MD
from aiida_eipnn.science.settings import build

EIP, COMMITTEE = "eip", "committee"
_LIMIT = "max_uncertainty"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtensionParameters:
    """When a committee is trusted with molecular dynamics.

    Parameters
    ----------
    trusted_forces_mae
        Error of the forces on the test set, in eV/Å, that it must be below with 95 % confidence;
        until then an EIP drives, which is stable where nobody has labels yet.
    every
        Explore after each batch of DFT labels (1), every second one (2), ...
    """

    trusted_forces_mae: float = 0.3
    every: int = 1

    def __post_init__(self) -> None:
        if not self.trusted_forces_mae > 0:
            raise ValueError(
                f"trusted_forces_mae is {self.trusted_forces_mae} eV/Å; it must be above zero"
            )
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every is {self.every!r}; give a whole number from 1 on")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build from plain values by name."""
        return build(cls, content, "extension")


class Plan(NamedTuple):
    """What drives the dynamics, ``eip`` or ``committee``, and the recipes for it."""

    driver: str
    recipes: list[dict[str, Any]]


def plan(
    recipes: Sequence[Mapping[str, Any]],
    parameters: ExtensionParameters,
    forces_mae_high: float | None,
    most_uncertain: float | None,
    has_eip: bool,
) -> Plan:
    """Say who drives the dynamics next, and where it ends.

    Parameters
    ----------
    recipes
        As :func:`aiida_eipnn.science.pool.make_pool` takes them.
    parameters
        When the committee is trusted.
    forces_mae_high
        What its error on the test set is below with 95 % confidence, in eV/Å.
    most_uncertain
        The uncertainty, in eV/Å, above which a configuration is no candidate: dynamics ends there
        too, unless a recipe has a limit of its own. ``None`` where that is not known.
    has_eip
        Whether there is an EIP; without one the committee drives from the start.
    """
    trusted = forces_mae_high is not None and forces_mae_high <= parameters.trusted_forces_mae
    if has_eip and not trusted:
        return Plan(EIP, [{k: v for k, v in item.items() if k != _LIMIT} for item in recipes])
    limit = {} if most_uncertain is None else {_LIMIT: most_uncertain}
    planned = [
        {**limit, **item} if item.get("config_type") == MD else dict(item) for item in recipes
    ]
    return Plan(COMMITTEE, planned)
