"""What needs the code of a block to be read: residual sums, and the activations after them, computed by the layer
before them; two convolutions as one; attention. torch.fx reads it; a block that it cannot read stays as it is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn

from tscnc_hf.inference.attention import attention
from tscnc_hf.inference.following import activation_of, is_plain, is_watched
from tscnc_hf.inference.layers import (
    Absorbed,
    SparseChain,
    SparseConv,
    SparseConvBlock,
    SparseConvImages,
    SparseConvPixels,
    SparseLinear,
    SparseMLP,
)


MOST_LAYERS = 8  # sparse layers in a block: what has more is a stage or a whole network
ONLY_ATTENTION = "tscnc_only_attention"  # of a graph module: what is in it may still be fused with what is around it
SUMS = (operator.add, operator.iadd, torch.add)


class _Reader(fx.Tracer):
    """Goes into modules that hold sparse layers, and takes all others as they are, and those that are watched."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = (module for module in m.modules() if module is not m)
        whole = isinstance(m, _SPARSE) or (isinstance(m, fx.GraphModule) and not m.meta.get(ONLY_ATTENTION))
        return whole or is_watched(m) or not any(isinstance(module, _SPARSE) for module in inside)


_SPARSE = (SparseConv, SparseLinear, SparseConvBlock, SparseMLP)

Pair = Callable[[str, str], SparseConvBlock | None]


def fuse_blocks(model: nn.Module, pair: Pair) -> int:
    """
    Replace, in place, each block of `model` that adds something to the output of one of its sparse layers, normalises
    the input of one, has two convolutions after one another, or attention, by one in which these are one call, and
    attention is `attention`.

    Args:
        pair: from the names of two convolutions to the layer that takes their place, or None where that does not pay.

    Returns:
        How many calls became part of another, or another.
    """
    fused = 0
    for path, parent, name, block in list(_blocks(model)):
        try:
            graph = _Reader(autowrap_functions=(attention,)).trace(block)
        except Exception:  # what fx cannot read: it may raise anything
            continue
        sums = sum(_fuse_sum(block, graph, node) for node in list(graph.nodes))
        sums += sum(_fuse_norm(block, graph, node) for node in list(graph.nodes))
        attentions = [n for n in graph.nodes if n.target in (F.scaled_dot_product_attention, attention)]
        for node in attentions:
            node.target = attention
        found = sums + len(attentions)
        absorbed = {}
        for node in list(graph.nodes):
            absorbed |= _fuse_pair(block, graph, node, lambda one, two, path=path: pair(path + one, path + two))
        steps = _steps(block, graph)
        if found or absorbed or steps:
            for node in list(graph.nodes):
                if _module(block, node, _does_nothing) is not None:
                    node.replace_all_uses_with(node.args[0])
                    graph.erase_node(node)
            graph.lint()
            if steps:
                made = SparseChain(block, steps, next(iter(graph.nodes)).target)
            else:
                made = fx.GraphModule(block, graph, type(block).__name__)
            if not sums and not absorbed and not steps:
                made.meta[ONLY_ATTENTION] = True
            for target, layer in absorbed.items():
                made.add_submodule(target, Absorbed(layer))
            for key, value in vars(block).items():  # what others may ask a block for
                if key not in vars(made) and not key.startswith("_"):
                    setattr(made, key, value)
            setattr(parent, name, made)
            fused += found + len(absorbed)
    return fused


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(path of the names in a block, parent, name in it, block), inner blocks first."""
    for path, parent in reversed(list(model.named_modules())):
        for name, block in parent.named_children():
            layers = sum(isinstance(module, _SPARSE) for module in block.modules())
            if 0 < layers <= MOST_LAYERS and not isinstance(block, _SPARSE) and not is_watched(block):
                yield f"{path}.{name}.".lstrip("."), parent, name, block


def _fuse_sum(block: nn.Module, graph: fx.Graph, node: fx.Node) -> bool:
    """Whether `node` is a sum of two tensors, one a sparse layer's, and was fused into the layer."""
    if node.op != "call_function" or node.target not in SUMS or len(node.args) != 2 or node.kwargs:
        return False
    for term, other in (node.args, node.args[::-1]):
        if not isinstance(term, fx.Node) or not isinstance(other, fx.Node) or term is other:
            continue
        layer_node, between = _behind(block, term)
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
            if function not in (None, "none") and not isinstance(layer, SparseMLP):
                layer.activation, last = function, after
        last.replace_all_uses_with(call)
        for old in dict.fromkeys((last, node, *between, layer_node)):
            graph.erase_node(old)
        return True
    return False


def _fuse_norm(block: nn.Module, graph: fx.Graph, node: fx.Node) -> bool:
    """Whether `node` calls a layer norm whose output only one linear layer gets, and was fused into that."""
    norm = _module(block, node, _is_layer_norm)
    if norm is None or _uses(graph, node) != 1 or len(node.args) != 1 or node.kwargs:
        return False
    layers = [user for user in node.users if user.args[1:] != ("shape",) or user.target is not getattr]
    layer = _module(block, layers[0], lambda m: isinstance(m, (SparseLinear, SparseMLP))) if len(layers) == 1 else None
    layer = layer.first if isinstance(layer, SparseMLP) else layer
    if layer is None or layer.norm is not None or tuple(norm.normalized_shape) != (layer.in_features,):
        return False
    if _uses(graph, layers[0]) != 1 or layers[0].args != (node,):
        return False
    layer.normalise(norm)
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)
    return True


def _fuse_pair(block: nn.Module, graph: fx.Graph, node: fx.Node, pair: Pair) -> dict[str, nn.Module]:
    """If `node` calls a convolution of what another one returns, both become one: name of the second -> its layer."""

    def is_conv(module: nn.Module) -> bool:
        return isinstance(module, SparseConvImages)

    second = _module(block, node, is_conv)
    if second is None or second.stride != (1, 1) or _uses(graph, node) != 1 or len(node.args) != 1:
        return {}
    before, between = _behind(block, node.args[0])
    first = _module(block, before, is_conv)
    alone = first is not None and len(before.users) == 1 and _uses(graph, before) == 1
    if not alone or len(before.args) != 1 or before.kwargs or not {"residual"} >= set(node.kwargs):
        return {}
    made = pair(before.target, node.target)
    if made is None:
        return {}
    made.first.activation, made.second.activation = first.activation, second.activation
    block.set_submodule(before.target, made)
    with graph.inserting_before(node):
        call = graph.call_module(before.target, before.args, dict(node.kwargs))
    node.replace_all_uses_with(call)
    for old in (node, *between, before):
        graph.erase_node(old)
    return {node.target: second}


def _steps(block: nn.Module, graph: fx.Graph) -> list[tuple[SparseConvPixels, int, int]]:
    """What `SparseChain` takes, if the block is nothing but two or more convolutions of pixels; else none."""
    made: dict[fx.Node, int] = {}
    steps: list[tuple[SparseConvPixels, int, int]] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            if made:
                return []
            made[node] = 0
        elif node.op == "output":
            return steps if len(steps) > 1 and made.get(node.args[0]) == len(steps) else []
        elif _module(block, node, _does_nothing) is not None:
            made[node] = made[node.args[0]]
        else:
            layer = _module(block, node, lambda module: isinstance(module, SparseConvPixels))
            given = [*node.args, *node.kwargs.values()]
            if layer is None or len(node.args) != 1 or not {"residual"} >= set(node.kwargs):
                return []
            steps.append((layer, made[given[0]], made[given[1]] if len(given) > 1 else -1))
            made[node] = len(steps)
    return []


def _is_layer_norm(module: nn.Module) -> bool:
    """One of torch's, or of a class of its own that computes the same, as timm's."""
    if not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) != 1:
        return False
    x = torch.linspace(-3, 5, 2 * module.normalized_shape[0], dtype=torch.float32).view(2, -1) ** 3
    expected = F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
    try:
        with torch.no_grad():
            found = module(x)
    except Exception:  # of one that takes something else, as timm's of channels
        return False
    return isinstance(found, torch.Tensor) and found.shape == x.shape and torch.allclose(found, expected)


def _behind(block: nn.Module, node: object) -> tuple[object, list[fx.Node]]:
    """What a node gets through modules that do nothing and that nothing else uses; and these, last first."""
    between = []
    while isinstance(node, fx.Node) and len(node.users) == 1 and _module(block, node, _does_nothing) is not None:
        between.append(node)
        node = node.args[0]
    return node, between


def _does_nothing(module: nn.Module) -> bool:
    if is_watched(module):
        return False
    if type(module) is nn.Sequential:  # of what a folded batch norm leaves
        return all(_does_nothing(child) for child in module)
    return is_plain(module) and activation_of(module) == "none"


def _module(block: nn.Module, node: object, kind: Callable[[nn.Module], bool]) -> nn.Module | None:
    """The module that a node calls, if it is of that kind and nobody watches it."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = block.get_submodule(node.target)
    return module if not is_watched(module) and kind(module) else None


def _uses(graph: fx.Graph, node: fx.Node) -> int:
    return sum(other.op == "call_module" and other.target == node.target for other in graph.nodes)
