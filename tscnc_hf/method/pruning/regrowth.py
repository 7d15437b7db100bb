"""
Weights that come back after a pruning schedule: the least important of the kept ones go, and as many with the largest
gradients come in their place (RigL, Evci, Gale, Menick, Castro and Elsen 2020, arXiv 1911.11134; in adversarial
training: Flying Bird, Chen et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tscnc_hf.method.matrices import WeightMatrix
from tscnc_hf.method.pruning.allocation import Allocation
from tscnc_hf.method.pruning.patterns import outside_pattern
from tscnc_hf.method.pruning.topk import keep_largest


UNTIL = 0.75  # of the steps after the schedule; the last masks are trained without change (RigL: of training)


def regrow_end(start: int, steps: int) -> int:
    """The step at which nothing comes back any more, of `steps` in all, where the schedule ended at `start`."""
    return start + round(UNTIL * (steps - start))


def regrow_share(step: int, start: int, end: int, fraction: float) -> float:
    """
    Share of the kept weights that are exchanged after a step: fraction / 2 (1 + cos(pi (t - start) / (end - start)))
    (RigL, section 3), 0 outside (start, end).
    """
    if not start < step < end:
        return 0.0
    return fraction / 2 * (1 + math.cos(math.pi * (step - start) / (end - start)))


def exchanged(
    records: Sequence[WeightMatrix],
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    share: float,
    allocation: Allocation,
) -> dict[str, Tensor]:
    """
    Masks with as many zeros, in each group of layers that the allocation ranks together (each layer alone, or all of
    scope "global"). Of the k = floor(share * kept) that a group exchanges, those with the smallest scores go, but for
    what floors keep, and each matrix its best weight; then the k with the largest gradient magnitude come, of those
    that are not kept: what has just gone may be among them, and has then not gone (so in RigL's own code). A pattern
    n:m leaves room for n of m, and the largest gradients of a group fill it.

    Args:
        records: the weights.
        masks, scores, gradients: by their names, of their shapes: bool, True = kept; larger = more important; of the
            loss, of pruned weights too.
        share: in [0, 1).

    Returns:
        `dict[str, Tensor]`: bool, True = kept.
    """
    names = [record.name for record in records]
    groups, kept, left = allocation.groups(names), allocation.protected(records, scores, masks), {}
    for group in groups:
        may_go = [masks[name] & ~kept[name] for name in group]
        wanted = math.floor(share * sum(int(masks[name].sum()) for name in group))
        count = min(wanted, sum(int(part.sum()) for part in may_go))
        ranked = [scores[name].masked_fill(~part, math.inf) for name, part in zip(group, may_go, strict=True)]
        left |= {n: masks[n] & stays for n, stays in zip(group, keep_largest(ranked, count), strict=True)}
    size = {name: gradients[name].abs() for name in names}
    free = {name: ~left[name] for name in names}
    if allocation.pattern is not None:
        ranked = {name: size[name].masked_fill(left[name], math.inf) for name in names}
        barred = outside_pattern(records, ranked, *allocation.pattern)
        free = {name: free[name] & ~barred[name] for name in names}
    found = {}
    for group in groups:
        count = sum(int(masks[name].sum()) - int(left[name].sum()) for name in group)
        ranked = [(-size[name]).masked_fill(~free[name], math.inf) for name in group]
        found |= {n: left[n] | ~stays for n, stays in zip(group, keep_largest(ranked, count), strict=True)}
    return {name: found[name] for name in names}


@torch.no_grad()
def forget_moments_(state: Mapping[str, object], weight: Tensor, places: Tensor) -> None:
    """Zero what an optimizer remembers of a weight, tensors of its shape, at `places` (bool, laid out as it is)."""
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
            value.masked_fill_(places, 0.0)
