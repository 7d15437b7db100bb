"""Copies of models, also of such that keep what they have computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def copied(model: nn.Module, memo: Mapping[int, object] | None = None) -> nn.Module:
    """
    A deep copy of a model. What its layers keep of a forward, such as an activation or a weight that was computed,
    is copied as numbers, without the graph that it came from, which `copy.deepcopy` would refuse.

    Args:
        memo (`Mapping`, *optional*): as `copy.deepcopy` takes it: id -> what stands for an object.
    """
    known = dict(memo or {})
    for module in model.modules():
        for tensor in _tensors(vars(module)):
            if not tensor.is_leaf and id(tensor) not in known:
                known[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, known)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in lists, tuples and maps inside each other, parameters and modules aside."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
