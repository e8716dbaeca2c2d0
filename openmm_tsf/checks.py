"""Numbers that settings may have."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any


def positive(name: str, value: float) -> float:
    """The number itself.

    Raises:
        ValueError: it is not finite and above 0.
    """
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"{name} must be finite and above 0, not {value:g}")
    return float(value)


def whole(name: str, value: Any, least: int = 1) -> int:
    """The number itself.

    Raises:
        ValueError: it is no whole number, or less than `least`.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)
