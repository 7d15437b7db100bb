"""N:M patterns, such as 2:4: which weights are not among the n largest of m consecutive input channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tscnc_hf.method.matrices import WeightMatrix


def outside_pattern(
    records: Sequence[WeightMatrix], scores: Mapping[str, Tensor], n: int, m: int
) -> dict[str, Tensor]:
    """
    Name -> bool mask, of the scores' shape, of the weights that do not belong to the n largest of their group of m.

    Raises:
        ValueError: m does not divide the input channels of a layer.
    """
    barred = {}
    for record in records:
        score = scores[record.name]
        groups = _input_groups(record, m, score.device)
        smallest = groups.gather(-1, score.reshape(-1)[groups].argsort(dim=-1, stable=True)[..., : m - n])
        mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
        mask[smallest.reshape(-1)] = True
        barred[record.name] = mask.view(score.shape)
    return barred


def kernel_sides(record: WeightMatrix) -> tuple[int, ...]:
    """Of a convolution, in pixels; () of any other layer."""
    size = getattr(record.module, "kernel_size", ())
    return tuple(size) if isinstance(size, (tuple, list)) else (size,)


def index_view(record: WeightMatrix, device: torch.device) -> Tensor:
    """(b, r, c): where in the flattened weight each entry of the matrices stands, int64."""
    shape = record.weight.shape
    return record.view(torch.arange(shape.numel(), device=device).view(shape))


def _input_groups(record: WeightMatrix, m: int, device: torch.device) -> Tensor:
    """(..., m): places in the flattened weight of m consecutive input channels at one position of the kernel."""
    index = index_view(record, device)
    b, rows, columns = index.shape
    positions = math.prod(kernel_sides(record))
    inputs = columns // positions
    if inputs % m:
        raise ValueError(
            f"{record.name} reads {inputs} input channels, which groups of {m} do not divide: leave it dense "
            f"(pruning_exclude={[record.name]!r}), or choose another pattern"
        )
    return index.view(b, rows, inputs // m, m, positions).transpose(-1, -2)
