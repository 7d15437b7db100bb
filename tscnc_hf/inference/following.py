"""What a model does with the output of a layer, read off one forward pass: no graph of the model is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tscnc_hf.method.adversarial.folding import is_hooked


MADE_BY = "_tscnc_made_by"  # attribute of a tensor: the module that returned it, and the tensor's version then
UNSEEN = ""  # the name of whatever reads a tensor and is none of the modules that are followed


@dataclass
class Call:
    """
    A layer that one forward pass has called.

    Attributes:
        name, module: the layer.
        shape, stride: of the tensor that it was first called with.
        calls: how often.
        followed: names of the modules that got its output, in order; UNSEEN for each operation elsewhere that did.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    calls: int = 0
    followed: list[str] = field(default_factory=list)


@torch.no_grad()
def calls_of(model: nn.Module, kinds: tuple[type, ...], run) -> dict[str, Call]:
    """
    The modules of exactly these kinds that `run()`, a forward pass of `model`, calls with one tensor each, and all
    modules without weights, in the order of their first calls.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, Call] = {}
    inside: list[object] = []  # what the modules that are running now were given: they may read it

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inside.append(args[0] if args else None)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            found.pop(names[module], None)
            return
        x = args[0]
        call = found.setdefault(names[module], Call(names[module], module, tuple(x.shape), x.stride()))
        call.calls += 1
        maker, version = getattr(x, MADE_BY, (None, None))
        if maker in found and version == _version(x):  # else it was changed in place since
            found[maker].followed.append(names[module])

    def after(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        inside.pop()
        if isinstance(output, Tensor):
            setattr(output, MADE_BY, (names[module], _version(output)))

    def elsewhere(tensor: Tensor) -> None:
        maker, _ = getattr(tensor, MADE_BY, (None, None))
        if maker in found and not any(tensor is given for given in inside):
            found[maker].followed.append(UNSEEN)

    with ExitStack() as hooks:
        for module in model.modules():
            if type(module) in kinds or is_plain(module):
                hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(after, with_kwargs=True))
        hooks.enter_context(_Readers(elsewhere))
        output = run()
    for tensor in filter(torch.is_tensor, tree_leaves(output)):
        elsewhere(tensor)
    return found


class _Readers(TorchDispatchMode):
    """Calls `reads` with each tensor that an operation gets."""

    def __init__(self, reads: Callable[[Tensor], None]):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in filter(torch.is_tensor, tree_leaves((args, kwargs))):
            self.reads(tensor)
        return func(*args, **(kwargs or {}))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # those of inference mode keep none


def is_watched(module: nn.Module) -> bool:
    """Whether somebody has put a hook on it, or a forward of its own, which nothing in its place would call."""
    return is_hooked(module) or "forward" in vars(module)


def is_plain(module: nn.Module) -> bool:
    """A leaf without weights or buffers: an activation, an identity, a dropout."""
    return not any(True for _ in [*module.children(), *module.parameters(), *module.buffers()])


def activation_of(module: nn.Module) -> str | None:
    """The name among `operators.ACTIVATIONS` of what a plain module computes, found out by trying; or None."""
    far = torch.logspace(-6, 38, 500, dtype=torch.float32)  # where a cap, or a jump next to zero, shows
    x = torch.cat([torch.linspace(-9, 9, 1001, dtype=torch.float32), -far, far.new_zeros(1), far]).view(2, 7, 11, 13)
    try:
        y = module(x.clone())
    except Exception:  # of a module that takes something else
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    for name, function in {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}.items():
        if torch.allclose(y, function(x), rtol=1e-6, atol=1e-6):
            return name
    return None


def chain_after(name: str, calls: dict[str, Call]) -> Iterator[Call]:
    """The calls that follow one another, each getting the output of the one before and nothing else getting it."""
    while len(calls[name].followed) == 1 and calls[name].followed[0] in calls:
        name = calls[name].followed[0]
        if calls[name].calls != 1:
            return
        yield calls[name]
