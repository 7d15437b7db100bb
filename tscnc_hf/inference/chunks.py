"""A large batch a few images at a time: what lies between layers stays in a cache, and its memory is used again."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache
from threading import Barrier
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
        apart: as many such parts at once as torch has threads, each by one of them from first layer to last, so
            that its cache holds them and no thread waits for another; what is left of a batch then by all together.
            One after another where a thread is in a state that others do not see (autocast, modes of torch).
    """

    def __init__(self, model: nn.Module, size: int, apart: bool = False):
        self.model, self.size, self.apart = model, size, apart

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.model).forward, self.model))

    @property
    def __code__(self) -> CodeType:  # torch.export says by it where a model's forward was written
        return type(self.model).forward.__code__

    def _whole(self, *args, **kwargs):
        return type(self.model).forward(self.model, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._whole(*args, **kwargs)
        lengths = {value.shape[0] if value.ndim else 0 for value in (*args, *kwargs.values()) if _is_tensor(value)}
        if len(lengths) != 1 or (n := lengths.pop()) <= self.size:
            return self._whole(*args, **kwargs)
        parts = [slice(start, min(n, start + self.size)) for start in range(0, n, self.size)]

        def run(part: slice):
            given = [value[part] if _is_tensor(value) else value for value in args]
            named = {name: value[part] if _is_tensor(value) else value for name, value in kwargs.items()}
            return self._whole(*given, **named)

        threads = torch.get_num_threads() if self.apart and not _is_watched() else 1
        at_once = len(parts) // threads * threads if threads > 1 else 0
        if threads > 1 and at_once < len(parts):
            parts = [*parts[:at_once], slice(at_once * self.size, n)]
        outputs = _in_threads(run, parts[:at_once], threads)
        for part in parts[at_once:]:
            if outputs and not _can_be_joined(outputs[-1], self.size):
                break
            outputs.append(run(part))
        joinable = all(_can_be_joined(o, p.stop - p.start) for o, p in zip(outputs, parts, strict=False))
        return _joined(outputs) if joinable else self._whole(*args, **kwargs)


def _is_watched() -> bool:
    """Whether this thread, and no other, has set something that changes or records what torch does."""
    modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    return modes > 0 or torch.is_autocast_enabled("cpu")


def _in_threads(run: Callable[[slice], object], parts: list[slice], threads: int) -> list:
    if not parts:
        return []
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def alone(part: slice):
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return run(part)

    contexts = [copy_context() for _ in parts]
    return list(_pool(threads).map(lambda context, part: context.run(alone, part), contexts, parts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for each of which torch has one thread. They stay: a new one would have to find its memory anew."""
    pool, ready = ThreadPoolExecutor(threads, "tscnc"), Barrier(threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # the first call in a thread takes over what others have set
        torch.set_num_threads(1)
        ready.wait()

    for _ in range(threads):
        pool.submit(begin)
    ready.wait()
    torch.set_num_threads(threads)  # what threads of others begin with was set, too
    return pool


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_pool.cache_clear)  # which has no threads but its first


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """With so many threads of torch, in the calling thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
