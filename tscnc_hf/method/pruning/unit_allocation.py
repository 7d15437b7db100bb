"""Which whole channels, hidden units and attention heads are zero: what `slim` can then cut out for good."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tscnc_hf.method.matrices import WeightMatrix
from tscnc_hf.method.pruning.layer_rates import near_threshold
from tscnc_hf.method.units.groups import KINDS, StructureGroup, structure_groups
from tscnc_hf.method.units.slimming import why_not_cut


logger = logging.getLogger(__name__)

UNIT_SCOPES = ("global", "uniform", "learned")


@dataclass(frozen=True)
class UnitAllocation:
    """
    The counterpart of `Allocation` for whole units. A unit's score is the root mean square of the scores of all its
    weights, those that make it and those that read it; their mean where some scores are negative, as those of the
    criterion "movement" are, of which it is then that of a factor of all these weights. The best unit of every group
    always stays.

    Attributes:
        groups: of the model that is pruned, see `unit_allocation`.
        scope: "global" ranks the units of all groups together, "uniform" takes the same fraction of each group,
            "learned" is global with learned factors (`tscnc_hf.method.pruning.layer_rates`).
    """

    groups: tuple[StructureGroup, ...]
    scope: str = "global"

    def masks(
        self,
        records: Sequence[WeightMatrix],
        scores: Mapping[str, Tensor],
        sparsity: float,
        standing: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """
        Masks with the fewest zeros that are at least round(sparsity * N), N the number of all scores: a part of a unit
        is not cut, so there can be more zeros than asked for, by less than what the last unit holds.

        Arguments and what is returned as in `Allocation.masks`. The units that `standing` weights are part of stay as
        they are.

        Raises:
            ValueError: so many zeros cannot be reached by whole units (the message has the largest sparsity that can);
                a score is NaN.
        """
        shapes = {record.name: scores[record.name] for record in records}
        total = sum(score.numel() for score in shapes.values())
        keep = [self._standing_units(group, standing or {}) for group in self.groups]
        wanted, order = round(sparsity * total), self._order(scores, standing or {})
        if wanted > (most := _zeros(self._cut(shapes, keep, order, len(order)))) and not standing:
            raise ValueError(
                f"a sparsity of {sparsity:.6g} is not reachable with whole units, one of each group kept: the largest "
                f"is {most / total:.6g} of the prunable weights, for {len(self.groups)} groups. Lower the target, or "
                'prune single weights (pruning_structure="unstructured")'
            )
        counts = range(len(order) + 1)
        wanted = min(wanted, most)  # less where what is frozen leaves no more to cut
        count = bisect_left(counts, wanted, key=lambda count: _zeros(self._cut(shapes, keep, order, count)))
        return self._cut(shapes, keep, order, count)

    def check(self, records: Sequence[WeightMatrix], target: float) -> None:
        """Raise what `masks` would raise at the target, before any training."""
        self.masks(records, {record.name: record.weight.detach().abs() for record in records}, target)

    def near(
        self, records: Sequence[WeightMatrix], scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """
        Name -> bool: the weights that come or go with the units near the threshold that scope "learned" was cut at
        (`near_threshold`).
        """
        shapes = {record.name: scores[record.name] for record in records}
        standing = {part.name: scores[part.name] for g in self.groups for part in g.weights if part.name not in masks}
        ranked = {index: torch.zeros(group.count, dtype=torch.bool) for index, group in enumerate(self.groups)}
        for index, unit in self._order(scores, standing):
            ranked[index][unit] = True
        keep = {index: self._standing_units(group, masks) for index, group in enumerate(self.groups)}
        values = {index: torch.zeros(group.count) for index, group in enumerate(self.groups)}
        near = near_threshold(values | self._unit_scores(scores, standing), keep, ranked)
        most = self._of_units(shapes, [keep[index] | near[index] for index in keep])
        least = self._of_units(shapes, [keep[index] & ~near[index] for index in keep])
        return {name: most[name] & ~least[name] & (score > -math.inf) for name, score in shapes.items()}

    def _standing_units(self, group: StructureGroup, standing: Mapping[str, Tensor]) -> Tensor:
        """Bool, (units,): which units of a group the masks that stand leave; all of a group that has none."""
        found = {part.name: standing[part.name] for part in group.weights if part.name in standing}
        return group.unit_sums(found).cpu() > 0 if found else torch.ones(group.count, dtype=torch.bool)

    def _order(self, scores: Mapping[str, Tensor], standing: Mapping[str, Tensor]) -> list[tuple[int, int]]:
        """(group, unit), the least important first, without the best unit of each group."""
        ranked = []
        for index, values in self._unit_scores(scores, standing).items():
            count = len(values)
            for place, (value, unit) in enumerate(sorted(zip(values.tolist(), range(count), strict=True))[:-1]):
                ranked.append((place / count if self.scope == "uniform" else value, index, unit))
        return [(group, unit) for _, group, unit in sorted(ranked)]

    def _unit_scores(self, scores: Mapping[str, Tensor], standing: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Index of a group -> float64 (units,), on the CPU; none of groups that have standing weights."""
        groups = {
            index: [part.name for part in group.weights]
            for index, group in enumerate(self.groups)
            if not any(part.name in standing for part in group.weights)
        }
        found, known = {}, {name: scores[name] != -math.inf for names in groups.values() for name in names}
        signed = any(bool((known[name] & (scores[name] < 0)).any()) for name in known)
        for index, names in groups.items():
            group, finite = self.groups[index], {n: scores[n].double().masked_fill(~known[n], 0.0) for n in names}
            sizes = group.unit_sums({name: torch.ones_like(score) for name, score in finite.items()})
            if signed:
                values = group.unit_sums(finite) / sizes
            else:
                values = (group.unit_sums({name: score.square() for name, score in finite.items()}) / sizes).sqrt()
            zero = group.unit_sums({name: known[name] for name in names}) == 0
            found[index] = values.masked_fill(zero, -math.inf).cpu()
            if bool(found[index].isnan().any()):
                raise ValueError("a score is NaN: weights or gradients are not finite")
        return found

    def _cut(
        self, shapes: Mapping[str, Tensor], units: list[Tensor], order: list[tuple[int, int]], count: int
    ) -> dict[str, Tensor]:
        keep = [kept.clone() for kept in units]
        for group, unit in order[:count]:
            keep[group][unit] = False
        return self._of_units(shapes, keep)

    def _of_units(self, shapes: Mapping[str, Tensor], keep: list[Tensor]) -> dict[str, Tensor]:
        """Masks of the weights that leave these units of each group."""
        masks = {name: torch.ones_like(score, dtype=torch.bool) for name, score in shapes.items()}
        for group, units in zip(self.groups, keep, strict=True):
            for name, mask in group.unit_masks(units).items():
                if name in masks:
                    masks[name] &= mask.to(masks[name].device)
        return masks


def unit_allocation(
    model: nn.Module, records: Sequence[WeightMatrix], kinds: Sequence[str] = KINDS, scope: str = "global"
) -> UnitAllocation:
    """
    The units of a model that can be pruned and then cut out: all whose weights are among `records`.

    Args:
        kinds (`Sequence[str]`): of "channels", "hidden", "heads".
        scope (`str`): "global", "uniform" or "learned".

    Raises:
        ValueError: unknown kind or scope, or the model has no such units.
    """
    if scope not in UNIT_SCOPES:
        raise ValueError(f"scope={scope!r} does not go with whole units; use one of {', '.join(UNIT_SCOPES)}")
    if odd := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"kind {odd[0]!r} is unknown; units are {', '.join(KINDS)}")
    names = {record.name for record in records}
    found = structure_groups(model)
    wanted = [g for g in found if g.kind in kinds and g.count > 1]
    left = {group.name: group.blocked for group in wanted if group.blocked}
    try:
        left |= why_not_cut(model, kinds) if len(left) < len(wanted) else {}
    except ValueError as error:
        logger.warning(f"whether `slim` can cut units out of the model was not tried before training: {error}")
    groups = tuple(g for g in wanted if g.name not in left and {part.name for part in g.weights} <= names)
    if left and groups:
        logger.warning(
            f"{len(left)} of {len(wanted)} groups of units are not pruned, since they cannot be cut out: "
            + "; ".join(f"{name} ({why})" for name, why in list(left.items())[:3])
        )
    if not groups:
        others = sorted({group.kind for group in found}) or ["none"]
        why = next((f"; {name}: {why}" for name, why in left.items()), "")
        raise ValueError(
            f"{type(model).__name__} has no units of kind {', '.join(kinds)} that could be pruned and then cut out; "
            f'found: {", ".join(others)}{why}. Prune single weights (pruning_structure="unstructured")'
        )
    return UnitAllocation(groups, scope)


def _zeros(masks: Mapping[str, Tensor]) -> int:
    return sum(mask.numel() - int(mask.sum()) for mask in masks.values())
