"""The resize and crop of an image processor, on pixels in [0, 1], so that an attack goes through them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


class Resize(NamedTuple):
    """
    From images of one size to images of another: a resize, then a cut. Differentiable in the pixels.

    "nearest" is exactly what image libraries do. "bilinear" and "bicubic" are with antialiasing, as theirs, but are
    not rounded: libraries round 8-bit images after each of the two directions, and so differ by up to 1.1/255. What
    "bicubic" makes below 0 or above 1 is cut off after each direction, as theirs.

    Attributes:
        height, width: after the resize.
        interpolation: one of `INTERPOLATIONS`.
        crop: (top, left, height, width) of what is kept; beyond the image there is black. None keeps all.
        first: the direction that is resized first, "width" or "height".
    """

    height: int
    width: int
    interpolation: str
    crop: tuple[int, int, int, int] | None = None
    first: str = "width"

    @property
    def output(self) -> tuple[int, int]:
        """(h, w) of what comes out."""
        return (self.height, self.width) if self.crop is None else self.crop[2:]

    @property
    def only_picks(self) -> bool:
        """Whether each pixel that comes out is one that went in: what is done to single pixels may be done before."""
        top, left, height, width = self.crop or (0, 0, self.height, self.width)
        inside = min(top, left) >= 0 and top + height <= self.height and left + width <= self.width
        return self.interpolation == "nearest" and inside

    def __call__(self, pixels: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, *output)."""
        height, width = pixels.shape[-2:]
        if self.interpolation == "nearest":
            pixels = F.interpolate(pixels, (self.height, self.width), mode="nearest-exact")
        else:
            middle = (height, self.width) if self.first == "width" else (self.height, width)
            for size in (middle, (self.height, self.width)):
                if tuple(pixels.shape[-2:]) != size:
                    pixels = F.interpolate(pixels, size, mode=self.interpolation, antialias=True)
                    pixels = pixels.clamp(0, 1) if self.interpolation == "bicubic" else pixels
        if self.crop is None:
            return pixels
        top, left, height, width = self.crop
        sides = (-left, left + width - self.width, -top, top + height - self.height)
        return F.pad(pixels, sides) if any(sides) else pixels  # a negative side cuts

    def gain(self, height: int, width: int) -> float:
        """
        How much it stretches a change of an image of this size at most, in l2: the product of the operator norms of
        its two directions (what is cut off below 0 and above 1 stretches nothing). 4 for nearest by 4.
        """
        top, left, kept_height, kept_width = self.crop or (0, 0, self.height, self.width)
        vertical = _matrix(height, self.height, top, kept_height, self.interpolation)
        horizontal = _matrix(width, self.width, left, kept_width, self.interpolation)
        return math.prod(torch.linalg.matrix_norm(matrix, 2).item() for matrix in (vertical, horizontal))

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._asdict().items()}

    @classmethod
    def from_dict(cls, values: dict) -> Resize:
        """What `to_dict` gave."""
        crop = values.get("crop")
        return cls(**values | {"crop": None if crop is None else tuple(crop)})


def _matrix(size: int, resized: int, start: int, kept: int, interpolation: str) -> Tensor:
    """float64 (size, kept): what a line of `size` pixels becomes, transposed."""
    lines = torch.eye(size, dtype=torch.float64)[:, None, :, None].expand(-1, 1, -1, 2)  # torch errs at a width of 1
    if interpolation == "nearest":
        made = F.interpolate(lines, (resized, 2), mode="nearest-exact")
    else:
        made = F.interpolate(lines, (resized, 2), mode=interpolation, antialias=True) if resized != size else lines
    return F.pad(made[..., 0].flatten(1), (-start, start + kept - resized))
