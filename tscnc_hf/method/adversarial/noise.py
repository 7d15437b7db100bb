"""Random numbers for a batch of images, from a torch generator or from the places of the images in a larger batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


BLOCK = 16


def seeded_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator on `device` seeded from the whole key, e.g. (seed, rank, step): no state to save or restore."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big") >> 1)


class PlacedNoise:
    """
    Random numbers for the images at places first, first + 1, ..., first + count - 1 of a larger batch or a data set.

    Takes the place of a `torch.Generator`. What an image gets follows from the key, its place and the draws made
    before, whichever images it is drawn with: cutting a batch over processes or in time changes nothing. Blocks of 16
    places are drawn from a generator each, so that there are few of them; what belongs to other images is dropped.

    Args:
        device (`torch.device` or `str`): where the numbers are drawn.
        key (`tuple[int | str, ...]`): what the larger batch is, e.g. (seed, step).
        first (`int`): place of the first image, >= 0.
        count (`int`): images.
    """

    def __init__(self, device: torch.device | str, key: tuple[int | str, ...], first: int, count: int):
        self.key, self.first, self.count = key, first, count
        blocks = range(first // BLOCK, -(-(first + count) // BLOCK))
        self._generators = [seeded_generator(device, *key, block) for block in blocks]

    def draw(self, x: Tensor, fill_: Callable) -> Tensor:
        """What `fill_` (`Tensor.uniform_`, `Tensor.normal_`) writes, in the shape (count, ...), type, device of x."""
        if len(x) != self.count:
            raise ValueError(f"this noise is for the {self.count} images from place {self.first} on, not for {len(x)}")
        drawn = torch.empty((BLOCK * len(self._generators), *x.shape[1:]), dtype=x.dtype, device=x.device)
        for block, generator in zip(drawn.split(BLOCK), self._generators, strict=True):
            fill_(block, generator=generator)
        return drawn[self.first % BLOCK :][: self.count]


Noise = torch.Generator | PlacedNoise


def uniform_like(x: Tensor, noise: Noise | None) -> Tensor:
    """From [0, 1), in the shape, type and device of x; None draws from torch's global generator."""
    return _drawn(x, noise, Tensor.uniform_)


def normal_like(x: Tensor, noise: Noise | None) -> Tensor:
    """From N(0, 1), otherwise as `uniform_like`."""
    return _drawn(x, noise, Tensor.normal_)


def _drawn(x: Tensor, noise: Noise | None, fill_: Callable) -> Tensor:
    if isinstance(noise, PlacedNoise):
        return noise.draw(x, fill_)
    return fill_(torch.empty(x.shape, dtype=x.dtype, device=x.device), generator=noise)
