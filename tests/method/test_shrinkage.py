"""TSC as a step of its own: against an AdamW with nothing else, and the slope that autograd gives."""

import pytest
import torch

from tscnc_hf.method.constraints import transformed_l1
from tscnc_hf.method.shrinkage import learning_rates, shrink_


def shrunk(weight: torch.Tensor, rate: float, scale: float, a: float) -> torch.Tensor:
    """By definition, in float64: as far as lr * weight * s * rho_a'(w / s) goes, and not past zero."""
    units = (weight.double() / scale).requires_grad_()
    (slope,) = torch.autograd.grad(transformed_l1(units, a).sum(), units)
    moved = weight.double() - rate * scale * slope
    return torch.where(weight.sign() * moved > 0, moved, 0.0)


@pytest.mark.parametrize("a", [0.1, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_weight_moves_by_the_slope_and_never_past_zero(a, dtype):
    weight, rate = torch.randn(400, dtype=dtype) * 0.05, 3e-2
    weight[:10] = torch.linspace(-1e-4, 1e-4, 10)
    expected = shrunk(weight, rate, 0.05, a)
    shrink_(weight, rate, torch.tensor(0.05, dtype=torch.float64), a)
    tolerance = {"rtol": 1e-12, "atol": 0} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-8}
    torch.testing.assert_close(weight.double(), expected, **tolerance)
    assert 5 < int((weight == 0).sum()) < 400 and not (torch.signbit(weight) & (weight == 0)).any()


def test_adamw_with_and_without_differ_by_exactly_the_shrinkage():
    """Two groups with learning rates of their own, a schedule, decay; gradients of both are the same in a step."""
    rates, penalty, a = (0.02, 0.3), 2.0, 10.0
    weights = [torch.nn.Parameter(torch.randn(6, 5, dtype=torch.float64)) for _ in rates]
    scales = [weight.detach().square().mean().sqrt() for weight in weights]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(weights, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    for step in range(12):
        for place, weight in enumerate(weights):
            weight.grad = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) + place
        optimizer.step()
        plain = [weight.detach().clone() for weight in weights]
        for weight, rate, scale in zip(weights, learning_rates(optimizer, weights), scales, strict=True):
            shrink_(weight, rate * penalty, scale, a)
        for weight, before, scale, start in zip(weights, plain, scales, rates, strict=True):
            rate = start * (1 + torch.cos(torch.tensor(torch.pi * step / 12, dtype=torch.float64)).item()) / 2
            expected = shrunk(before, rate * penalty, float(scale), a)
            assert not torch.equal(expected, before)
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-14)
        schedule.step()


def test_what_is_spared_stays():
    weight = torch.tensor([0.5, -0.5, 0.5, 0.0])
    shrink_(weight, 0.1, torch.tensor(1.0), 1.0, torch.tensor([True, False, False, False]))
    assert weight[0] == 0.5 and weight[2] == -weight[1] < 0.5 and weight[3] == 0


def test_weights_without_a_learning_rate_are_refused():
    one, other = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([one], 0.1)
    assert learning_rates(optimizer, [one]) == [0.1]
    with pytest.raises(ValueError, match="SGD has no learning rate for 1 of 2 weights, and tsc_decoupled=True"):
        learning_rates(optimizer, [one, other])
