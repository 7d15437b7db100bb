"""Numbers among options: integers that are integers, and nothing that is no number."""

from __future__ import annotations

import math
from dataclasses import fields
from numbers import Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def check_numbers(options: Any) -> None:
    """
    Numbers of a dataclass are what its annotations say: an integer is one (10.0 becomes 10), and no number is NaN, a
    truth value, or infinite, but for `max_grad_norm`.

    Raises:
        ValueError: one is not.
    """
    kinds = get_type_hints(type(options))
    for option in fields(options):
        kind, value = kinds[option.name], getattr(options, option.name)
        items = value if isinstance(value, list) else [value]
        allowed = _parts(kind)
        if bool in allowed or not allowed & {int, float}:
            continue
        for item in items:
            if item is None and type(None) in allowed:
                continue
            if isinstance(item, str) and allowed & {str, float}:  # upstream reads "5e-5"
                continue
            what = "a number" if float in allowed else "a whole number"
            if isinstance(item, bool) or not isinstance(item, Real):
                raise ValueError(f"{option.name}={value!r}: {type(item).__name__}, give {what}")
            if not math.isfinite(item) and not (option.name == "max_grad_norm" and item == math.inf):
                raise ValueError(f"{option.name}={value!r}: give {what} that is finite")
            if float not in allowed and item != int(item):
                raise ValueError(f"{option.name}={value!r}: give {what}")
        if float not in allowed and value is not None:
            whole = [int(item) for item in items]
            setattr(options, option.name, whole if isinstance(value, list) else whole[0])


def _parts(kind: Any) -> set:
    """The types that a value, or an item of a list, may have by its annotation."""
    if get_origin(kind) in (Union, UnionType, list):
        return {part for one in get_args(kind) for part in _parts(one)}
    return {get_origin(kind) or kind}
