"""Where a weight stands in a model: in several layers where it is tied, in several places where a layer is reused."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from tscnc_hf.method.matrices import WeightMatrix, full_name, weight_matrices
from tscnc_hf.method.weight_use import why_computed
from tscnc_hf.method.wrappers import unwrapped


def weight_places(model: nn.Module) -> Iterator[tuple[WeightMatrix, dict[nn.Module, list[str]]]]:
    """
    The records of `weight_matrices`, each with the layers that multiply with its weight (its own first) -> the names
    that the weight has there.
    """
    owners: dict[int, dict[nn.Module, list[str]]] = {}
    for name, module in unwrapped(model).named_modules(remove_duplicate=False):
        for parameter, weight in module._parameters.items():
            owners.setdefault(id(weight), {}).setdefault(module, []).append(full_name(name, parameter))
    for record in weight_matrices(model):
        found = owners[id(record.weight)]
        others = {module: names for module, names in found.items() if _multiplies(module, record)}
        yield record, {record.module: found[record.module]} | others


def _multiplies(module: nn.Module, record: WeightMatrix) -> bool:
    """Not an embedding, which looks a row up."""
    plain = isinstance(module, (nn.Linear, _ConvNd)) and not why_computed(module)
    return plain or type(module) is type(record.module)
