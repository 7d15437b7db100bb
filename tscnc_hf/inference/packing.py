"""Weights as the kernels walk them: for each output the values that are not zero, and where in a tile their inputs
lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


GROUP = 64  # outputs among which rows are ordered by length, and which are not shared out among threads


def pack(weight: Tensor, block_channels: int, offsets: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """
    Args:
        weight: float32 (outputs, channels, taps).
        block_channels: how many channels are walked at a time, for all outputs, before the next ones.
        offsets: (channels, taps), int64 (n) each, to what is stored as offset, int64 (n).

    Returns:
        entries, int32 (n, 2): offset, bytes into a tile, and bits of the value; row after row, by channel and tap.
        rows, int32 (blocks, outputs, 3): output, first and last entry, the last not included; by length within GROUP.
    """
    outputs, channels, _ = weight.shape
    blocks = -(-channels // block_channels)
    output, channel, tap = weight.nonzero(as_tuple=True)
    block = channel // block_channels
    lengths = torch.zeros(blocks, outputs, dtype=torch.int64)
    lengths.view(-1).index_add_(0, block * outputs + output, torch.ones_like(output))
    # places of outputs in their block: by group, then by length
    key = torch.arange(outputs) // GROUP * (int(lengths.max()) + 1) + lengths
    order = key.argsort(dim=1, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(outputs).expand(blocks, -1))
    ends = lengths.gather(1, order).view(-1).cumsum(0).view(blocks, outputs)
    rows = torch.stack([order, ends - lengths.gather(1, order), ends], dim=-1)
    sequence = (block * outputs + place[block, output]).argsort(stable=True)
    output, channel, tap = output[sequence], channel[sequence], tap[sequence]
    values = weight[output, channel, tap].contiguous().view(torch.int32)
    where = offsets(channel, tap)
    return torch.stack([where.to(torch.int32), values], dim=1).contiguous(), rows.to(torch.int32).contiguous()
