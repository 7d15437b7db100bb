"""
Models that FSDP2 (`torch.distributed.fsdp.fully_shard`) has spread over processes: a parameter is a DTensor, of which
each process holds a part.

What gathers whole tensors is a collective: all processes call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tscnc_hf.method.matrices import full_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 manages the parameters of the model, sharded at the moment or not."""
    return next(_units(model), None) is not None


def _units(model: nn.Module) -> Iterator[nn.Module]:
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        yield from (module for module in model.modules() if isinstance(module, FSDPModule))


def reshard_(model: nn.Module) -> None:
    """
    Let every parameter be its shards again. A forward leaves some of them whole, as plain tensors in the dtype of the
    computation, and what is written into those is lost.
    """
    for unit in _units(model):
        unit.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor itself. Not differentiable."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that is the same on all processes, so that it can be computed with `like`, sharded or not."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """
    A whole tensor as `like` is: sharded alike, with the values of the first process, or in its memory format, so that
    element by element runs are fast.
    """
    if hasattr(like, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


@torch.no_grad()
def copy_whole_(target: Tensor, whole: Tensor) -> None:
    """Copy a tensor that every process has as a whole into one that may be sharded. No communication."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        whole = whole.to(target.device, target.dtype)
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)


@torch.no_grad()
def whole_state(model: nn.Module, keep: bool = True) -> dict[str, Tensor] | None:
    """
    The state dict with whole tensors on the CPU, gathered one by one; tied ones stay one. All processes take part,
    those that do not `keep` get None.
    """
    whole: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if id(tensor) not in whole:
            gathered = full_tensor(tensor.detach())
            whole[id(tensor)] = gathered.cpu() if keep else torch.empty(0)
    return {name: whole[id(tensor)] for name, tensor in state.items()} if keep else None


@torch.no_grad()
def share_buffers_(model: nn.Module) -> None:
    """Give the first process's floating-point buffers (a batch norm's statistics) to the others; all call this."""
    buffers: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffers.setdefault(buffer.dtype, []).append(buffer)
    for alike in buffers.values():
        whole = torch.cat([buffer.flatten() for buffer in alike])
        dist.broadcast(whole, src=0)
        for buffer, part in zip(alike, whole.split([buffer.numel() for buffer in alike]), strict=True):
            buffer.copy_(part.view_as(buffer))


def unsharded_class(model: nn.Module) -> type[nn.Module]:
    """The class that a model had before `fully_shard` put one in its place, derived from that and from FSDPModule."""
    from torch.distributed.fsdp import FSDPModule

    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
