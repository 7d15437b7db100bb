"""The constraints against float64 singular values and finite differences."""

import math

import pytest
import torch
from torch import nn

from tscnc_hf.method.constraints import (
    condition_number_constraint,
    condition_number_penalty,
    transformed_l1,
    transformed_sparse_constraint,
    weight_scales,
)
from tscnc_hf.method.matrices import weight_matrices


def reference_cnc(matrix: torch.Tensor, ridge: float) -> float:
    """From singular values, in float64: nothing in common with the Cholesky route."""
    squares = torch.linalg.svdvals(matrix.double()).square()
    mean = squares.mean()
    ratio = squares / mean if mean > 0 else squares
    return math.log1p(ridge) - (ratio + ridge).log().mean().item()


def pruned(matrix: torch.Tensor, sparsity: float) -> torch.Tensor:
    threshold = matrix.abs().flatten().kthvalue(int(sparsity * matrix.numel())).values
    return matrix * (matrix.abs() > threshold)


def with_condition_number(n: int, m: int, kappa: float) -> torch.Tensor:
    u = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64))[0]
    return (u * torch.logspace(0, -math.log10(kappa), n, dtype=torch.float64)) @ v.T


CASES = {
    "square": lambda: torch.randn(64, 64),
    "wide": lambda: torch.randn(16, 144),
    "tall": lambda: torch.randn(200, 30),
    "kappa 1e8": lambda: with_condition_number(48, 64, 1e8).float(),
    "99 % pruned": lambda: pruned(torch.randn(192, 192), 0.99),
    "rank deficient": lambda: torch.randn(96, 10) @ torch.randn(10, 96),
    "one row": lambda: torch.randn(1, 9),
    "all ones": lambda: torch.ones(256, 256),
    "all zero": lambda: torch.zeros(12, 20),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ridge", [1e-3, 1e-2])
def test_value_agrees_with_singular_values(case, ridge):
    matrix = CASES[case]()
    value = condition_number_constraint(matrix, ridge)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(reference_cnc(matrix, ridge), abs=2e-4, rel=2e-4)
    # the larger of many equal values is reached by the zero matrix alone
    assert -1e-5 <= value.item() <= math.log((1 + ridge) / ridge) + 1e-4


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6), (1, 4), (3, 4, 7)])
def test_gradient_agrees_with_finite_differences(shape):
    matrix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: condition_number_constraint(m, 1e-3), matrix)


def test_gradient_agrees_with_autograd_through_svd():
    matrix = torch.randn(40, 60, dtype=torch.float64, requires_grad=True)
    squares = torch.linalg.svdvals(matrix).square()
    expected = math.log1p(1e-3) - (squares / squares.mean() + 1e-3).log().mean()
    (expected_gradient,) = torch.autograd.grad(expected, matrix)
    single = matrix.detach().float().requires_grad_()
    (gradient,) = torch.autograd.grad(condition_number_constraint(single), single)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e6])
def test_scaled_orthogonal_matrix_has_no_penalty_and_scale_changes_nothing(scale):
    orthogonal = torch.linalg.qr(torch.randn(64, 64))[0]
    assert condition_number_constraint(scale * orthogonal).abs() < 1e-5
    matrix = torch.randn(32, 80)
    torch.testing.assert_close(
        condition_number_constraint(scale * matrix), condition_number_constraint(matrix), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["kappa 1e8", "99 % pruned", "rank deficient", "all zero", "all ones"])
def test_value_and_gradient_are_finite_in_every_precision(case, dtype):
    matrix = CASES[case]().to(dtype).requires_grad_()
    value = condition_number_constraint(matrix)
    value.backward()
    assert value.dtype == torch.float32 and torch.isfinite(value)
    assert torch.isfinite(matrix.grad).all()
    assert matrix.grad.abs().max() > 0 or case in ("all zero",)


def test_autocast_does_not_lower_the_precision():
    matrix = torch.randn(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = condition_number_constraint(matrix)
    assert torch.equal(inside, condition_number_constraint(matrix))


def test_batch_equals_one_by_one():
    batch = torch.randn(3, 2, 8, 20)
    expected = torch.stack([condition_number_constraint(m) for m in batch.flatten(0, 1)]).view(3, 2)
    torch.testing.assert_close(condition_number_constraint(batch), expected)


def test_bounds_the_condition_number():
    """log kappa < log 2 + (n/2) cnc (Guggenheimer, Edelman and Johnson 1995)."""
    for n in (2, 3, 5, 10, 20):
        batch = torch.randn(2000, n, n, dtype=torch.float64)
        sigma = torch.linalg.svdvals(batch)
        ridge = 1e-12
        squares = sigma.square()
        without_ridge = ridge * (squares.mean(-1, keepdim=True) / squares).mean(-1)  # at most what the ridge takes off
        bound = math.log(2) + n / 2 * (condition_number_constraint(batch, ridge) + without_ridge)
        assert ((sigma[:, 0] / sigma[:, -1]).log() < bound + 1e-9).all()


def test_descent_makes_a_matrix_well_conditioned():
    weight = torch.randn(48, 48)
    before = torch.linalg.cond(weight).item()
    weight.requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=10.0)
    for _ in range(500):
        optimizer.zero_grad()
        condition_number_constraint(weight).backward()
        optimizer.step()
    assert before > 20
    assert torch.linalg.cond(weight.detach()).item() < 1.1


@pytest.mark.parametrize("wrong", [torch.randn(4), torch.randn(0, 3)])
def test_wrong_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match="shape"):
        condition_number_constraint(wrong)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="ridge=0"):
        condition_number_constraint(torch.randn(3, 3), ridge=0)
    with pytest.raises(ValueError, match="a=-1"):
        transformed_l1(torch.randn(3), a=-1)


def test_transformed_l1_follows_its_formula_and_limits():
    t = torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    expected = torch.tensor([3 * abs(v) / (2 + abs(v)) for v in t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(transformed_l1(t, 2.0), expected)
    torch.testing.assert_close(transformed_l1(t, 1e9), t.abs(), rtol=1e-6, atol=1e-6)  # l1
    torch.testing.assert_close(transformed_l1(t, 1e-9), (t != 0).double(), rtol=1e-6, atol=1e-6)  # l0
    (gradient,) = torch.autograd.grad(transformed_l1(t, 2.0).sum(), t)
    slope = [3 * 2 / (2 + abs(v)) ** 2 * (v > 0) - 3 * 2 / (2 + abs(v)) ** 2 * (v < 0) for v in t.tolist()]
    torch.testing.assert_close(gradient, torch.tensor(slope, dtype=torch.float64))


def test_tsc_sums_over_the_weights_in_units_of_their_scale():
    model = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(3, 2, 3), nn.LayerNorm(4))
    scales = weight_scales(weight_matrices(model))
    expected = 0.0
    for layer in (model[0], model[1]):
        w = layer.weight.detach().double()
        t = w / w.square().mean().sqrt()
        expected += (1.5 * t.abs() / (0.5 + t.abs())).sum().item()
    value = transformed_sparse_constraint(weight_matrices(model), scales, a=0.5)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        model[0].weight.mul_(100), model[1].weight.mul_(0.01)
    again = transformed_sparse_constraint(weight_matrices(model), weight_scales(weight_matrices(model)), a=0.5)
    assert again.item() == pytest.approx(expected, rel=1e-5)


def test_penalty_sums_over_matrices_and_skips_depthwise():
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    assert condition_number_penalty(weight_matrices(depthwise)).item() == 0.0
    model = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(4, 6, 3, groups=2), depthwise)
    blocks = model[1].weight.detach().reshape(2, 3, 18)
    expected = reference_cnc(model[0].weight.detach(), 1e-3) + sum(reference_cnc(block, 1e-3) for block in blocks)
    assert condition_number_penalty(weight_matrices(model)).item() == pytest.approx(expected, rel=1e-4)


def test_penalty_does_not_depend_on_how_matrices_are_stacked(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Conv2d(4, 6, 3, groups=2), nn.Linear(6, 4))

    def penalty_and_gradients():
        model.zero_grad()
        value = condition_number_penalty(weight_matrices(model))
        value.backward()
        return [value.detach(), *(layer.weight.grad.clone() for layer in model)]

    together = penalty_and_gradients()
    monkeypatch.setattr("tscnc_hf.method.constraints.STACK_LIMIT", 0)
    for one, other in zip(together, penalty_and_gradients(), strict=True):
        torch.testing.assert_close(one, other)
