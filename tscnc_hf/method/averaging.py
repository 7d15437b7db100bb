"""Exponential moving average of a model: weights, and the statistics of batch norm with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tscnc_hf.method.sharding import copy_whole_, local


class WeightAverage:
    """
    The average of what a model has been: after each step, average = decay * average + (1 - decay) * now.

    Parameters and floating-point buffers (batch-norm statistics) are averaged, integers are those of the last step.
    The decay is min(decay, (1 + step) / (10 + step)), so that the first weights are soon forgotten (as TensorFlow does
    it): a function of the step, no state.

    Args:
        model (`nn.Module`): averaged from its weights now on.
        decay (`float`): in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay} is outside (0, 1)")
        self.decay = decay
        self._first = _first_names(model)
        self.tensors = {name: tensor.detach().clone() for name, tensor in own_tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, masks: Mapping[str, Tensor] | None = None) -> None:
        """
        After optimizer step `step` (counted from 1). Where a mask (parameter name -> bool, sharded as its weight is)
        is False, it is zero.
        """
        decay, now = min(self.decay, (1 + step) / (10 + step)), own_tensors(model)
        floating = [name for name, tensor in now.items() if tensor.is_floating_point()]
        averages, values = ([local(tensors[name]) for name in floating] for tensors in (self.tensors, now))
        get_ema_multi_avg_fn(decay)(averages, values, step)
        for name in now.keys() - set(floating):
            self.tensors[name].copy_(now[name])
        for name, mask in (masks or {}).items():
            average = self.tensors[self._first[name]]
            average.mul_(mask.view_as(average)).add_(0.0)  # no negative zeros

    def copy_to_(self, model: nn.Module) -> None:
        """Give the average to the model, for good."""
        _copy_(model, self.tensors)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model is its average; afterwards it is bit for bit what it was."""
        now = {name: tensor.detach().clone() for name, tensor in own_tensors(model).items()}
        self.copy_to_(model)
        try:
            yield
        finally:
            _copy_(model, now)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """
        Take back what `tensors` was when it was saved, whole.

        Raises:
            ValueError: the names are not those of this model.
        """
        load_tensors_(self.tensors, tensors, "averages")


def load_tensors_(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str = "tensors") -> None:
    """
    Give tensors (`own_tensors` of a model, its average) other values, which are whole; `what` they are, in words.

    Raises:
        ValueError: the names are not the same.
    """
    if tensors.keys() != own.keys():
        odd = sorted(tensors.keys() ^ own.keys())
        raise ValueError(f"these are not the {what} of this model: {len(odd)} names differ, such as {odd[0]!r}")
    for name, tensor in own.items():
        copy_whole_(tensor, tensors[name])


@torch.no_grad()
def _copy_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in own_tensors(model).items():
        tensor.copy_(tensors[name])


def _first_names(model: nn.Module) -> dict[str, str]:
    """Of every name in the state dict the first one that its tensor has there: another one where it is tied."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and every persistent buffer once, by name."""
    saved, seen = model.state_dict(keep_vars=True), {}
    return {name: seen.setdefault(id(tensor), tensor) for name, tensor in saved.items() if id(tensor) not in seen}
