"""A folder of images -> its splits: the first level says the split, the next one the class, whatever their names."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset


SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # as `datasets` names them, but of any case
OTHER_DATA = (".parquet", ".arrow", ".zip", ".tar")
METADATA = ("metadata.csv", "metadata.jsonl")
LAYOUT = "images belong in <split>/<class>/<file>, with splits named train, val and test, or in <class>/<file>"


def image_folder_splits(folder: Path) -> dict[str, "Dataset"] | None:
    """
    Split -> rows of `image` (a path) and `label` (`ClassLabel`), in the order of the paths. Without split folders all
    is `train`. A folder around all others is looked into. Hidden files, and folders named "__...", are passed over.
    None where the folder is for `datasets` to read: without images, or with parquet files, archives or metadata.

    Raises:
        ValueError: an image's split or class cannot be told from its path; the message names the path.
    """
    import datasets

    images = _images(folder)
    if images is None:
        return None
    parts = {image: image.split(os.sep) for image in images}
    around = 0
    while (
        len({path[around] for path in parts.values()}) == 1
        and min(map(len, parts.values())) > around + 2
        and _split_of(next(iter(parts.values()))[around]) is None
    ):
        around += 1
    parts = {image: path[around:] for image, path in parts.items()}
    of_split = _by_split(folder, parts)
    names = sorted({name for rows in of_split.values() for _, name in rows})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return {
        split: datasets.Dataset.from_dict(
            {"image": [str(folder / image) for image, _ in rows], "label": [name for _, name in rows]}, features
        )
        for split, rows in of_split.items()
    }


def _images(folder: Path) -> list[str] | None:
    """Paths below the folder, sorted; None where it is not a folder of nothing but images."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    kinds, found = frozenset(ImageFolder.EXTENSIONS), []
    readme = folder / "README.md"
    if readme.is_file() and re.match(r"---\n.*^\s*data_files:.*^---", readme.read_text("utf-8"), re.DOTALL | re.M):
        return None
    for place, below, files in os.walk(folder, followlinks=True):
        below[:] = [name for name in below if not name.startswith((".", "__"))]
        for name in files:
            kind = os.path.splitext(name)[1].lower()
            if kind in OTHER_DATA or name in METADATA:
                return None
            if kind in kinds and not name.startswith("."):
                found.append(os.path.relpath(os.path.join(place, name), folder))
    return sorted(found) or None


def _split_of(name: str) -> str | None:
    return next((split for split, names in SPLIT_FOLDERS.items() if name.casefold() in names), None)


def _by_split(folder: Path, parts: dict[str, list[str]]) -> dict[str, list[tuple[str, str]]]:
    """Split -> (image, class) in order; see `image_folder_splits`."""
    tops = {path[0] for path in parts.values() if len(path) > 1}
    meant = {name: split for name in sorted(tops) if (split := _split_of(name))}
    depth = max(map(len, parts.values()))
    if depth > 2 and meant:
        if others := sorted(tops - set(meant)):
            raise ValueError(
                f"{folder} has the folders {_some(sorted(meant))}, which are splits, and beside them {_some(others)}, "
                f"which are none: {LAYOUT}. Move the others out, or rename them."
            )
        if twice := [split for split, count in Counter(meant.values()).items() if count > 1]:
            both = [name for name, split in meant.items() if split == twice[0]]
            raise ValueError(f"{folder} has the folders {_some(both)}, which all mean {twice[0]!r}. Keep one of them.")
    elif meant and (len(meant) == len(tops) or len(set(meant.values())) > 1):
        raise ValueError(
            f"{folder} has images in {_some(sorted(meant))} that are in no class folder: {LAYOUT}. "
            "Rename a class that is called like a split."
        )
    level = 2 if depth > 2 and meant else 1
    for image, path in parts.items():
        if len(path) != level + 1:
            raise ValueError(_wrong_depth(folder, image, path, level))
    made: dict[str, list[tuple[str, str]]] = {split: [] for split in (SPLIT_FOLDERS if level == 2 else ["train"])}
    for image, path in parts.items():
        made[meant[path[0]] if level == 2 else "train"].append((image, path[-2]))
    return {split: rows for split, rows in made.items() if rows}


def _wrong_depth(folder: Path, image: str, path: list[str], level: int) -> str:
    depth = f"{len(path) - 1} folder{'s' * (len(path) != 2)} deep, at {image}"
    if len(path) <= level:
        return f"{folder} has an image {depth}, in no class folder: {LAYOUT}. Move it to its class, or out."
    if level == 2:
        return (
            f"{folder} has an image {depth}: is its class {path[1]} or {path[-2]}? {LAYOUT}. Move the images up, into "
            "the folders of their classes."
        )
    return (
        f"{folder} has an image {depth}, and no folder called train or test: whether {path[0]} is a split or a class "
        f"cannot be told. {LAYOUT}. Rename the folders of splits, or move the images up, into those of their classes."
    )


def refuse_shared_files(source: str, of_split: dict[str, Any]) -> None:
    """
    ValueError where `datasets`, which looks for words anywhere in a path, reads a file into two splits, or files of a
    test into train as the word is not in lower case.

    Args:
        source: the folder or the Hub id that they are of.
        of_split: split -> its files' paths, on this machine or on the Hub ("hf://datasets/owner/name@revision/file").
    """
    where: dict[str, str] = {}
    for split, files in of_split.items():
        for file in map(str, files):
            inside = re.match(r"hf://[^@]+@[^/]+/(.+)", file)
            name = inside[1] if inside else os.path.relpath(file, source)
            if file in where:
                raise ValueError(
                    f"{name} of {source} would be in the splits {where[file]!r} and {str(split)!r} both, as its path "
                    "has words of both. Rename the file or its folders."
                )
            where[file] = str(split)
            words = re.split(r"[-._ 0-9/\\]+", name)
            other = [word for word in words if _split_of(word) not in (None, split)]
            if other and not any(_split_of(word) == split for word in words):
                raise ValueError(
                    f"{name} would be in the split {str(split)!r}, as {other[0]!r} says a split in lower case only. "
                    f"Rename it to {other[0].lower()!r}."
                )


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + ", ..." * (len(names) > 6)
