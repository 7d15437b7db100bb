"""Which weights are near the threshold of learned rates: against a cut that is found by sorting what was free."""

import pytest
import torch
from torch import nn

from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning.allocation import Allocation
from tscnc_hf.method.pruning.layer_rates import LayerRates
from tscnc_hf.method.pruning.pruner import Pruner
from tscnc_hf.method.pruning.unit_allocation import unit_allocation


SPARSITY = 0.8


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10)
    ).requires_grad_()


def updated(model, allocation, sparsity=SPARSITY, theta=(0.0, 0.0, 0.0)):
    """The pruner after one choice of masks, and the scores as they were ranked."""
    pruner = Pruner(weight_matrices(model), "magnitude", allocation)
    pruner.begin()
    pruner._rates.theta = torch.tensor(theta)
    pruner.update(sparsity)
    factors = dict(zip(pruner.records, torch.tensor(theta).exp(), strict=True))
    scores = {n: w.detach().abs() / w.detach().square().mean().sqrt() * factors[n] for n, w in pruner.weights.items()}
    return pruner, scores


def expected(scores, free, kept):
    """Near the smallest of the `kept` largest scores among `free` (name -> bool), and itself free."""
    cut = torch.cat([scores[name][part] for name, part in free.items()]).sort(descending=True).values[kept - 1]
    return {name: part & (scores[name] >= cut / 2) & (scores[name] <= cut * 2) for name, part in free.items()}


def assert_near(pruner, wanted):
    for name, near in wanted.items():
        assert int((pruner._near[name] ^ near).sum()) <= 1, name  # which may be at the edge, and round otherwise
    assert sum(int(near.sum()) for near in wanted.values()) > 100


def everywhere(scores, value=True):
    return {name: torch.full_like(score, value, dtype=torch.bool) for name, score in scores.items()}


def test_in_one_ranking_it_is_all_within_a_factor_of_two():
    pruner, scores = updated(network(), "learned")
    size = pruner.prunable_count
    assert_near(pruner, expected(scores, everywhere(scores), size - round(SPARSITY * size)))


def test_what_a_floor_keeps_says_nothing_of_the_cut():
    model = network()
    with torch.no_grad():
        model[0].weight[3] *= 1e-3
    pruner, scores = updated(model, Allocation("learned", row_floor=1))
    assert pruner.masks["0.weight"][3].sum() == 1
    free = everywhere(scores)
    free["0.weight"][3] = ~pruner.masks["0.weight"][3]
    assert_near(pruner, expected(scores, free, pruner.prunable_count - pruner.pruned_count - 1))


def test_nor_does_the_weight_that_a_matrix_keeps():
    pruner, scores = updated(network(), "learned", theta=(0.0, 0.0, -2.0))
    assert pruner.masks["4.weight"].sum() == 1
    free = everywhere(scores) | {"4.weight": ~pruner.masks["4.weight"]}
    wanted = expected(scores, free, pruner.prunable_count - pruner.pruned_count - 1)
    assert not wanted["4.weight"].any()
    assert_near(pruner, wanted)


@pytest.mark.parametrize("own", [0.0, 0.5])
def test_nor_a_layer_with_its_own_sparsity(own):
    pruner, scores = updated(network(), Allocation("learned", layer_sparsity={"4.weight": own}))
    free = everywhere(scores) | {"4.weight": torch.zeros(10, 40, dtype=torch.bool)}
    kept = pruner.prunable_count - pruner.pruned_count - round((1 - own) * 400)
    assert_near(pruner, expected(scores, free, kept))


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_nor_what_a_pattern_bars(sparsity):
    """Before the pattern is whole the groups' two smallest compete for a place, afterwards the two largest."""
    pruner, scores = updated(network(), Allocation("learned", pattern=(2, 4)), sparsity)
    places = {name: score.view(-1, 4).argsort(1).argsort(1).view_as(score) for name, score in scores.items()}
    free = {name: (place >= 2) if sparsity > 0.5 else (place < 2) for name, place in places.items()}
    size = pruner.prunable_count
    competing = size // 2 - (round(sparsity * size) - (size // 2 if sparsity > 0.5 else 0))
    assert_near(pruner, expected(scores, free, competing))


def test_zeros_that_stay_are_not_near():
    model = network()
    first = Pruner(weight_matrices(model))
    first.update(0.5)
    first.apply_()
    pruner = Pruner(weight_matrices(model), "taylor", "learned")
    pruner.keep_zeros()
    pruner.begin()
    for name, weight in pruner.weights.items():
        weight.grad = torch.ones_like(weight)
        pruner._dense[name].fill_(0.01)  # as steps may have moved them behind their masks
    pruner.before_step()
    pruner.after_step()
    pruner.update(SPARSITY)
    zeros = pruner._zeros
    assert all(int(pruner._near[name].sum()) == int((~zero).sum()) for name, zero in zeros.items())
    assert not any((pruner._near[name] & zero).any() for name, zero in zeros.items())


def test_units_are_near_as_a_whole():
    model = network()
    with torch.no_grad():  # in steps, so that some units are far from the cut
        scale = torch.logspace(-1, 1, 40)[:, None]
        model[0].weight.mul_(scale), model[2].weight.mul_(scale)
    allocation = unit_allocation(model, list(weight_matrices(model)), scope="learned")
    pruner, scores = updated(model, allocation, 0.6)
    units, kept = {}, {}
    for maker, reader in (("0.weight", "2.weight"), ("2.weight", "4.weight")):
        for unit in range(40):
            values = torch.cat([scores[maker][unit], scores[reader][:, unit]]).double()
            units[maker, reader, unit] = values.square().mean().sqrt().item()
            kept[maker, reader, unit] = bool(pruner.masks[maker][unit].any())
    cut = min(score for unit, score in units.items() if kept[unit])
    assert cut >= max(score for unit, score in units.items() if not kept[unit])
    near = {unit for unit, score in units.items() if cut / 2 <= score <= 2 * cut}
    assert 5 < len(near) < 75
    for maker, reader in (("0.weight", "2.weight"), ("2.weight", "4.weight")):
        best = max((unit for unit in units if unit[:2] == (maker, reader)), key=units.get)
        near.discard(best)  # which stays whatever its score
    wanted = everywhere(scores, False)
    for name, score in scores.items():
        for row, column in score.bool().nonzero().tolist():
            of = [unit for unit in units if (unit[0], unit[2]) == (name, row) or (unit[1], unit[2]) == (name, column)]
            wanted[name][row, column] = all(kept[u] or u in near for u in of) and any(u in near for u in of)
    assert_near(pruner, wanted)


def test_an_allocation_of_ones_own_needs_no_more_than_masks():
    class Mine:
        scope = "learned"

        def masks(self, records, scores, sparsity):
            return Allocation("learned").masks(records, scores, sparsity)

        def check(self, records, target):
            pass

    mine, ours = (updated(network(), allocation)[0] for allocation in (Mine(), "learned"))
    assert all(torch.equal(near, ours._near[name]) for name, near in mine._near.items())


def test_scores_whose_squares_are_zero_are_still_in_units_of_their_layer():
    rates = LayerRates(["a", "b"])
    scores = {"a": torch.rand(50), "b": torch.rand(50)}
    tiny = {"a": scores["a"] * 1e-25, "b": scores["b"] * 1e-30}
    for name, weighed in rates.weigh(tiny).items():
        torch.testing.assert_close(weighed, rates.weigh(scores)[name])
    assert (rates.weigh({"a": torch.zeros(5), "b": torch.ones(5)})["a"] == 0).all()
