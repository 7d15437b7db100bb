"""
How much a network can stretch a change of its input: an upper bound from the weights alone, a lower bound from data.

The truth lies between the two, usually far from the first (Szegedy et al. 2014, section 4.3, for the product).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from tscnc_hf.method.adversarial.attack_losses import pixel_gradient
from tscnc_hf.method.adversarial.pixels import LogitsFn
from tscnc_hf.method.matrices import computed_weights, full_tensor
from tscnc_hf.method.reports.places import weight_places
from tscnc_hf.method.reports.report import Report
from tscnc_hf.method.reports.spectrum import singular_values


@dataclass(frozen=True)
class LipschitzProduct(Report):
    """
    Attributes:
        log10: decimal logarithm of the product of `bounds`; minus infinity when a layer is all zero.
        bounds: layer -> upper bound of its operator norm (l2 to l2), of one that stands in several places once for
            each; "resize": of what the preprocessing does to the size of images, where it does something.
        unknown: layers without a bound, which count as 1.
    """

    log10: float
    bounds: dict[str, float]
    unknown: tuple[str, ...]


@torch.no_grad()
def lipschitz_product(model: nn.Module, resize_gain: float | None = None) -> LipschitzProduct:
    """
    The product of the operator norms of all layers with weights: linear, convolution, batch norm in evaluation mode.

    For a chain of such layers with 1-Lipschitz functions between them (ReLU, average pooling) this bounds the l2
    Lipschitz constant of the whole, as a function of normalised images at their own size. Residual sums, attention and
    layer norm are not in it: for such networks it compares a model with itself, before and after, and bounds nothing.
    How often a forward calls a layer is not known: it counts as often as it stands in the model, but once where its
    norm is below 1, as the forward may not call it at every place.

    A convolution's norm is at most sigma_1 of its (outputs, inputs * kernel) matrix times the square root of how often
    an input position is read, prod ceil(k / s) for kernel k and stride s (ours; the usual patch-counting argument).

    Args:
        resize_gain (*optional*): `Resize.gain` of the resize in front of the model, a factor of its own: nearest by k
            in both directions repeats each pixel k * k times and so stretches by k.
    """
    bounds = {} if resize_gain is None else {"resize": resize_gain}
    found: dict[str, float | None] = {}
    for record, layers in weight_places(model):
        for module, names in layers.items():
            found |= _at_each(names, _operator_norm_bound(module, full_tensor(record.weight)))
    unknown = (*(name for name, bound in found.items() if bound is None), *computed_weights(model))
    bounds |= {name: bound for name, bound in found.items() if bound is not None}
    norms: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm) and module.running_var is not None:
            norms.setdefault(module, []).append(name)
    for module, names in norms.items():
        factor = (module.running_var.double() + module.eps).rsqrt()
        factor = factor if module.weight is None else factor * module.weight.double().abs()
        bounds |= _at_each(names, factor.max().item())
    log10 = sum(math.log10(bound) if bound > 0 else -math.inf for bound in bounds.values())
    return LipschitzProduct(log10, bounds, unknown)


def _at_each(names: list[str], bound: float | None) -> dict[str, float | None]:
    """The bound of a layer at the places where it stands, of which a forward may call but one."""
    further = None if bound is None else max(bound, 1.0)
    return {name: further if place else bound for place, name in enumerate(names)}


def _operator_norm_bound(module: nn.Module, weight: Tensor) -> float | None:
    """None where the layer's geometry is not known: a registered layer type, a padding that repeats pixels."""
    if isinstance(module, _ConvNd):
        if module.padding_mode not in ("zeros", "circular"):
            return None
        # a transposed convolution is the adjoint of the convolution with the same weight: the same norm
        reads = 1
        for kernel, stride, dilation in zip(module.kernel_size, module.stride, module.dilation, strict=True):
            reads *= math.ceil(kernel * math.gcd(stride, dilation) / stride)
        blocks = weight.reshape(module.groups, weight.shape[0] // module.groups, -1)
        return math.sqrt(reads) * max(singular_values(block, "gram")[0].item() for block in blocks)
    return singular_values(weight, "gram")[0].item() if weight.ndim == 2 else None


def local_lipschitz(
    logits_fn: LogitsFn,
    x: Tensor,
    *,
    epsilon: float,
    steps: int = 10,
    step_size: float | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """
    Lower bound, per image, of the local Lipschitz constant max ||f(x') - f(x)||_1 / ||x' - x||_inf over the epsilon
    ball around x (Yang et al. 2020, equation 3), from projected sign ascent on ||f(x') - f(x)||_1 (ours: the largest
    ratio of all iterates is kept, so more steps never lower it).

    Args:
        logits_fn (`Callable`): pixels (b, c, h, w) -> logits (b, k), the model in evaluation mode.
        x (`Tensor`): pixels (b, c, h, w) in [0, 1], float.
        epsilon (`float`): radius of the ball, in pixel units, > 0.
        steps (`int`): gradient steps, at least 1.
        step_size (`float`, *optional*): in pixel units, defaults to epsilon / 4.
        noise (`Tensor`, *optional*): (b, c, h, w) in [0, 1], where in the ball to start; drawn uniformly by default.

    Returns:
        `Tensor`: (b,), float32, logit units per pixel unit.

    Raises:
        ValueError: epsilon is not in (0, 1], or steps below 1.
    """
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon={epsilon}: give a radius in pixel units, above 0 and at most 1, e.g. 8/255")
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one step is needed")
    step_size = epsilon / 4 if step_size is None else step_size
    x = x.detach()
    with torch.no_grad():
        clean = logits_fn(x)
    lower, upper = (x - epsilon).clamp_(min=0), (x + epsilon).clamp_(max=1)
    noise = torch.rand_like(x) if noise is None else noise
    moved = torch.clamp(x + (2 * noise - 1) * epsilon, lower, upper)
    best = torch.zeros(len(x), dtype=clean.dtype, device=x.device)

    def change(logits: Tensor) -> Tensor:
        return (logits - clean).abs().sum(-1)

    def ratio(value: Tensor) -> Tensor:
        return value / (moved - x).abs().flatten(1).amax(-1).clamp(min=torch.finfo(x.dtype).tiny)

    for _ in range(steps):
        gradient, value, _ = pixel_gradient(logits_fn, change, moved)
        best = torch.maximum(best, ratio(value))
        moved = torch.clamp(moved + step_size * gradient.sign(), lower, upper)
    with torch.no_grad():
        return torch.maximum(best, ratio(change(logits_fn(moved))))
