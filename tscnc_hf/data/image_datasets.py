"""The two image data sets: decoded once into memory, or decoded as they are read. Items are pixels in [0, 1]."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch.utils.data import Dataset

from tscnc_hf.data.augmentation import check_augmentation, crop_and_flip, draw_crops_and_flips, random_box
from tscnc_hf.data.decoding import CHANNELS, Fit, ImageDecoder, resize_to, to_planes
from tscnc_hf.data.identity import digest, spread


if TYPE_CHECKING:
    import datasets


class EpochDataset(Dataset):
    """Labelled images whose augmentation is a pure function of (seed, epoch, index).

    Attributes:
        labels: int64 (n,).
        class_names: one name a class.
        augmentation: "none", "flip" (left to right, every second image), "crop" or "crop-flip".
        augmentation_text: what that is, in words.
        seed: non-negative; with epoch and index, all that the augmentation depends on.
        epoch: set by `set_epoch`, 0 at first.
        data_name, data_split: of the data set that they are from, None where nobody has said it.
    """

    data_name: ClassVar[str | None] = None  # attributes where they are known
    data_split: ClassVar[str | None] = None

    _crop_text: str  # what a "crop" of the class is
    _item_shape: tuple[int, ...]  # (c, h, w)

    def __post_init__(self) -> None:
        if self.labels.ndim != 1 or self.labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64 (n,), got {self.labels.dtype} {tuple(self.labels.shape)}.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is negative; give 0 or more.")
        self.class_names = list(self.class_names)
        check_augmentation(self.augmentation)
        # In shared memory, so that `set_epoch` also reaches the workers a DataLoader keeps alive between epochs.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @property
    def augmentation_text(self) -> str:
        parts = [text for key, text in (("crop", self._crop_text), ("flip", "flips")) if key in self.augmentation]
        return f"random {' and '.join(parts)}" if parts else "not augmented"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What tells these images from others, plain JSON types: see `tscnc_hf.data.identity`."""
        about = {"augmentation": self.augmentation_text, "augmentation_seed": self.seed}
        found = {"images": len(self), "image_size": [*self._item_shape], "digest": digest(self._content())}
        return found | (about if self.augmentation != "none" else {})

    @abstractmethod
    def _content(self) -> list:
        """Pixels and labels, or what tells them from others."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0, 1, ...) whose augmentation the items get; ValueError when negative or no integer."""
        if epoch != int(epoch) or epoch < 0:
            raise ValueError(f"epoch={epoch}; give an integer, 0 or more.")
        self._epoch.fill_(int(epoch))

    def __len__(self) -> int:
        return len(self.labels)

    def _named(self, part: Self) -> Self:
        part.data_name, part.data_split = self.data_name, self.data_split
        return part

    def _position(self, index: int) -> int:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)} images.")
        return index % len(self)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self):,} images of {'x'.join(map(str, self._item_shape))}, "
            f"{len(self.class_names)} classes, augmentation={self.augmentation!r}, seed={self.seed}, "
            f"epoch={self.epoch})"
        )


@dataclass(eq=False, repr=False)
class ImageTensorDataset(EpochDataset):
    """Small images, decoded once.

    Args, beside those of `EpochDataset`:
        images: uint8 (n, c, h, w).
        augmentation: "crop" is of h // 8 zeros on each side, then a random crop of the old size.

    Raises:
        ValueError: wrong shapes or dtypes, an unknown augmentation, crops asked of images less than 8 pixels high.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: Sequence[str]
    augmentation: str = "none"
    seed: int = 0

    _crop_text = "crops of the padded image"

    def __post_init__(self) -> None:
        super().__post_init__()
        images = self.images
        if images.ndim != 4 or images.dtype != torch.uint8 or len(images) != len(self):
            raise ValueError(
                f"images must be uint8 (n, c, h, w) with n = {len(self)} labels, got {images.dtype} "
                f"{tuple(images.shape)}."
            )
        self._item_shape = tuple(images.shape[1:])
        self._padding = images.shape[2] // 8 if "crop" in self.augmentation else 0
        if "crop" in self.augmentation and self._padding == 0:
            raise ValueError(
                f"augmentation={self.augmentation!r} pads by h // 8 pixels, none at all for images {images.shape[2]} "
                'pixels high; use "none" or "flip".'
            )

    def _content(self) -> list:
        return [self.images, self.labels]

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """One ready batch: pixel_values float32 (b, c, h, w) in [0, 1], labels int64 (b,). `collate` passes it on."""
        where = torch.as_tensor([self._position(index) for index in indices], dtype=torch.int64)
        images = self.images[where]
        if self.augmentation != "none":
            draws = draw_crops_and_flips(len(self), self._padding, self.seed, self.epoch)
            rows, columns, flips = (draw[where] for draw in draws)
            images = crop_and_flip(images, rows, columns, flips & ("flip" in self.augmentation), self._padding)
        return {"pixel_values": images.float().div_(255), "labels": self.labels[where]}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One item: pixel_values float32 (c, h, w) in [0, 1], labels int64 ()."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def subset(self, indices: Iterable[int]) -> "ImageTensorDataset":
        """The images at `indices` (copied), in that order; augmented by their new indices, from epoch 0."""
        where = [self._position(index) for index in indices]
        return self._named(replace(self, images=self.images[where], labels=self.labels[where]))


@dataclass(eq=False, repr=False)
class ImageStreamDataset(EpochDataset):
    """Large images, decoded when read.

    Args, beside those of `EpochDataset`:
        rows: a `datasets.Dataset` with the column `image_column` (decoded or not).
        labels: int64, one for each of `indices`.
        image_size: (h, w) of the items.
        augmentation: "crop" is of random resized crops (8 to 100 % of the area, aspect ratio 3/4 to 4/3), instead of
            resizing the shorter side and cropping the centre.
        image_column: name of the column.
        indices: int64, the rows to use, in order; all by default.
        decoder: which pixels to make of an image; RGB by default.
        split: name of the split, for messages.
        fit: from an image to its pixels, uint8 (c, *image_size), in place of resizing and cropping.

    Raises:
        ValueError: wrong shapes or dtypes, an unknown augmentation; when an item is read: an image that cannot be
            decoded.
    """

    rows: "datasets.Dataset"
    labels: torch.Tensor
    class_names: Sequence[str]
    image_size: tuple[int, int]
    augmentation: str = "none"
    _: KW_ONLY
    image_column: str = "image"
    indices: Sequence[int] | np.ndarray | None = None
    decoder: ImageDecoder = ImageDecoder()
    split: str = "train"
    seed: int = 0
    fit: Fit | None = None

    _crop_text = "resized crops"

    def __post_init__(self) -> None:
        super().__post_init__()
        import datasets

        column, rows = self.image_column, self.rows
        if column not in rows.column_names:
            raise ValueError(f"no column {column!r}; the columns are {', '.join(rows.column_names)}.")
        rows = rows.select_columns([column])
        if isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        self.rows = rows
        self.indices = np.arange(len(rows)) if self.indices is None else np.asarray(self.indices, dtype=np.int64)
        if len(self.indices) != len(self):
            raise ValueError(f"{len(self)} labels for {len(self.indices)} images; give one label an image.")
        self._item_shape = CHANNELS[self.decoder.channels], *self.image_size

    def _content(self) -> list:
        # all labels, and as many files as are read in a moment
        files = [self.rows[int(self.indices[place])][self.image_column] for place in spread(len(self))]
        return [self.labels, self.indices, *map(_bytes_of, files)]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One item: pixel_values float32 (c, h, w) in [0, 1], labels int64 ()."""
        index = self._position(index)
        row = int(self.indices[index])
        image = self.decoder.open(self.rows[row][self.image_column], f"image {row} of split {self.split!r}")
        generator = np.random.default_rng([self.seed, self.epoch, index])
        flip = generator.random() < 0.5
        box = None
        if "crop" in self.augmentation:
            box = random_box(image.width, image.height, self.image_size, generator)
        made = to_planes(resize_to(image, self.image_size, box)) if self.fit is None else self.fit(image)
        planes = torch.tensor(made)
        if flip and "flip" in self.augmentation:
            planes = planes.flip(-1)
        return {"pixel_values": planes.float().div_(255), "labels": self.labels[index]}

    def subset(self, indices: Iterable[int]) -> "ImageStreamDataset":
        """The images at `indices`, in that order; augmented by their new indices, from epoch 0."""
        where = [self._position(index) for index in indices]
        return self._named(replace(self, labels=self.labels[where], indices=self.indices[where]))


def _bytes_of(stored: Any) -> bytes:
    """Of an image as a data set holds it: encoded, or in a file; one that is not there is found when it is read."""
    content, path = (stored.get("bytes"), stored.get("path")) if isinstance(stored, dict) else (stored, None)
    if content is not None:
        return bytes(content)
    return Path(path).read_bytes() if path and Path(path).is_file() else b""
