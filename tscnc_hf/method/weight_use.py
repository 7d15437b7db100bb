"""
Whether a layer multiplies with its weight as it stands: tried with a small input, not read off its class.

Layers that standardise, normalise, binarise, scale or mask their weight (NFNet, BiT, weight norm, torch's pruning)
multiply with other numbers than they store: zeros, condition numbers and operations counted of the stored ones would
be of another network.
"""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


PRODUCTS = (
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "mkldnn_linear", "convolution", "_convolution",
    "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution", "_scaled_mm",
)  # fmt: skip
COPIES = ("clone", "_to_copy", "_unsafe_view", "_reshape_copy", "lift_fresh")  # of the same numbers
# how torch's own ways to compute a weight are undone: attribute that a layer has then -> advice
FOLDED_BY = {
    "parametrizations": "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
    "weight_g": "torch.nn.utils.remove_weight_norm(layer)",
    "weight_mask": "torch.nn.utils.prune.remove(layer, 'weight')",
    "weight_orig": "torch.nn.utils.remove_spectral_norm(layer)",
}

_TRIED: WeakKeyDictionary[nn.Module, tuple[int, str]] = WeakKeyDictionary()  # under which forward, and what was found


def why_computed(layer: nn.Module) -> str:
    """
    Why what a linear layer or convolution multiplies with is not the parameter `weight`; empty if it is.

    Args:
        layer (`nn.Module`): an `nn.Linear` or convolution, or derived from one. Not changed; tried once.
    """
    if "weight" not in layer._parameters:
        how = next((advice for name, advice in FOLDED_BY.items() if hasattr(layer, name)), "")
        return "computed from other parameters" + (f"; {how} makes a plain weight of it" if how else "")
    if type(layer).__module__.startswith("torch.nn.modules.") and "forward" not in vars(layer):
        return ""
    forward = id(vars(layer).get("forward"))
    if layer not in _TRIED or _TRIED[layer][0] != forward:
        if any(hasattr(parameter, "full_tensor") for parameter in layer.parameters()):
            return ""  # sharded by FSDP2, which does not let it be copied: it was tried before, by whoever trains it
        _TRIED[layer] = forward, _try(layer)
    return _TRIED[layer][1]


@torch.no_grad()
def _try(layer: nn.Module) -> str:
    kind = type(layer).__name__
    try:
        # a forward that was put in place of the layer's own belongs to the layer, not to a copy
        tried = layer if "forward" in vars(layer) else copy.deepcopy(layer).eval()
        with _Watch(tried.weight) as watch:
            tried.forward(_input(tried))
    except Exception as error:  # of code that is not ours
        return (
            f"{kind} could not be tried on a small input ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
        )
    if watch.changed_by or not watch.products:
        return f"{kind} multiplies with what it computes from its weight"
    return f"{kind} multiplies with more than its weight" if watch.others else ""


def _input(layer: nn.Module) -> Tensor:
    like = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    if isinstance(layer, nn.Linear):
        return torch.ones(2, layer.in_features, **like)
    sizes = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
    return torch.ones(2, layer.in_channels, *(d * (k - 1) + 1 + s for k, d, s in sizes), **like)


class _Watch(TorchDispatchMode):
    """
    Follows a weight through what is computed inside.

    Attributes:
        products: how many products it took part in as it is, or as a view or copy of itself.
        others: how many products it took no part in.
        changed_by: the first operation that made other numbers of it; empty if there was none.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.products, self.others, self.changed_by = 0, 0, ""
        self._same = {_memory(weight): weight}  # the tensors are kept: memory that is freed is given out again

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None):
        given = [part for part in tree_leaves((args, kwargs or {})) if isinstance(part, Tensor)]
        name = func.overloadpacket.__name__
        is_weight = any(_memory(tensor) in self._same for tensor in given)
        result = func(*args, **(kwargs or {}))
        made = [part for part in tree_leaves(result) if isinstance(part, Tensor)]
        if name in PRODUCTS:
            self.products, self.others = self.products + is_weight, self.others + (not is_weight)
        elif is_weight and made:
            views = not func._schema.is_mutable and all(_memory(tensor) in self._same for tensor in made)
            if views or name in COPIES:
                self._same |= {_memory(tensor): tensor for tensor in made}
            else:
                self.changed_by = self.changed_by or name
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
