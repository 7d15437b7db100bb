"""What an image processor does to the size of images, found by sending one of that size through it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tscnc_hf.method.adversarial.pixels import Preprocessing, pixel_inputs
from tscnc_hf.method.resizing import INTERPOLATIONS, Resize


ROUNDED = 1.2 / 255  # in pixel units: 8-bit images are rounded after each of the two directions of a resize
PIL_NUMBERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}


def candidates(says: Mapping[str, Any], size: tuple[int, int], output: tuple[int, int]) -> Iterator[Resize]:
    """
    The resizes that an image processor may do to an image of `size` (h, w) where it makes one of `output`, in the
    order of what its settings, `says`, speak for.
    """
    said = says.get("resample", says.get("interpolation"))
    for interpolation in sorted(INTERPOLATIONS, key=lambda name: said not in (name, PIL_NUMBERS[name])):
        for height, width in dict.fromkeys(_sizes(says, size, output)):
            for crop in _crops((height, width), output):
                for first in ("width", "height"):
                    yield Resize(height, width, interpolation, crop, first)


def _sizes(says: Mapping[str, Any], size: tuple[int, int], output: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(h, w) after the resize: the output's, or so that the shorter side has some length, or as before."""
    yield output
    share = says.get("crop_pct") or 1.0
    scaled = tuple(math.floor(side / share) for side in output)
    yield scaled
    named = dict(says.get("size") or {})
    if named.get("height") and named.get("width"):
        yield named["height"], named["width"]
    edge = named.get("shortest_edge") or says.get("resize_short")
    sides = [min(scaled), *([edge, int(edge / share), int(256 / 224 * edge)] if edge else [])]
    for side in sides:
        for rounded in (int, round):
            ratio = side / min(size)
            yield tuple(side if length == min(size) else rounded(length * ratio) for length in size)
    ratio = min(length / wanted for length, wanted in zip(size, scaled, strict=True))
    yield tuple(round(length / ratio) for length in size)
    yield size


def _crops(size: tuple[int, int], output: tuple[int, int]) -> list[tuple[int, int, int, int] | None]:
    if size == output:
        return [None]
    half = [(length - kept) / 2 for length, kept in zip(size, output, strict=True)]
    starts = {tuple(rounded(start) for start in half) for rounded in (math.floor, round, math.ceil)}
    return [(*start, *output) for start in sorted(starts)]


def measured(
    says: Mapping[str, Any], how: Preprocessing, given: torch.Tensor, made: torch.Tensor, tolerance: float
) -> Resize | float:
    """
    The resize that makes of the pixels `given`, float64 (c, h, w) in [0, 1], the inputs `made` (c, H, W), or how far
    off the best one is, in pixel units.

    Args:
        says: the settings of the image processor.
        how: how inputs are normalised.
        tolerance: of the largest input, where nothing is rounded.
    """
    least = math.inf
    for resize in candidates(says, tuple(given.shape[1:]), tuple(made.shape[1:])):
        off, allowed = distance(resize, how, given, made, tolerance)
        if off <= allowed:
            return resize
        least = min(least, off)
    return least


def distance(
    resize: Resize, how: Preprocessing, given: torch.Tensor, made: torch.Tensor, tolerance: float
) -> tuple[float, float]:
    """How far off a resize is, in pixel units, and how far it may be. Arguments: those of `measured`."""
    scale = torch.tensor(how.std, dtype=torch.float64).view(-1, 1, 1).abs()
    ours = pixel_inputs(given[None].float(), *how[:3], lambda *_: resize)[0]
    if ours.shape != made.shape:
        return math.inf, 0.0
    exact = tolerance * float(made.abs().max().clamp(min=1.0) * scale.max())
    return float(((ours - made).abs() * scale).max()), exact if resize.interpolation == "nearest" else ROUNDED
