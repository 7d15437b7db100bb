"""What an adversary may do: the ball of radius epsilon around an image, in L-infinity or L2, inside [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from tscnc_hf.method.adversarial.noise import Noise, normal_like, uniform_like


NORMS = ("linf", "l2")


def check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; use one of {', '.join(NORMS)}")


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(b,) as (b, 1, 1, ...), to be broadcast over `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def l2_norm(delta: Tensor) -> Tensor:
    """L2 norm of each image's perturbation, (b,), at least float32."""
    return torch.linalg.vector_norm(delta.flatten(1), dim=1)


def project(x_adv: Tensor, x: Tensor, epsilon: float, norm: str = "linf") -> Tensor:
    """
    The pixels next to `x_adv` within epsilon of `x` and within [0, 1]; all (b, c, h, w), float, x in [0, 1].

    For L2: on the ball first, then on the box, which only shortens a perturbation of an image in the box.
    """
    check_norm(norm)
    if norm == "linf":
        return torch.minimum(torch.maximum(x_adv, (x - epsilon).clamp_(min=0)), (x + epsilon).clamp_(max=1))
    delta = x_adv - x
    length = l2_norm(delta)
    factor = torch.where(length > epsilon, epsilon / length, torch.ones_like(length))
    return (x + delta * per_image(factor, x)).clamp_(0, 1)


def random_start(x: Tensor, epsilon: float, norm: str = "linf", generator: Noise | None = None) -> Tensor:
    """
    Pixels drawn from the ball around x: uniformly for L-infinity; for L2 with uniform direction and uniform radius,
    before the cut to [0, 1]. (Uniform in volume is next to the surface where there are many pixels, and from there the
    same steps break fewer images.)
    """
    check_norm(norm)
    if norm == "linf":
        return (x + (2 * uniform_like(x, generator) - 1) * epsilon).clamp_(0, 1)
    direction = normal_like(x, generator)
    length = l2_norm(direction)
    scale = epsilon * uniform_like(length, generator) / length.clamp_(min=torch.finfo(x.dtype).tiny)
    return (x + direction * per_image(scale, x)).clamp_(0, 1)


def steepest(gradient: Tensor, norm: str = "linf") -> Tensor:
    """The direction of steepest ascent of length 1: the sign, or the gradient over its L2 norm (zero where it is)."""
    check_norm(norm)
    if norm == "linf":
        return gradient.sign()
    # scaled first: the square of a gradient of 1e-20 is zero in float32
    largest = gradient.flatten(1).abs().amax(1)
    scaled = gradient / per_image(torch.where(largest > 0, largest, torch.ones_like(largest)), gradient)
    length = l2_norm(scaled)
    return scaled / per_image(torch.where(length > 0, length, torch.ones_like(length)), gradient)
