"""A folder of images -> its splits: the first level says the split, the next one the class, whatever their names."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tscnc_hf.data.splits import SPLIT_NAMES, split_of


if TYPE_CHECKING:
    from datasets import Dataset


OTHER_DATA = (".parquet", ".arrow", ".zip", ".tar")
METADATA = ("metadata.csv", "metadata.jsonl")
# of files that often lie beside images
COMPANIONS = frozenset(
    ".txt .json .jsonl .csv .tsv .xml .yaml .yml .md .html .pdf .log .db .ini .lnk .url .md5 .sha256 .py .sh".split()
)
COMPANION_NAMES = ("readme", "license", "licence", "copying", "notice", "authors", "checksums")
KINDS = ".jpg, .jpeg, .png, .webp, .bmp, .gif, .tif, .tiff, .ppm and others that Pillow opens"
LAYOUT = "images belong in <split>/<class>/<file>, with splits named train, val and test, or in <class>/<file>"


def image_folder_splits(folder: Path) -> tuple[dict[str, "Dataset"], list[str]] | None:
    """
    Split -> rows of `image` (a path) and `label` (`ClassLabel`), in the order of the paths; and sentences on what was
    left out. Without split folders all is `train`. A folder around all others is looked into. Hidden files, and
    folders named "__...", are passed over. None where the folder is for `datasets` to read: without images, or with
    parquet files, archives or metadata.

    Raises:
        ValueError: an image's split or class cannot be told from its path; or the folder of a class or a split gave no
            image. The message names the path.
    """
    import datasets

    found = _images(folder)
    if found is None:
        return None
    images, others = found
    parts = {image: image.split(os.sep) for image in images}
    around = 0
    while (
        len({path[around] for path in parts.values()}) == 1
        and min(map(len, parts.values())) > around + 2
        and split_of(next(iter(parts.values()))[around]) is None
    ):
        around += 1
    top = os.sep.join(parts[images[0]][:around])
    parts = {image: path[around:] for image, path in parts.items()}
    of_split = _by_split(folder, parts)
    names = sorted({name for rows in of_split.values() for _, name in rows})
    notes = _left_out(folder, top, {tuple(path[:-1]) for path in parts.values()}, others)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    made = {
        split: datasets.Dataset.from_dict(
            {"image": [str(folder / image) for image, _ in rows], "label": [name for _, name in rows]}, features
        )
        for split, rows in of_split.items()
    }
    return made, notes


def _images(folder: Path) -> tuple[list[str], dict[str, list[str]]] | None:
    """
    Paths below the folder, sorted, and each folder below it -> names of its files that are no images; None where it is
    not a folder of nothing but images.
    """
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    kinds, found = frozenset(ImageFolder.EXTENSIONS), []
    others: dict[str, list[str]] = {}
    readme = folder / "README.md"
    said = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    if re.match(r"---\n.*^\s*data_files:.*^---", said, re.DOTALL | re.M):
        return None
    for place, files in _walk(folder):
        unread = others.setdefault(os.path.relpath(place, folder), [])
        for name in files:
            kind = os.path.splitext(name)[1].lower()
            if kind in OTHER_DATA or name in METADATA:
                return None
            if name.startswith("."):
                continue
            if kind in kinds:
                found.append(os.path.relpath(os.path.join(place, name), folder))
            else:
                unread.append(name)
    return (sorted(found), others) if found else None


def _left_out(folder: Path, top: str, with_images: set[tuple[str, ...]], others: dict[str, list[str]]) -> list[str]:
    """
    Sentences on files of unknown kinds, and on folders beside those of classes that hold none but companions.

    Args:
        folder: the data set's.
        top: the folder around all others, below it; "" where there is none.
        with_images: the folders that images are in, as parts of their paths below `top`.
        others: as of `_images`.

    Raises:
        ValueError: the folder of a split, or of a class, gave no image. One of a class may be empty if another split
            has images of the class.
    """
    level, classes = max(map(len, with_images)), {path[-1] for path in with_images}
    reached = {path[:depth] for path in with_images for depth in range(1, level + 1)}
    notes, lost = [], []
    for place in sorted(others):
        path = tuple(Path(os.path.relpath(place, top or ".")).parts)
        split_or_class = 0 < len(path) <= level and ".." not in path and (level == 1 or split_of(path[0]))
        if not split_or_class or path in reached or (len(path) == 2 and path[:1] not in reached):
            continue
        below = [name for inner, names in others.items() if Path(inner).is_relative_to(place) for name in names]
        unknown = _of_unknown_kind(below)
        if below and not unknown and level == 1:
            notes.append(f"folder {place!r}, without images, left out")
        elif below or len(path) == 1 or path[-1] not in classes:
            what = f"{len(unknown)} of kinds that are not read, {_kinds(unknown)}" if unknown else "none of an image"
            files = f"{len(below)} file{'s' * (len(below) != 1)}"
            lost.append(f"{place} ({files}, {what})" if below else f"{place} (empty)")
    if lost:
        raise ValueError(
            f"{folder} has folders of classes or splits without an image that can be read: {_some(lost)}. Read are "
            f"{KINDS}. Convert the files, or remove the folders."
        )
    unknown = _of_unknown_kind([name for place, names in others.items() if place != "." for name in names])
    if unknown:
        notes.append(
            f"{len(unknown):,} file{'s' * (len(unknown) != 1)} of kinds that are not read left out ({_kinds(unknown)})"
        )
    return notes


def _of_unknown_kind(names: list[str]) -> list[str]:
    """Those that may be images, and are not read."""
    parts = [os.path.splitext(name.lower()) for name in names]
    return [
        name
        for name, (stem, kind) in zip(names, parts, strict=True)
        if kind not in COMPANIONS and not (kind == "" and stem in COMPANION_NAMES)
    ]


def _kinds(names: list[str]) -> str:
    return _some(sorted({os.path.splitext(name)[1].lower() or "no suffix" for name in names}))


def _by_split(folder: Path, parts: dict[str, list[str]]) -> dict[str, list[tuple[str, str]]]:
    """Split -> (image, class) in order; see `image_folder_splits`."""
    tops = {path[0] for path in parts.values() if len(path) > 1}
    meant = {name: split for name in sorted(tops) if (split := split_of(name))}
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
    made: dict[str, list[tuple[str, str]]] = {split: [] for split in (SPLIT_NAMES if level == 2 else ["train"])}
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
            other = [word for word in words if split_of(word) not in (None, split)]
            if other and not any(split_of(word) == split for word in words):
                raise ValueError(
                    f"{name} would be in the split {str(split)!r}, as {other[0]!r} says a split in lower case only. "
                    f"Rename it to {other[0].lower()!r}."
                )


def in_no_split(folder: str, of_split: dict[str, Any]) -> list[str]:
    """
    Files of a folder that `datasets` overlooks: of the kinds that it reads there, but with no word in their paths, in
    lower case, by which it tells splits.

    Args:
        folder, of_split: as of `refuse_shared_files`; of a Hub id nothing is known.
    """
    read = {os.path.realpath(file) for files in of_split.values() for file in map(str, files)}
    kinds = {os.path.splitext(file)[1].lower() for file in read} - COMPANIONS
    found = []
    for place, files in _walk(folder):
        paths = [os.path.join(place, name) for name in files if not name.startswith((".", "__"))]
        found += [path for path in paths if os.path.splitext(path)[1].lower() in kinds]
    return sorted(os.path.relpath(path, folder) for path in found if os.path.realpath(path) not in read)


def without_metadata(folder: Path, error: str) -> str | None:
    """
    What is wrong and to be done where `datasets` says that a split has no data, as a folder's files of metadata, in
    which images are to be named, name none of it; nothing where that is not so.
    """
    split = re.search(r'Instruction "(\w+)" corresponds to no data', error)
    if split is None:
        return None
    found = [os.path.join(place, name) for place, files in _walk(folder) for name in files if name in METADATA]
    there = _some(sorted(os.path.relpath(path, folder) for path in found))
    return there and (
        f"where there is {' or '.join(METADATA)}, only images that it names are read, and {there} names none of split "
        f"{split[1]!r}. Put one with their file_name and label beside the images of each split, or, where folders say "
        "the classes, remove it."
    )


def _walk(folder: str | os.PathLike) -> Iterator[tuple[str, list[str]]]:
    """
    A folder and those below it, also through links, with the names of their files; none that is hidden or is named
    "__...", and none that lies around itself by a link, which would have no end.
    """
    around = {os.fspath(folder): {os.path.realpath(folder)}}
    for place, below, files in os.walk(folder, followlinks=True):
        above = around.pop(place)
        real = {
            name: os.path.realpath(os.path.join(place, name)) for name in below if not name.startswith((".", "__"))
        }
        below[:] = [name for name in real if real[name] not in above]
        around |= {os.path.join(place, name): above | {real[name]} for name in below}
        yield place, files


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + ", ..." * (len(names) > 6)
