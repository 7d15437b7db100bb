"""Weights that come back, against RigL's definition written with sorted lists in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning.allocation import Allocation
from tscnc_hf.method.pruning.pruner import Pruner
from tscnc_hf.method.pruning.regrowth import exchanged, regrow_end, regrow_share


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(),
        nn.Linear(32, 12), nn.Linear(12, 8),
    )  # fmt: skip


def rigl(masks: dict, scores: dict, gradients: dict, share: float, groups: list) -> dict:
    """Algorithm 1: of each group drop k = floor(share * kept) of smallest score, grow k of largest |gradient| among
    all that is not kept then."""
    found = {}
    for names in groups:
        place = [(name, index) for name in names for index in range(masks[name].numel())]
        flat = {
            what: np.concatenate([of[name].double().flatten().numpy() for name in names])
            for what, of in (("mask", masks), ("score", scores), ("gradient", gradients))
        }
        kept = {i for i in range(len(place)) if flat["mask"][i]}
        k = math.floor(share * len(kept))
        kept -= set(sorted(kept, key=lambda i: flat["score"][i])[:k])
        outside = [i for i in range(len(place)) if i not in kept]
        kept |= set(sorted(outside, key=lambda i: -abs(flat["gradient"][i]))[:k])
        for name in names:
            own = [i in kept for i, (of, _) in enumerate(place) if of == name]
            found[name] = torch.tensor(own).view(masks[name].shape)
    return found


def setting(allocation: Allocation, sparsity: float = 0.7, model: nn.Module | None = None):
    records = list(weight_matrices(network() if model is None else model))
    scores = {record.name: record.weight.detach().abs() for record in records}
    masks = allocation.masks(records, scores, sparsity)
    generator = torch.Generator().manual_seed(1)
    gradients = {r.name: torch.randn(r.weight.shape, generator=generator) for r in records}
    return records, masks, scores, gradients


@pytest.mark.parametrize("scope, share", [("global", 0.3), ("uniform", 0.3), ("erk", 0.17), ("global", 0.001)])
def test_it_is_rigl_per_layer_or_over_all(scope, share):
    allocation = Allocation(scope)
    records, masks, scores, gradients = setting(allocation)
    names = [record.name for record in records]
    expected = rigl(masks, scores, gradients, share, [names] if scope == "global" else [[name] for name in names])
    found = exchanged(records, masks, scores, gradients, share, allocation)
    for name in names:
        assert torch.equal(found[name], expected[name]), name
        if scope != "global":
            assert found[name].sum() == masks[name].sum()
    assert sum(int(m.sum()) for m in found.values()) == sum(int(m.sum()) for m in masks.values())
    changed = sum(int((found[name] != masks[name]).sum()) for name in names)
    assert changed > 20 or (share < 0.01 and changed == 0)


def test_layers_with_a_sparsity_of_their_own_are_exchanged_alone():
    allocation = Allocation(layer_sparsity={"3.weight": 0.5})
    records, masks, scores, gradients = setting(allocation)
    names = [record.name for record in records]
    groups = [["3.weight"], [name for name in names if name != "3.weight"]]
    expected = rigl(masks, scores, gradients, 0.3, groups)
    found = exchanged(records, masks, scores, gradients, 0.3, allocation)
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert int(found["3.weight"].sum()) == 192 and not torch.equal(found["3.weight"], masks["3.weight"])


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_a_pattern_holds_and_its_groups_are_filled_by_the_largest_gradients(sparsity):
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8))
    allocation = Allocation(pattern=(2, 4))
    records, masks, scores, gradients = setting(allocation, sparsity, model)
    found = exchanged(records, masks, scores, gradients, 0.4, allocation)
    total = sum(int(mask.sum()) for mask in masks.values())
    assert sum(int(mask.sum()) for mask in found.values()) == total == round((1 - sparsity) * 288)
    moved = 0
    for name in masks:
        before, after, size = (t.reshape(-1, 4) for t in (masks[name], found[name], gradients[name].abs()))
        assert after.sum(-1).max() <= 2
        for old, new, g in zip(before, after, size, strict=True):
            grown = [i for i in range(4) if new[i] and not old[i]]
            left_out = [i for i in range(4) if not new[i]]
            assert all(g[i] >= g[j] for i in grown for j in left_out)  # within the group
            moved += len(grown)
    assert moved > 10


@pytest.mark.parametrize("options", [{"layer_floor": 0.25}, {"row_floor": 2}, {}])
def test_floors_hold_and_no_matrix_is_emptied(options):
    """The first layer's weights are the smallest and its gradients vanish: without floors all would go."""
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    allocation = Allocation(**options)
    records, masks, scores, gradients = setting(allocation, 0.7, model)
    gradients["0.weight"].zero_()
    for _ in range(8):
        masks = exchanged(records, masks, scores, gradients, 0.5, allocation)
    least = {"layer_floor": 72, "row_floor": 16}.get(next(iter(options), ""), 1)
    assert int(masks["0.weight"].sum()) == least
    if "row_floor" in options:
        assert (masks["0.weight"].flatten(1).sum(-1) == 2).all()
    if "layer_floor" in options:
        assert all(mask.float().mean() >= 0.25 for mask in masks.values())


def test_the_share_falls_by_a_cosine_and_ends():
    end = regrow_end(40, 100)
    assert end == 85
    shares = [regrow_share(step, 40, end, 0.3) for step in range(100)]
    for step, share in enumerate(shares):
        expected = 0.15 * (1 + np.cos((step - 40) * np.pi / 45)) if 40 < step < 85 else 0.0
        assert share == pytest.approx(expected, abs=1e-15)
    assert shares[41] < 0.3 and shares[84] > 0 and sorted(shares[41:], reverse=True) == shares[41:]


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_what_comes_back_begins_at_zero_without_moments(optimizer_class):
    model = network()
    pruner = Pruner(weight_matrices(model), allocation="erk")
    more = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {"amsgrad": True}
    optimizer = optimizer_class(model.parameters(), 0.01, **more)
    pruner.update(0.8)
    pruner.apply_()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 4, 6, 6)).square().mean().backward()
        gradients = pruner.gradients()
        optimizer.step()  # pruned weights have gradients, and move
    before = pruner.masks
    weights = {name: weight.detach().clone() for name, weight in pruner.weights.items()}
    moments = {
        n: {k: v.clone() for k, v in optimizer.state[w].items() if torch.is_tensor(v)}
        for n, w in pruner.weights.items()
    }
    pruner.regrow(0.3, gradients, optimizer)
    pruner.apply_()
    came = 0
    for name, weight in pruner.weights.items():
        mask, grown = pruner.masks[name], pruner.masks[name] & ~before[name]
        came += int(grown.sum())
        assert (weight[~mask] == 0).all() and (weight[grown] == 0).all()
        stayed = mask & before[name]
        assert torch.equal(weight[stayed], weights[name][stayed])
        seen = 0
        for key, value in optimizer.state[weight].items():
            if torch.is_tensor(value) and value.shape == weight.shape:
                assert (value[grown] == 0).all() and torch.equal(value[~grown], moments[name][key][~grown])
                assert moments[name][key].any()
                seen += 1
        assert seen == (1 if optimizer_class is torch.optim.SGD else 3)
    assert came > 20 and pruner.pruned_count == pruner.target_count(0.8)


def test_weights_without_a_gradient_keep_their_masks():
    model = network()
    pruner = Pruner(weight_matrices(model))
    pruner.update(0.8)
    before = pruner.masks
    gradients = {n: torch.randn_like(w) for n, w in pruner.weights.items() if n != "3.weight"}
    pruner.regrow(0.5, gradients)
    assert torch.equal(pruner.masks["3.weight"], before["3.weight"])
    assert any(not torch.equal(pruner.masks[name], before[name]) for name in gradients)
    assert pruner.pruned_count == pruner.target_count(0.8)
