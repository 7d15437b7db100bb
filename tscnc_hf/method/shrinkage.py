"""
TSC apart from the gradient, as AdamW has weight decay apart from it (Loshchilov and Hutter 2019): after the
optimizer's step, a step of its own towards zero, which moments do not scale.

In the loss, TSC reaches a weight through the optimizer. Adam divides its small steady pull by the root of the weight's
own second moment, so that weights with small gradients are driven out at full speed. Here (ours) a weight moves by
what the learning rate and its layer's scale say.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tscnc_hf.method.sharding import local


@torch.no_grad()
def shrink_(weight: Tensor, rate: float | Tensor, scale: Tensor, a: float, spared: Tensor | None = None) -> None:
    """
    In place, w moves towards zero by rate * s * rho_a'(|w| / s) and never past it, where rho_a'(t) = (a + 1) a /
    (a + t)^2 is the slope of transformed l1 (`constraints.transformed_l1`).

    Args:
        weight (`Tensor`): any shape, floating; sharded or not, without communication.
        rate (`float` or 0-d `Tensor`): learning rate times weight of the constraint, >= 0.
        scale (`Tensor`): 0-d, s > 0, the layer's own (`constraints.weight_scales`).
        a (`float`): shape of transformed l1, > 0.
        spared (`Tensor`, *optional*): bool, as the weight is: where True it stays as it is.
    """
    weight = local(weight)
    now = weight if weight.dtype == torch.float64 else weight.float()
    scale, magnitude = scale.to(now), now.abs()
    step = (magnitude / scale).add_(a).square_().reciprocal_().mul_(rate * (a + 1) * a * scale)
    moved = magnitude.sub_(step).clamp_(min=0).mul_(now.sign()).add_(0.0)  # no negative zeros
    weight.copy_(moved if spared is None else torch.where(local(spared), now, moved))


def learning_rates(optimizer: torch.optim.Optimizer, weights: Iterable[Tensor]) -> list[float | Tensor]:
    """
    The learning rate of each weight, that of its group.

    Raises:
        ValueError: the optimizer has none for one of them.
    """
    found = {id(parameter): group.get("lr") for group in optimizer.param_groups for parameter in group["params"]}
    rates = [found.get(id(weight)) for weight in weights]
    if None in rates:
        raise ValueError(
            f"{type(optimizer).__name__} has no learning rate for {rates.count(None)} of {len(rates)} weights, and "
            "tsc_decoupled=True moves each by its own: give the optimizer all weights that are trained, each in a "
            "group with a learning rate, freeze the others (requires_grad=False), or leave tsc_decoupled out"
        )
    return rates
