"""The two image data sets: decoded once into memory, or decoded as they are read. Items are pixels in [0, 1]."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tscnc_hf.data.augmentation import check_augmentation, crop_and_flip, draw_crops_and_flips, random_box
from tscnc_hf.data.decoding import CHANNELS, ImageDecoder, resize_to, to_planes
from tscnc_hf.data.identity import digest, spread


if TYPE_CHECKING:
    import datasets


class EpochDataset(Dataset):
    """Labelled images whose augmentation is a pure function of (seed, epoch, index).

    Attributes:
        labels: int64 (n,).
        class_names: one name a class.
        augmentation: "none", "flip", "crop" or "crop-flip".
        augmentation_text: what that is, in words.
        seed: non-negative.
        epoch: set by `set_epoch`, 0 at first.
    """

    _crop_text: str  # what a "crop" of the class is

    def __init__(self, labels: torch.Tensor, class_names: Sequence[str], augmentation: str, seed: int) -> None:
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64 (n,), got {labels.dtype} {tuple(labels.shape)}.")
        if seed < 0:
            raise ValueError(f"seed={seed} is negative; give 0 or more.")
        self.labels = labels
        self.class_names = list(class_names)
        self.augmentation = check_augmentation(augmentation)
        self.seed = seed
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
        return {"images": len(self), **self._content(), **(about if self.augmentation != "none" else {})}

    @abstractmethod
    def _content(self) -> dict[str, Any]:
        """The size of the images, and a digest of pixels and labels."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0, 1, ...) whose augmentation the items get; ValueError when negative or no integer."""
        if epoch != int(epoch) or epoch < 0:
            raise ValueError(f"epoch={epoch}; give an integer, 0 or more.")
        self._epoch.fill_(int(epoch))

    def __len__(self) -> int:
        return len(self.labels)

    def _position(self, index: int) -> int:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)} images.")
        return index % len(self)

    def _describe(self, channels: int, height: int, width: int) -> str:
        return (
            f"{type(self).__name__}({len(self):,} images of {channels}x{height}x{width}, {len(self.class_names)} "
            f"classes, augmentation={self.augmentation!r}, seed={self.seed}, epoch={self.epoch})"
        )


class ImageTensorDataset(EpochDataset):
    """Small images, decoded once.

    Args:
        images: uint8 (n, c, h, w).
        labels: int64 (n,).
        class_names: one name a class.
        augmentation: "none", "flip" (left to right, every second image), "crop" (h // 8 zeros on each side, then a
            random crop of the old size) or "crop-flip".
        seed: with epoch and index, all that the augmentation depends on.

    Raises:
        ValueError: wrong shapes or dtypes, an unknown augmentation, crops asked of images less than 8 pixels high.
    """

    _crop_text = "crops of the padded image"

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        class_names: Sequence[str],
        augmentation: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__(labels, class_names, augmentation, seed)
        if images.ndim != 4 or images.dtype != torch.uint8 or len(images) != len(labels):
            raise ValueError(
                f"images must be uint8 (n, c, h, w) with n = {len(labels)} labels, got {images.dtype} "
                f"{tuple(images.shape)}."
            )
        self.images = images
        self._crops, self._flips = "crop" in augmentation, "flip" in augmentation
        self._padding = images.shape[2] // 8 if self._crops else 0
        if self._crops and self._padding == 0:
            raise ValueError(
                f"augmentation={augmentation!r} pads by h // 8 pixels, none at all for images {images.shape[2]} "
                'pixels high; use "none" or "flip".'
            )
        self._drawn: tuple[int, tuple[torch.Tensor, ...]] | None = None

    def _content(self) -> dict[str, Any]:
        return {"image_size": [*self.images.shape[1:]], "digest": digest([self.images, self.labels])}

    def _draws(self) -> tuple[torch.Tensor, ...]:
        epoch = self.epoch
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, draw_crops_and_flips(len(self), self._padding, self.seed, epoch)
        return self._drawn[1]

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """One ready batch: pixel_values float32 (b, c, h, w) in [0, 1], labels int64 (b,). `collate` passes it on."""
        where = torch.as_tensor([self._position(index) for index in indices], dtype=torch.int64)
        images = self.images[where]
        if self.augmentation != "none":
            rows, columns, flips = (draw[where] for draw in self._draws())
            if not self._flips:
                flips = torch.zeros_like(flips)
            images = crop_and_flip(images, rows, columns, flips, self._padding)
        return {"pixel_values": images.float().div_(255), "labels": self.labels[where]}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One item: pixel_values float32 (c, h, w) in [0, 1], labels int64 ()."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def subset(self, indices: Iterable[int]) -> "ImageTensorDataset":
        """The images at `indices` (copied), in that order; augmented by their new indices, from epoch 0."""
        where = torch.as_tensor([self._position(index) for index in indices], dtype=torch.int64)
        return ImageTensorDataset(
            self.images[where], self.labels[where], self.class_names, self.augmentation, self.seed
        )

    def __repr__(self) -> str:
        return self._describe(*self.images.shape[1:])


class ImageStreamDataset(EpochDataset):
    """Large images, decoded when read.

    Args:
        rows: a `datasets.Dataset` with the column `image_column` (decoded or not).
        labels: int64, one for each of `indices`.
        class_names: one name a class.
        image_size: (h, w) of the items.
        augmentation: "crop" makes random resized crops (8 to 100 % of the area, aspect ratio 3/4 to 4/3) instead of
            resizing the shorter side and cropping the centre; "flip" mirrors every second image left to right;
            "crop-flip" does both, "none" neither.
        image_column: name of the column.
        indices: int64, the rows to use, in order; all by default.
        decoder: which pixels to make of an image; RGB by default.
        split: name of the split, for messages.
        seed: with epoch and index, all that the augmentation depends on.

    Raises:
        ValueError: wrong shapes or dtypes, an unknown augmentation; when an item is read: an image that cannot be
            decoded.
    """

    _crop_text = "resized crops"

    def __init__(
        self,
        rows: "datasets.Dataset",
        labels: torch.Tensor,
        class_names: Sequence[str],
        image_size: tuple[int, int],
        augmentation: str = "none",
        *,
        image_column: str = "image",
        indices: Sequence[int] | np.ndarray | None = None,
        decoder: ImageDecoder | None = None,
        split: str = "train",
        seed: int = 0,
    ) -> None:
        super().__init__(labels, class_names, augmentation, seed)
        import datasets

        if image_column not in rows.column_names:
            raise ValueError(f"no column {image_column!r}; the columns are {', '.join(rows.column_names)}.")
        rows = rows.select_columns([image_column])
        if isinstance(rows.features[image_column], datasets.Image):
            rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.rows = rows
        self.indices = np.arange(len(rows)) if indices is None else np.asarray(indices, dtype=np.int64)
        if len(self.indices) != len(labels):
            raise ValueError(f"{len(labels)} labels for {len(self.indices)} images; give one label an image.")
        self.image_column = image_column
        self.image_size = image_size
        self.decoder = decoder or ImageDecoder()
        self.split = split

    def _content(self) -> dict[str, Any]:
        # all labels, and as many files as are read in a moment
        files = [self.rows[int(self.indices[place])][self.image_column] for place in spread(len(self))]
        size = [CHANNELS[self.decoder.channels], *self.image_size]
        return {"image_size": size, "digest": digest([self.labels, self.indices, *map(_bytes_of, files)])}

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
        planes = torch.tensor(to_planes(resize_to(image, self.image_size, box)))
        if flip and "flip" in self.augmentation:
            planes = planes.flip(-1)
        return {"pixel_values": planes.float().div_(255), "labels": self.labels[index]}

    def subset(self, indices: Iterable[int]) -> "ImageStreamDataset":
        """The images at `indices`, in that order; augmented by their new indices, from epoch 0."""
        where = [self._position(index) for index in indices]
        return self._like(labels=self.labels[where], indices=self.indices[where])

    def _like(self, **changes: Any) -> "ImageStreamDataset":
        same = ("rows", "labels", "class_names", "image_size", "augmentation", "image_column", "indices", "decoder")
        return ImageStreamDataset(**({name: getattr(self, name) for name in (*same, "split", "seed")} | changes))

    def __repr__(self) -> str:
        return self._describe(CHANNELS[self.decoder.channels], *self.image_size)


def _bytes_of(stored: Any) -> bytes:
    """Of an image as a data set holds it: encoded, or in a file; one that is not there is found when it is read."""
    content, path = (stored.get("bytes"), stored.get("path")) if isinstance(stored, dict) else (stored, None)
    if content is not None:
        return bytes(content)
    return Path(path).read_bytes() if path and Path(path).is_file() else b""
