"""Images -> pixels in [0, 1] and labels: the embedded digits, any labelled image data set of the Hub, any folder."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tscnc_hf.data.augmentation import check_augmentation
from tscnc_hf.data.batches import collate
from tscnc_hf.data.class_names import has_no_names, numbers_of_a_part, some_names
from tscnc_hf.data.columns import (
    encode_labels,
    find_columns,
    labelled_rows,
    normal_name,
    read_labels,
    refuse_other_numbers,
)
from tscnc_hf.data.decoding import CHANNELS, Fit, common_size, decode_rows, decoder_for
from tscnc_hf.data.folders import image_folder_splits, in_no_split, refuse_shared_files, without_metadata
from tscnc_hf.data.identity import spread
from tscnc_hf.data.image_datasets import ImageStreamDataset, ImageTensorDataset
from tscnc_hf.data.splits import choose_splits, first_rows, stratified_split
from tscnc_hf.method.numbers import whole_number


__all__ = ["ImageData", "ImageStreamDataset", "ImageTensorDataset", "collate", "load_image_data"]

MEMORY_LIMIT = 4 * 10**9
MEMORY_SIDE = 96
TEST_FRACTION = 0.2
LOOKED_AT = 16  # images of each part, for whether a data set is grey


@dataclass
class ImageData:
    """A data set for classification, in three disjoint parts.

    Attributes:
        train, validation, test: data sets of `{"pixel_values": float32 (c, h, w) in [0, 1], "labels": int64 ()}`; only
            train is augmented.
        class_names: k names.
        image_size: (h, w).
        channels: 1 or 3.
        name: the Hub id, or the folder's name.
        description: one sentence on sizes, origin, storage and augmentation of the parts.
        identity: what tells the three parts from others, plain JSON types, and under "asked" the arguments.
        notes: sentences that a reader of figures on it needs; the card shows them.
    """

    train: ImageTensorDataset | ImageStreamDataset
    validation: ImageTensorDataset | ImageStreamDataset
    test: ImageTensorDataset | ImageStreamDataset
    class_names: list[str]
    image_size: tuple[int, int]
    channels: int
    name: str
    description: str
    identity: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def load_image_data(
    dataset: str = "digits",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    channels: str = "rgb",
    validation_fraction: float = 0.1,
    train_limit: int | None = None,
    test_limit: int | None = None,
    augmentation: str = "crop-flip",
    in_memory: str | bool = "auto",
    seed: int = 0,
    revision: str | None = None,
    test_split: str | None = None,
    drop_unlabelled: bool = False,
    photos: int | tuple[int, int] | None = None,
) -> ImageData:
    """Load images and labels. The same rows land in train, validation and test in every run, whatever the seed.

    The test part is the split `test`, else `validation`, else a fifth of train. The validation part is the split
    `validation` where that is not the test part; else it comes out of train, class by class in proportion. Splits may
    have the other usual names, in any case (`SPLIT_NAMES`); the description says which were not used.

    Images are held decoded in memory (`ImageTensorDataset`), or decoded as they are read (`ImageStreamDataset`): then
    no pixels are kept. For parquet files about 0.1 kB an image is, labels and row numbers and what `datasets` keeps;
    a folder of single files takes about 1.3 kB a file, and is listed anew at each start, at 0.03 ms a file (measured
    with 60,000).

    Args:
        dataset: "digits" (scikit-learn's 1,797 8x8 images, no download), a Hub id, or a folder of parquet files or of
            images: `<split>/<class>/<file>`, the splits named train, val and test in any case, or `<class>/<file>`.
        image_column, label_column: names; found by type when None.
        image_size: side, or (h, w), in pixels. The shorter side is resized, then the centre cropped. None keeps the
            stored size, which then must be the same for all images.
        channels: "rgb", "grey", or "auto": grey when all are of some images of each part, stored so or in three
            channels that are the same.
        validation_fraction: share of the training rows held out, in (0, 1), where no split is for validation.
        train_limit: the first n training rows after validation was taken out (validation keeps its full size). Of
            rows sorted by class a fixed random order is taken first.
        test_limit: likewise the first n test rows.
        augmentation: of train: "none", "flip", "crop" or "crop-flip". Mirrored digits are wrong digits: pass "crop".
            Crops are of the padded image where images are in memory, resized ones where they are decoded as read.
        in_memory: decode everything once; "auto" does so up to 4 GB of pixels and 96 pixels a side.
        seed: of the augmentation only.
        revision: commit, branch or tag of a Hub data set.
        test_split: the split to test on, where the choice above is not the one meant: ImageNet's `test` has no labels.
        drop_unlabelled: leave out rows whose label is negative or missing; the description says how many.
        photos: the `image_size` of images that have none in common, or one above 96 pixels, where none was given.

    Raises:
        ValueError: an argument, a column, a label or an image that cannot be used; no split to test on by its name,
            but another one beside train; a class of a folder that gave no image. The message says which and why.
        FileNotFoundError: the folder does not exist.
    """
    asked = dict(locals())
    check_augmentation(augmentation)
    if channels not in ("auto", *CHANNELS):
        raise ValueError(f"channels={channels!r} is unknown; allowed are 'auto', 'rgb', 'grey'.")
    if in_memory not in ("auto", True, False):
        raise ValueError(f"in_memory={in_memory!r} is unknown; allowed are 'auto', True, False.")
    size = _check_size(image_size)
    splits, name, about = _digits_or_splits(dataset, asked)
    in_memory = True if dataset == "digits" else in_memory
    rows = _Rows(splits, image_column, label_column, drop_unlabelled)
    parts, origin = _choose_rows(rows.labels, validation_fraction, train_limit, test_limit)

    decoder, first_size, grey = decoder_for(rows.some_of(parts.values()), channels)
    if size is None and photos is not None and not rows.keep_their_size(parts.values()):
        size = _check_size(photos)
    if in_memory == "auto":
        count = sum(len(indices) for _, indices in parts.values())
        in_memory = _fits_in_memory(count, size or first_size, decoder)
    if not in_memory and size is None:
        raise ValueError(
            f"images of {first_size[0]}x{first_size[1]} pixels are decoded as they are read, and need an image_size, "
            f"such as image_size={min(first_size)}; in_memory=True keeps the stored size and decodes all at once."
        )
    made = {}
    for part, (split, indices) in parts.items():
        how = augmentation if part == "train" else "none"
        made[part] = rows.dataset(split, indices, decoder, size, in_memory, augmentation=how, seed=seed)
    notes = [origin, *about, *rows.notes]
    if grey and decoder.channels == "rgb" and all(map(_may_be_grey, made.values())):
        looked = "" if in_memory else f" (up to {LOOKED_AT} of each part were looked at)"
        notes.append(
            f'grey images in three equal channels{looked}, which an attack changes apart: channels="grey" keeps one'
        )
    tested = "test" if parts["test"][0] == "train" else parts["test"][0]  # no training of ours sees what is held out
    return _finish(made, rows.class_names, name, tested, "; ".join(notes), asked)


@dataclass
class TestData:
    """Images to test on.

    Attributes:
        test: data set of `{"pixel_values": float32 (c, h, w) in [0, 1], "labels": int64 ()}`.
        class_names, image_size, channels, name, description: as of `ImageData`.
        fitted: whether the images are as `fit` made them.
    """

    test: ImageTensorDataset | ImageStreamDataset
    class_names: list[str]
    image_size: tuple[int, int]
    channels: int
    name: str
    description: str
    fitted: bool = False


def load_test_data(
    dataset: str = "digits",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    fit: Fit | None = None,
    channels: str = "auto",
    limit: int | None = None,
    revision: str | None = None,
    test_split: str | None = None,
    drop_unlabelled: bool = False,
    class_names: Sequence[str] | None = None,
) -> TestData:
    """The test part of `load_image_data`, of a data set that may have nothing else, for a model that exists.

    Args:
        dataset, image_column, label_column, image_size, channels, revision, test_split, drop_unlabelled: as there; a
            data set with one split is tested on that, of `train` on the same fifth as there. That fifth is called
            `train` here (`data_split`), but for the digits: nobody knows whether the model was trained without it.
        fit: from an image (PIL, mode RGB or L) to its pixels, uint8 (c, h, w), in place of `image_size`, where the
            images have no size in common, or one above 96 pixels. Others keep the size that they have.
        limit: the first n rows, chosen as by `test_limit` there.
        class_names: of the model. Labels of a data set without train that are strings are looked up in them, and so
            are the classes of one that has only some of them, by name or by number ("3" is "LABEL_3").

    Raises:
        ValueError, FileNotFoundError: as `load_image_data`; a label that the model has no class for.
    """
    asked = dict(locals())
    size = _check_size(image_size)
    splits, name, about = _digits_or_splits(dataset, asked, test_only=True)
    rows = _Rows(splits, image_column, label_column, drop_unlabelled, class_names)
    rows.find_among(class_names or ())
    split, rest, indices, origin = _test_rows(rows.labels)
    called = "test" if dataset == "digits" else split  # they have no splits but ours
    if called == "train":
        origin = (
            f"tested on {len(indices):,} of {len(rest) + len(indices):,} rows of split 'train', as there is none for "
            "tests: only a model that was trained by this library on this very data has not seen them"
        )
    indices = first_rows(indices, rows.labels[split], limit, "limit")
    decoder, first_size, _ = decoder_for(rows.some_images(split, indices), channels)
    fit = None if rows.keep_their_size([(split, indices)]) else fit
    if fit is not None:
        stored, where = next(rows.some_images(split, indices))
        size = fit(decoder.open(stored, where)).shape[1:]
    in_memory = _fits_in_memory(len(indices), size or first_size, decoder)
    if not in_memory and size is None:
        raise ValueError(f"images of {first_size[0]}x{first_size[1]} pixels need an image_size")
    made = rows.dataset(split, indices, decoder, size, in_memory, fit=fit)
    made.data_name, made.data_split = name, called
    channels, *size = made[0]["pixel_values"].shape
    description = "; ".join([origin, *about, *rows.notes])
    return TestData(made, rows.class_names, tuple(size), channels, name, description, fitted=fit is not None)


class _Rows:
    """The splits of a data set, with their labels as class ids and their images not decoded.

    Attributes:
        labels: split -> int64 (n,).
        class_names: k names.
        notes: what was done that one should know.
    """

    def __init__(
        self, splits: dict[str, Any], image_column: str | None, label_column: str | None, drop_unlabelled: bool,
        known: Sequence[str] | None = None,
    ):  # fmt: skip
        import datasets

        features = next(iter(splits.values())).features
        self.column, label_column = find_columns(features, image_column, label_column)
        for split, rows in splits.items():
            try:
                find_columns(rows.features, self.column, label_column)
            except ValueError as error:
                raise ValueError(f"split {split!r} is not stored as {next(iter(splits))!r} is: {error}") from error
        self.notes: list[str] = []
        kinds = {split: rows.features[label_column] for split, rows in splits.items()}
        named = {split: list(kind.names) for split, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
        refuse_other_numbers(label_column, [(f"split {split!r}", names) for split, names in named.items()])
        names = next(iter(named.values()), None)
        raw = {split: read_labels(rows, label_column, split, drop_unlabelled) for split, rows in splits.items()}
        if drop_unlabelled:
            for split, labels in raw.items():
                kept = labelled_rows(labels)
                if len(kept) == 0:
                    raise ValueError(f"no row of split {split!r} has a label in column {label_column!r}.")
                if len(kept) < len(labels):
                    self.notes.append(f"{len(labels) - len(kept):,} rows of {split!r} without a label left out")
                    splits[split], raw[split] = splits[split].select(kept), labels[kept]
        known = None if known is None else list(known)
        self.labels, self.class_names = encode_labels(raw, names, label_column, known)
        if names is not None and len(self.class_names) < len(names):
            self.notes.append(
                f"{len(names) - len(self.class_names)} class names that differ from others in their Unicode form only "
                "are the same class"
            )
        self.images = {split: rows.select_columns([self.column]) for split, rows in splits.items()}
        if isinstance(features[self.column], datasets.Image):
            undecoded = datasets.Image(decode=False)
            self.images = {split: rows.cast_column(self.column, undecoded) for split, rows in self.images.items()}

    def find_among(self, class_names: Sequence[str]) -> None:
        """Give labels the numbers of these classes where their own are only some of them."""
        numbers = numbers_of_a_part(class_names, self.class_names)
        if numbers is None:
            return
        how = "numbers" if has_no_names(class_names) else "names"
        self.notes.append(f"{len(numbers)} of the model's {len(class_names)} classes, found by their {how}")
        self.labels = {split: np.array(numbers)[labels] for split, labels in self.labels.items()}
        self.class_names = list(class_names)

    def some_images(self, split: str, indices: np.ndarray) -> Iterator[tuple[Any, str]]:
        """The first of the rows `indices` and some others, as stored, and what messages call them."""
        for place in spread(len(indices), LOOKED_AT):
            row = int(indices[place])
            yield self.images[split][row][self.column], f"image {row} of split {split!r}"

    def some_of(self, parts: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[Any, str]]:
        """`some_images` of each of these (split, rows)."""
        return chain.from_iterable(self.some_images(*part) for part in parts)

    def keep_their_size(self, parts: Iterable[tuple[str, np.ndarray]]) -> bool:
        """Whether the images of (split, rows) are small ones of one size, as far as some of them tell."""
        size = common_size(self.some_of(parts))
        return size is not None and max(size) <= MEMORY_SIDE

    def dataset(
        self, split: str, indices: np.ndarray, decoder: Any, size: tuple[int, int] | None, in_memory: bool,
        fit: Fit | None = None, augmentation: str = "none", seed: int = 0,
    ) -> ImageTensorDataset | ImageStreamDataset:  # fmt: skip
        """The rows `indices` of a split."""
        ids, names, images = torch.from_numpy(self.labels[split][indices]), self.class_names, self.images[split]
        if in_memory:
            planes = decode_rows(images, indices, split, decoder, size, fit)
            return ImageTensorDataset(planes, ids, names, augmentation, seed)
        source = dict(image_column=self.column, indices=indices, decoder=decoder, split=split, seed=seed, fit=fit)
        return ImageStreamDataset(images, ids, names, size, augmentation, **source)


def _may_be_grey(part: ImageTensorDataset | ImageStreamDataset) -> bool:
    """Whether the three channels of all images are equal, as far as they are in memory."""
    chunks = part.images.split(1000) if isinstance(part, ImageTensorDataset) else ()
    return all(bool((chunk == chunk[:, :1]).all()) for chunk in chunks)


def _fits_in_memory(count: int, size: tuple[int, int], decoder: Any) -> bool:
    pixels = count * size[0] * size[1] * CHANNELS[decoder.channels]
    return pixels <= MEMORY_LIMIT and max(size) <= MEMORY_SIDE


def _digits_or_splits(
    dataset: str, asked: dict[str, Any], test_only: bool = False
) -> tuple[dict[str, Any], str, list[str]]:
    """Split -> rows, of those that are used; the data set's name; and sentences on what was left out."""
    if dataset != "digits":
        return _load_splits(dataset, asked["revision"], asked["test_split"], test_only)
    of_others = ("image_column", "label_column", "revision", "test_split", "drop_unlabelled")
    given = [name for name in of_others if asked[name]] + ["in_memory"] * (asked.get("in_memory") is False)
    if given:
        raise ValueError(f'dataset="digits" is embedded: drop {", ".join(given)}.')
    return {"train": _digits()}, dataset, []


def _check_size(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    sides = tuple(image_size) if isinstance(image_size, Sequence | np.ndarray) else (image_size, image_size)
    if isinstance(image_size, str) or len(sides) != 2:
        raise ValueError(f"image_size={image_size!r}; give a side or (height, width), in pixels, above 0.")
    return whole_number("image_size", sides[0], 1), whole_number("image_size", sides[1], 1)


def _load_splits(
    dataset: str, revision: str | None, test_split: str | None, test_only: bool
) -> tuple[dict[str, Any], str, list[str]]:
    import datasets

    folder = Path(dataset).expanduser()
    name = dataset
    if folder.exists():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for Hub data sets, but {dataset!r} is a folder; leave it out.")
        dataset, name = str(folder), folder.resolve().name
    elif folder.is_absolute() or dataset.startswith(("./", "../", "~")) or dataset.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {dataset!r}. Give an existing folder, a Hub id, or 'digits'.")
    splits, notes = (image_folder_splits(folder) if folder.is_dir() else None) or (None, [])
    unread: list[str] = []
    files: list[str] = []
    saved = (folder / datasets.config.DATASET_STATE_JSON_FILENAME).exists()  # load_dataset says what to do
    try:
        if splits is None and saved:
            splits = datasets.load_dataset(dataset)
        elif splits is None and (folder / datasets.config.DATASETDICT_JSON_FILENAME).exists():
            splits = datasets.load_from_disk(dataset).with_format(None)  # `load_dataset` finds usual names only
        elif splits is None:
            splits, files, unread = _read(dataset, revision)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data set {dataset!r} cannot be read: a text file there, such as README.md, is not UTF-8 ({error}). "
            "Store it as UTF-8."
        ) from error
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = f"{error.__cause__ or error}"
        if said := without_metadata(folder, reason):
            raise ValueError(f"data set {dataset!r} cannot be read: {said}") from error
        raise ValueError(
            f"data set {dataset!r} cannot be read: {reason}. Give a Hub id, or a folder of parquet files or of images "
            "with rows in every split."
        ) from error
    there = f"files in no split ({some_names(unread)})" if unread else ""
    chosen = choose_splits([*splits], test_split, name, test_only, there)
    unused = [repr(split) for split in splits if split not in chosen.values()]
    notes += [f"not used: {', '.join([*unused, *filter(None, [there])])}"] if unused or unread else []
    if test_only and [*chosen][-1] != "validation":
        chosen.pop("validation", None)
    _refuse_other_names(files, next(iter(splits.values())).features)
    return {split: splits[stored] for split, stored in chosen.items()}, name, notes


def _read(source: str, revision: str | None = None) -> tuple[dict[str, Any], list[str], list[str]]:
    """
    What `datasets.load_dataset` makes of a folder or a Hub id, of which files, and which files of a folder it
    overlooks. No file is in two splits, and all are in one, unless whoever published it has said which is where.
    """
    import datasets

    builder = datasets.load_dataset_builder(source, revision=revision)
    files, unread = builder.config.data_files or {}, []
    try:
        refuse_shared_files(source, files)
        unread = in_no_split(source, files)
    except ValueError:
        if not _is_said(source, revision):
            raise
    if unread and _is_said(source, revision):
        unread = []
    builder.download_and_prepare()
    return builder.as_dataset(), [str(file) for of_split in files.values() for file in of_split], unread


def _is_said(source: str, revision: str | None) -> bool:
    """Whether the head of a data set's README.md says which file is in which split."""
    import datasets

    module = datasets.load.dataset_module_factory(source, revision=revision)
    return bool(module.builder_configs_parameters.metadata_configs)


def _choose_rows(
    labels: dict[str, np.ndarray], validation_fraction: float, train_limit: int | None, test_limit: int | None
) -> tuple[dict[str, tuple[str, np.ndarray]], str]:
    """Part -> (split, rows), and where the parts came from."""
    everything = labels["train"]
    test_split, rest, test, origin = _test_rows(labels)
    if "validation" in labels and test_split != "validation":
        train, held = rest, ("validation", np.arange(len(labels["validation"])))
        origin += ", validation on split 'validation'"
    else:
        train, validation = stratified_split(everything[rest], validation_fraction, "validation")
        train, held = rest[train], ("train", rest[validation])
        origin += ", validation held out of the training rows"
    parts = {
        "train": ("train", first_rows(train, everything, train_limit, "train_limit")),
        "validation": held,
        "test": (test_split, first_rows(test, labels[test_split], test_limit, "test_limit")),
    }
    return parts, origin


def _test_rows(labels: dict[str, np.ndarray]) -> tuple[str, np.ndarray, np.ndarray, str]:
    """The split to test on (the last one), the rows of train that are left, its own, and where they came from."""
    split = list(labels)[-1]
    if split == "train":
        rest, test = stratified_split(labels[split], TEST_FRACTION, "testing")
        return split, rest, test, f"{TEST_FRACTION:.0%} of the training rows were held out for testing"
    return split, np.arange(len(labels.get("train", ()))), np.arange(len(labels[split])), f"tested on split {split!r}"


def _refuse_other_names(files: Iterable[str], features: dict[str, Any]) -> None:
    """
    ValueError where parquet or arrow files number their classes differently: `datasets` reads all with one file's
    names, or with those of README.md, which may be others than the files' but not the same ones in another order. And
    where numbers of classes are read as text, "0" and "1".

    Args:
        files: their paths; others, and those that are not on this machine, are passed over.
        features: what `datasets` reads them as.
    """
    import datasets

    named: dict[str, list[tuple[str, list[str]]]] = {}
    for path in sorted(map(Path, files)):
        for column, feature in _features_of_file(path).items():
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
                named.setdefault(column, []).append((path.name, feature["names"]))
    for column, of_files in named.items():
        refuse_other_numbers(column, of_files)
        where, names = of_files[0]
        read = features.get(column)
        if getattr(read, "dtype", None) in ("string", "large_string"):
            raise ValueError(
                f"column {column!r} holds numbers of the classes {', '.join(names)} in {where}, but text in other "
                "files or by README.md: they would be read as '0', '1', ... Write all splits with one ClassLabel."
            )
        if isinstance(read, datasets.ClassLabel):
            known = {normal_name(name): number for number, name in enumerate(read.names)}
            if any(known.get(normal_name(name), number) != number for number, name in enumerate(names)):
                refuse_other_numbers(column, [(where, names), ("dataset_info of README.md", read.names)])


def _features_of_file(path: Path) -> dict[str, Any]:
    """What `datasets` has noted in a parquet or arrow file of its columns; {} where there is nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix not in (".parquet", ".arrow") or not path.is_file():
        return {}
    if path.suffix == ".parquet":
        schema = pq.read_schema(path)
    else:
        with pa.memory_map(str(path)) as file:
            try:
                schema = pa.ipc.open_stream(file).schema
            except pa.ArrowInvalid:  # it is of the other kind of arrow file
                schema = pa.ipc.open_file(file).schema
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return described.get("info", {}).get("features", {})


def _digits():
    """The digits of scikit-learn, 8 x 8 pixels of 17 shades, as a `datasets.Dataset`."""
    import datasets
    from PIL import Image
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    planes = np.round(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    names = datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    images = [Image.fromarray(plane) for plane in planes]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features)


def _finish(
    made: dict[str, Any], class_names: list[str], name: str, tested: str, origin: str, asked: dict[str, Any]
) -> ImageData:
    for part in made.values():
        part.data_name = name
    made["train"].data_split, made["validation"].data_split, made["test"].data_split = "train", "validation", tested
    sizes = {tuple(part[0]["pixel_values"].shape) for part in made.values()}
    if len(sizes) > 1:
        raise ValueError(f"train, validation and test images differ in size: {sorted(sizes)}. Give image_size.")
    ((channels, height, width),) = sizes
    storage = "decoded as they are read"
    if isinstance(made["train"], ImageTensorDataset):
        storage = f"decoded in memory ({sum(part.images.nbytes for part in made.values()) / 1e6:,.1f} MB)"
    description = (
        f"{name}: {len(made['train']):,} training, {len(made['validation']):,} validation and "
        f"{len(made['test']):,} test images of {channels}x{height}x{width} in {len(class_names)} classes "
        f"({some_names(class_names)}), "
        f"{storage}; training images: {made['train'].augmentation_text}; {origin}."
    )
    identity = {part: dataset.identity for part, dataset in made.items()}
    said = {
        key: value if value is None or key == "dataset" else np.asarray(value).tolist() for key, value in asked.items()
    }
    identity |= {"classes": class_names, "asked": said | {"dataset": name}}  # a path says nothing elsewhere
    about = dict(image_size=(height, width), channels=channels, name=name, description=description)
    return ImageData(**made, class_names=class_names, identity=identity, **about)
