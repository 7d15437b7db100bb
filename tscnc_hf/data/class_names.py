"""Are a model's classes those of the data set? Labels are numbers, and a wrong order only shows as low accuracy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from tscnc_hf.data.batches import LABEL_KEYS
from tscnc_hf.data.columns import normal_name


NO_NAME = re.compile(r"(?:(?:label|class)[_ ]?)?(\d+)")  # what a config or a data set says where nobody gave names
SHOWN = 4


def compare_class_names(of_model: Sequence[str], of_data: Sequence[str]) -> str | None:
    """
    A warning where the names differ, so that only the labels' numbers are compared; None where they agree, or where
    the model has as many classes and no names ("LABEL_0", "0"). Where both have none, "LABEL_3", "3" and "03" are the
    same.

    Raises:
        ValueError: the same names, or numbers, in another order, or some of them under other labels; or another number
            of classes and not one name in common.
    """
    ours, theirs = _comparable(of_model, of_data)
    if ours == theirs:
        return None
    refuse_another_order(of_model, of_data)
    unnamed, numbered = has_no_names(of_model), has_no_names(of_data)
    if len(ours) == len(theirs) and not numbered and class_numbers(of_model) == list(range(len(ours))):
        return None
    both = set(ours) & set(theirs)
    if not (unnamed or both or len(ours) == len(theirs)):
        raise ValueError(
            f"the model was made for other classes: it has {len(ours)} ({some_names(of_model)}), the data set "
            f"{len(theirs)} ({some_names(of_data)}), and not one name is the same. Give the data set it was "
            "trained for"
        )
    moved = [name for name in theirs if name in both and ours.index(name) != theirs.index(name)]
    counted_from_elsewhere = unnamed and numbered and _from_lowest(of_model) == _from_lowest(of_data)
    if moved and not counted_from_elsewhere:
        one, other = ours.index(moved[0]), theirs.index(moved[0])
        raise ValueError(
            f"the data set's classes are not the model's, and {len(moved)} of the {len(both)} names in both have "
            f"another number: {of_model[one]!r} is {one} in the model, {of_data[other]!r} {other} in the data set, "
            "and labels are compared by number. Give the labels the model's numbers, and leave out images of classes "
            "that it does not have"
        )
    only = [
        some_names([name for name, key in zip(names, keys, strict=True) if key not in both])
        for names, keys in ((of_model, ours), (of_data, theirs))
    ]
    return (
        "Warning: the data set's classes are not the model's; labels are compared by number. "
        f"Only the model, of {len(ours)} classes, has {only[0]}; only the data set, of {len(theirs)}, has {only[1]}"
    )


def numbers_of_a_part(of_model: Sequence[str], of_data: Sequence[str]) -> list[int] | None:
    """
    The model's numbers of a data set's classes where these are some of the model's, in any order, by their names or,
    where both are only numbered, by the numbers they are called by; None where they are all of them, or where one is
    not among them.
    """
    ours, theirs = _comparable(of_model, of_data)
    found = len(set(theirs)) == len(theirs) < len(ours) and all(ours.count(name) == 1 for name in theirs)
    return [ours.index(name) for name in theirs] if found else None


def refuse_another_order(of_model: Sequence[str], of_data: Sequence[str]) -> None:
    """ValueError where a data set has the model's classes, named or numbered, under other labels."""
    if said := _another_order(of_model, of_data):
        raise ValueError(
            f"{said}. If the model was trained in this order, correct its names (id2label in config.json)"
        )


def _another_order(of_model: Sequence[str], of_data: Sequence[str]) -> str | None:
    """
    Names of folders and strings are sorted as text, "10" before "2": so numbers of a data set are compared, too, with
    the model's, or with the places of its names. Some count from 0, others from 1.
    """
    if len(of_model) != len(of_data):
        return None
    numbered = has_no_names(of_data)
    ours, theirs = (_from_lowest(of_model), _from_lowest(of_data)) if numbered else _comparable(of_model, of_data)
    if ours == theirs or sorted(ours) != sorted(theirs):
        return None
    if not numbered:
        return (
            f"the model's classes are {', '.join(of_model)}; the data set has them in another order: "
            f"{', '.join(of_data)}. Reorder the labels of the data set"
        )
    at, numbers = _first_other(ours, theirs), class_numbers(of_data)
    said = (
        f"the model's classes are {some_names(of_model)}; the data set has them in another order: "
        f"{some_names(of_data)} (label {at} is {of_model[at]!r} in the model, {of_data[at]!r} in the data set)"
    )
    if numbers == sorted(numbers):
        return f"{said}. Reorder the labels of the data set"
    width = len(str(max(numbers)))
    return (
        f"{said}. Names of folders and strings are sorted as text: call them {0:0{width}}, {1:0{width}}, ..., or "
        "reorder the labels of the data set"
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
        self._of_model = names
        self._numbered: tuple[str, list[str]] | None = None  # the first data set that only numbers its classes

    def check(self, dataset: Any, role: str) -> None:
        """ValueError where a label has another name in the data set; classes that come last may be missing there."""
        for part in parts_of(dataset):
            if names := class_names_of(part):
                self._check_names(names, role)

    def _check_names(self, names: list[str], role: str) -> None:
        if said := _another_order(self._of_model, names):
            raise ValueError(f"{role}: {said}, or build the model with its names (model.config.id2label)")
        if has_no_names(names):
            self._check_numbers(names, role)
            return
        if self.owner is None:
            self.owner, self.names = role, names
        ours, theirs = _plain(self.names), _plain(names)
        if ours[: len(theirs)] != theirs:
            self._refuse(self.owner, self.names, names, role, _first_other(ours, theirs))

    def _check_numbers(self, names: list[str], role: str) -> None:
        """The numbers of a data set are those of the first one; of the model it has all in its order, or the first."""
        theirs = class_numbers(names)
        if self._numbered is not None:
            ours = class_numbers(self._numbered[1])
            if (at := _first_other(ours, theirs)) < min(len(ours), len(theirs)):
                self._refuse(*self._numbered, names, role, at)
            return
        owner, known = ("the model", self._of_model) if self._of_model else (self.owner, self.names)
        ours = _numbers_or_places(known)
        if set(theirs) <= set(ours) and ours[: len(theirs)] != theirs:
            self._refuse(owner, known, names, role, _first_other(ours, theirs))
        self._numbered = role, names

    def _refuse(self, owner: str, known: list[str], names: list[str], role: str, wrong: int) -> None:
        here = repr(known[wrong]) if wrong < len(known) else f"none, with {len(known)} classes"
        raise ValueError(
            f"{role}: its classes are not those of {owner}. Label {wrong} is {names[wrong]!r} in {role}, and "
            f"{here} in {owner}: labels are compared by number, and what is published would have wrong names. "
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


def parts_of(dataset: Any) -> Iterator[Any]:
    """The data sets that may each have names of their own: of a dict, of a `ConcatDataset`, also below a `Subset`."""
    if isinstance(dataset, dict | ConcatDataset):
        for part in dataset.values() if isinstance(dataset, dict) else dataset.datasets:
            yield from parts_of(part)
    elif isinstance(dataset, Subset) and class_names_of(dataset) is None:
        yield from parts_of(dataset.dataset)
    else:
        yield dataset


def has_no_names(class_names: Sequence[str]) -> bool:
    """Whether the classes are only numbered ("LABEL_0", "0")."""
    return class_numbers(class_names) is not None


def class_numbers(class_names: Sequence[str]) -> list[int] | None:
    """The numbers of classes that are only numbered, 3 of "LABEL_3", "3" and "03"; None where one has a name."""
    found = [NO_NAME.fullmatch(name) for name in _plain(class_names)]
    return [int(one[1]) for one in found] if all(found) else None


def some_names(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "") or "none"


def _plain(names: Sequence[str]) -> list[str]:
    return [normal_name(name.strip().casefold()) for name in names]


def _comparable(of_model: Sequence[str], of_data: Sequence[str]) -> tuple[list, list]:
    """The numbers of both where both are only numbered, else their names."""
    ours, theirs = class_numbers(of_model), class_numbers(of_data)
    return (_plain(of_model), _plain(of_data)) if ours is None or theirs is None else (ours, theirs)


def _numbers_or_places(names: Sequence[str]) -> list[int]:
    numbers = class_numbers(names)
    return list(range(len(names))) if numbers is None else numbers


def _from_lowest(names: Sequence[str]) -> list[int]:
    numbers = _numbers_or_places(names)
    return [number - min(numbers) for number in numbers]


def _first_other(ours: Sequence, theirs: Sequence) -> int:
    """The first label that is another class; the shorter one's length where there is none."""
    places = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (one, other) in places if one != other), min(len(ours), len(theirs)))
