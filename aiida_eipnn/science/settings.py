"""Settings given as plain names and values, checked at the door."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def build(cls: type[Settings], content: Mapping[str, Any], what: str = "") -> Settings:
    """Build the frozen dataclass ``cls`` from plain values; lists become tuples.

    Parameters
    ----------
    cls
        A dataclass that checks its own values.
    content
        Value of each field, as JSON or YAML give it.
    what
        What the settings are for, to begin the message with; the name of ``cls`` by default.

    Raises
    ------
    ValueError
        If a field is unknown or missing, or if a value cannot be used.
    """
    what = what or cls.__name__
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(f"{what}: no setting {unknown}, only {sorted(known)}")
    needed = [
        name
        for name, item in known.items()
        if item.default is MISSING and item.default_factory is MISSING
    ]
    if missing := sorted(set(needed) - set(content)):
        raise ValueError(f"{what}: give {missing} too")
    try:
        return cls(**{name: _freeze(value) for name, value in content.items()})
    except TypeError as error:
        raise ValueError(f"{what}: a value is of the wrong type: {error}") from error


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, (list, tuple)) else value
