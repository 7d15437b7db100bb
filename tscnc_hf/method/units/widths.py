"""The width of every layer as plain numbers, and a model made narrower by them: how a slimmed model is rebuilt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tscnc_hf.method.matrices import CONVOLUTIONS
from tscnc_hf.method.units.sites import HEAD_COUNTS


Widths = dict[str, dict[str, int]]

HEAD_CHANNELS = ("attn_dim", "all_head_size")  # of all heads together, where an attention keeps that number (timm)
# What the width of a layer is called, by its class.
_WIDTHS: tuple[tuple[type | tuple, tuple[str, ...]], ...] = (
    (nn.Linear, ("in_features", "out_features")),
    (CONVOLUTIONS, ("in_channels", "out_channels", "groups")),
    (_BatchNorm, ("num_features",)),
    (nn.Module, (*HEAD_COUNTS, *HEAD_CHANNELS)),
)


def width_names(module: nn.Module) -> tuple[str, ...]:
    """The attributes of a module that are its widths; none for most modules."""
    names = next(names for kinds, names in _WIDTHS if isinstance(module, kinds))
    return tuple(name for name in names if type(getattr(module, name, None)) is int)


def layer_widths(model: nn.Module) -> Widths:
    """The widths of every layer that has some: {layer: {attribute: number}}."""
    found = {
        name: {key: getattr(module, key) for key in width_names(module)} for name, module in model.named_modules()
    }
    return {name: widths for name, widths in found.items() if widths}


def changed_widths(before: nn.Module, after: nn.Module) -> Widths:
    """The widths of `after` that are not as they are in `before`, a model of the same modules."""
    old, new = layer_widths(before), layer_widths(after)
    changed = {
        name: {key: number for key, number in widths.items() if number != old.get(name, {}).get(key)}
        for name, widths in new.items()
    }
    return {name: widths for name, widths in changed.items() if widths}


@torch.no_grad()
def set_widths_(model: nn.Module, widths: Mapping[str, Mapping[str, int]]) -> None:
    """
    Make layers narrower, with uninitialised weights for a checkpoint to fill.

    Args:
        model (`nn.Module`): changed in place; on any device, `meta` too.
        widths (`Mapping`): as `changed_widths` gives it.

    Raises:
        ValueError: a layer that the model has not, an attribute that is no width of it, or a number that is not a
            positive integer or larger than it is now. The model is as it was then.
    """
    modules = dict(model.named_modules())
    for name, new in widths.items():
        known = width_names(modules[name]) if name in modules else None
        if not known:
            raise ValueError(f"widths of {name!r}: {type(model).__name__} has no such layer, or it has no widths")
        for key, number in new.items():
            largest = getattr(modules[name], key) if key in known else 0
            if type(number) is not int or not 0 < number <= largest:
                raise ValueError(f"{name}.{key}={number!r}: must be one of {', '.join(known)}, from 1 to {largest}")
    for name, new in widths.items():
        module = modules[name]
        for key, number in new.items():
            setattr(module, key, number)
        for key, shape in _shapes(module).items():
            replace_tensor_(module, key, getattr(module, key).new_empty(shape))


def replace_tensor_(module: nn.Module, key: str, tensor: torch.Tensor) -> None:
    """Put another tensor in the place of a parameter (trained or frozen as that is) or buffer."""
    if key in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=module._parameters[key].requires_grad)
    setattr(module, key, tensor)


def follow_shapes_(module: nn.Module) -> None:
    """Set the widths of a linear layer, convolution or batch norm to what its tensors have now."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, CONVOLUTIONS):
        if module.groups > 1:  # depthwise: the only ones that are cut
            module.groups = len(module.weight)
        module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
    elif isinstance(module, _BatchNorm):
        module.num_features = len(module.running_mean if module.weight is None else module.weight)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """What the tensors of a layer look like at its widths."""
    if isinstance(module, nn.Linear):
        first, rest = module.out_features, (module.in_features,)
    elif isinstance(module, CONVOLUTIONS):
        first, rest = module.out_channels, (module.in_channels // module.groups, *module.kernel_size)
    elif isinstance(module, _BatchNorm):
        first, rest = module.num_features, ()
    else:
        return {}
    shapes = {"weight": (first, *rest), "bias": (first,), "running_mean": (first,), "running_var": (first,)}
    return {key: shape for key, shape in shapes.items() if getattr(module, key, None) is not None}
