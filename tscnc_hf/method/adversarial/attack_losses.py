"""
What an untargeted attack raises, and its gradient. Margins are per image, larger is more wrong: logits (b, k), labels
(b,) int64 -> (b,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tscnc_hf.method.adversarial.pixels import LogitsFn


def pixel_gradient(
    logits_fn: LogitsFn, value_of: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """
    The gradient of `value_of(logits)`, per image (b,), with respect to the pixels x (b, c, h, w).

    Returns:
        gradient like x, values (b,) and logits (b, k), all detached; parameters collect no gradient.

    Raises:
        ValueError: the logits are not computed from the pixels by differentiable operations.
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = logits_fn(x)
        value = value_of(logits)
        if not value.requires_grad:
            raise ValueError(
                "the logits have no gradient with respect to the pixels (a step that is not differentiable, or "
                "torch.no_grad inside the model): attacks that follow gradients say nothing of this model; what is "
                "left are 'clean' and 'square', with masking=False"
            )
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return gradient, value.detach(), logits.detach()


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def cw_margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best wrong logit minus the right one (Carlini and Wagner 2017, f_6 without its floor): > 0 iff wrong."""
    right = y[:, None]
    return logits.scatter(-1, right, -torch.inf).amax(-1) - logits.gather(-1, right).squeeze(-1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """
    Difference of logits ratio (Croce and Hein 2020, equation 6): the margin over the gap between the largest and the
    third largest logit, unchanged when logits are scaled. Needs three classes.
    """
    if logits.shape[-1] < 3:
        raise ValueError(f"loss='dlr' needs at least 3 classes, the model has {logits.shape[-1]}; use 'cw'")
    top = logits.topk(3, dim=-1).values
    return cw_margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


MARGINS = {"cross-entropy": cross_entropy, "cw": cw_margin, "dlr": dlr}


def margin(name: str):
    """The function of that name; ValueError lists those that exist."""
    if name not in MARGINS:
        raise ValueError(f"loss={name!r} is unknown; use one of {', '.join(MARGINS)}")
    return MARGINS[name]
