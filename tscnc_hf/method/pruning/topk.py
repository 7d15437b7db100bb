"""
The exact top k of very many scores, without sorting, joining or copying all of them.

A sample says between which two values the threshold must lie; one pass counts what is below and collects what is
between, a selection among these few gives the threshold exactly, and a last pass makes the masks. Where the sample was
misleading the bracket is widened until it holds. (Selection by sampling is Floyd and Rivest 1975; the arrangement over
many tensors is ours.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


SAMPLE = 1 << 18
CHUNK = 1 << 21


def keep_largest(scores: Sequence[Tensor], pruned: int) -> list[Tensor]:
    """
    Keep all but the `pruned` smallest scores, exactly; among equal scores at the threshold the first ones are kept.

    Args:
        scores (`Sequence[Tensor]`): ranked together; any shapes, one floating dtype, one device. Infinities are fine.
        pruned (`int`): in [0, number of scores].

    Returns:
        `list[Tensor]`: bool, of the scores' shapes, True = kept, with exactly `pruned` False.

    Raises:
        ValueError: a score is NaN.
    """
    scores = [score.detach() for score in scores]
    total = sum(score.numel() for score in scores)
    if any(bool(score.isnan().any()) for score in scores):
        raise ValueError("a score is NaN: weights or gradients are not finite")
    if pruned <= 0 or pruned >= total:
        fill = torch.ones if pruned <= 0 else torch.zeros
        return [fill(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    threshold, kept_ties = _threshold(scores, pruned, total)
    return [_mask(score, threshold, kept_ties) for score in scores]


def _threshold(scores: list[Tensor], pruned: int, total: int) -> tuple[float, list[int]]:
    """The `pruned`-th smallest score, and how many of those equal to it are kept (a counter, used up in order)."""
    stride = max(1, total // SAMPLE)
    sample = torch.cat([score.reshape(-1)[::stride] for score in scores]).float().sort().values
    size, share = len(sample), pruned / total
    margin = 6 * math.sqrt(share * (1 - share) * size) + 2  # six standard deviations of the rank in a random sample
    while True:
        first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
        low = float(sample[first]) if first >= 0 else -math.inf
        high = float(sample[last]) if last < size else math.inf
        below = sum(int(torch.count_nonzero(score < low)) for score in scores)
        if below < pruned:
            between = torch.cat([score[(score >= low) & (score <= high)] for score in scores])
            if pruned <= below + len(between):
                break
        margin *= 4
    threshold = between.kthvalue(pruned - below).values
    smaller = below + int(torch.count_nonzero(between < threshold))
    ties = int(torch.count_nonzero(between == threshold))
    return float(threshold), [ties - (pruned - smaller)]


def _mask(score: Tensor, threshold: float, kept_ties: list[int]) -> Tensor:
    keep = score > threshold
    if kept_ties[0] > 0:
        flat = keep.view(-1) if keep.is_contiguous() else keep.reshape(-1)
        for values, part in zip(score.reshape(-1).split(CHUNK), flat.split(CHUNK), strict=True):
            ties = (values == threshold).nonzero().squeeze(-1)[: kept_ties[0]]
            part[ties] = True
            kept_ties[0] -= len(ties)
            if kept_ties[0] == 0:
                break
        keep = flat.view(score.shape)
    return keep
