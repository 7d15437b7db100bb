"""Where the values of a sparse tensor stand, one byte or so a value: the gap code of `packed_format.md`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


SKIP = 255
CHUNK = 1 << 16  # gap bytes at a time: int64 positions of a whole tensor would be larger than the tensor


def encode_gaps(positions: torch.Tensor, numel: int) -> torch.Tensor:
    """Ascending positions of the values, int64 (nnz,), among `numel` elements -> gap bytes, uint8 (length,)."""
    gap = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
    skips, rest = gap // SKIP, gap % SKIP
    ends = torch.cumsum(skips + 1, 0)
    after_last = numel - 1 - (int(positions[-1]) if len(positions) else -1)
    gaps = torch.full(((int(ends[-1]) if len(ends) else 0) + after_last // SKIP,), SKIP, dtype=torch.uint8)
    gaps[ends - 1] = rest.to(torch.uint8)
    return gaps


def measure_gaps(gaps: np.ndarray) -> tuple[int, int]:
    """(number of values, number of elements covered) of gap bytes, uint8 (length,); Python integers."""
    values = covered = 0
    for start in range(0, len(gaps), CHUNK):
        chunk = gaps[start : start + CHUNK]
        count = int(np.count_nonzero(chunk != SKIP))
        values, covered = values + count, covered + int(chunk.sum(dtype=np.int64)) + count
    return values, covered


def decode_gaps(gaps: np.ndarray, values: Callable[[int, int], torch.Tensor], dense: torch.Tensor) -> None:
    """
    Put the values where the gaps say, and zeros elsewhere.

    Args:
        gaps: uint8 (length,), which `measure_gaps` has found to fit `dense`.
        values: values(i, j) gives the values from the i-th to before the j-th, (j - i,), in the dtype of `dense`.
        dense: (numel,), of any contents; written in place.
    """
    position = used = 0
    for start in range(0, len(gaps), CHUNK):
        chunk = gaps[start : start + CHUNK]
        is_value = chunk != SKIP
        count = int(np.count_nonzero(is_value))
        steps = torch.from_numpy(chunk + is_value)  # at most 255: it fits the byte
        ends = torch.cumsum(steps, 0, dtype=torch.int64)
        covered = int(ends[-1])
        if count < len(chunk):
            ends = ends[torch.from_numpy(is_value)]
        part = dense[position : position + covered].zero_()  # zeroed while it is on its way through the cache
        part.index_put_((ends.sub_(1),), values(used, used + count))
        position, used = position + covered, used + count
    dense[position:].zero_()
