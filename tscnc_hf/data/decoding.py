"""Encoded images -> uint8 pixels, with PIL, so that an image that cannot be read is named."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

from tscnc_hf.data.augmentation import centre_box


if TYPE_CHECKING:
    from datasets import Dataset


Fit = Callable[[Image.Image], np.ndarray]

CHANNELS = {"rgb": 3, "grey": 1}
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
GREY_MODES = ("1", "L", "LA", "La", *SIXTEEN_BIT_MODES)
ORIENTATION = 0x0112
CHUNK = 1000
PROGRESS_FROM = 5_000


class ImageError(ValueError):
    """A stored image is none, or cannot be decoded."""


class ColourError(ImageError):
    """An image is in colour where only grey was expected."""


@dataclass(frozen=True)
class ImageDecoder:
    """Turns one stored image into uint8 pixels.

    Attributes:
        channels: "rgb" (c = 3) or "grey" (c = 1). Palette, CMYK, 16-bit grey ... are converted, alpha is dropped.
        only_grey: refuse images in colour, for data sets that were found to be grey where they were looked at.
    """

    channels: str = "rgb"
    only_grey: bool = False

    def open(self, stored: Any, where: str) -> Image.Image:
        """Decode `{"bytes", "path"}`, or bytes alone, to a PIL image in mode RGB or L, upright.

        Raises:
            ImageError: a `ValueError`; the image cannot be decoded, or is in colour where only grey was expected;
                names `where`, the path where known, and the decoder's message.
        """
        content, path = (stored.get("bytes"), stored.get("path")) if isinstance(stored, dict) else (stored, None)
        if content is None and path is None:
            raise ImageError(f"{where} holds no image (neither bytes nor a path). Remove the row or repair the file.")
        try:
            image = Image.open(path if content is None else io.BytesIO(content))
            image.load()
            if image.getexif().get(ORIENTATION) is not None:
                image = ImageOps.exif_transpose(image)
            is_grey = image.mode in GREY_MODES or (self.only_grey and _channels_are_equal(image))
            image = self._convert(image)
        except Exception as error:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error and more
            source = path if content is None else f"{len(content)} bytes" + (f" of {path}" if path else "")
            raise ImageError(
                f"{where} ({source}) cannot be decoded: {type(error).__name__}: {error}. Repair or remove the image."
            ) from error
        if self.only_grey and not is_grey:
            raise ColourError(
                f"{where} is in colour, but one channel is read, as all images are grey that were looked at before; "
                'give channels="rgb" (or "grey" to drop all colour).'
            )
        return image

    def _convert(self, image: Image.Image) -> Image.Image:
        target = "RGB" if self.channels == "rgb" else "L"
        if image.mode == target:
            return image
        if image.mode in SIXTEEN_BIT_MODES:
            # PIL would clip 16-bit grey at 255 instead of scaling it.
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError(f"grey values in [{values.min()}, {values.max()}], allowed are 8 and 16 bits")
            image = Image.fromarray(np.round(values / 257).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point pixels have no defined range; store 8 or 16 bits")
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert(target)


def decoder_for(images: Iterator[tuple[Any, str]], channels: str) -> tuple[ImageDecoder, tuple[int, int], bool]:
    """
    The decoder for `channels` ("rgb", "grey" or "auto"), the first image's (h, w), and whether all are grey, stored so
    or in three channels that are equal. "auto" is grey where they are.

    Args:
        images: some of a data set, each as stored and as messages call it; more than one is read where the first is
            grey, unless channels="grey".
    """
    stored, where = next(images)
    image = ImageDecoder().open(stored, where)
    grey = _channels_are_equal(image)
    if grey and channels != "grey":
        grey = all(_channels_are_equal(ImageDecoder().open(*other)) for other in images)
    chosen = channels if channels != "auto" else "grey" if grey else "rgb"
    return ImageDecoder(chosen, only_grey=channels == "auto" and grey), (image.height, image.width), grey


def common_size(images: Iterator[tuple[Any, str]]) -> tuple[int, int] | None:
    """(h, w) of some images of a data set, each as stored and as messages call it; None where they differ."""
    sizes = {ImageDecoder().open(*image).size for image in images}
    return sizes.pop()[::-1] if len(sizes) == 1 else None


def _channels_are_equal(image: Image.Image) -> bool:
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
    return bool((red == green).all() and (green == blue).all())


def resize_to(image: Image.Image, size: tuple[int, int], box: tuple[float, ...] | None = None) -> Image.Image:
    """Resize to `size` (h, w), bilinear with antialias, from `box` or else the largest centred box of that shape."""
    box = box or centre_box(image.width, image.height, size)
    if (image.height, image.width) == size and tuple(box) == (0, 0, image.width, image.height):
        return image
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)


def to_planes(image: Image.Image) -> np.ndarray:
    """PIL image in mode RGB or L -> uint8 array (c, h, w)."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def decode_rows(
    rows: "Dataset",
    indices: np.ndarray,
    split: str,
    decoder: ImageDecoder,
    image_size: tuple[int, int] | None,
    fit: Fit | None = None,
) -> torch.Tensor:
    """Decode the images of the rows `indices` into memory.

    Args:
        rows: a split whose only column holds undecoded images.
        indices: int64 (n,), rows of the split.
        split: its name, for messages.
        decoder: what pixels to make.
        image_size: (h, w) to resize to: shorter side first, then a centre crop; None keeps the stored size.
        fit: from an image to its pixels, uint8 (c, h, w), in place of `image_size`.

    Returns:
        uint8 (n, c, h, w).

    Raises:
        ValueError: an image cannot be decoded, or sizes differ and no `image_size` was given.
    """
    from tqdm.auto import tqdm

    column = rows.column_names[0]
    chunks = rows.select(indices).with_format("arrow").iter(batch_size=CHUNK)
    images = chain.from_iterable(chunk.column(column).to_pylist() for chunk in chunks)
    hidden = len(indices) <= PROGRESS_FROM
    images = tqdm(images, f"decoding {split}", len(indices), unit="img", disable=hidden)
    planes, size = None, None
    for at, stored in enumerate(images):
        where = f"image {int(indices[at])} of split {split!r}"
        image = decoder.open(stored, where)
        made = fit(image) if fit else to_planes(image if image_size is None else resize_to(image, image_size))
        size = size or made.shape[1:]
        if made.shape[1:] != size:
            raise ValueError(
                f"{where} is {made.shape[1]}x{made.shape[2]}, images before it are {size[0]}x{size[1]} (height x "
                "width). Give image_size to bring all images to one size."
            )
        if planes is None:
            planes = np.empty((len(indices), *made.shape), dtype=np.uint8)
        planes[at] = made
    return torch.from_numpy(planes)
