"""A large batch a few images at a time: what lies between layers stays in a cache, and its memory is used again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import CodeType, MethodType

import torch
from torch import Tensor, nn


class InChunks:
    """
    In the place of a model's `forward`: that of its class, called for `size` images at a time, and what it returns put
    together. At once where that cannot be done (images are not the first dimension of all that comes in and goes out,
    as of a loss) and while the model is traced.

    Args:
        model: whose `forward` it becomes.
        size: images at a time.
    """

    def __init__(self, model: nn.Module, size: int):
        self.model, self.size = model, size

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.model).forward, self.model))

    @property
    def __code__(self) -> CodeType:  # torch.export says by it where a model's forward was written
        return type(self.model).forward.__code__

    def _whole(self, *args, **kwargs):
        return type(self.model).forward(self.model, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        lengths = {value.shape[0] if value.ndim else 0 for value in (*args, *kwargs.values()) if _is_tensor(value)}
        if torch.compiler.is_compiling() or len(lengths) != 1 or (n := lengths.pop()) <= self.size:
            return self._whole(*args, **kwargs)
        outputs = []
        for start in range(0, n, self.size):
            part = slice(start, min(n, start + self.size))
            given = [value[part] if _is_tensor(value) else value for value in args]
            named = {name: value[part] if _is_tensor(value) else value for name, value in kwargs.items()}
            outputs.append(self._whole(*given, **named))
            if not _can_be_joined(outputs[-1], part.stop - part.start):
                return self._whole(*args, **kwargs)
        return _joined(outputs)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _can_be_joined(output: object, images: int) -> bool:
    if isinstance(output, Tensor):
        return output.ndim > 0 and output.shape[0] == images
    if isinstance(output, Mapping):
        return all(_can_be_joined(value, images) for value in output.values())
    if isinstance(output, (tuple, list)):
        return all(_can_be_joined(value, images) for value in output)
    return output is None


def _joined(outputs: Sequence):
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, Mapping):
        return type(first)({name: _joined([output[name] for output in outputs]) for name in first})
    if isinstance(first, (tuple, list)):
        joined = [_joined(values) for values in zip(*outputs, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    return first
