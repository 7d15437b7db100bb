"""Adversarial weight perturbation (AWP, Wu, Xia and Wang 2020): train where the weights, too, are at their worst."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


SMALL = 1e-15  # a gradient all of whose entries are smaller is scaled before its norm is taken


def perturbation(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], gamma: float) -> dict[str, Tensor]:
    """
    gamma * |w| * g / |g| for each weight tensor w with gradient g, Frobenius norms (equation 10 of the paper, one
    step); zero where w is, so that pruned weights stay pruned, and where g vanishes.
    """
    moved = {}
    for name, weight in weights.items():
        direction = gradients[name] * (weight != 0)
        largest = torch.linalg.vector_norm(direction, torch.inf)
        # the squares of a gradient of 1e-20 are zero in float32
        direction = direction / torch.where((largest > 0) & (largest < SMALL), largest, 1.0)
        length = torch.linalg.vector_norm(direction)
        scale = gamma * torch.linalg.vector_norm(weight) / torch.where(length > 0, length, 1.0)
        moved[name] = (direction * scale).detach()
    return moved


def weight_perturbation(
    model: nn.Module,
    loss_of: Callable[[nn.Module], Tensor],
    weights: Mapping[str, Tensor],
    gamma: float,
    *,
    average: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """
    How far to move weights uphill on a loss, see `perturbation`. Costs a forward and a backward; gradients and the
    statistics of batch norm are left as they are.

    Args:
        model (`nn.Module`): the module itself, no wrapper that averages gradients.
        loss_of (`Callable`): the model -> scalar loss, on the batch at hand.
        weights (`Mapping[str, Tensor]`): the parameters to move, any names. One that the loss does not reach stays.
        gamma (`float`): length of the move, in units of each weight's norm; 5e-3 to 1e-2 in the paper.
        average (`Callable`, *optional*): mean of a tensor over processes, so that all move alike.
    """
    # leaves of their own: backward() fills their gradients, as recomputed activations may need it (reentrant
    # checkpointing knows no torch.autograd.grad)
    leaves = {
        parameter: parameter.detach().requires_grad_(parameter.requires_grad) for parameter in model.parameters()
    }
    with torch.enable_grad(), replaced(model, leaves | {buffer: buffer.clone() for buffer in model.buffers()}):
        loss_of(model).backward()
    found = {name: leaves[weight].grad for name, weight in weights.items()}
    gradients = {n: torch.zeros_like(weights[n]) if gradient is None else gradient for n, gradient in found.items()}
    if average is not None:
        gradients = {name: average(gradient) for name, gradient in gradients.items()}
    return perturbation(weights, gradients, gamma)


@contextmanager
def moved(model: nn.Module, weights: Mapping[str, Tensor], move: Mapping[str, Tensor]) -> Iterator[None]:
    """
    Inside, the model, and whatever wraps it, computes with weights + move; gradients reach the model's own weights.
    Stay inside until the backward is over: what it recomputes (activation checkpointing) needs the same weights.
    """
    with replaced(model, {weight: weight + move[name] for name, weight in weights.items()}):
        yield


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside, modules have other tensors in the place of parameters and buffers, wherever each of them stands."""
    places = [
        (own, name, tensor)
        for module in model.modules()
        for own in (module._parameters, module._buffers)
        for name, tensor in own.items()
        if tensor is not None and tensor in tensors
    ]
    try:
        for own, name, tensor in places:
            own[name] = tensors[tensor]
        yield
    finally:
        for own, name, tensor in places:
            own[name] = tensor
