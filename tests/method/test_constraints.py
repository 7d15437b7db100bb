"""The constraints against float64 singular values and finite differences."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tscnc_hf.method.constraints import (
    condition_number_constraint,
    condition_number_penalty,
    constraint_terms,
    reference_condition_number_constraint,
    transformed_l1,
    transformed_sparse_constraint,
    weight_scales,
)
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning.pruner import Pruner


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
    "orthogonal": lambda: 3 * torch.linalg.qr(torch.randn(40, 40))[0],
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


@pytest.mark.parametrize("ridge", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("n", [128, 512, 1024])
def test_a_large_matrix_of_rank_one_is_finite_at_every_ridge(n, ridge):
    """The Gram matrix's rounding grows with n: it must not make a rank-deficient matrix indefinite."""
    generator = torch.Generator().manual_seed(n)
    flat = torch.ones(n, n) + 1e-4 * torch.randn(n, n, generator=generator)
    outer = torch.randn(n, 1, generator=generator) @ torch.randn(1, n, generator=generator)
    for matrix in (flat, outer):
        value = condition_number_constraint(matrix.requires_grad_(), ridge)
        assert value.item() == pytest.approx(reference_cnc(matrix, ridge), abs=1e-2)
        value.backward()
        assert matrix.grad.isfinite().all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ridge", [1e-3, 1e-7])
def test_gradient_agrees_with_autograd_through_svd(case, ridge):
    matrix = CASES[case]()
    reference = matrix.double().requires_grad_()
    squares = torch.linalg.svdvals(reference).square()
    mean = squares.mean()
    (expected,) = torch.autograd.grad((squares / torch.where(mean > 0, mean, 1.0) + ridge).log().mean(), reference)
    single = matrix.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-condition_number_constraint(single, ridge), single)
    largest = 0.0 if case == "all zero" else expected.abs().max().item()
    if case in ("orthogonal", "one row", "all ones"):  # the gradient vanishes: what is left of it is rounding
        assert largest < 1e-6 and gradient.abs().max() < 1e-6
    else:
        # float32's rounding in the directions of vanishing singular values is amplified by 1 / ridge
        tolerance = {"kappa 1e8": 1e-3, "rank deficient": 5e-3}.get(case, 2e-4)
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=tolerance * largest)


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
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-6, 1.0, 100.0, 1e6, 1e15])
def test_value_and_gradient_are_finite_in_every_precision(case, dtype, scale):
    matrix = scale * CASES[case]()
    matrix = (matrix.clamp(-6e4, 6e4) if dtype == torch.float16 else matrix).to(dtype).requires_grad_()
    value = condition_number_constraint(matrix)
    value.backward()
    assert value.dtype == torch.float32 and torch.isfinite(value)
    assert torch.isfinite(matrix.grad).all()
    assert matrix.grad.abs().max() > 0 or case in ("all zero", "all ones") or not 1e-6 <= scale <= 1


@pytest.mark.parametrize("n", [1, 2, 3, 17, 100, 333, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_size(n, dtype):
    matrix = torch.randn(n, n)
    matrix = (pruned(matrix, 0.9) if n > 3 else matrix).to(dtype).requires_grad_()
    value = condition_number_constraint(matrix)
    value.backward()
    assert value.item() == pytest.approx(reference_cnc(matrix.detach(), 1e-3), abs=1e-3)
    assert torch.isfinite(matrix.grad).all()


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


def descend(weight: torch.Tensor, mask: torch.Tensor, steps: int) -> torch.Tensor:
    weight = weight.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=100.0, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        condition_number_constraint(weight).backward()
        optimizer.step()
        with torch.no_grad():
            weight.mul_(mask)
    return weight.detach()


def test_descent_makes_a_matrix_well_conditioned():
    torch.manual_seed(0)
    weight = torch.randn(192, 192)
    assert torch.linalg.cond(weight) > 300
    assert torch.linalg.cond(descend(weight, torch.ones_like(weight), steps=200)) < 1.1


def test_descent_under_a_mask_comes_as_far_as_a_float64_optimiser():
    torch.manual_seed(0)
    weight = pruned(torch.randn(128, 128), 0.97)
    mask = weight != 0
    best = weight.double().requires_grad_()
    optimizer = torch.optim.LBFGS([best], max_iter=500, history_size=20, line_search_fn="strong_wolfe")

    def through_singular_values():
        optimizer.zero_grad()
        squares = torch.linalg.svdvals(best * mask).square()
        value = -(squares / squares.mean() + 1e-3).log().mean()
        value.backward()
        return value

    optimizer.step(through_singular_values)

    def effective_condition_number(matrix):
        sigma = torch.linalg.svdvals(matrix.double())
        kept = sigma[sigma > 1e-6 * sigma[0]]
        return len(kept), (sigma[0] / kept[-1]).item()

    rank, before = effective_condition_number(weight)
    best_rank, reachable = effective_condition_number(best.detach() * mask)
    found_rank, found = effective_condition_number(descend(weight, mask, steps=500))
    assert before > 100 and reachable < 2
    assert found_rank == best_rank == rank and found < 2 * reachable


def reference_formula(matrix: torch.Tensor) -> torch.Tensor:
    """(log(det(G/n) + 1e-5))^2 as it stands, in the matrix's own precision."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return (torch.linalg.det(small @ small.T / small.shape[0]) + 1e-5).log().square()


@pytest.mark.parametrize(
    "shape, scale", [((10, 640), 0.05), ((640, 10), 0.02), ((10, 64), 1.0), ((10, 64), 10.0), ((24, 24), 1.0)]
)
def test_reference_form_equals_its_formula_where_that_is_representable(shape, scale):
    matrix = (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    expected = reference_formula(matrix)
    value = reference_condition_number_constraint(matrix)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    (expected_gradient,) = torch.autograd.grad(expected, matrix)
    (gradient,) = torch.autograd.grad(value, matrix)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("classes, inputs", [(100, 640), (512, 512)])
def test_reference_form_has_a_useful_gradient_where_its_formula_has_none(classes, inputs):
    weight = 0.02 * torch.randn(classes, inputs)
    naive = weight.clone().requires_grad_()
    value = reference_formula(naive)
    value.backward()
    assert value.item() == pytest.approx(132.547, abs=1e-2) and not naive.grad.any()  # det is 0 in float32

    ours = weight.clone().requires_grad_()
    value = reference_condition_number_constraint(ours)
    value.backward()
    assert torch.isfinite(value) and value > 133 and torch.isfinite(ours.grad).all()
    log_det = torch.linalg.slogdet(weight.double() @ weight.double().T / classes).logabsdet
    lowest = math.log(torch.finfo(torch.float32).tiny)
    assert value.item() == pytest.approx(math.log(1e-5) ** 2 + lowest - log_det.item(), rel=1e-4)
    expected = -2 * torch.linalg.pinv(weight.double()).T  # of -log det
    torch.testing.assert_close(ours.grad.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    step = 1e-3 / ours.grad.abs().max()
    assert torch.linalg.cond(weight - step * ours.grad) < torch.linalg.cond(weight)


@pytest.mark.parametrize("case", CASES)
def test_reference_form_is_finite(case):
    matrix = CASES[case]().requires_grad_()
    value = reference_condition_number_constraint(matrix)
    value.backward()
    assert value.dtype == torch.float32 and torch.isfinite(value) and value >= 0
    assert torch.isfinite(matrix.grad).all()


def test_reference_penalty_looks_at_dense_layers_only():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Linear(6, 4))
    expected = reference_formula(model[1].weight.detach().double()).item()
    value = condition_number_penalty(weight_matrices(model), form="reference")
    assert value.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="form='svd' is unknown; use one of scale-invariant, reference"):
        condition_number_penalty(weight_matrices(model), form="svd")


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


def test_the_scale_of_a_sparse_weight_is_that_of_what_is_there():
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 4))
    dense = weight_scales(weight_matrices(model))
    assert dense["0.weight"] == model[0].weight.detach().square().mean().sqrt()
    with torch.no_grad():
        model[0].weight[torch.rand(50, 40) < 0.9] = 0.0
        model[1].weight.zero_()
    left = model[0].weight.detach().double()
    found = weight_scales(weight_matrices(model))
    assert found["0.weight"].item() == pytest.approx(left[left != 0].square().mean().sqrt().item(), rel=1e-6)
    assert found["1.weight"] == 1


@pytest.mark.parametrize("a", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tsc_agrees_with_autograd_through_its_formula(a, dtype):
    layer = nn.Conv2d(3, 5, 3).to(dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        layer.weight[:, 0] = 0
    scales = weight_scales(weight_matrices(layer))
    value = transformed_sparse_constraint(weight_matrices(layer), scales, a)
    value.backward()
    weight = layer.weight.detach().double().requires_grad_()
    expected = transformed_l1(weight / scales["weight"].double(), a).sum()
    expected.backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert value.item() == pytest.approx(expected.item(), rel=1e-6 if dtype != torch.float64 else 1e-12)
    torch.testing.assert_close(layer.weight.grad.double(), weight.grad, rtol=tolerance, atol=1e-12)
    assert layer.weight.grad.dtype == dtype and not layer.weight.grad[:, 0].any()


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 6))


def test_no_layer_drops_out_of_tsc_by_its_name():
    weights = list(weight_matrices(small_model()))
    scales = weight_scales(weights)
    renamed = [replace(record, name=f"_orig_mod.{record.name}") for record in weights]
    with pytest.raises(ValueError, match="scale for 0.weight, 3.weight, 4.weight, which is not among the weights"):
        constraint_terms(renamed, scales, tsc_weight=1.0)


def all_terms(model: nn.Module, scales: dict) -> torch.Tensor:
    weights = list(weight_matrices(model))
    terms = constraint_terms(weights, scales, tsc_weight=1e-2, tsc_a=2.0, cnc_weight=0.1)
    return terms["tsc_loss"] + terms["cnc_loss"]


@pytest.mark.parametrize("form", ["scale-invariant", "reference"])
def test_compiled_constraints_are_the_same(form):
    model = small_model()
    scales = weight_scales(weight_matrices(model))

    def value():
        weights = list(weight_matrices(model))
        terms = constraint_terms(weights, scales, tsc_weight=1e-2, cnc_weight=0.1, cnc_form=form)
        return terms["tsc_loss"] + terms["cnc_loss"]

    results = []
    for function in (value, torch.compile(value, backend="aot_eager")):
        model.zero_grad()
        total = function()
        total.backward()
        results.append([total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


class NoLookAtValues(TorchDispatchMode):
    """Fails where a GPU would have to wait for the host: when a tensor's value is read or decides a shape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


WAITING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)


def test_a_step_never_looks_at_a_value():
    model = small_model()
    scales = weight_scales(weight_matrices(model))
    pruner = Pruner(weight_matrices(model))
    pruner.update(0.5)
    with NoLookAtValues():
        all_terms(model, scales).backward()
        pruner.mask_gradients_()
        pruner.apply_()
    with pytest.raises(AssertionError, match="waits for the device"), NoLookAtValues():
        torch.ones(1).item()


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
