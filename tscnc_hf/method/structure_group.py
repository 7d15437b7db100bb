"""A set of units that are made, carried and read together, and the slices of tensors that belong to each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tscnc_hf.method.gate_sites import CONVOLUTIONS
from tscnc_hf.method.matrices import full_tensor


KINDS = ("channels", "hidden", "heads")
LAYERS = (nn.Linear, *CONVOLUTIONS)


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
        return f"{self.layer}.{self.tensor_name}" if self.layer else self.tensor_name

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
        owner (`nn.Module | None`), owner_name (`str`): the attention that counts its heads; None for other kinds.
        after (`nn.Module | None`), after_name: the batch norm that takes what the reader gives, where there is one.
        blocked (`str`): why units can be zeroed but not cut out; empty if they can.
    """

    name: str
    kind: str
    count: int
    parts: tuple[Part, ...]
    owner: nn.Module | None = None
    owner_name: str = ""
    after: nn.Module | None = None
    after_name: str = ""
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
