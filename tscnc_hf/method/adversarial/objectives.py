"""Training objectives: pure functions that return a dict of named scalar terms, whose sum is the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tscnc_hf.method.adversarial.pixels import LogitsFn


OBJECTIVES = ("natural", "pgd-at", "trades", "mart")


def objective_terms(
    objective: str,
    forward: LogitsFn,
    x: Tensor,
    x_adv: Tensor | None,
    y: Tensor,
    *,
    beta: float = 6.0,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    also: Callable[[Tensor, Tensor], Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """
    The terms of a named objective, batch means:
    * "natural": {"natural_loss": CE(f(x), y)};
    * "pgd-at" (Madry et al. 2018): {"robust_loss": CE(f(x_adv), y)};
    * "trades" (Zhang et al. 2019): {"natural_loss": CE(f(x), y), "robust_loss": beta * KL(f(x) || f(x_adv))};
    * "mart" (Wang et al. 2020): {"robust_loss": BCE(f(x_adv), y), "consistency_loss": beta * KL(f(x) || f(x_adv))
      (1 - p_y(x))}, where BCE adds to the cross-entropy -log(1 - p) of the likeliest wrong class (equation 8). Images
      that are wrong when clean weigh more in the second term.

    With "trades" and "mart", clean and adversarial images go through one concatenated forward, so batch-norm
    statistics are those of both; with "pgd-at" where there are terms beside it (`also`).

    Args:
        forward (`Callable`): pixels in [0, 1] (b, c, h, w) -> logits (b, k), the model in training mode.
        x, x_adv (`Tensor`): clean and adversarial pixels; `x_adv` None falls back on x (epsilon = 0).
        y (`Tensor`): labels (b,), int64.
        beta (`float`): weight of the divergence in TRADES and MART.
        weights (`Tensor`, *optional*): (b,), of the images, by which each one's part of every term is multiplied. The
            sum is divided by the number of images, not by that of the weights: micro-batches add up to their batch.
        also (`Callable`, *optional*): further terms, a function of the logits of clean and of adversarial images; with
            "natural" they are the same.

    Raises:
        ValueError: unknown objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is unknown; use one of {', '.join(OBJECTIVES)}")

    def mean(values: Tensor) -> Tensor:
        return (values if weights is None else weights * values).mean()

    def cross_entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=label_smoothing, reduction="none")

    x_adv = x if x_adv is None else x_adv
    if objective == "natural" or (objective == "pgd-at" and also is None):
        clean = adversarial = forward(x if objective == "natural" else x_adv)
    else:
        clean, adversarial = forward(torch.cat([x, x_adv])).chunk(2)
    more = {} if also is None else dict(also(clean, adversarial))
    if objective in ("natural", "pgd-at"):
        return {"natural_loss" if objective == "natural" else "robust_loss": mean(cross_entropy(adversarial))} | more
    log_clean, log_adv = F.log_softmax(clean, dim=-1), F.log_softmax(adversarial, dim=-1)
    divergence = F.kl_div(log_adv, log_clean, reduction="none", log_target=True).sum(-1)
    if objective == "trades":
        return {"natural_loss": mean(cross_entropy(clean)), "robust_loss": beta * mean(divergence)} | more
    wrong = log_adv.scatter(-1, y[:, None], -torch.inf).argmax(-1, keepdim=True)
    # log(1 - p) as a sum over the other classes: finite and with a gradient where p rounds to 1
    others = log_adv.scatter(-1, wrong, -torch.inf).logsumexp(-1)
    doubt = 1 - log_clean.gather(-1, y[:, None]).squeeze(-1).exp()
    boosted = mean(cross_entropy(adversarial) - others)
    return {"robust_loss": boosted, "consistency_loss": beta * mean(divergence * doubt)} | more
