"""The operators `torch.ops.tscnc`, and their shapes for torch.compile and torch.export."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tscnc_hf.inference.building import load_kernels


ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "silu": 3}


@cache
def machine() -> tuple[int, int, int]:
    """Floats in a vector, sums that a kernel keeps at a time, vectors of tokens at most. The kernels are loaded."""
    load_kernels()
    for name, fake in (
        ("linear", _linear),
        ("mlp", _mlp),
        ("conv_pixels", _conv_pixels),
        ("chain", _chain),
        ("conv_images", _conv_images),
        ("conv_block", _conv_block),
        ("attention", _attention),
    ):
        torch.library.register_fake(f"tscnc::{name}", fake)
    return tuple(torch.ops.tscnc.machine())


def has_tangent(x: Tensor) -> bool:
    """Whether a forward-mode derivative is taken of it, which the kernels would make zero."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _linear(x: Tensor, entries: Tensor, rows: Tensor, *rest) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows.shape[1]))


def _mlp(x: Tensor, entries: Tensor, rows: Tensor, bias, entries2: Tensor, rows2: Tensor, *rest) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows2.shape[1]))


def _sizes(x: Tensor, rows: Tensor, kernel, stride, padding, dilation) -> tuple:
    sides = [
        (side + 2 * p - (k - 1) * d - 1) // s + 1
        for side, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    return x.shape[0], rows.shape[1], *sides


def _conv_pixels(
    x: Tensor, entries: Tensor, rows: Tensor, bias, residual, channels, kernel, stride, padding, dilation, *rest
) -> Tensor:
    return x.new_empty(_sizes(x, rows, kernel, stride, padding, dilation))


STEP = 13  # numbers of a convolution in a chain, as `sparse_chain` in ops.cpp reads them


def _chain(x: Tensor, tensors: list[Tensor], plan: list[int]) -> Tensor:
    made = [x]
    for step in range(len(tensors) // 3):
        source, _, channels, *rest = plan[step * STEP : (step + 1) * STEP]
        geometry = [rest[i : i + 2] for i in range(0, 8, 2)]
        entries, rows, bias = tensors[step * 3 : step * 3 + 3]
        made.append(_conv_pixels(made[source], entries, rows, bias, None, channels, *geometry))
    return made[-1]


def _conv_images(
    x: Tensor, entries: Tensor, rows: Tensor, bias, residual, channels, kernel, stride, padding, dilation, *rest
) -> Tensor:
    n, c, h, w = _sizes(x, rows, kernel, stride, padding, dilation)
    return x.new_empty_strided((n, c, h, w), (1, h * w * n, w * n, n))


def _conv_block(
    x: Tensor, entries: Tensor, rows: Tensor, bias, entries2: Tensor, rows2: Tensor, bias2, residual, channels, kernel,
    stride, padding, dilation, kernel2, padding2, dilation2, *rest,
) -> Tensor:  # fmt: skip
    between = x.new_empty(_sizes(x, rows, kernel, stride, padding, dilation))
    n, c, h, w = _sizes(between, rows2, kernel2, (1, 1), padding2, dilation2)
    return x.new_empty_strided((n, c, h, w), (1, h * w * n, w * n, n))


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    images, heads, queries, size = q.shape
    return q.new_empty((images, queries, heads, size)).transpose(1, 2)
