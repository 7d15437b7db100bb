"""Which weights of a network are zero: scores and a total in, masks out, exact to one weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tscnc_hf.method.matrices import WeightMatrix
from tscnc_hf.method.pruning.layer_rates import near_threshold
from tscnc_hf.method.pruning.patterns import index_view, kernel_sides, outside_pattern
from tscnc_hf.method.pruning.topk import keep_largest


SCOPES = ("global", "uniform", "erk", "learned")


@dataclass(frozen=True)
class Allocation:
    """
    How zeros are shared among the layers, and what may not become zero. No matrix is emptied whole, unless
    `layer_sparsity` says so of its layer: each keeps its best weight at least.

    Attributes:
        scope: "global" ranks all weights together; "uniform" prunes every layer alike; "erk" keeps in each layer a
            number of weights proportional to the sum of its dimensions (Erdos-Renyi-kernel, Evci et al. 2020);
            "learned" is global, with a factor for each layer that training learns (`layer_rates`).
        layer_sparsity: part of a weight's name -> fraction of zeros of that layer, in [0, 1]; the other layers share
            what is left of the total as `scope` says. While the total is less than all of these have, it is shared
            among them.
        layer_floor: fraction of its weights that every layer keeps at least, in [0, 1).
        row_floor: weights that every row of every matrix keeps at least, so that no output of a layer dies. (Rows as
            in the matrix view.)
        pattern: (n, m), at most n of m consecutive input channels (at one position of the kernel) are kept; None has
            no pattern. Until the sparsity 1 - n/m is reached only a part of the groups follows it.
    """

    scope: str = "global"
    layer_sparsity: Mapping[str, float] = field(default_factory=dict)
    layer_floor: float = 0.0
    row_floor: int = 0
    pattern: tuple[int, int] | None = None

    def __post_init__(self):
        if self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r} is unknown; use one of {', '.join(SCOPES)}")
        for name, value in self.layer_sparsity.items():
            if not 0 <= value <= 1:
                raise ValueError(f"layer_sparsity of {name!r} is {value}, a fraction of zeros lies in [0, 1]")
        if not 0 <= self.layer_floor < 1:
            raise ValueError(f"layer_floor={self.layer_floor} is outside [0, 1): a fraction of a layer's weights")
        if self.row_floor < 0:
            raise ValueError(f"row_floor={self.row_floor}: a number of weights, 0 or more")
        if self.pattern is not None:
            n, m = self.pattern
            if not 0 < n < m:
                raise ValueError(f"pattern {n}:{m} keeps {n} of {m}; n must be at least 1 and less than m")

    def masks(
        self,
        records: Sequence[WeightMatrix],
        scores: Mapping[str, Tensor],
        sparsity: float,
        standing: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """
        Masks with exactly round(sparsity * N) zeros, N the number of all scores.

        Args:
            records: the prunable weights (their views say what a row and an input channel is).
            scores: weight name -> scores of its shape, larger = more important; minus infinity is a zero that should
                stay one.
            sparsity: fraction of zeros, in [0, 1).
            standing: masks of other prunable weights, which are frozen and stay as they are. Where the own sparsities
                of layers, or the floors, leave no more to prune then, there are fewer zeros.

        Returns:
            `dict[str, Tensor]`: bool, of the scores' shapes, True = kept.

        Raises:
            ValueError: the sparsity cannot be reached with what must be kept; a pattern that does not divide the
                input channels of a layer; a name in `layer_sparsity` that no weight has.
        """
        scores = {record.name: scores[record.name] for record in records}
        sizes = {name: score.numel() for name, score in scores.items()}
        pruned = round(sparsity * sum(sizes.values()))
        barred = {} if self.pattern is None else outside_pattern(records, scores, *self.pattern)
        needed, free = self._needed(records, scores, barred), self._own(sizes)
        while True:  # ranked without them first: where no matrix is emptied, as it is by far the most often
            masks = self._ranked(records, scores, sizes, pruned, needed, barred, standing or {})
            emptied = {}
            for record in records:
                best = None if record.name in free else _best_of_emptied(record, masks[record.name], scores, barred)
                if best is not None:
                    emptied[record.name] = best | needed[record.name] if record.name in needed else best
            if not emptied:
                return masks
            needed |= emptied

    def _ranked(self, records, scores, sizes, pruned: int, needed, barred, standing) -> dict[str, Tensor]:
        """Masks with so many zeros, that keep what is needed."""
        minimum, bars = ({n: int(m[n].sum()) if n in m else 0 for n in sizes} for m in (needed, barred))
        for record in records:
            if record.name not in self._own(sizes):
                minimum[record.name] = max(minimum[record.name], _matrices(record))
        whole = pruned >= sum(bars.values())  # else only a part of the groups follows the pattern yet
        maximum = {name: size - bars[name] * whole for name, size in sizes.items()}
        masks = {}
        for names, count in self._kept(records, sizes, sum(sizes.values()) - pruned, minimum, maximum, standing):
            cut = sum(sizes[name] for name in names) - count
            first = cut >= sum(bars[name] for name in names)
            ranked = []
            for name in names:
                score = scores[name]
                if name in barred:  # what the pattern bars goes before anything else, the least important of it first
                    outside = barred[name]
                    score = _last(score, outside) if first else score.masked_fill(~outside, math.inf)
                ranked.append(score.masked_fill(needed[name], math.inf) if name in needed else score)
            masks |= dict(zip(names, keep_largest(ranked, cut), strict=True))
        return {name: masks[name] for name in sizes}

    def check(self, records: Sequence[WeightMatrix], target: float) -> None:
        """Raise what `masks` would raise at the target, before any training."""
        size = sum(record.weight.numel() for record in records)
        few = size - round(target * size) < sum(_matrices(record) for record in records)
        if not (self.layer_sparsity or self.layer_floor or self.row_floor or self.pattern or few):
            return
        generator = torch.Generator().manual_seed(0)
        scores = {record.name: torch.rand(record.weight.shape, generator=generator) for record in records}
        self.masks(records, scores, target)
        sizes = {name: score.numel() for name, score in scores.items()}
        own, total = sum(sizes[name] - kept for name, kept in self._own(sizes).items()), sum(sizes.values())
        if own > round(target * total):  # which `masks` takes for a step on the way
            raise ValueError(
                f"a sparsity of {target:.6g} is not reachable with the layers' own sparsities: the smallest is "
                f"{own / total:.6g} of the prunable weights"
            )
        if self.pattern is not None:
            n, m = self.pattern
            fixed = 1 - n / m
            if round(target * size) < round(fixed * size):
                what = f"{n}:{m}, which has {fixed:.4g} zeros: use {fixed:.4g} or more"
                raise ValueError(f"target_sparsity={target} does not give {what}")

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Layers that are ranked together: all in one ranking, or each alone as those with their own sparsity are."""
        own = [name for name in names if self._is_own(name)]
        rest = [name for name in names if name not in own]
        together = self.scope in ("global", "learned")
        return [[name] for name in own] + ([rest] if rest and together else [[name] for name in rest])

    def protected(
        self, records: Sequence[WeightMatrix], scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Name -> bool: of the kept weights (`masks`), those that the floors keep, and the best one of each matrix."""
        kept = {name: scores[name].masked_fill(~mask, -math.inf) for name, mask in masks.items()}
        floors, found = self._needed(records, kept, {}), {}
        for record in records:
            mask = masks[record.name]
            best = _best_of_emptied(record, torch.zeros_like(mask), kept, {})  # None where all scores are 0
            parts = [part for part in (best, floors.get(record.name)) if part is not None]
            found[record.name] = mask & sum(parts, torch.zeros_like(mask))
        return found

    def near(
        self, records: Sequence[WeightMatrix], scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """
        Name -> bool: the weights near the threshold of the one ranking of scope "learned" (`near_threshold`). Layers
        with their own sparsity have no part in it, nor what a pattern bars; nor, while only a part of the groups
        follows it, what it does not.
        """
        ranked = {name: torch.full_like(mask, not self._is_own(name)) for name, mask in masks.items()}
        if self.pattern is not None:
            barred = outside_pattern(records, scores, *self.pattern)
            rest = [name for name in masks if not self._is_own(name)]
            follows = sum(int((~masks[n]).sum()) for n in rest) >= sum(int(barred[n].sum()) for n in rest)
            ranked |= {name: ~barred[name] if follows else barred[name] for name in rest}
        return near_threshold(scores, masks, ranked)

    # ---- what must be kept, what may not be ----

    def _needed(self, records, scores, barred) -> dict[str, Tensor]:
        """Name -> bool mask of the weights that the floors keep."""
        needed: dict[str, Tensor] = {}
        for record in records if self.layer_floor > 0 or self.row_floor > 0 else ():
            name, score = record.name, scores[record.name]
            if name in barred:
                score = _last(score, barred[name])
            (mask,) = keep_largest([score], score.numel() - math.ceil(self.layer_floor * score.numel()))
            if self.row_floor > 0:
                index = index_view(record, score.device)
                count = min(self.row_floor, index.shape[-1])
                best = score.reshape(-1)[index].topk(count, dim=-1).indices
                flat = mask.reshape(-1)
                flat[index.gather(-1, best).reshape(-1)] = True
                mask = flat.view(mask.shape)
            needed[name] = mask & ~barred[name] if name in barred else mask
        return needed

    def _is_own(self, name: str) -> bool:
        return any(part in name for part in self.layer_sparsity)

    def _own(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """How many weights the layers keep that have sparsities of their own."""
        found = {}
        for part, share in self.layer_sparsity.items():
            found |= {name: round((1 - share) * size) for name, size in sizes.items() if part in name}
        return found

    def _kept(self, records, sizes, total: int, minimum, maximum, standing) -> list[tuple[list[str], int]]:
        """Groups of layers that are ranked together, and how many weights each group keeps."""
        fixed = self._own(sizes)
        for part in self.layer_sparsity:
            if not any(part in name for name in (*sizes, *standing)):
                raise ValueError(
                    f"layer_sparsity names {part!r}, which no prunable weight has in its name; they look like "
                    f"{', '.join(list(sizes)[:3])}"
                )
        for name, count in fixed.items():
            if not minimum[name] <= count <= maximum[name]:
                raise ValueError(
                    f"layer_sparsity of {name!r} keeps {count} weights; with the floors and the pattern it can keep "
                    f"{minimum[name]} to {maximum[name]}"
                )
        pruned, own = sum(sizes.values()) - total, {n: sizes[n] - kept for n, kept in fixed.items() if kept < sizes[n]}
        if sum(own.values()) > pruned and maximum == sizes:  # on the way to the target: a part of it each
            zeros = share_out(pruned, own, dict.fromkeys(own, 0), own)
            fixed |= {name: sizes[name] - count for name, count in zeros.items()}
        rest = [name for name in sizes if name not in fixed]
        left = total - sum(fixed.values())
        lowest, highest = (sum(bound[name] for name in rest) for bound in (minimum, maximum))
        left = min(max(left, lowest), highest) if standing else left
        if not lowest <= left <= highest:
            wanted, most, least = (1 - (total - left + kept) / sum(sizes.values()) for kept in (left, lowest, highest))
            raise ValueError(
                f"a sparsity of {wanted:.6g} is not reachable with the floors (layer_floor={self.layer_floor}, "
                f"row_floor={self.row_floor}, and one weight of each matrix) and the layers' own sparsities: the "
                f"largest is {most:.6g}, the smallest {least:.6g} of the prunable weights. Lower the target or the "
                "floors, or leave fewer layers dense"
            )
        groups = [([name], count) for name, count in fixed.items()]
        if self.scope in ("global", "learned"):
            return groups + ([(rest, left)] if rest else [])
        weights = {record.name: _erk(record) if self.scope == "erk" else sizes[record.name] for record in records}
        counts = share_out(left, {name: weights[name] for name in rest}, minimum, maximum)
        return groups + [([name], counts[name]) for name in rest]


def share_out(
    total: int, weights: Mapping[str, float], minimum: Mapping[str, int], maximum: Mapping[str, int]
) -> dict[str, int]:
    """
    Whole numbers that add up to `total`, proportional to `weights` as far as minimum and maximum allow.

    Args:
        total: between the sums of the minima and of the maxima.
        weights: name -> positive number; the keys are what is shared among.
    """

    def clipped(values: Mapping[str, float]) -> dict:
        return {name: min(max(value, minimum[name]), maximum[name]) for name, value in values.items()}

    def at(factor: float) -> dict[str, float]:
        return clipped({name: factor * weight for name, weight in weights.items()})

    low, high = 0.0, max((maximum[name] / weight for name, weight in weights.items()), default=0.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle).values()) < total else (low, middle)
    shares = at(high)
    counts = clipped({name: math.floor(value) for name, value in shares.items()})
    order = sorted(counts, key=lambda name: counts[name] - shares[name])
    while (missing := total - sum(counts.values())) != 0:
        step = 1 if missing > 0 else -1
        for name in order if step > 0 else reversed(order):
            if minimum[name] <= counts[name] + step <= maximum[name] and missing != 0:
                counts[name] += step
                missing -= step
    return counts


def _last(score: Tensor, barred: Tensor) -> Tensor:
    """Scores with what is barred below all else, also below what has minus infinity."""
    return score.clamp(min=torch.finfo(score.dtype).min).masked_fill(barred, -math.inf)


def _matrices(record: WeightMatrix) -> int:
    """How many a weight holds that are not to be emptied; rows and columns of a grouped layer are none."""
    b, rows, columns = record.view(torch.empty(record.weight.shape, device="meta")).shape
    return b if min(rows, columns) > 1 else 1


def _best_of_emptied(record: WeightMatrix, mask: Tensor, scores, barred) -> Tensor | None:
    """
    A mask of the best weight of each matrix of which nothing is kept, None where there is no such matrix. One whose
    scores are all 0, or all minus infinity, is empty already, and stays so.
    """
    score, whole = scores[record.name], _matrices(record) == 1

    def matrices(values: Tensor) -> Tensor:
        return values.reshape(1, -1) if whole else record.view(values).flatten(1)

    empty = ~matrices(mask).any(dim=-1)
    if not empty.any() or not (empty := empty & matrices(score).any(-1) & (matrices(score) > -math.inf).any(-1)).any():
        return None
    index = matrices(torch.arange(score.numel(), device=score.device).view(score.shape))
    if record.name in barred:
        score = _last(score, barred[record.name])
    best = index.gather(-1, matrices(score).argmax(dim=-1, keepdim=True))[empty]
    found = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    found[best.flatten()] = True
    return found.view(score.shape)


def _erk(record: WeightMatrix) -> float:
    """Sum of the dimensions of a layer: outputs, inputs, sides of the kernel."""
    b, rows, columns = record.view(torch.empty(record.weight.shape, device="meta")).shape
    kernel = kernel_sides(record)
    return b * rows + columns // math.prod(kernel) + sum(kernel)
