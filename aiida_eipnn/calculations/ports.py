"""Input ports that several processes share, and their validators."""

from collections.abc import Callable, Iterable
from typing import Any

from aiida.engine import CalcJobProcessSpec
from aiida.orm import Dict, Int, List, to_aiida_type

from aiida_eipnn.data.choice import ChoiceData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.jobs.spec import Stage

Validator = Callable[[Any, Any], str | None]


def add_configurations(spec: CalcJobProcessSpec) -> None:
    """Add the namespace of sets of configurations."""
    spec.input_namespace(
        "configurations",
        dynamic=True,
        valid_type=ConfigurationsData,
        validator=_at_least_one("configurations"),
        help="Sets of configurations, under any names.",
    )


def add_labels(spec: CalcJobProcessSpec, name: str, text: str) -> None:
    """Add a namespace of labels."""
    spec.input_namespace(name, dynamic=True, valid_type=LabelsData, required=False, help=text)


def add_exclude(spec: CalcJobProcessSpec) -> None:
    """Add the namespace of configurations that are held out."""
    spec.input_namespace(
        "exclude",
        dynamic=True,
        valid_type=ChoiceData,
        required=False,
        help="Configurations that the job must not see, such as the test set.",
    )


def add_dict(
    spec: CalcJobProcessSpec, name: str, text: str, validator: Validator | None = None
) -> None:
    """Add an input of settings, empty by default."""
    spec.input(
        name,
        valid_type=Dict,
        serializer=to_aiida_type,
        default=lambda: Dict({}),
        validator=validator,
        help=text,
    )


def add_training(spec: CalcJobProcessSpec, name: str, stage: Stage | None) -> None:
    """Add the settings of a training: its ``stage``, and fields of TrainingParameters.

    The stage is a setting and not an input of its own, so that a work chain that runs several
    stages has every value from its user and makes up none itself.
    """

    def validate(value: Dict | None, _: Any) -> str | None:
        content = value.get_dict() if value is not None else {}
        given, n_heads = content.get("stage"), content.get("n_heads", 0)
        allowed = [str(stage)] if stage else [str(item) for item in Stage]
        if given not in allowed:
            return f"{name} must name its stage: one of {allowed}, got {given!r}"
        if not isinstance(n_heads, int) or n_heads < 0:
            return f"n_heads of {name} must be a whole number from 0 on, not {n_heads!r}"
        if n_heads > 1 and given != Stage.FINETUNE:
            return f"n_heads of {name} is {n_heads}: only stage {Stage.FINETUNE} draws heads"
        return None

    spec.input(
        name,
        valid_type=Dict,
        serializer=to_aiida_type,
        validator=validate,
        help=f"Schedule and weights of the stage {stage}."
        if stage
        else "Stage, schedule, weights.",
        **({"default": lambda: Dict({"stage": str(stage)})} if stage else {}),
    )


def add_seed(spec: CalcJobProcessSpec) -> None:
    """Add the seed of every random choice of a process."""
    spec.input(
        "seed", valid_type=Int, serializer=to_aiida_type, help="Seed of every random choice."
    )


def add_eips(spec: CalcJobProcessSpec) -> None:
    """Add the list of EIPs."""
    spec.input(
        "eips",
        valid_type=List,
        serializer=to_aiida_type,
        validator=validate_eips,
        help="Names of the EIPs, as open_potential takes them: KIM ids or any other.",
    )


def validate_eips(value: List | None, _: Any) -> str | None:
    """Refuse an empty list, and a name that occurs twice."""
    names = value.get_list() if value is not None else []
    if not names:
        return "name at least one EIP, for example SW_StillingerWeber_1985_Si__MO_405512056662_005"
    if len(set(names)) < len(names):
        return f"each EIP may occur once, got {names}"
    return None


def settings_validator(build: Callable[[dict[str, Any]], object]) -> Validator:
    """Return a validator that builds the settings of the science, and passes on what it says."""

    def validate(value: Dict | None, _: Any) -> str | None:
        try:
            build(value.get_dict() if value is not None else {})
        except (ValueError, TypeError) as error:
            return str(error)
        return None

    return validate


def _at_least_one(name: str) -> Validator:
    def validate(value: Iterable[Any] | None, _: Any) -> str | None:
        return None if value else f"give at least one set below `{name}`"

    return validate
