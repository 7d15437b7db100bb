"""Residual sums, and the activations after them, computed by the sparse layer before them: the one thing for which the
code of a block has to be read. torch.fx does; a block that it cannot read stays as it is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch import fx, nn

from tscnc_hf.inference.following import activation_of, is_plain
from tscnc_hf.inference.layers import SparseConv, SparseLinear


MOST_LAYERS = 8  # sparse layers in a block: what has more is a stage or a whole network
SUMS = (operator.add, operator.iadd, torch.add)


class _Reader(fx.Tracer):
    """Goes into modules that hold sparse layers, and takes all others as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = (module for module in m.modules() if module is not m)
        return isinstance(m, fx.GraphModule) or not any(isinstance(module, _SPARSE) for module in inside)


_SPARSE = (SparseConv, SparseLinear)


def fuse_residuals(model: nn.Module) -> int:
    """
    Replace, in place, each block of `model` that adds something to the output of one of its sparse layers by one in
    which the layer does.

    Returns:
        How many sums were.
    """
    fused = 0
    for parent, name, block in list(_blocks(model)):
        try:
            graph = _Reader().trace(block)
        except Exception:  # what fx cannot read: it may raise anything
            continue
        if found := sum(_fuse(block, graph, node) for node in list(graph.nodes)):
            graph.lint()
            made = fx.GraphModule(block, graph, type(block).__name__)
            for key, value in vars(block).items():  # what others may ask a block for
                if key not in vars(made) and not key.startswith("_"):
                    setattr(made, key, value)
            setattr(parent, name, made)
            fused += found
    return fused


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name in it, block), inner blocks first."""
    for parent in reversed(list(model.modules())):
        for name, block in parent.named_children():
            layers = sum(isinstance(module, _SPARSE) for module in block.modules())
            if 0 < layers <= MOST_LAYERS and not isinstance(block, _SPARSE):
                yield parent, name, block


def _fuse(block: nn.Module, graph: fx.Graph, node: fx.Node) -> bool:
    """Whether `node` is a sum of two tensors, one a sparse layer's, and was fused into the layer."""
    if node.op != "call_function" or node.target not in SUMS or len(node.args) != 2 or node.kwargs:
        return False
    for term, other in (node.args, node.args[::-1]):
        if not isinstance(term, fx.Node) or not isinstance(other, fx.Node) or term is other:
            continue
        between, layer_node = [], term
        while len(layer_node.users) == 1 and _module(block, layer_node, _does_nothing) is not None:
            between.append(layer_node)
            layer_node = layer_node.args[0]
        layer = _module(block, layer_node, lambda m: isinstance(m, _SPARSE))
        plain = (
            layer is not None and layer.activation == "none" and len(layer_node.args) == 1 and not layer_node.kwargs
        )
        if not plain or len(layer_node.users) != 1 or _uses(graph, layer_node) != 1:
            continue
        with graph.inserting_before(node):
            call = graph.call_module(layer_node.target, layer_node.args, {"residual": other})
        last = node
        if len(node.users) == 1:
            after = next(iter(node.users))
            module = _module(block, after, is_plain)
            function = activation_of(module) if module is not None else None
            if function not in (None, "none"):
                layer.activation, last = function, after
        last.replace_all_uses_with(call)
        for old in dict.fromkeys((last, node, *between, layer_node)):
            graph.erase_node(old)
        return True
    return False


def _does_nothing(module: nn.Module) -> bool:
    return is_plain(module) and activation_of(module) == "none"


def _module(block: nn.Module, node: object, kind: Callable[[nn.Module], bool]) -> nn.Module | None:
    """The module that a node calls, if it is of that kind."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = block.get_submodule(node.target)
    return module if kind(module) else None


def _uses(graph: fx.Graph, node: fx.Node) -> int:
    return sum(other.op == "call_module" and other.target == node.target for other in graph.nodes)
