"""Numbers that a database row can hold."""

import math
from typing import Any


def finite(value: Any) -> Any:
    """Return ``value`` with ``None`` for what is no number: a database row cannot hold NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
