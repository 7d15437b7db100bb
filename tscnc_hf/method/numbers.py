"""Numbers that functions are given: whole where images and steps are counted, and refused before anything runs."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """
    The value as a plain `int`, also of numpy's numbers and of 8.0.

    Raises:
        ValueError: it is no whole number, or below `least`.
    """
    bound = "" if least is None else f", {least} or more"
    if not _is_number(value) or value != int(value):
        raise ValueError(f"{name}={value!r}: give a whole number{bound}")
    if least is not None and value < least:
        raise ValueError(f"{name}={value!r}: give {least} or more")
    return int(value)


def finite_number(name: str, value: Any, least: float = 0.0) -> float:
    """ValueError unless it is a finite number, `least` or more."""
    if not _is_number(value) or value < least:
        raise ValueError(f"{name}={value!r}: give a number, {least:g} or more")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
