"""Random crops and flips as pure functions of (seed, epoch, index), so that resuming and sharding change nothing."""

import math
from functools import lru_cache

import numpy as np
import torch


AUGMENTATIONS = ("none", "flip", "crop", "crop-flip")


def check_augmentation(name: str) -> str:
    """Return `name`; ValueError unless it is one of `AUGMENTATIONS`."""
    if name not in AUGMENTATIONS:
        raise ValueError(f"augmentation={name!r} is unknown; allowed are {', '.join(AUGMENTATIONS)}.")
    return name


def mix_seed(*counters: int) -> int:
    """Mix non-negative integers, such as (seed, epoch), into one 64-bit seed; neighbours give unrelated streams."""
    return int(np.random.SeedSequence(counters).generate_state(1, np.uint64)[0])


@lru_cache(maxsize=2)  # each batch of an epoch asks for them
def draw_crops_and_flips(count: int, padding: int, seed: int, epoch: int) -> tuple[torch.Tensor, ...]:
    """Draw where each of `count` images is cropped and whether it is flipped.

    The draw of image i depends on (seed, epoch, i) only, not on `count`.

    Returns:
        rows, columns: int64 (count,) in [0, 2 * padding], the crop's corner in the padded image; flips: bool (count,).
    """
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    uniform = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    corners = (uniform[:, :2] * (2 * padding + 1)).long().clamp_(max=2 * padding)
    return corners[:, 0], corners[:, 1], uniform[:, 2] < 0.5


def crop_and_flip(
    images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, flips: torch.Tensor, padding: int
) -> torch.Tensor:
    """Pad with zeros, crop each image back to its size, mirror those marked.

    Args:
        images: (b, c, h, w), any dtype.
        rows, columns: int64 (b,), the crop's upper left corner in the padded image, in [0, 2 * padding].
        flips: bool (b,), mirrored left to right after the crop.
        padding: zeros added on each of the four sides.

    Returns:
        (b, c, h, w), same dtype.
    """
    batch, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    across = torch.arange(width).expand(batch, width)
    across = torch.where(flips[:, None], width - 1 - across, across) + columns[:, None]
    down = torch.arange(height)[None, :] + rows[:, None]
    position = down[:, :, None] * padded.shape[3] + across[:, None, :]
    position = position.view(batch, 1, height * width).expand(batch, channels, height * width)
    return padded.view(batch, channels, -1).gather(2, position).view_as(images)


def centre_box(width: int, height: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred box (left, upper, right, lower), in pixels, with the aspect ratio of `size` (h, w)."""
    scale = min(width / size[1], height / size[0])
    box_width, box_height = scale * size[1], scale * size[0]
    left, upper = (width - box_width) / 2, (height - box_height) / 2
    # Rounding must not push an edge over the image's: PIL refuses such a box.
    return max(left, 0.0), max(upper, 0.0), min(left + box_width, width), min(upper + box_height, height)


def random_box(
    width: int,
    height: int,
    size: tuple[int, int],
    generator: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[float, float, float, float]:
    """The box (left, upper, right, lower) of a random resized crop (Szegedy et al. 2015), in pixels.

    Covers a share of the image in `area` with an aspect ratio (width / height) in `ratio`; after ten boxes that do
    not fit, the centred box with the aspect ratio of `size` (h, w).
    """
    for _ in range(10):
        target = width * height * generator.uniform(*area)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(generator.integers(width - box_width + 1))
            upper = int(generator.integers(height - box_height + 1))
            return left, upper, left + box_width, upper + box_height
    return centre_box(width, height, size)
