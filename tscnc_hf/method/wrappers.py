"""Modules around a model that put a word before the names of its weights: compiled, for several processes or GPUs."""

from __future__ import annotations

from torch import nn


COMPILED = "_orig_mod"  # where torch.compile keeps the module
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, in any order; or itself."""
    while True:
        if COMPILED in model._modules:
            model = model._modules[COMPILED]
        elif isinstance(model, WRAPPERS):
            model = model.module
        else:
            return model


def unwrap_(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """
    The model without wrappers around it or around any module in it, where what was inside takes their place.

    Returns:
        The model, and the names of what was wrapped ("" for the whole model).
    """
    names = [""] if unwrapped(model) is not model else []
    model = unwrapped(model)
    for name, module in list(model.named_modules()):
        for key, child in module._modules.items():
            if child is not None and unwrapped(child) is not child:
                module._modules[key] = unwrapped(child)
                names.append(f"{name}.{key}" if name else key)
    return model, names
