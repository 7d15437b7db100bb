"""
Whole units of a network: channels, hidden units and attention heads, and every slice of a tensor that belongs to one.

A group is a set of units that one layer makes and another reads, with nothing between that mixes them, so that a unit
can be zeroed, or cut out for good (`slimming.py`), without a trace in the rest. Found by the names and the order of
layers, as `gate_sites` finds places for gates; beyond those, chains with depthwise convolutions and squeeze-excitation
between, and the way through flattening into a classifier. Residual streams are no groups: all blocks share one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tscnc_hf.method.matrices import CONVOLUTIONS, LAYERS, computed_weights, full_name, full_tensor
from tscnc_hf.method.units.sites import HEAD_MAKERS, MIXING, PAIRS, head_site, input_channels, owners


KINDS = ("channels", "hidden", "heads")
# (maker, reader) beyond those of gates: with a depthwise convolution and squeeze-excitation between, inside
# squeeze-excitation, and timm's heads of mobile networks
CHAINS = (*PAIRS, ("conv_pw", "conv_pwl"), ("conv_exp", "conv_pwl"), ("conv_reduce", "conv_expand"))
CHAINS += (("conv_head", "classifier"),)
# Children that a network calls one after the other, as if they were one sequence (VGG of timm and of torchvision).
SEQUENCES = (("features", "pre_logits", "head"), ("features", "classifier"))
SQUEEZES = (("conv_reduce", "conv_expand"), ("fc1", "fc2"))
HIDDEN_MAKERS = ("fc1", "conv_reduce")  # of an MLP or squeeze-excitation that is written with 1x1 convolutions


def structure_groups(model: nn.Module) -> list[StructureGroup]:
    """
    The units that a model is made of, in module order: hidden units of an MLP (also of squeeze-excitation), heads of
    an attention, channels inside a residual block (basic, bottleneck, inverted) or between two layers of a sequence.

    A group whose units cannot be cut out (tied weights, a grouped convolution, an attention with other parameters for
    each head) is there too, with the reason in `blocked`.
    """
    groups: dict[str, StructureGroup] = {}
    names = {module: name for name, module in model.named_modules()}
    inside = {id(child) for m in model.modules() if isinstance(m, nn.Sequential) for child in m.children()}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        flows = [_between(module, maker, reader) for maker, reader in CHAINS if {maker, reader} <= children.keys()]
        if isinstance(module, nn.Sequential) and id(module) not in inside:
            flows.append(list(_leaves(module)))
        for keys in SEQUENCES:
            if set(keys) <= children.keys() and isinstance(children[keys[0]], nn.Sequential):
                flows.append(_in_sequence(children, keys))
        found = [group for flow in flows for group in _groups_of(flow, names)]
        groups |= {group.name: group for group in (*found, *_heads(name, module, children))}
    order = {name: index for index, name in enumerate(names.values())}
    why = _shared(model)
    made = Counter(part.name for group in groups.values() for part in group.parts if part.role == "make")
    why |= {name: f"two layers read what {name} makes" for name, times in made.items() if times > 1}
    return [
        replace(group, blocked=group.blocked or next((why[p.name] for p in group.parts if p.name in why), ""))
        for group in sorted(groups.values(), key=lambda group: order[group.name])
    ]


def _between(module: nn.Module, maker: str, reader: str) -> list[nn.Module]:
    """From maker to reader, in the order in which the children were made, and the norm behind the reader."""
    children = dict(module.named_children())
    keys = list(children)
    if keys.index(maker) > keys.index(reader):
        return []
    flow = [children[key] for key in keys[keys.index(maker) : keys.index(reader) + 1]]
    if any(isinstance(child, LAYERS) and not _is_depthwise(child) for child in flow[1:-1]):
        return []  # conv1 -> conv3 is two pairs
    behind = [children[key] for key in keys[keys.index(reader) + 1 :]][:1]
    return flow + [child for child in behind if isinstance(child, _BatchNorm)]


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of nested sequences, one after the other, as often as they stand there."""
    for child in module._modules.values():
        if isinstance(child, nn.Sequential):
            yield from _leaves(child)
        else:
            yield child


def _in_sequence(children: Mapping[str, nn.Module], keys: Iterable[str]) -> list[nn.Module]:
    flow: list[nn.Module] = []
    for key in keys:
        child = children[key]
        if key == "classifier":  # torchvision and timm flatten between the two, in a function
            flow.append(nn.Flatten())
        flow += [child] if isinstance(child, LAYERS) else _leaves(child)
    return flow


def _groups_of(flow: list[nn.Module], names: Mapping[nn.Module, str]) -> Iterator[StructureGroup]:
    """The groups in a row of modules that are called one after the other."""
    maker, between = None, []
    for index, module in enumerate(flow):
        if isinstance(module, LAYERS) and not _is_depthwise(module):
            if maker is not None:
                yield from _group(maker, between, module, flow[index + 1 : index + 2], names)
            maker, between = module, []
        else:
            between.append(module)


def _group(
    maker: nn.Module, between: list[nn.Module], reader: nn.Module, behind: list[nn.Module], names: Mapping
) -> Iterator[StructureGroup]:
    """None where the two do not belong together, or something between them mixes the units."""
    count, inputs = len(maker.weight), input_channels(reader)
    flattened = any(isinstance(module, nn.Flatten) for module in between)
    size = inputs // count if flattened and isinstance(reader, nn.Linear) else 1
    if size * count != inputs or getattr(reader, "groups", 1) != 1:
        return
    parts = _parts(names[maker], maker, "make")
    for module in between:
        found = [] if isinstance(module, nn.Flatten) else _carried(names[module], module, count)
        if found is None:
            return
        parts += found
    parts.append(Part(names[reader], reader, "weight", 1, "read", size=size))
    kind = "hidden" if isinstance(maker, nn.Linear) or names[maker].endswith(HIDDEN_MAKERS) else "channels"
    norms = [m for m in behind if isinstance(m, _BatchNorm) and m.num_features == len(reader.weight)]
    after = next((names[norm] for norm in norms if norm.running_mean is not None), None)
    grouped = getattr(maker, "groups", 1) != 1
    why = f"{names[maker]} has {maker.groups} groups of channels" if grouped else ""
    yield StructureGroup(names[reader], kind, count, tuple(parts), after=after, blocked=why)


def _parts(layer: str, module: nn.Module, role: str, blocks: int = 1, size: int = 1) -> list[Part]:
    """Everything that a module has one of for each unit."""
    keys = ("weight", "bias", "running_mean", "running_var") if isinstance(module, _BatchNorm) else ("weight", "bias")
    found = [key for key in keys if getattr(module, key, None) is not None]
    return [Part(layer, module, key, 0, role, blocks, size) for key in found]


def _carried(layer: str, module: nn.Module, count: int) -> list[Part] | None:
    """The parts of a module between maker and reader, none if it has no weights; None if it mixes the units."""
    if isinstance(module, _BatchNorm):
        return _parts(layer, module, "norm") if module.num_features == count else None
    if _is_depthwise(module):
        return _parts(layer, module, "depthwise") if module.out_channels == count else None
    for squeeze, excite in SQUEEZES:
        first, last = (getattr(module, key, None) for key in (squeeze, excite))
        if isinstance(first, LAYERS) and isinstance(last, LAYERS):
            own = sum(p.numel() for p in module.parameters())
            theirs = sum(p.numel() for layer_ in (first, last) for p in layer_.parameters())
            if input_channels(first) != count or len(last.weight) != count or own != theirs:
                return None
            reads = Part(f"{layer}.{squeeze}", first, "weight", 1, "squeeze")
            return [reads, *_parts(f"{layer}.{excite}", last, "excite")]
    if isinstance(module, MIXING) or next(module.parameters(), None) is not None:
        return None
    return []


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels


def _heads(name: str, module: nn.Module, children: Mapping[str, nn.Module]) -> Iterator[StructureGroup]:
    site = head_site(name, module, children)
    if site is None:
        return
    size, count = site.channels, site.count
    parts = []
    for key in HEAD_MAKERS:
        if (maker := children.get(key)) in site.makers:
            parts += _parts(full_name(name, key), maker, "make", len(maker.weight) // (size * count), size)
    parts.append(Part(site.name, site.reader, "weight", 1, "read", size=size))
    own = [key for key, value in module._parameters.items() if value is not None]
    known = {id(parameter) for layer in (*site.makers, site.reader) for parameter in layer.parameters()}
    for key, child in children.items():
        wide = any(id(p) not in known and p.numel() > size for p in child.parameters())
        own += [key] if wide else []  # a norm over one head at a time (q_norm) stays as it is
    why = f"{name or 'the attention'} has parameters besides its projections: {own}" if own else ""
    yield StructureGroup(site.name, "heads", count, tuple(parts), owner=name, blocked=why)


def _shared(model: nn.Module) -> dict[str, str]:
    """Tensors that belong to two layers, or to a layer that stands in two places: name -> why they stay."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    layers, found = owners(model), {}
    for layer, module in model.named_modules():
        for key in {**module._parameters, **module._buffers}:
            tensor = getattr(module, key)
            name = full_name(layer, key)
            if places[id(module)] > 1:
                found[name] = f"{layer} stands in {places[id(module)]} places"
            elif layers[id(tensor)] > 1:
                found[name] = f"{name} is tied to another weight"
        for key in getattr(module, "parametrizations", {}):
            found[full_name(layer, key)] = f"{layer}.{key} is computed from other parameters"
    return found | {name: f"{name}: {why}" for name, why in computed_weights(model).items()}


@dataclass(frozen=True)
class Part:
    """
    What of one tensor belongs to the units of a group: along `dim` the tensor is `blocks` x units x `size`.

    Attributes:
        layer (`str`): name of the module that owns the tensor.
        module (`nn.Module`): that module.
        tensor_name (`str`): "weight", "bias", "running_mean" or "running_var".
        dim (`int`): 0 for what is made, 1 for what is read.
        role (`str`): "make", "norm", "depthwise", "squeeze" (reads for a squeeze-excitation), "excite", "read".
        blocks (`int`): 3 for a fused qkv, else 1.
        size (`int`): consecutive indices a unit: the size of a head, pixels of a flattened channel, else 1.
    """

    layer: str
    module: nn.Module
    tensor_name: str
    dim: int
    role: str
    blocks: int = 1
    size: int = 1

    @property
    def name(self) -> str:
        """Of the tensor, as in `model.named_parameters()` or `named_buffers()`."""
        return full_name(self.layer, self.tensor_name)

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.tensor_name)

    @property
    def prunable(self) -> bool:
        """Whether it is the weight of a linear layer or convolution: what masks are made for."""
        return self.tensor_name == "weight" and isinstance(self.module, LAYERS)

    def by_unit(self, tensor: Tensor) -> Tensor:
        """A tensor of the part's shape -> (units, numbers a unit)."""
        front = tensor.movedim(self.dim, 0)
        return front.reshape(self.blocks, -1, self.size, front[0].numel()).transpose(0, 1).flatten(1)

    def expand(self, units: Tensor) -> Tensor:
        """(units,) -> one value for each index along `dim`, in order."""
        return units.repeat_interleave(self.size).repeat(self.blocks)


@dataclass(frozen=True)
class StructureGroup:
    """
    Units that are made, carried and read together.

    Attributes:
        name (`str`): of the layer that reads them (as `GateSite.name`).
        kind (`str`): "channels", "hidden" or "heads".
        count (`int`): number of units.
        parts (`tuple[Part, ...]`): in the order of the data flow.
        owner (`str | None`): name of the attention that counts its heads; None for other kinds.
        after (`str | None`): name of the batch norm (with statistics) that takes what the reader gives, if any.
        blocked (`str`): why units can be zeroed but not cut out; empty if they can.
    """

    name: str
    kind: str
    count: int
    parts: tuple[Part, ...]
    owner: str | None = None
    after: str | None = None
    blocked: str = ""

    @property
    def weights(self) -> tuple[Part, ...]:
        """The parts that are prunable weights: zero these of a unit and nobody reads it any more."""
        return tuple(part for part in self.parts if part.prunable)

    @property
    def reader(self) -> nn.Module:
        return self.parts[-1].module

    def unit_sums(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """
        Add up numbers of weights over each unit: its size, its score, its squared norm.

        Args:
            tensors (`Mapping[str, Tensor]`): by the weight's name, of its shape; weights that are not in it are left
                out.

        Returns:
            `Tensor`: (count,), in the dtype of the sums.

        Raises:
            ValueError: none of the group's weights is among the tensors.
        """
        sums = [part.by_unit(full_tensor(tensors[part.name])).sum(1) for part in self.weights if part.name in tensors]
        if not sums:
            names = ", ".join(part.name for part in self.weights)
            raise ValueError(f"group {self.name} has the weights {names}; none of them was given")
        return torch.stack(sums).sum(0)

    def unit_masks(self, keep: Tensor) -> dict[str, Tensor]:
        """
        The masks of weights that leave the units `keep`, bool (count,), and zero all others.

        Returns:
            `dict[str, Tensor]`: by the weight's name, bool of its shape, True = kept. A weight can belong to two
            groups, to one with what it makes and to another with what it reads: combine the masks of groups with `&`.
        """
        masks = {}
        for part in self.weights:
            weight = part.tensor
            line = part.expand(keep.to(weight.device)).view([-1 if d == part.dim else 1 for d in range(weight.ndim)])
            masks[part.name] = line.expand(weight.shape).clone()
        return masks
