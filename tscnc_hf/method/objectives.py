"""Training objectives: each a pure function that returns a dict of named scalar terms, whose sum is the loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tscnc_hf.method.pixels import LogitsFn


OBJECTIVES = ("natural", "pgd-at", "trades")


def natural(forward: LogitsFn, x: Tensor, y: Tensor, label_smoothing: float = 0.0) -> dict[str, Tensor]:
    """Cross-entropy on the clean images: {"natural_loss"}."""
    return {"natural_loss": F.cross_entropy(forward(x), y, label_smoothing=label_smoothing)}


def pgd_at(forward: LogitsFn, x_adv: Tensor, y: Tensor, label_smoothing: float = 0.0) -> dict[str, Tensor]:
    """Cross-entropy on the adversarial images only (Madry et al. 2018): {"robust_loss"}."""
    return {"robust_loss": F.cross_entropy(forward(x_adv), y, label_smoothing=label_smoothing)}


def trades(
    forward: LogitsFn, x: Tensor, x_adv: Tensor, y: Tensor, beta: float, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """
    TRADES (Zhang et al. 2019): {"natural_loss": CE(f(x), y), "robust_loss": beta * KL(f(x) || f(x_adv))}, batch means.

    Clean and adversarial images go through one concatenated forward, so batch-norm statistics are those of both.
    """
    clean, adversarial = forward(torch.cat([x, x_adv])).chunk(2)
    divergence = F.kl_div(
        F.log_softmax(adversarial, dim=-1), F.log_softmax(clean, dim=-1), reduction="batchmean", log_target=True
    )
    return {
        "natural_loss": F.cross_entropy(clean, y, label_smoothing=label_smoothing),
        "robust_loss": beta * divergence,
    }


def objective_terms(
    objective: str,
    forward: LogitsFn,
    x: Tensor,
    x_adv: Tensor | None,
    y: Tensor,
    *,
    beta: float = 6.0,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """
    The terms of a named objective (`OBJECTIVES`).

    Args:
        forward (`Callable`): pixels in [0, 1] (b, c, h, w) -> logits (b, k), the model in training mode.
        x, x_adv (`Tensor`): clean and adversarial pixels; `x_adv` None falls back on x (epsilon = 0).
        y (`Tensor`): labels (b,), int64.
        beta (`float`): weight of the robust term of TRADES.
    """
    if objective == "natural":
        return natural(forward, x, y, label_smoothing)
    x_adv = x if x_adv is None else x_adv
    if objective == "pgd-at":
        return pgd_at(forward, x_adv, y, label_smoothing)
    if objective == "trades":
        return trades(forward, x, x_adv, y, beta, label_smoothing)
    raise ValueError(f"objective={objective!r} is unknown; use one of {', '.join(OBJECTIVES)}")
