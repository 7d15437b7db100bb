"""Images -> pixels in [0, 1] and labels: the embedded digits, any labelled image data set of the Hub, any folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tscnc_hf.data.augmentation import check_augmentation
from tscnc_hf.data.batches import collate
from tscnc_hf.data.columns import encode_labels, find_columns, read_labels
from tscnc_hf.data.decoding import CHANNELS, decode_rows, decoder_for
from tscnc_hf.data.image_datasets import ImageStreamDataset, ImageTensorDataset
from tscnc_hf.data.splits import first_rows, stratified_split


__all__ = ["ImageData", "ImageStreamDataset", "ImageTensorDataset", "collate", "load_image_data"]

MEMORY_LIMIT = 4 * 10**9
MEMORY_SIDE = 96
TEST_FRACTION = 0.2


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
) -> ImageData:
    """Load images and labels. The same rows land in train, validation and test in every run, whatever the seed.

    The test part is the split `test`, else `validation`, else a fifth of train. The validation part always comes out
    of train, class by class in proportion.

    Images are held decoded in memory (`ImageTensorDataset`), or decoded as they are read (`ImageStreamDataset`): then
    no pixels are kept. For parquet files about 0.1 kB an image is, labels and row numbers and what `datasets` keeps;
    of a folder of single files `datasets` keeps about 2.4 kB a file, and lists it anew at each start, at 0.6 ms a file
    (measured with 60,000).

    Args:
        dataset: "digits" (scikit-learn's 1,797 8x8 images, no download), a Hub id, or a folder of parquet files or of
            images (`train/<class>/<file>`).
        image_column, label_column: names; found by type when None.
        image_size: side, or (h, w), in pixels. The shorter side is resized, then the centre cropped. None keeps the
            stored size, which then must be the same for all images.
        channels: "rgb", "grey", or "auto": grey when the first training image is.
        validation_fraction: share of the training rows held out, in (0, 1).
        train_limit: the first n training rows after validation was taken out (validation keeps its full size). Of
            rows sorted by class a fixed random order is taken first.
        test_limit: likewise the first n test rows.
        augmentation: of train: "none", "flip", "crop" or "crop-flip". Mirrored digits are wrong digits: pass "crop".
            Crops are of the padded image where images are in memory, resized ones where they are decoded as read.
        in_memory: decode everything once; "auto" does so up to 4 GB of pixels and 96 pixels a side.
        seed: of the augmentation only.
        revision: commit, branch or tag of a Hub data set.
        test_split: the split to test on, where the choice above is not the one meant: ImageNet's `test` has no labels.

    Raises:
        ValueError: an argument, a column, a label or an image that cannot be used; the message says which and why.
        FileNotFoundError: the folder does not exist.
    """
    asked = dict(locals())
    check_augmentation(augmentation)
    if channels not in ("auto", *CHANNELS):
        raise ValueError(f"channels={channels!r} is unknown; allowed are 'auto', 'rgb', 'grey'.")
    if in_memory not in ("auto", True, False):
        raise ValueError(f"in_memory={in_memory!r} is unknown; allowed are 'auto', True, False.")
    size = _check_size(image_size)
    if dataset == "digits":
        of_others = ("image_column", "label_column", "revision", "test_split")
        given = [name for name in of_others if asked[name] is not None] + ["in_memory"] * (in_memory is False)
        if given:
            raise ValueError(f'dataset="digits" is embedded: drop {", ".join(given)}.')
        splits, name, in_memory = {"train": _digits()}, dataset, True
    else:
        splits, name = _load_splits(dataset, revision, test_split)

    import datasets

    image_column, label_column = find_columns(splits["train"].features, image_column, label_column)
    feature = splits["train"].features[label_column]
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    raw = {split: read_labels(rows, label_column, split) for split, rows in splits.items()}
    labels, class_names = encode_labels(raw, names, label_column)
    parts, origin = _choose_rows(labels, validation_fraction, train_limit, test_limit)

    images = {split: rows.select_columns([image_column]) for split, rows in splits.items()}
    if isinstance(splits["train"].features[image_column], datasets.Image):
        undecoded = datasets.Image(decode=False)
        images = {split: rows.cast_column(image_column, undecoded) for split, rows in images.items()}
    split, indices = parts["train"]
    row = int(indices[0])
    decoder, first_size = decoder_for(images[split][row][image_column], channels, f"image {row} of split {split!r}")
    if in_memory == "auto":
        height, width = size or first_size
        pixels = sum(len(indices) for _, indices in parts.values()) * height * width * CHANNELS[decoder.channels]
        in_memory = pixels <= MEMORY_LIMIT and max(height, width) <= MEMORY_SIDE
    if not in_memory and size is None:
        raise ValueError(
            f"images of {first_size[0]}x{first_size[1]} pixels are decoded as they are read, and need an image_size, "
            f"such as image_size={min(first_size)}; in_memory=True keeps the stored size and decodes all at once."
        )
    made = {}
    for part, (split, indices) in parts.items():
        ids, how = torch.from_numpy(labels[split][indices]), augmentation if part == "train" else "none"
        if in_memory:
            planes = decode_rows(images[split], indices, split, decoder, size)
            made[part] = ImageTensorDataset(planes, ids, class_names, how, seed)
        else:
            source = dict(image_column=image_column, indices=indices, decoder=decoder, split=split)
            made[part] = ImageStreamDataset(images[split], ids, class_names, size, how, **source, seed=seed)
    return _finish(made, class_names, name, origin, asked)


def _check_size(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"image_size={image_size!r}; give a side or (height, width), in pixels, above 0.")
    return size


def _load_splits(dataset: str, revision: str | None, test_split: str | None) -> tuple[dict[str, Any], str]:
    import datasets

    folder = Path(dataset).expanduser()
    name = dataset
    if folder.exists():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for Hub data sets, but {dataset!r} is a folder; leave it out.")
        dataset, name = str(folder), folder.resolve().name
    elif folder.is_absolute() or dataset.startswith(("./", "../", "~")) or dataset.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {dataset!r}. Give an existing folder, a Hub id, or 'digits'.")
    try:
        splits = datasets.load_dataset(dataset, revision=revision)
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(
            f"data set {dataset!r} cannot be read: {error.__cause__ or error}. Give a Hub id, or a folder of parquet "
            "files or of images with rows in every split."
        ) from error
    if "train" not in splits:
        raise ValueError(f"data set {name!r} has no split 'train', only {', '.join(splits)}. Rename one to train.")
    others = [split for split in splits if split != "train"]
    if test_split is not None and test_split not in others:
        raise ValueError(f"test_split={test_split!r}: data set {name!r} has {', '.join(others) or 'only train'}.")
    test = test_split or next((split for split in ("test", "validation") if split in splits), None)
    return {split: splits[split] for split in ("train", test) if split is not None}, name


def _choose_rows(
    labels: dict[str, np.ndarray], validation_fraction: float, train_limit: int | None, test_limit: int | None
) -> tuple[dict[str, tuple[str, np.ndarray]], str]:
    """Part -> (split, rows), and where the test part came from."""
    everything, test_split = labels["train"], next((split for split in labels if split != "train"), "train")
    if test_split == "train":
        rest, test = stratified_split(everything, TEST_FRACTION, "testing")
        origin = f"{TEST_FRACTION:.0%} of the training rows were held out for testing"
    else:
        rest, test = np.arange(len(everything)), np.arange(len(labels[test_split]))
        origin = f"tested on split {test_split!r}"
    train, validation = stratified_split(everything[rest], validation_fraction, "validation")
    parts = {
        "train": ("train", first_rows(rest[train], everything, train_limit, "train_limit")),
        "validation": ("train", rest[validation]),
        "test": (test_split, first_rows(test, labels[test_split], test_limit, "test_limit")),
    }
    return parts, f"{origin}, validation held out of the training rows"


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


def _finish(made: dict[str, Any], class_names: list[str], name: str, origin: str, asked: dict[str, Any]) -> ImageData:
    sizes = {tuple(part[0]["pixel_values"].shape) for part in made.values()}
    if len(sizes) > 1:
        raise ValueError(f"train, validation and test images differ in size: {sorted(sizes)}. Give image_size.")
    ((channels, height, width),) = sizes
    storage = "decoded as they are read"
    if isinstance(made["train"], ImageTensorDataset):
        storage = f"decoded in memory ({sum(part.images.nbytes for part in made.values()) / 1e6:,.1f} MB)"
    description = (
        f"{name}: {len(made['train']):,} training, {len(made['validation']):,} validation and "
        f"{len(made['test']):,} test images of {channels}x{height}x{width} in {len(class_names)} classes, "
        f"{storage}; training images: {made['train'].augmentation_text}; {origin}."
    )
    identity = {part: dataset.identity for part, dataset in made.items()}
    identity |= {"classes": class_names, "asked": asked | {"dataset": name}}  # a path says nothing elsewhere
    about = dict(image_size=(height, width), channels=channels, name=name, description=description)
    return ImageData(**made, class_names=class_names, identity=identity, **about)
