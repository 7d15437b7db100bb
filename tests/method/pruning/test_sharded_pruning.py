"""Masks, latent weights and learned scores of networks that two processes share: DDP, and FSDP2's sharded weights."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.processes import run_processes
from tscnc_hf.method.matrices import full_tensor, weight_matrices
from tscnc_hf.method.pruning.allocation import Allocation
from tscnc_hf.method.pruning.pruner import Pruner


WAYS = {
    "magnitude": {},
    "erk": {"allocation": "erk"},
    "latent": {"latent": True, "allocation": "erk"},
    "learned": {"criterion": "learned"},
    "movement": {"criterion": "movement"},
    "learned rates": {"criterion": "taylor", "allocation": "learned"},
    "pattern": {"allocation": Allocation(pattern=(1, 2), row_floor=1), "latent": True},
}
SPARSITIES = {1: 0.3, 3: 0.5, 5: 0.7}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 11), nn.GELU(), nn.Linear(11, 6))


def train(model: nn.Module, pruner: Pruner, data: slice) -> None:
    """Six steps as a trainer takes them, and an exchange of weights; each process has its part of the batch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner.begin(optimizer)
    for step in range(1, 7):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.rand(8, 4, 4, 4, generator=generator), torch.randint(6, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[data]), y[data]).backward()
        pruner.freeze_others(model)
        gradients = pruner.gradients()
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
        if step in SPARSITIES:
            pruner.update(SPARSITIES[step])
        if step == 5 and not pruner.active:
            before = pruner.masks
            pruner.regrow(0.3, gradients, optimizer)
            assert any(not torch.equal(mask, before[name]) for name, mask in pruner.masks.items())
        pruner.apply_()
        masks = pruner.masks
        for name, weight in pruner.weights.items() if masks else ():
            assert (full_tensor(weight.detach())[~masks[name]] == 0).all()


def on_every_rank(tensor: torch.Tensor) -> bool:
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor.contiguous())
    return torch.equal(both[0], both[1])


def compare(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    assert dist.get_world_size() == 2
    mine = slice(4 * rank, 4 * rank + 4)
    for way, options in WAYS.items():
        exclude = ["4."] if way == "pattern" else []  # it reads eleven inputs
        single, replicated, sharded = build(), build(), build()
        pruners = [Pruner(weight_matrices(model, exclude), **options) for model in (single, replicated, sharded)]
        train(single, pruners[0], slice(0, 8))
        train(DistributedDataParallel(replicated), pruners[1], mine)
        mesh = init_device_mesh("cpu", (2,))
        for layer in sharded:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        assert all(isinstance(weight, DTensor) for weight in pruners[2].weights.values())
        train(sharded, pruners[2], mine)

        alone = pruners[0].state()
        assert pruners[0].pruned_count == round(0.7 * pruners[0].prunable_count)
        for pruner, kind in ((pruners[1], "DDP"), (pruners[2], "FSDP2")):
            state = pruner.state()
            assert state.keys() == alone.keys()
            for name, tensor in state.items():
                assert on_every_rank(tensor.float()), f"{way}, {kind}: {name} differs between processes"
                torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5, msg=f"{way}, {kind}: {name}")
            for name, weight in pruner.weights.items():
                expected = pruners[0].weights[name]
                torch.testing.assert_close(full_tensor(weight), expected, rtol=1e-4, atol=1e-5)
        again = Pruner(weight_matrices(sharded, exclude), **options)
        again.load_state(pruners[2].state())
        for name, tensor in again.state().items():
            assert torch.equal(tensor, pruners[2].state()[name])
        again.finish()
        again.apply_()
        masks = again.masks
        for name, weight in again.weights.items():  # one that came back may have stayed where it began
            assert (full_tensor(weight)[~masks[name]] == 0).all()


def test_masks_and_scores_are_those_of_one_process(tmp_path):
    run_processes(compare, str(tmp_path))
