"""Gradual magnitude pruning (Zhu and Gupta 2017): a schedule, scores, exact masks, and a report of what is zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from tscnc_hf.method.matrices import WeightMatrix, full_tensor, weight_matrices


SCOPES = ("global", "layer")
CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": torch.abs}


def sparsity_at(step: int, start: int, end: int, target: float, initial: float = 0.0) -> float:
    """
    Cubic sparsity schedule (Zhu and Gupta 2017, eq. 1): a pure function of the step.

    Args:
        step, start, end (`int`): optimizer steps; pruning happens in [start, end], start <= end.
        target, initial (`float`): fractions of zeros, in [0, 1).

    Returns:
        `float`: `initial` before start, `target` from `end` on, target + (initial - target)(1 - progress)^3 between.
    """
    if step < start:
        return initial
    if step >= end:
        return target
    progress = (step - start) / (end - start)
    return target + (initial - target) * (1.0 - progress) ** 3


def keep_largest(scores: Tensor, pruned: int) -> Tensor:
    """
    Keep all but the `pruned` smallest scores, exactly; among equal scores at the threshold the first ones are kept.

    Args:
        scores (`Tensor`): (n,), floating.
        pruned (`int`): in [0, n].

    Returns:
        `Tensor`: (n,) bool, True = kept, with exactly n - pruned True.
    """
    if pruned <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if pruned >= scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(pruned).values
    keep = scores > threshold
    ties = (scores == threshold).nonzero().squeeze(-1)
    missing = scores.numel() - pruned - int(keep.sum())
    keep[ties[:missing]] = True
    return keep


def make_masks(scores: Mapping[str, Tensor], sparsity: float, scope: str = "global") -> dict[str, Tensor]:
    """
    Masks with exactly round(sparsity * n) zeros, n the number of all scores.

    Args:
        scores (`Mapping[str, Tensor]`): per weight, its shape, larger = more important.
        sparsity (`float`): fraction of zeros, in [0, 1).
        scope (`str`): "global" ranks all weights together, "layer" prunes every layer alike (the rounding remainders
            go to the layers with the largest ones, so that the total is exact too).

    Returns:
        `dict[str, Tensor]`: bool, True = kept.
    """
    sizes = {name: score.numel() for name, score in scores.items()}
    total = round(sparsity * sum(sizes.values()))
    if scope == "global":
        keep = keep_largest(torch.cat([score.reshape(-1) for score in scores.values()]), total)
        parts = keep.split(list(sizes.values()))
        return {name: part.view_as(scores[name]).clone() for name, part in zip(scores, parts, strict=True)}
    if scope == "layer":
        counts = {name: int(sparsity * size) for name, size in sizes.items()}
        by_remainder = sorted(sizes, key=lambda name: counts[name] - sparsity * sizes[name])
        for name in by_remainder[: total - sum(counts.values())]:
            counts[name] += 1
        return {name: keep_largest(score.reshape(-1), counts[name]).view_as(score) for name, score in scores.items()}
    raise ValueError(f"scope={scope!r} is unknown; use one of {', '.join(SCOPES)}")


class Pruner:
    """
    The masks of a model and what is done with them. Weights stay ordinary parameters: after `apply_` the pruned ones
    are exactly zero, so every forward, constraint and report sees the pruned network.

    Args:
        weights (`Iterable[WeightMatrix]`): the prunable weights.
        criterion (`str`): "magnitude".
        scope (`str`): "global" or "layer".
    """

    def __init__(self, weights: Iterable[WeightMatrix], criterion: str = "magnitude", scope: str = "global"):
        self.weights = {record.name: record.weight for record in weights}
        if not self.weights:
            raise ValueError("the model has nothing to prune: no Linear or convolution weight was found")
        self.score = CRITERIA[criterion]
        self.scope = scope
        self._pruned: dict[str, Tensor] = {}  # True = zero: masked_fill_ then also clears NaN and inf

    @property
    def masks(self) -> dict[str, Tensor]:
        """True = kept; empty before the first `update`."""
        return {name: ~pruned for name, pruned in self._pruned.items()}

    @property
    def prunable_count(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def pruned_count(self) -> int:
        return sum(int(pruned.sum()) for pruned in self._pruned.values())

    def target_count(self, sparsity: float) -> int:
        return round(sparsity * self.prunable_count)

    @torch.no_grad()
    def update(self, sparsity: float) -> None:
        """Choose the masks anew. A pruned weight competes with the value that the last optimizer step gave it."""
        scores = {name: self.score(full_tensor(weight).float()) for name, weight in self.weights.items()}
        self.masks_from(make_masks(scores, sparsity, self.scope))

    def masks_from(self, masks: Mapping[str, Tensor]) -> None:
        """Take given masks (bool, True = kept). ValueError when names or shapes differ from the prunable weights."""
        if masks and masks.keys() != self.weights.keys():
            odd = sorted(masks.keys() ^ self.weights.keys())
            raise ValueError(f"masks do not fit the model's prunable weights; differing names: {', '.join(odd[:5])}")
        pruned = {}
        for name, mask in masks.items():
            weight = self.weights[name]
            if mask.shape != weight.shape:
                raise ValueError(f"mask of {name} has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}")
            # laid out like the weight (channels_last!), so that masked_fill_ runs over contiguous memory
            pruned[name] = torch.empty_like(weight, dtype=torch.bool).copy_(~mask)
        self._pruned = pruned

    @torch.no_grad()
    def apply_(self) -> None:
        """Set the pruned weights to exactly zero."""
        for name, pruned in self._pruned.items():
            self.weights[name].masked_fill_(pruned, 0.0)

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Zero the gradients of pruned weights, so that clipping and moments see only what can move (frozen masks)."""
        for name, pruned in self._pruned.items():
            if (grad := self.weights[name].grad) is not None:
                grad.masked_fill_(pruned, 0.0)


@dataclass(frozen=True)
class LayerSparsity:
    """Zeros of one prunable weight; `sparsity` is the fraction of zeros."""

    name: str
    shape: tuple[int, ...]
    numel: int
    zeros: int
    sparsity: float


@dataclass(frozen=True)
class SparsityReport:
    """
    Zeros per prunable weight and in all. Fractions are fractions of zeros.

    Attributes:
        rows: one per prunable weight.
        prunable, zeros, sparsity: over the prunable weights.
        parameters, parameter_zeros, parameter_sparsity: over all parameters.
    """

    rows: tuple[LayerSparsity, ...]
    prunable: int
    zeros: int
    sparsity: float
    parameters: int
    parameter_zeros: int
    parameter_sparsity: float

    def to_dict(self) -> dict:
        return asdict(self) | {"rows": [asdict(row) | {"shape": list(row.shape)} for row in self.rows]}

    def to_markdown(self) -> str:
        lines = ["| weight | shape | zeros | sparsity |", "| --- | --- | ---: | ---: |"]
        lines += [
            f"| `{row.name}` | {' x '.join(map(str, row.shape))} | {row.zeros:,} of {row.numel:,} "
            f"| {row.sparsity:.2%} |"
            for row in self.rows
        ]
        lines.append(f"| all prunable | | {self.zeros:,} of {self.prunable:,} | {self.sparsity:.2%} |")
        lines.append(
            f"| all parameters | | {self.parameter_zeros:,} of {self.parameters:,} | {self.parameter_sparsity:.2%} |"
        )
        return "\n".join(lines)


def sparsity_report(model: nn.Module, exclude: Sequence[str] = ()) -> SparsityReport:
    """Count the exact zeros of a model, per prunable weight (see `weight_matrices`) and over all parameters."""
    rows = []
    for record in weight_matrices(model, exclude):
        weight = full_tensor(record.weight).detach()
        zeros = int((weight == 0).sum())
        rows.append(
            LayerSparsity(record.name, tuple(weight.shape), weight.numel(), zeros, zeros / max(weight.numel(), 1))
        )
    parameters = [full_tensor(parameter).detach() for parameter in model.parameters()]
    count, all_zeros = sum(p.numel() for p in parameters), sum(int((p == 0).sum()) for p in parameters)
    prunable, zeros = sum(row.numel for row in rows), sum(row.zeros for row in rows)
    return SparsityReport(
        tuple(rows), prunable, zeros, zeros / max(prunable, 1), count, all_zeros, all_zeros / max(count, 1)
    )
