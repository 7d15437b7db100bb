"""Which column holds the images, which the labels, and what the labels mean."""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from datasets import Dataset, Features


LABEL_NAMES = ("label", "labels", "fine_label", "coarse_label", "class", "class_label", "target", "category")


def find_columns(features: "Features", image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """Names of the image and the label column.

    Images are columns of type `Image`, else of bytes or of `{"bytes", "path"}`. Labels are columns of type
    `ClassLabel`, and integer or string columns with a usual name (`LABEL_NAMES`).

    Args:
        features: the types of all columns.
        image_column, label_column: names that were given; None searches.

    Raises:
        ValueError: a given name is missing or of another type, or a search finds none or several.
    """
    import datasets

    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    stored = [name for name, feature in features.items() if _is_stored_image(feature)]
    labels = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.ClassLabel) or (name.lower() in LABEL_NAMES and _is_label(feature))
    ]
    possible_labels = [name for name, feature in features.items() if _is_label(feature)]
    return (
        _choose("image", image_column, typed or stored, typed + stored, features),
        _choose("label", label_column, labels, possible_labels, features),
    )


def _is_stored_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _is_label(feature: Any) -> bool:
    dtype = getattr(feature, "dtype", None)
    return isinstance(dtype, str) and (dtype in ("string", "large_string") or dtype.lstrip("u").startswith("int"))


def _choose(kind: str, given: str | None, found: list[str], allowed: list[str], features: "Features") -> str:
    columns = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    if given is not None:
        if given not in features:
            raise ValueError(f"{kind}_column={given!r} is not among the columns: {columns}.")
        if given not in allowed:
            raise ValueError(
                f"{kind}_column={given!r} has type {_type_name(features[given])}, which holds no {kind}s. "
                f"Columns: {columns}."
            )
        return given
    if len(found) != 1:
        several = f"several columns could hold the {kind}s ({', '.join(found)})"
        problem = several if found else f"no {kind} column found"
        raise ValueError(f"{problem}; name one with {kind}_column. Columns: {columns}.")
    return found[0]


def _type_name(feature: Any) -> str:
    import datasets

    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def read_labels(rows: "Dataset", column: str, split: str, none: bool = False) -> np.ndarray:
    """
    The labels of a split as stored: int64 or str (n,), strings in Unicode's composed form (NFC).

    Args:
        none: a row may lack its label; it is then -1, or the empty string, which is none either.

    Raises:
        ValueError: the split is empty, or a label is missing.
    """
    if len(rows) == 0:
        raise ValueError(f"split {split!r} is empty; give a data set with images in it.")
    stored = rows.select_columns([column]).with_format("arrow")[:].column(column)
    values = stored.to_pylist()
    missing = [row for row, value in enumerate(values) if value in (None, "")]
    if missing and not none:
        raise ValueError(
            f"{len(missing)} rows of split {split!r} have no label in column {column!r} (the first is row "
            f"{missing[0]}). Label or remove them, or leave them out with drop_unlabelled."
        )
    if any(isinstance(value, str) for value in values):
        return np.array(["" if value is None else normal_name(value) for value in values])
    return np.array([-1 if value is None else value for value in values], dtype=np.int64)


def normal_name(name: str) -> str:
    """A class name in Unicode's composed form: two spellings that look alike are one class."""
    return unicodedata.normalize("NFC", name)


def refuse_other_numbers(column: str, named: Sequence[tuple[str, Sequence[str]]]) -> None:
    """ValueError where a number is another class in one of several (place, class names); some may have fewer names."""
    for where, names in named:
        first, known = max(named, key=lambda one: len(one[1]))
        if any(normal_name(one) != normal_name(other) for one, other in zip(known, names, strict=False)):
            raise ValueError(
                f"the classes of column {column!r} are {', '.join(known)} in {first}, but {', '.join(names)} in "
                f"{where}: the same numbers are other classes. Write all splits with one ClassLabel."
            )


def labelled_rows(labels: np.ndarray) -> np.ndarray:
    """Row numbers, int64, of the labels that say a class: not negative, not empty."""
    return np.flatnonzero(labels != "" if labels.dtype.kind == "U" else labels >= 0)


def encode_labels(
    raw: dict[str, np.ndarray], names: list[str] | None, column: str, known: list[str] | None = None
) -> tuple[dict, list[str]]:
    """Class ids 0 .. k - 1 for every split, and the class names.

    Args:
        raw: split name -> int64 or str (n,), "train" among them unless the classes are `known`.
        names: the names of a `ClassLabel` column, which strings of other splits are looked up in, else None: then
            strings are sorted, integers name themselves. Names that differ in their Unicode form only are one class.
        column: the label column, for messages.
        known: a model's class names, for labels that have no names of their own, or of a data set without "train".

    Returns:
        split name -> int64 (n,); class names.

    Raises:
        ValueError: a label is negative, beyond the names or absent from train; some are strings, others numbers
            without names; integers leave gaps; fewer than 2 classes.
    """
    train, classes = raw.get("train"), names
    texts = {split: labels for split, labels in raw.items() if labels.dtype.kind == "U"}
    if names is None and 0 < len(texts) < len(raw):
        numbers = ", ".join(repr(split) for split in raw if split not in texts)
        raise ValueError(
            f"column {column!r} holds text in {', '.join(map(repr, texts))}, but numbers without names in {numbers}: "
            "which is which class cannot be told. Write all splits with one ClassLabel."
        )
    if texts:
        whose = "are not among its class names"
        if names is None:
            classes = sorted(set(train.tolist())) if train is not None else known
            whose = "train lacks" if train is not None else "the model has no class for"
        ids = {normal_name(name): number for number, name in enumerate(classes)}
        for split, labels in texts.items():
            strange = sorted(set(labels.tolist()) - set(ids))
            if strange:
                raise ValueError(f"column {column!r} of split {split!r} has labels that {whose}: {strange[:10]}.")
        raw = raw | {split: np.array([ids[name] for name in labels.tolist()]) for split, labels in texts.items()}
        train = raw.get("train")
    for split, labels in raw.items():
        if labels.min() < 0:
            raise ValueError(
                f"column {column!r} of split {split!r} holds negative labels ({int((labels < 0).sum())} of "
                f"{len(labels)}), as unlabelled test sets do. Use a labelled split, remove this one, or leave out the "
                "rows without a label with drop_unlabelled."
            )
    if classes is None and train is None:
        classes = known
    elif classes is None:
        classes = [str(number) for number in range(int(train.max()) + 1)]
        gaps = sorted(set(range(len(classes))) - set(train.tolist()))
        if gaps:
            raise ValueError(
                f"column {column!r} of split 'train' runs to {len(classes) - 1} but lacks {gaps[:10]}; integer labels "
                "must be 0 .. k - 1 without gaps. Renumber them, or store them as ClassLabel with all class names."
            )
    for split, labels in raw.items():
        if labels.max() >= len(classes):
            raise ValueError(
                f"column {column!r} of split {split!r} holds label {int(labels.max())}, but "
                f"{'train' if train is not None else 'the model'} knows {len(classes)} classes (0 .. "
                f"{len(classes) - 1}). Give splits of the same classes."
            )
    if names is not None:
        spellings = [normal_name(name) for name in names]
        classes = list(dict.fromkeys(spellings))
        ids = np.array([classes.index(name) for name in spellings])
        raw = {split: ids[labels] for split, labels in raw.items()}
        _refuse_classes_without_training(raw, classes, column)
    if len(classes) < 2:
        raise ValueError(
            f"column {column!r} holds {len(classes)} class ({', '.join(classes)}); at least 2 are needed."
        )
    return {split: labels.astype(np.int64) for split, labels in raw.items()}, classes


def _refuse_classes_without_training(ids: dict[str, np.ndarray], classes: list[str], column: str) -> None:
    for split, labels in ids.items():
        strange = sorted(set(labels.tolist()) - set(ids["train"].tolist())) if "train" in ids else []
        if strange:
            shown = ", ".join(classes[number] for number in strange[:10])
            raise ValueError(
                f"column {column!r} of split {split!r} has labels that train lacks: {shown}. A model cannot learn "
                "them: correct the names, add training images, or remove the rows."
            )
