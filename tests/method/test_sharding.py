"""Constraints and attacks on weights that FSDP2 has sharded over two processes, and attacks under DDP."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.processes import run_processes
from tscnc_hf.method.adversarial.pgd import craft, seeded_generator
from tscnc_hf.method.adversarial.pixels import pixel_logits
from tscnc_hf.method.constraints import CNC_FORMS, constraint_terms, weight_scales
from tscnc_hf.method.matrices import weight_matrices


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 5))


def terms_and_gradients(model: nn.Module, form: str) -> dict[str, torch.Tensor]:
    weights = list(weight_matrices(model))
    scales = weight_scales(weights)
    model.zero_grad()
    terms = constraint_terms(weights, scales, tsc_weight=0.1, tsc_a=2.0, cnc_weight=1.0, cnc_form=form)
    sum(terms.values()).backward()
    gradients = {record.name: record.weight.grad for record in weights if record.weight.grad is not None}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
    return {name: value.detach() for name, value in terms.items()} | whole


def attacks_agree(single: nn.Module, wrapped: nn.Module) -> None:
    """Every adversary finds the same images on both, and leaves no gradient behind."""
    x, y = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(3)), torch.arange(6) % 5
    for model in (single, wrapped):
        model.zero_grad(set_to_none=True)
    for adversary in ("fgsm-rs", "n-fgsm", "pgd", "cw-pgd", "kl-pgd"):
        found = [
            craft(
                adversary, pixel_logits(model, [0.5], [0.25]), x, y, epsilon=0.1, steps=3, step_size=None,
                generator=seeded_generator("cpu", 0),
            )
            for model in (single, wrapped)
        ]  # fmt: skip
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5, msg=adversary)
        assert (found[0] != x).any()
    assert all(parameter.grad is None for parameter in (*single.parameters(), *wrapped.parameters()))


def compare(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    assert dist.get_world_size() == 2
    single = build()
    sharded, mesh = build(), init_device_mesh("cpu", (2,))
    for layer in sharded:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for form in CNC_FORMS:
        assert all(isinstance(record.weight, DTensor) for record in weight_matrices(sharded))
        expected, found = terms_and_gradients(single, form), terms_and_gradients(sharded, form)
        assert expected.keys() == found.keys() and {"tsc_loss", "cnc_loss", "2.weight"} <= expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7, msg=f"{form} {name}")
    for wrapped in (sharded, DistributedDataParallel(build())):
        attacks_agree(single, wrapped)


def test_sharded_weights_give_the_single_process_values_and_gradients(tmp_path):
    run_processes(compare, str(tmp_path))
