"""Schedule, masks and reports."""

import pytest
import torch
from torch import nn

from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning import Pruner, keep_largest, make_masks, sparsity_at, sparsity_report


def test_schedule_is_cubic_between_its_ends():
    assert sparsity_at(3, 10, 50, 0.9) == 0.0
    assert sparsity_at(50, 10, 50, 0.9) == 0.9 and sparsity_at(1000, 10, 50, 0.9) == 0.9
    assert sparsity_at(30, 10, 50, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))
    assert sparsity_at(20, 10, 50, 0.8, initial=0.4) == pytest.approx(0.8 - 0.4 * 0.75**3)
    values = [sparsity_at(step, 10, 50, 0.95) for step in range(60)]
    assert values == sorted(values)


@pytest.mark.parametrize("n, count", [(1000, 0), (1000, 1), (1000, 937), (1000, 1000), (7, 3)])
def test_keep_largest_is_exact_and_right(n, count):
    scores = torch.randn(n).abs()
    keep = keep_largest(scores, count)
    expected = torch.ones(n, dtype=torch.bool)
    expected[scores.argsort()[:count]] = False
    assert torch.equal(keep, expected)


def test_ties_never_overshoot():
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 2.0, 1.0])
    keep = keep_largest(scores, 4)
    assert keep.sum() == 3 and keep[5] and not keep[1] and not keep[4]
    assert keep_largest(torch.zeros(1000), 990).sum() == 10


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999])
def test_masks_are_exact_to_one_weight(scope, sparsity):
    scores = {name: torch.rand(shape) for name, shape in {"a": (17, 13), "b": (5, 3, 3, 3), "c": (101,)}.items()}
    masks = make_masks(scores, sparsity, scope)
    total = sum(score.numel() for score in scores.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * total)
    assert all(masks[name].shape == scores[name].shape for name in scores)
    if scope == "layer":
        for name, mask in masks.items():
            assert abs(int((~mask).sum()) - sparsity * scores[name].numel()) < 1


def test_global_masks_compare_weights_across_layers():
    masks = make_masks({"small": torch.full((10,), 0.1), "large": torch.full((10,), 1.0)}, 0.5)
    assert not masks["small"].any() and masks["large"].all()
    with pytest.raises(ValueError, match="scope='row'"):
        make_masks({"a": torch.rand(3)}, 0.5, "row")


def test_pruner_zeroes_exactly_and_lets_weights_return():
    model = nn.Sequential(nn.Linear(20, 10), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last))
    pruner = Pruner(weight_matrices(model))
    pruner.update(0.8)
    pruner.apply_()
    report = sparsity_report(model)
    assert report.zeros == pruner.pruned_count == round(0.8 * (200 + 108)) == pruner.target_count(0.8)
    assert report.parameter_zeros == report.zeros and report.parameters == 308 + 14
    index = (model[0].weight == 0).nonzero()[0]
    with torch.no_grad():
        model[0].weight[tuple(index)] = 5.0  # what an optimizer step may do
    pruner.update(0.8)
    pruner.apply_()
    assert model[0].weight[tuple(index)] == 5.0
    assert sparsity_report(model).zeros == round(0.8 * 308)


def test_apply_clears_whatever_the_optimizer_left():
    model = nn.Linear(8, 8)
    pruner = Pruner(weight_matrices(model))
    pruner.update(0.5)
    with torch.no_grad():
        model.weight[~pruner.masks["weight"]] = float("nan")
    pruner.apply_()
    assert torch.isfinite(model.weight).all() and sparsity_report(model).zeros == 32


def test_masked_gradients():
    model = nn.Linear(8, 8)
    pruner = Pruner(weight_matrices(model))
    pruner.update(0.75)
    model(torch.randn(2, 8)).sum().backward()
    pruner.mask_gradients_()
    assert torch.equal(model.weight.grad != 0, pruner.masks["weight"] & (model.weight.grad != 0))
    assert (model.weight.grad[~pruner.masks["weight"]] == 0).all() and model.weight.grad.abs().sum() > 0


def test_masks_travel_and_misfits_are_refused():
    model, other = nn.Linear(8, 8), nn.Linear(8, 8)
    pruner, resumed = Pruner(weight_matrices(model)), Pruner(weight_matrices(other))
    pruner.update(0.75)
    resumed.masks_from(pruner.masks)
    assert torch.equal(resumed.masks["weight"], pruner.masks["weight"])
    with pytest.raises(ValueError, match="shape"):
        resumed.masks_from({"weight": torch.ones(3, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="wieght"):
        resumed.masks_from({"wieght": torch.ones(8, 8, dtype=torch.bool)})


def test_nothing_to_prune_is_an_error():
    with pytest.raises(ValueError, match="nothing to prune"):
        Pruner(weight_matrices(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())))
