"""Which units of a network are exactly dead: read by nobody, or the same number whatever the input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tscnc_hf.method.adversarial.pixels import logits_of
from tscnc_hf.method.matrices import CONVOLUTIONS
from tscnc_hf.method.units.groups import Part, StructureGroup, structure_groups


CONSTANT = 1e-9  # how far a constant may vary in float64, relative to the largest input of its layer: rounding


@dataclass
class DeadUnits:
    """
    A group of units, and which of them can go.

    Attributes:
        group: the group.
        unread, constant: bool (count,), the units that nobody reads, and of the others the constant ones that can go.
        values: float64, one an input channel of the reader: what it takes from a constant unit.
        left: number of dead units that cannot go.
        why: why they cannot, or why nothing of the group can; else empty.
        keep: bool (count,), the units that stay: at first those that are not dead.
    """

    group: StructureGroup
    unread: Tensor
    constant: Tensor
    values: Tensor
    left: int
    why: str
    keep: Tensor = field(init=False)

    def __post_init__(self):
        self.keep = ~self.dead

    @property
    def dead(self) -> Tensor:
        return self.unread | self.constant


def find_dead_units(exact: nn.Module, inputs: Tensor, kinds: Iterable[str]) -> tuple[list[DeadUnits], Tensor]:
    """
    What is dead in each group: by its weights, and by what its layers take in one forward pass, which tells what a
    constant is after norms and activations that only the forward code knows.

    Args:
        exact (`nn.Module`): in float64 and evaluation mode.
        inputs (`Tensor`): float64, a batch that it takes.
        kinds (`Iterable[str]`): of the groups to look at.

    Returns:
        One `DeadUnits` a group, and the outputs (logits).

    Raises:
        ValueError: the model does not take the inputs.
    """
    groups = [group for group in structure_groups(exact) if group.kind in kinds]
    modules = {part.module: part.layer for group in groups for part in group.parts}
    hooked = {module for module in modules if module._forward_pre_hooks or module._forward_hooks}
    calls: Counter[nn.Module] = Counter()
    taken: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def watch(module: nn.Module, args: tuple) -> None:
        if args:
            calls[module] += 1
            x = args[0].movedim(-1 if isinstance(module, nn.Linear) else 1, 0).flatten(1)
            taken[module] = x.amin(1), x.amax(1)

    try:
        with ExitStack() as hooks:
            for module in modules:
                if hasattr(module, "weight"):
                    hooks.enter_context(module.register_forward_pre_hook(watch))
            outputs = logits_of(exact(inputs))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise ValueError(
            f"{type(exact).__name__} does not take inputs of shape (b, {', '.join(map(str, inputs.shape[1:]))}); pass "
            f"example_inputs, a batch that it takes ({error})"
        ) from error
    found = []
    for group in groups:
        odd = [f"{p.layer} is called {calls[p.module]} times" for p in group.parts if calls[p.module] != 1]
        odd += [f"{p.layer} has a hook" for p in group.parts if p.module in hooked]
        found.append(_dead_units(group, taken, group.blocked or next(iter(odd), "")))
    return found, outputs


def _dead_units(group: StructureGroup, taken: dict[nn.Module, tuple[Tensor, Tensor]], why: str) -> DeadUnits:
    """`why` nothing of the group can go; empty if something can."""
    unread, constant = _unread(group), _made_of_nothing(group)
    if why:
        none = torch.zeros_like(unread)
        return DeadUnits(group, none, none, none.double(), int((unread | constant).sum()), why)
    for part in group.parts:
        if part.role == "depthwise" and part.prunable:
            constant = _zero(part) | (constant & (_nought(*taken[part.module]) | _pads_nothing(part.module)))
        elif part.role == "squeeze":  # multiplies by numbers that depend on the input
            constant = constant & _nought(*taken[part.module])
    reader = group.parts[-1]
    low, high = (bound.reshape(-1, reader.size) for bound in taken[reader.module])
    constant &= (high - low <= CONSTANT * torch.maximum(high, -low).max()).all(1) & ~unread
    why = _why_not_folded(group)
    stays = constant & ~_nought(low, high).all(1) if why else torch.zeros_like(constant)
    left = int(stays.sum())
    return DeadUnits(group, unread, constant & ~stays, ((low + high) / 2).flatten(), left, why if left else "")


def _nought(low: Tensor, high: Tensor) -> Tensor:
    return (low == 0) & (high == 0)


def _unread(group: StructureGroup) -> Tensor:
    return torch.stack([_zero(part) for part in group.parts if part.role in ("read", "squeeze")]).all(0)


def _made_of_nothing(group: StructureGroup) -> Tensor:
    """Units whose maker's weights are all zero; of heads those of their values (the last block, or the last maker)."""
    made = [part for part in group.parts if part.role == "make" and part.tensor_name == "weight"][-1]
    rows = made.by_unit(made.tensor)
    return (rows[:, rows.shape[1] * (made.blocks - 1) // made.blocks :] == 0).all(1)


def _zero(part: Part) -> Tensor:
    return (part.by_unit(part.tensor) == 0).all(1)


def _pads_nothing(module: nn.Module) -> bool:
    """Whether a layer maps a constant to a constant. Subclasses of convolutions may pad in their own forward."""
    if isinstance(module, nn.Linear):
        return True
    padding = module.padding if not isinstance(module.padding, str) else (0,) * (module.padding == "valid")
    without = len(padding) > 0 and not any(padding)
    point = all(size == 1 for size in module.kernel_size) and without
    return point or (type(module) in CONVOLUTIONS and (without or module.padding_mode != "zeros"))


def _why_not_folded(group: StructureGroup) -> str:
    """Why a constant other than zero cannot be given to the reader for good; empty if it can."""
    if not _pads_nothing(group.reader):
        return f"constant but not zero, and {group.name} pads with zeros"
    if group.reader.bias is None and group.after is None:
        return f"constant but not zero, and {group.name} has no bias to add it to"
    return ""
