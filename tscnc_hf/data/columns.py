"""Which column holds the images, which the labels, and what the labels mean."""

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


def read_labels(rows: "Dataset", column: str, split: str) -> np.ndarray:
    """The labels of a split as stored: int64 or str, (n,). ValueError when the split is empty or one is missing."""
    if len(rows) == 0:
        raise ValueError(f"split {split!r} is empty; give a data set with images in it.")
    stored = rows.select_columns([column]).with_format("arrow")[:].column(column)
    if stored.null_count:
        missing = next(row for row, value in enumerate(stored.to_pylist()) if value is None)
        raise ValueError(
            f"{stored.null_count} rows of split {split!r} have no label in column {column!r} (the first is row "
            f"{missing}). Label or remove them."
        )
    values = np.array(stored.to_pylist())
    return values if values.dtype.kind == "U" else values.astype(np.int64)


def encode_labels(raw: dict[str, np.ndarray], names: list[str] | None, column: str) -> tuple[dict, list[str]]:
    """Class ids 0 .. k - 1 for every split, and the class names.

    Args:
        raw: split name -> int64 or str (n,), "train" among them.
        names: the names of a `ClassLabel` column, else None: then strings are sorted, integers name themselves.
        column: the label column, for messages.

    Returns:
        split name -> int64 (n,); class names.

    Raises:
        ValueError: a label is negative, beyond the names or absent from train; integers leave gaps; fewer than 2
            classes.
    """
    train = raw["train"]
    if names is None and train.dtype.kind == "U":
        names = sorted(set(train.tolist()))
        ids = {name: number for number, name in enumerate(names)}
        for split, labels in raw.items():
            strange = sorted(set(labels.tolist()) - set(ids))
            if strange:
                raise ValueError(f"column {column!r} of split {split!r} has labels that train lacks: {strange[:10]}.")
        raw = {split: np.array([ids[name] for name in labels.tolist()]) for split, labels in raw.items()}
    for split, labels in raw.items():
        if labels.min() < 0:
            raise ValueError(
                f"column {column!r} of split {split!r} holds negative labels ({int((labels < 0).sum())} of "
                f"{len(labels)}), as unlabelled test sets do. Use a labelled split, or remove this one."
            )
    if names is None:
        names = [str(number) for number in range(int(train.max()) + 1)]
        gaps = sorted(set(range(len(names))) - set(train.tolist()))
        if gaps:
            raise ValueError(
                f"column {column!r} of split 'train' runs to {len(names) - 1} but lacks {gaps[:10]}; integer labels "
                "must be 0 .. k - 1 without gaps. Renumber them, or store them as ClassLabel with all class names."
            )
    for split, labels in raw.items():
        if labels.max() >= len(names):
            raise ValueError(
                f"column {column!r} of split {split!r} holds label {int(labels.max())}, but "
                f"train knows {len(names)} classes (0 .. {len(names) - 1}). Give splits of the same classes."
            )
    if len(names) < 2:
        raise ValueError(f"column {column!r} holds {len(names)} class ({', '.join(names)}); at least 2 are needed.")
    return {split: labels.astype(np.int64) for split, labels in raw.items()}, names
