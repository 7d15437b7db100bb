"""Which kernel a layer gets: each is tried on an input of the layer's own shape, and the fastest is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tscnc_hf.inference.following import Call
from tscnc_hf.inference.layers import (
    SparseConvBlock,
    SparseConvImages,
    SparseConvPixels,
    SparseLinear,
    conv_padding,
)
from tscnc_hf.inference.operators import machine
from tscnc_hf.inference.timing import race


FEWEST_ZEROS = 0.5  # with fewer, no sparse kernel is tried, but for
FEW_CHANNELS = 4  # a first layer among others that keep images innermost, whatever its zeros
FEATURES = 768  # times vectors of them: what is walked at a time stays in a first cache of 48 KB
SECONDS = 0.1  # for all kernels of a layer
TILES = ((1, 1), (2, 2), (2, 4), (2, 7), (2, 8), (4, 4))  # as in `with_tile` of kernels.h
CACHES = (None, 64 << 10, 48 << 10, 32 << 10)  # bytes that a block of channels may take: all, some of L2, a usual L1


@dataclass
class Choice:
    """
    Attributes:
        call: the layer.
        zeros: share of its weights.
        dense_ms: least time of the layer as it is.
        kernels: the fastest sparse layer of each kind, and its least time; empty where none was tried.
    """

    call: Call
    zeros: float
    dense_ms: float
    kernels: dict[str, tuple[nn.Module, float]]


@torch.no_grad()
def choose(call: Call, alike: dict[tuple, Choice]) -> Choice:
    """
    Time the layer and all kernels that can take its place.

    Args:
        alike: choices so far, by what their times depend on; a layer like one of them gets what that one got.
    """
    layer = call.module
    zeros = 1 - int(layer.weight.count_nonzero()) / layer.weight.numel()
    key = (repr(layer), call.shape, call.stride, round(zeros, 2))
    if known := alike.get(key):
        kernels = {kind: (made.like(layer), took) for kind, (made, took) in known.kernels.items()}
        return Choice(call, zeros, known.dense_ms, kernels)
    x = _like(call)
    calls, made = {"dense": lambda: layer(x)}, {}
    if can_be_sparse(call) and (zeros >= FEWEST_ZEROS or _has_few_channels(layer)):
        for index, candidate in enumerate(_candidates(call)):
            # images lie innermost where the layer before has left them so
            given = _innermost(x) if candidate.kind == SparseConvImages.kind else x
            made[f"{index}"] = candidate
            calls[f"{index}"] = lambda candidate=candidate, given=given: candidate(given)
    times = race(calls, {"dense": "dense"} | {name: layer.kind for name, layer in made.items()}, SECONDS)
    kernels: dict[str, tuple[nn.Module, float]] = {}
    for name, candidate in made.items():
        if candidate.kind not in kernels or times[name] < kernels[candidate.kind][1]:
            kernels[candidate.kind] = candidate, times[name]
    alike[key] = Choice(call, zeros, times["dense"], kernels)
    return alike[key]


def _has_few_channels(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d and layer.in_channels <= FEW_CHANNELS


def can_be_sparse(call: Call) -> bool:
    """Whether there are kernels for what the layer computes."""
    layer = call.module
    if type(layer) is nn.Linear:
        return math.prod(call.shape) > 0
    return layer.groups == 1 and conv_padding(layer) is not None and len(call.shape) == 4


def _candidates(call: Call) -> Iterator[nn.Module]:
    layer, lanes = call.module, machine()[0]
    if type(layer) is nn.Linear:
        tokens = -(-math.prod(call.shape[:-1]) // lanes)  # vectors of them
        for vectors in (1, 2, 3, 4, 6, 8) if tokens < 32 else (2, 4):
            if vectors <= tokens:
                yield SparseLinear(layer, vectors)
                if (block := FEATURES // vectors) < layer.in_features and tokens >= 32:
                    yield SparseLinear(layer, vectors, block)
        return
    images, _, height, width = call.shape
    for block in sorted({_plane_channels(layer, height, width, cache) for cache in CACHES}):
        yield SparseConvPixels(layer, (height, width), block)
    if images >= lanes // 2:
        for tile in _tiles(layer, height, width)[:2]:
            for block in sorted({_block_channels(layer, tile, cache) for cache in CACHES}):
                yield SparseConvImages(layer, tile, block)


def _block_channels(layer: nn.Conv2d, tile: tuple[int, int], cache: int | None) -> int:
    """Channels of which a tile takes so many bytes; all if None."""
    sizes = [
        (t - 1) * s + (k - 1) * d + 1
        for t, s, k, d in zip(tile, layer.stride, layer.kernel_size, layer.dilation, strict=True)
    ]
    most = layer.in_channels if cache is None else max(8, cache // (sizes[0] * sizes[1] * machine()[0] * 4))
    return min(layer.in_channels, most)


def _plane_channels(layer: nn.Conv2d, height: int, width: int, cache: int | None) -> int:
    """Channels of which so many bytes are read for as many pixels of an output as are summed up at a time."""
    rows, across = _out_size(layer, height, width)
    pixels = min(rows * across, machine()[0] * machine()[1]) + (layer.kernel_size[0] - 1) * layer.dilation[0] * across
    most = layer.in_channels if cache is None else max(8, cache // (layer.kernel_size[1] * pixels * 4))
    return min(layer.in_channels, most)


def _out_size(layer: nn.Conv2d, height: int, width: int) -> list[int]:
    return [
        (side + 2 * p - (k - 1) * d - 1) // s + 1
        for side, k, s, p, d in zip(
            (height, width), layer.kernel_size, layer.stride, conv_padding(layer), layer.dilation, strict=True
        )
    ]


def _tiles(layer: nn.Conv2d, height: int, width: int) -> list[tuple[int, int]]:
    """Those that the kernels have, the largest first among those that waste least of an output."""
    out, most = _out_size(layer, height, width), machine()[1]

    def computed(tile: tuple[int, int]) -> int:
        return math.prod(-(-side // t) * t for side, t in zip(out, tile, strict=True))

    fitting = [tile for tile in TILES if math.prod(tile) <= most]
    # a tile of half the size pays more for each weight: as much as a fifth of its pixels
    return sorted(fitting, key=lambda tile: computed(tile) * (1 + 3 / math.prod(tile)))


Placed = tuple[Call, SparseConvImages]  # a convolution and what it is replaced by


@torch.no_grad()
def choose_pair(first: Placed, second: Placed, alike: dict[tuple, SparseConvBlock | None]) -> SparseConvBlock | None:
    """
    Two convolutions, the second of the first's output and of stride 1, as one layer; None where one after the other is
    as fast.

    Args:
        alike: choices so far, by what their times depend on.
    """
    (one, as_one), (two, as_two) = first, second
    key = (repr(one.module), repr(two.module), one.shape, round(as_one.zeros, 2), round(as_two.zeros, 2))
    if key not in alike:
        x = _innermost(_drawn(one.shape))
        made = {}
        for tile in _tiles(two.module, *two.shape[2:])[:3]:
            for cache in CACHES:
                layers = [SparseConvImages(c.module, tile, _block_channels(c.module, tile, cache)) for c in (one, two)]
                made[f"{tile}, {[layer.block_channels for layer in layers]}"] = SparseConvBlock(*layers)
        calls = {"apart": lambda: as_two(as_one(x))}
        calls |= {name: lambda both=both: both(x) for name, both in made.items()}
        times = race(calls, dict.fromkeys(calls), SECONDS)
        fastest = min(times, key=times.__getitem__)
        alike[key] = made.get(fastest)
    known = alike[key]
    return known and SparseConvBlock(known.first.like(one.module), known.second.like(two.module))


def _like(call: Call) -> Tensor:
    x = _drawn(call.shape)
    return x.as_strided(call.shape, call.stride) if _dense(call) else x


def _drawn(shape: tuple[int, ...]) -> Tensor:
    """By a generator of its own: that of torch belongs to the caller."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def _dense(call: Call) -> bool:
    """Whether the strides are those of some order of the dimensions, without gaps."""
    size = 1
    for stride, side in sorted(zip(call.stride, call.shape, strict=True)):
        if side != 1 and stride != size:
            return False
        size *= side
    return True


def _innermost(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
