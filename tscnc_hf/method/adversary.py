"""
Adversaries in pixel space [0, 1], L-infinity: pure functions `(logits_fn, x, y) -> x_adv`.

`logits_fn` maps pixels (b, c, h, w) to logits (b, k) with the normalisation inside and the model in evaluation mode
(`tscnc_hf.method.pixels.attack_mode`). Gradients are taken with respect to the pixels only; parameters collect none.
Randomness comes from the generator given, never from torch's global one.
"""

from __future__ import annotations

import hashlib
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tscnc_hf.method.pixels import LogitsFn


ADVERSARIES = ("none", "fgsm-rs", "pgd", "kl-pgd")


def seeded_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator on `device` seeded from the whole key, e.g. (seed, rank, step): no state to save or restore."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big") >> 1)


def _uniform_start(x: Tensor, epsilon: float, generator: torch.Generator | None) -> Tensor:
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return (x + (2 * noise - 1) * epsilon).clamp_(0, 1)


def _ascend(
    logits_fn: LogitsFn, loss, start: Tensor, x: Tensor, epsilon: float, step_size: float, steps: int
) -> Tensor:
    """Signed gradient ascent on `loss(logits)` inside the epsilon ball around x and inside [0, 1]."""
    lower, upper = (x - epsilon).clamp_(min=0), (x + epsilon).clamp_(max=1)
    x_adv = start.detach()
    for _ in range(steps):
        x_adv.requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(logits_fn(x_adv)), x_adv)
        x_adv = x_adv.detach().add_(gradient.sign_(), alpha=step_size)
        x_adv = torch.minimum(torch.maximum(x_adv, lower, out=x_adv), upper, out=x_adv)
    return x_adv.detach()


def fgsm_rs(
    logits_fn: LogitsFn,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """
    One step from a uniform random start (FGSM-RS, Wong, Rice and Kolter 2020).

    Args:
        x (`Tensor`): pixels (b, c, h, w) in [0, 1], float.
        y (`Tensor`): labels (b,), int64.
        epsilon (`float`): radius in pixel units.
        step_size (`float`, *optional*): defaults to 1.25 epsilon, as in the paper.

    Returns:
        `Tensor`: pixels within epsilon of x and within [0, 1].
    """
    start = _uniform_start(x, epsilon, generator)
    loss = partial(F.cross_entropy, target=y, reduction="sum")
    return _ascend(logits_fn, loss, start, x, epsilon, 1.25 * epsilon if step_size is None else step_size, 1)


def pgd(
    logits_fn: LogitsFn,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float | None = None,
    random_start: bool = True,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """
    Projected gradient descent on the cross-entropy (Madry et al. 2018), L-infinity.

    Args:
        x (`Tensor`): pixels (b, c, h, w) in [0, 1], float.
        y (`Tensor`): labels (b,), int64.
        epsilon (`float`): radius in pixel units.
        steps (`int`): gradient steps; 0 returns the start.
        step_size (`float`, *optional*): in pixel units, defaults to epsilon / 4.
        random_start (`bool`): start uniformly in the ball instead of at x.
        restarts (`int`): independent runs; per image the one with the largest loss is kept.

    Returns:
        `Tensor`: pixels within epsilon of x and within [0, 1].
    """
    step_size = epsilon / 4 if step_size is None else step_size
    loss = partial(F.cross_entropy, target=y, reduction="sum")
    best, best_loss = None, None
    for _ in range(restarts):
        start = _uniform_start(x, epsilon, generator) if random_start else x.clone()
        x_adv = _ascend(logits_fn, loss, start, x, epsilon, step_size, steps)
        if restarts == 1:
            return x_adv
        with torch.no_grad():
            value = F.cross_entropy(logits_fn(x_adv), y, reduction="none")
        if best is None:
            best, best_loss = x_adv, value
        else:
            better = value > best_loss
            best = torch.where(better[:, None, None, None], x_adv, best)
            best_loss = torch.where(better, value, best_loss)
    return best


def kl_pgd(
    logits_fn: LogitsFn,
    x: Tensor,
    y: Tensor | None = None,
    *,
    epsilon: float,
    steps: int,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """
    The inner maximisation of TRADES (Zhang et al. 2019): PGD on KL(p(x) || p(x_adv)) from x + 0.001 N(0, 1).

    The clean prediction is computed once per call. Labels are not used. Arguments and result as in `pgd`.
    """
    step_size = epsilon / 4 if step_size is None else step_size
    with torch.no_grad():
        target = F.log_softmax(logits_fn(x), dim=-1)

    def loss(logits: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(logits, dim=-1), target, reduction="sum", log_target=True)

    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return _ascend(logits_fn, loss, (x + 0.001 * noise).clamp_(0, 1), x, epsilon, step_size, steps)


def craft(
    adversary: str,
    logits_fn: LogitsFn,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float | None,
    generator: torch.Generator,
) -> Tensor | None:
    """The adversarial images of a named adversary (`ADVERSARIES`), or None for "none" and for epsilon = 0."""
    if adversary == "none" or epsilon == 0:
        return None
    if adversary == "fgsm-rs":
        return fgsm_rs(logits_fn, x, y, epsilon=epsilon, step_size=step_size, generator=generator)
    attacks = {"pgd": pgd, "kl-pgd": kl_pgd}
    if adversary not in attacks:
        raise ValueError(f"adversary={adversary!r} is unknown; use one of {', '.join(ADVERSARIES)}")
    return attacks[adversary](logits_fn, x, y, epsilon=epsilon, steps=steps, step_size=step_size, generator=generator)
