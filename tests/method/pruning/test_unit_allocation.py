"""Whole channels, hidden units and heads that become zero."""

import pytest
import timm
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning.pruner import Pruner
from tscnc_hf.method.pruning.unit_allocation import unit_allocation


def vit() -> nn.Module:
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return ViTForImageClassification(config)


MODELS = {
    "vit": vit,
    "resnet": lambda: timm.create_model("resnet18", num_classes=10, channels=[16, 16, 32, 32], layers=[1, 1, 1, 1]),
    "mobilenet": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "vgg-like": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1)
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def pruned(model, kinds, scope, target) -> Pruner:
    records = list(weight_matrices(model))
    pruner = Pruner(records, "scaled-magnitude", unit_allocation(model, records, kinds, scope))
    pruner.check(target)
    pruner.update(target)
    return pruner


def units_kept(group, masks) -> torch.Tensor:
    """(count,): share of each unit's weights that is kept."""
    sizes = group.unit_sums({part.name: torch.ones(part.tensor.shape) for part in group.weights})
    return group.unit_sums({part.name: masks[part.name].float() for part in group.weights}) / sizes


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("target", [0.0, 0.1, 0.25])
def test_zeros_are_whole_units_and_hardly_more_than_asked_for(scope, target, model):
    kinds = ("channels", "hidden", "heads")
    pruner = pruned(model, kinds, scope, target)
    groups, masks = pruner.allocation.groups, pruner.masks
    largest = max(
        float(group.unit_sums({part.name: torch.ones(part.tensor.shape) for part in group.weights}).max())
        for group in groups
    )
    assert 0 <= pruner.pruned_count - pruner.target_count(target) < largest
    cut = {part.name: torch.ones(part.tensor.shape, dtype=torch.bool) for group in groups for part in group.weights}
    for group in groups:
        gone = units_kept(group, masks) == 0
        assert not gone.all()
        for name, mask in group.unit_masks(~gone).items():
            cut[name] &= mask
    for name, mask in masks.items():  # nothing but whole units is zero
        assert torch.equal(mask, cut.get(name, torch.ones_like(mask)))


def test_the_weakest_units_go_first():
    model = MODELS["vgg-like"]()
    with torch.no_grad():
        model[0].weight[[2, 7, 11]] *= 1e-3
        model[3].weight[:, [2, 7, 11]] *= 1e-3
    records = list(weight_matrices(model))
    allocation = unit_allocation(model, records)
    scores = {record.name: record.weight.abs() for record in records}
    target = 3 * (27 + 16 * 9) / sum(score.numel() for score in scores.values())
    masks = allocation.masks(records, scores, target)
    assert (~masks["0.weight"].flatten(1).any(1)).nonzero().flatten().tolist() == [2, 7, 11]


def test_uniform_takes_the_same_part_of_every_group():
    model = vit()
    pruner = pruned(model, ("hidden",), "uniform", 0.2)
    shares = [float((units_kept(group, pruner.masks) == 0).float().mean()) for group in pruner.allocation.groups]
    assert len(shares) == 2 and max(shares) - min(shares) <= 1 / 64 and min(shares) > 0.2


def test_kinds_are_told_apart():
    model = vit()
    pruner = pruned(model, ("heads",), "global", 0.1)
    touched = {name for name, mask in pruner.masks.items() if not mask.all()}
    assert touched and all("attention" in name for name in touched)


def test_what_is_excluded_keeps_its_group_whole():
    model = vit()
    records = list(weight_matrices(model, ["layers.0.mlp.fc1"]))
    allocation = unit_allocation(model, records, ("hidden",))
    assert [group.name for group in allocation.groups] == ["vit.layers.1.mlp.fc2"]


def test_a_pruned_model_computes_without_the_units():
    model = MODELS["resnet"]().eval()
    pruner = pruned(model, ("channels",), "global", 0.3)
    pruner.apply_()
    x = torch.rand(2, 3, 32, 32)
    before = model(x)
    with torch.no_grad():
        for group in pruner.allocation.groups:
            gone = units_kept(group, pruner.masks) == 0
            for part in group.parts:  # whatever norms and biases make of a unit, nobody reads it
                if not part.prunable:
                    part.tensor[part.expand(gone)] = 7.0
    torch.testing.assert_close(model(x), before)


def test_what_cannot_be_is_said():
    model = vit()
    records = list(weight_matrices(model))
    allocation = unit_allocation(model, records, ("heads",))
    with pytest.raises(ValueError, match=r"0.9 is not reachable with whole units.*the largest is 0\.\d+ .*2 groups"):
        allocation.check(records, 0.9)
    with pytest.raises(ValueError, match="scope='erk' does not go with whole units; use one of global, uniform"):
        unit_allocation(model, records, scope="erk")
    with pytest.raises(ValueError, match="kind 'rows' is unknown; units are channels, hidden, heads"):
        unit_allocation(model, records, ("rows",))
    with pytest.raises(
        ValueError, match="no units of kind channels that could be pruned and then cut out; found: heads, hidden"
    ):
        unit_allocation(model, records, ("channels",))


def three_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


def order_of_going(scores, score_of) -> list[tuple[str, int]]:
    """(layer that makes it, unit), the first to go first, but for the best of each layer; unit by unit."""
    units = []
    for maker, reader in (("0.weight", "2.weight"), ("2.weight", "4.weight")):
        rows = [torch.cat([row, scores[reader][:, unit]]).tolist() for unit, row in enumerate(scores[maker])]
        units += sorted((score_of(row), maker, unit) for unit, row in enumerate(rows))[:-1]
    return [unit[1:] for unit in sorted(units)]


@pytest.mark.parametrize("signed", [False, True])
def test_units_go_in_the_order_of_their_scores(signed):
    """Of scores that may be negative the mean, of others the root mean square."""
    model = three_layers()
    records = list(weight_matrices(model))
    scores = {r.name: torch.randn(r.weight.shape) for r in records}
    scores = scores if signed else {name: score.abs() for name, score in scores.items()}

    def score_of(row):
        return sum(row) / len(row) if signed else (sum(value**2 for value in row) / len(row)) ** 0.5

    order, allocation = order_of_going(scores, score_of), unit_allocation(model, records)
    if not signed:
        assert order != order_of_going(scores, lambda row: sum(row) / len(row))
    gone = set()
    for percent in range(60):
        masks = allocation.masks(records, scores, percent / 100)
        now = {
            (name, u) for name in ("0.weight", "2.weight") for u in (~masks[name].any(1)).nonzero().flatten().tolist()
        }
        assert now == set(order[: len(now)])
        gone |= now
    assert len(gone) > 5


def test_a_unit_that_training_drives_to_zero_goes_first():
    """Movement: four hidden units of equal weights, whose gradients push them by -10, 1, 0.5 and 2."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    pushes = torch.tensor([-10.0, 1.0, 0.5, 2.0])
    with torch.no_grad():
        model[0].weight.fill_(1.0), model[2].weight.fill_(1.0)
    records = list(weight_matrices(model))
    pruner = Pruner(records, "movement", unit_allocation(model, records))
    pruner.begin()
    model[0].weight.grad, model[2].weight.grad = -pushes[:, None].repeat(1, 4), -pushes.repeat(2, 1)
    pruner.before_step()
    pruner.after_step()
    for sparsity, left in ((0.25, [1, 2, 3]), (0.5, [1, 3]), (0.75, [3])):
        pruner.update(sparsity)
        assert pruner.masks["0.weight"].any(1).nonzero().flatten().tolist() == left


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "movement"])
def test_units_that_came_as_zeros_go_before_those_without_a_gradient(criterion):
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    with torch.no_grad():
        model[0].weight[5:], model[2].weight[:, 5:] = 0.0, 0.0
    records = list(weight_matrices(model))
    pruner = Pruner(records, criterion, unit_allocation(model, records))
    pruner.keep_zeros()
    pruner.begin()
    for weight, dim in ((model[0].weight, 0), (model[2].weight, 1)):
        pushes = torch.tensor([0.0, 3, -3, 2, 1, 5, 5, 5])  # the loss does not feel the first unit, that is there
        weight.grad = (pushes[:, None] if dim == 0 else pushes).expand(weight.shape).clone()
    pruner.before_step()
    pruner.after_step()
    pruner.update(3 / 8)
    assert pruner.masks["0.weight"].any(1).tolist() == [True] * 5 + [False] * 3
    pruner.update(4 / 8)
    assert int(pruner.masks["0.weight"].any(1).sum()) == 4 and not pruner.masks["0.weight"][5:].any()


def test_a_score_that_is_not_a_number_is_refused():
    model = three_layers()
    records = list(weight_matrices(model))
    scores = {record.name: record.weight.detach().abs() for record in records}
    scores["2.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="a score is NaN"):
        unit_allocation(model, records).masks(records, scores, 0.2)
