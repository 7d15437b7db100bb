"""
Adversaries in pixel space [0, 1]: pure functions `(logits_fn, x, y) -> x_adv`.

`logits_fn` maps pixels (b, c, h, w) to float32 logits (b, k) with the normalisation inside and the model in evaluation
mode (`pixels.attack_mode`). Gradients are taken with respect to the pixels only; parameters collect none. Randomness
comes from the generator given (a `PlacedNoise` will do), never from torch's global one.
APGD is in `apgd`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tscnc_hf.method.adversarial.attack_losses import cross_entropy, margin, pixel_gradient
from tscnc_hf.method.adversarial.ball import check_norm, project, steepest
from tscnc_hf.method.adversarial.ball import random_start as uniform_start
from tscnc_hf.method.adversarial.noise import Noise, normal_like
from tscnc_hf.method.adversarial.noise import seeded_generator as seeded_generator
from tscnc_hf.method.adversarial.pixels import LogitsFn


ADVERSARIES = ("none", "fgsm-rs", "n-fgsm", "pgd", "cw-pgd", "kl-pgd", "mixed")


def _ascend(
    logits_fn: LogitsFn,
    loss: Callable[[Tensor, Tensor], Tensor],
    target: Tensor,
    start: Tensor,
    x: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    norm: str,
    early_stop: bool = False,
) -> Tensor:
    """
    Steepest ascent on `loss(logits, target)` (b,) inside the epsilon ball around x and inside [0, 1]. With
    `early_stop` the targets are labels, and an image stays as it is from its first misclassified iterate on.
    """
    x_adv = start.detach()
    if norm == "linf" and not early_stop:  # in place: this loop is most of the time that training takes
        lower, upper = (x - epsilon).clamp_(min=0), (x + epsilon).clamp_(max=1)
        for _ in range(steps):
            gradient, _, _ = pixel_gradient(logits_fn, lambda z: loss(z, target), x_adv)
            x_adv = torch.add(x_adv, gradient.sign_(), alpha=step_size)
            torch.minimum(torch.maximum(x_adv, lower, out=x_adv), upper, out=x_adv)
        return x_adv
    x_adv, left = x_adv.clone(), torch.arange(len(x), device=x.device) if early_stop else slice(None)
    for _ in range(steps):
        now = target[left]
        gradient, _, logits = pixel_gradient(logits_fn, lambda z, now=now: loss(z, now), x_adv[left])
        if early_stop:
            right = logits.argmax(-1) == now
            left, gradient = left[right], gradient[right]
            if len(left) == 0:
                break
        moved = x_adv[left] + step_size * steepest(gradient, norm)
        x_adv[left] = project(moved, x[left], epsilon, norm)
    return x_adv


def fgsm_rs(
    logits_fn: LogitsFn, x: Tensor, y: Tensor, *, epsilon: float, step_size: float | None = None, **options
) -> Tensor:
    """
    One step from a uniform random start (FGSM-RS, Wong, Rice and Kolter 2020): arguments, options and result as in
    `pgd`, but `step_size` defaults to 1.25 epsilon, as in the paper, which is about "linf".
    """
    step_size = 1.25 * epsilon if step_size is None else step_size
    return pgd(logits_fn, x, y, epsilon=epsilon, steps=1, step_size=step_size, **options)


def n_fgsm(
    logits_fn: LogitsFn,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float | None = None,
    noise: float = 2.0,
    generator: Noise | None = None,
) -> Tensor:
    """
    N-FGSM (de Jorge et al. 2022), L-infinity: one step from stronger noise, without the projection on the epsilon ball
    that makes one-step training collapse. For training only: the result may be (1 + noise) epsilon away from x.

    Args:
        step_size (`float`, *optional*): in pixel units, defaults to epsilon.
        noise (`float`): radius of the uniform noise in units of epsilon.

    Returns:
        `Tensor`: pixels within (1 + noise) epsilon of x (noise epsilon + step_size, to be exact) and within [0, 1].
    """
    step_size = epsilon if step_size is None else step_size
    start = uniform_start(x, noise * epsilon, generator=generator)
    gradient, _, _ = pixel_gradient(logits_fn, lambda logits: cross_entropy(logits, y), start)
    return start.add_(gradient.sign_(), alpha=step_size).clamp_(0, 1)


def pgd(
    logits_fn: LogitsFn,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float | None = None,
    random_start: bool = True,
    norm: str = "linf",
    loss: str = "cross-entropy",
    early_stop: bool = False,
    start: Tensor | None = None,
    generator: Noise | None = None,
) -> Tensor:
    """
    Projected gradient descent (Madry et al. 2018).

    Args:
        x (`Tensor`): pixels (b, c, h, w) in [0, 1], float.
        y (`Tensor`): labels (b,), int64.
        epsilon (`float`): radius in pixel units.
        steps (`int`): gradient steps; 0 returns the start.
        step_size (`float`, *optional*): in pixel units, defaults to epsilon / 4.
        random_start (`bool`): start uniformly in the ball instead of at x.
        norm (`str`): "linf" (steps along the sign) or "l2" (steps along the normalised gradient).
        loss (`str`): "cross-entropy", "cw" (the margin of Carlini and Wagner) or "dlr".
        early_stop (`bool`): leave an image alone once it is misclassified. For evaluation: the count of successes is
            the same or larger, the perturbations of broken images are weaker than they could be.
        start (`Tensor`, *optional*): pixels to start from, in place of the random start.

    Returns:
        `Tensor`: pixels within epsilon of x and within [0, 1].

    Raises:
        ValueError: unknown norm or loss.
    """
    check_norm(norm)
    step_size, value_of = epsilon / 4 if step_size is None else step_size, margin(loss)
    if start is None:
        start = uniform_start(x, epsilon, norm, generator) if random_start else x.clone()
    return _ascend(logits_fn, value_of, y, start, x, epsilon, step_size, steps, norm, early_stop)


def kl_pgd(
    logits_fn: LogitsFn,
    x: Tensor,
    y: Tensor | None = None,
    *,
    epsilon: float,
    steps: int,
    step_size: float | None = None,
    norm: str = "linf",
    generator: Noise | None = None,
) -> Tensor:
    """
    The inner maximisation of TRADES (Zhang et al. 2019): PGD on KL(p(x) || p(x_adv)) from x + 0.001 N(0, 1).

    The clean prediction is computed once per call. Labels are not used. Arguments and result as in `pgd`.
    """
    check_norm(norm)
    step_size = epsilon / 4 if step_size is None else step_size
    with torch.no_grad():
        target = F.log_softmax(logits_fn(x), dim=-1)

    def divergence(logits: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(logits, dim=-1), target, reduction="none", log_target=True).sum(-1)

    start = (x + 0.001 * normal_like(x, generator)).clamp_(0, 1)
    return _ascend(logits_fn, divergence, target, start, x, epsilon, step_size, steps, norm)


def craft(
    adversary: str,
    logits_fn: LogitsFn,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float | None,
    generator: Noise,
    norm: str = "linf",
    turn: int = 0,
) -> Tensor | None:
    """
    The adversarial images of a named adversary (`ADVERSARIES`), or None for "none" and for epsilon = 0.

    "mixed" is `fgsm_rs` where `turn`, the number of a step of training, is even, and two steps of `pgd`, each of
    epsilon / 2, where it is odd (after Salmani et al. 2023, arXiv 2310.18975, who draw one of both at random for a
    batch, and send the two steps through the first half of the layers only).

    Raises:
        ValueError: unknown adversary or norm; "n-fgsm" with a norm other than L-infinity.
    """
    if adversary == "none" or epsilon == 0:
        return None
    if adversary not in ADVERSARIES:
        raise ValueError(f"adversary={adversary!r} is unknown; use one of {', '.join(ADVERSARIES)}")
    if adversary == "mixed":
        adversary, steps, step_size = ("pgd", 2, epsilon / 2) if turn % 2 else ("fgsm-rs", 1, None)
    options = {"epsilon": epsilon, "step_size": step_size, "generator": generator}
    if adversary == "n-fgsm":
        if norm != "linf":
            raise ValueError(f"adversary='n-fgsm' is defined for norm='linf', not {norm!r}; use 'fgsm-rs' or 'pgd'")
        return n_fgsm(logits_fn, x, y, **options)
    if adversary == "fgsm-rs":
        return fgsm_rs(logits_fn, x, y, norm=norm, **options)
    if adversary == "kl-pgd":
        return kl_pgd(logits_fn, x, y, steps=steps, norm=norm, **options)
    return pgd(
        logits_fn, x, y, steps=steps, norm=norm, loss="cw" if adversary == "cw-pgd" else "cross-entropy", **options
    )
