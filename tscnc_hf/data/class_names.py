"""Are a model's classes those of the data set? Labels are numbers, and a wrong order only shows as low accuracy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch.utils.data import ConcatDataset

from tscnc_hf.data.batches import LABEL_KEYS
from tscnc_hf.data.columns import normal_name


NO_NAME = re.compile(r"((label|class)[_ ]?)?\d+")  # what a config or a data set says where nobody gave names
SHOWN = 4


def compare_class_names(of_model: Sequence[str], of_data: Sequence[str]) -> str | None:
    """
    A warning where the names differ, so that only the labels' numbers are compared; None where they agree, or where
    the model has as many classes and no names ("LABEL_0", "0").

    Raises:
        ValueError: the same names in another order, or some of them under other numbers; or another number of classes
            and not one name in common.
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
            f"the model was made for other classes: it has {len(ours)} ({some_names(of_model)}), the data set "
            f"{len(theirs)} ({some_names(of_data)}), and not one name is the same. Give the data set it was "
            "trained for"
        )
    moved = [name for name in theirs if name in both and ours.index(name) != theirs.index(name)]
    if moved:
        one, other = ours.index(moved[0]), theirs.index(moved[0])
        raise ValueError(
            f"the data set's classes are not the model's, and {len(moved)} of the {len(both)} names in both have "
            f"another number: {of_model[one]!r} is {one} in the model, {of_data[other]!r} {other} in the data set, "
            "and labels are compared by number. Give the labels the model's numbers, and leave out images of classes "
            "that it does not have"
        )
    return (
        "Warning: the data set's classes are not the model's; labels are compared by number. "
        f"Only the model, of {len(ours)} classes, has {some_names(of_model, both)}; "
        f"only the data set, of {len(theirs)}, has {some_names(of_data, both)}"
    )


def numbers_of_a_part(of_model: Sequence[str], of_data: Sequence[str]) -> list[int] | None:
    """
    The model's numbers of a data set's classes where these are some of the model's, in any order; None where they are
    all of them, or where one is not among them.
    """
    ours, theirs = _plain(of_model), _plain(of_data)
    found = len(set(theirs)) == len(theirs) < len(ours) and all(ours.count(name) == 1 for name in theirs)
    if not found or has_no_names(of_model):
        return None
    return [ours.index(name) for name in theirs]


def refuse_another_order(of_model: Sequence[str], of_data: Sequence[str]) -> None:
    """ValueError where a data set has the model's classes under other numbers."""
    ours, theirs = _plain(of_model), _plain(of_data)
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise ValueError(
            f"the model's classes are {', '.join(of_model)}; the data set has them in another order: "
            f"{', '.join(of_data)}. Reorder the labels of the data set"
        )


class SameClasses:
    """
    Whether labels mean the same in a model and in all of its data sets. Where the model has no names, the first data
    set that has some says them.

    Args:
        model: whose `config.id2label` has the names, if anything has.
    """

    def __init__(self, model: Any):
        names = class_names_of_model(model)
        self.owner, self.names = ("the model", names) if names and not has_no_names(names) else (None, [])
        self._numbered = names

    def check(self, dataset: Any, role: str) -> None:
        """ValueError where a label has another name in the data set; classes that come last may be missing there."""
        if isinstance(dataset, dict | ConcatDataset):
            for part in dataset.values() if isinstance(dataset, dict) else dataset.datasets:
                self.check(part, role)
            return
        names = class_names_of(dataset)
        if not names:
            return
        try:
            refuse_another_order(self._numbered, names)
        except ValueError as error:
            raise ValueError(f"{role}: {error}, or build the model with its names (model.config.id2label)") from None
        if has_no_names(names):
            return
        if self.owner is None:
            self.owner, self.names = role, names
        ours, theirs = _plain(self.names), _plain(names)
        if ours[: len(theirs)] == theirs:
            return
        wrong = next((i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), len(ours))
        here = repr(self.names[wrong]) if wrong < len(ours) else f"none, with {len(ours)} classes"
        raise ValueError(
            f"{role}: its classes are not those of {self.owner}. Label {wrong} is {names[wrong]!r} in {role}, and "
            f"{here} in {self.owner}: labels are compared by number, and what is published would have wrong names. "
            "Reorder the labels of the data set, or build the model with its names in their order "
            "(model.config.id2label)"
        )


def class_names_of_model(model: Any) -> list[str]:
    """The names in a model's config, by number; none where it has no config."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    return [str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0]))]


def class_names_of(dataset: Any) -> list[str] | None:
    """The names that a data set says its labels have: a column of labels in `datasets`, `.class_names`, `.classes`."""
    features = getattr(dataset, "features", None)
    found = [features[key] for key in LABEL_KEYS if isinstance(features, dict) and key in features]
    kinds = [getattr(feature, "names", None) for feature in found[:1]]
    for names in (*kinds, getattr(dataset, "class_names", None), getattr(dataset, "classes", None)):
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return list(names)
    inner = getattr(dataset, "dataset", None)  # of a `Subset`
    return None if inner is None or inner is dataset else class_names_of(inner)


def has_no_names(class_names: Sequence[str]) -> bool:
    """Whether the classes are only numbered ("LABEL_0", "0")."""
    return all(NO_NAME.fullmatch(name) for name in _plain(class_names))


def _plain(names: Sequence[str]) -> list[str]:
    return [normal_name(name.strip().casefold()) for name in names]


def some_names(names: Sequence[str], but: set[str] = frozenset()) -> str:
    """The first few names that are not in `but`."""
    left = [name for name, plain in zip(names, _plain(names), strict=True) if plain not in but]
    return ", ".join(left[:SHOWN]) + (", ..." if len(left) > SHOWN else "") or "none"
