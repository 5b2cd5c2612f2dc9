"""How EIPs that are no KIM models are named: a kind, then settings in brackets.

``lennard-jones[sigma=2.1,cutoff=5]``, ``stillinger-weber[hauch-1999]``,
``ase:ase.calculators.emt:EMT[asap_cutoff=True]``. The name says all: it is the source of the
labels and what AiiDA's cache goes by, so everything that changes a label is a setting.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

PYTHON = "python:"
ASE = "ase:"
LENNARD_JONES = "lennard-jones"
STILLINGER_WEBER = "stillinger-weber"

_OPENING, _CLOSING = "([{", ")]}"


class EipName(NamedTuple):
    """The parts of a name.

    ``kind`` is what stands before the brackets; ``words`` are the settings without a value, such
    as the name of a published set; ``settings`` are the others, still as text.
    """

    kind: str
    words: tuple[str, ...]
    settings: dict[str, str]


def read_name(name: str) -> EipName:
    """Take a name apart.

    Raises
    ------
    ValueError
        If its brackets are not closed, something follows them, or a setting occurs twice.
    """
    matched = re.fullmatch(r"([^\[\]]+)(?:\[(.*)\])?", name)
    if not matched:
        raise ValueError(f"cannot read {name!r}; write settings as kind[first=1,second=2]")
    words: list[str] = []
    settings: dict[str, str] = {}
    for item in split_names(matched[2] or ""):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            words.append(key)
        elif key in settings:
            raise ValueError(f"cannot read {name!r}: {key} is set twice; set it once")
        else:
            settings[key] = value
    return EipName(matched[1].strip(), tuple(words), settings)


def write_name(kind: str, settings: Mapping[str, object]) -> str:
    """Return the name with these settings, numbers with all their digits."""
    inner = ",".join(f"{key}={value}" for key, value in settings.items())
    return f"{kind}[{inner}]" if inner else kind


def split_names(text: str) -> list[str]:
    """Return what stands between commas, except those within brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += 0 if quote else (character in _OPENING) - (character in _CLOSING)
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def without_kim_id(name: str) -> str:
    """Return the readable part of an extended KIM id; any other name as it is."""
    found = re.fullmatch(r"(.+)__[A-Z]{2}_\d{12}_\d{3}", name)
    return found[1] if found else name


def number_of(name: str, key: str, text: str) -> float:
    """Return a setting as a number.

    Raises
    ------
    ValueError
        If it is none, or not finite.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"cannot open {name!r}: {key}={text} is no number; write {key}=1.5")
    return number
