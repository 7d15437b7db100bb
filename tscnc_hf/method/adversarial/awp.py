"""Adversarial weight perturbation (AWP, Wu, Xia and Wang 2020): train where the weights, too, are at their worst."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call


def perturbation(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], gamma: float) -> dict[str, Tensor]:
    """
    gamma * |w| * g / |g| for each weight tensor w with gradient g, Frobenius norms (equation 10 of the paper, one
    step); zero where w is, so that pruned weights stay pruned, and where g vanishes.
    """
    moved = {}
    for name, weight in weights.items():
        direction = gradients[name] * (weight != 0)
        length = torch.linalg.vector_norm(direction)
        scale = gamma * torch.linalg.vector_norm(weight) / length.clamp(min=torch.finfo(weight.dtype).tiny)
        moved[name] = (direction * scale).detach()
    return moved


def perturbed_model(
    model: nn.Module,
    loss_of: Callable[[Callable], Tensor],
    weights: Mapping[str, Tensor],
    gamma: float,
    *,
    inner: nn.Module | None = None,
    average: Callable[[Tensor], Tensor] | None = None,
) -> Callable:
    """
    A model as a function whose weights have been moved uphill on a loss. Gradients reach the model's own weights,
    which stay where they are: nothing has to be taken back afterwards. Costs one forward and one backward more.

    Args:
        model (`nn.Module`): what the result calls; may be a wrapper (DistributedDataParallel, compiled) of `inner`.
        loss_of (`Callable`): a function like the model -> scalar loss, on the batch at hand. Statistics of batch norm
            are not updated by it.
        weights (`Mapping[str, Tensor]`): the parameters to move, any names.
        gamma (`float`): length of the move, in units of each weight's norm; 5e-3 to 1e-2 in the paper.
        inner (`nn.Module`, *optional*): the unwrapped model, on which the direction is found.
        average (`Callable`, *optional*): mean of a tensor over processes, so that all move alike.
    """
    inner = model if inner is None else inner
    buffers = {name: buffer.clone() for name, buffer in inner.named_buffers()}
    with torch.enable_grad():
        loss = loss_of(lambda *inputs: functional_call(inner, buffers, inputs))
        found = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    gradients = dict(zip(weights, found, strict=True))
    if average is not None:
        gradients = {name: average(gradient) for name, gradient in gradients.items()}
    move = perturbation(weights, gradients, gamma)
    by_identity = {id(weight): move[name] for name, weight in weights.items()}
    moved = {
        name: parameter + by_identity[id(parameter)]
        for name, parameter in model.named_parameters()
        if id(parameter) in by_identity
    }
    return lambda *inputs: functional_call(model, moved, inputs)
