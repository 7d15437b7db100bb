"""Are a model's classes those of the data set? Labels are numbers, and a wrong order only shows as low accuracy."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tscnc_hf.data.columns import normal_name


NO_NAME = re.compile(r"((label|class)[_ ]?)?\d+")  # what a config or a data set says where nobody gave names
SHOWN = 4


def compare_class_names(of_model: Sequence[str], of_data: Sequence[str]) -> str | None:
    """
    A warning where the names differ, so that only the labels' numbers are compared; None where they agree, or where
    the model has as many classes and no names ("LABEL_0", "0").

    Raises:
        ValueError: the same names in another order; or another number of classes and not one name in common.
    """
    ours, theirs = _plain(of_model), _plain(of_data)
    if ours == theirs:
        return None
    refuse_another_order(of_model, of_data)
    unnamed = has_no_names(of_model)
    if unnamed and len(ours) == len(theirs):
        return None
    both = set(ours) & set(theirs)
    if not (unnamed or both or len(ours) == len(theirs)):
        raise ValueError(
            f"the model was made for other classes: it has {len(ours)} ({_some(of_model)}), the data set "
            f"{len(theirs)} ({_some(of_data)}), and not one name is the same. Give the data set it was trained for"
        )
    moved = sum(ours.index(name) != theirs.index(name) for name in both)
    return (
        "Warning: the data set's classes are not the model's; labels are compared by number. "
        f"Only the model, of {len(ours)} classes, has {_some(of_model, both)}; "
        f"only the data set, of {len(theirs)}, has {_some(of_data, both)}"
        + (f"; {moved} of the {len(both)} names in both have another number" if moved else "")
    )


def refuse_another_order(of_model: Sequence[str], of_data: Sequence[str]) -> None:
    """ValueError where a data set has the model's classes under other numbers."""
    ours, theirs = _plain(of_model), _plain(of_data)
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise ValueError(
            f"the model's classes are {', '.join(of_model)}; the data set has them in another order: "
            f"{', '.join(of_data)}. Reorder the labels of the data set"
        )


def has_no_names(class_names: Sequence[str]) -> bool:
    """Whether the classes are only numbered ("LABEL_0", "0")."""
    return all(NO_NAME.fullmatch(name) for name in _plain(class_names))


def _plain(names: Sequence[str]) -> list[str]:
    return [normal_name(name.strip().casefold()) for name in names]


def _some(names: Sequence[str], but: set[str] = frozenset()) -> str:
    """The first few names that are not in `but`."""
    left = [name for name, plain in zip(names, _plain(names), strict=True) if plain not in but]
    return ", ".join(left[:SHOWN]) + (", ..." if len(left) > SHOWN else "") or "none"
