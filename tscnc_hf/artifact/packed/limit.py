"""How small a sparse checkpoint can be: the bound that the packed file is measured against."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from tscnc_hf.artifact.files.tensor_file import is_minus_zero, magnitude_bits


def count_nonzero(tensor: torch.Tensor) -> int:
    """Elements of `tensor` (at most 8 bytes each) that are no zero of either sign; NaN is none."""
    return int(torch.count_nonzero(magnitude_bits(tensor.detach().contiguous())))


def count_minus_zeros(tensors: Iterable[torch.Tensor]) -> int:
    """How often -0.0 stands in them: what `weight * mask` makes of negative weights. A packed file keeps 0.0."""
    return sum(int(is_minus_zero(tensor.detach().contiguous()).sum()) for tensor in tensors)


def storage_limit(tensors: dict[str, torch.Tensor]) -> int:
    """
    Bytes that a lossless file of these tensors needs at least if zeros stand anywhere and values are stored raw.

    For a floating tensor of n elements of w bytes, k of them not zero, and H the binary entropy in bits:

        ceil(n H(k / n) / 8) + k w    bytes, and never more than n w, the dense tensor

    n H(k/n) bits is what it takes to say which k of n elements are values when every such choice is as likely as any
    other (Shannon 1948), so a mask with structure can need less, and so can values that are not random (zstd on their
    byte planes does). Other tensors count with their own bytes; names, shapes and headers with none.

    Args:
        tensors: name -> tensor of any shape, dtype and device, as in a state dict. Two names for one tensor count
            twice: leave one out, as safetensors files do.

    Returns:
        The sum over the tensors, in bytes.

    Source: ours; the entropy bound is the usual one of the pruning literature.
    """
    limit = 0
    for tensor in tensors.values():
        width, n = tensor.element_size(), tensor.numel()
        k, entropy = n, 0.0
        if tensor.is_floating_point() and n:
            k = count_nonzero(tensor)
            entropy = -sum(p * math.log2(p) for p in (k / n, 1 - k / n) if p)
        limit += min(n * width, math.ceil(n * entropy / 8) + k * width)
    return limit
