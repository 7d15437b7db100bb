"""Which weights are zero: exact for every scope, floor and pattern, on real architectures."""

import math

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning.allocation import Allocation, share_out
from tscnc_hf.method.pruning.pruner import Pruner


ARCHITECTURES = {
    "vit": lambda: ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                  intermediate_size=64, num_labels=10)
    ),
    "resnet": lambda: timm.create_model("resnet18", num_classes=10, channels=[16, 16, 32, 32], layers=[1, 1, 1, 1]),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=10, depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)),
    "mobilenet": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=10, img_size=32, window_size=2, embed_dim=16, depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 2),
    ),
    "mixer": lambda: MlpMixer(num_classes=10, img_size=32, patch_size=8, num_blocks=2, embed_dim=32),
}  # fmt: skip


def records_and_scores(model: nn.Module, exclude=()):
    records = list(weight_matrices(model, exclude))
    return records, {record.name: torch.rand(record.weight.shape) for record in records}


def zeros(masks) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


def shares(masks) -> dict[str, float]:
    return {name: float((~mask).double().mean()) for name, mask in masks.items()}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return ARCHITECTURES[request.param]()


@pytest.mark.parametrize("scope", ["global", "uniform", "erk"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99, 0.999])
def test_exact_to_one_weight(scope, sparsity, architecture):
    records, scores = records_and_scores(architecture)
    total = sum(score.numel() for score in scores.values())
    masks = Allocation(scope).masks(records, scores, sparsity)
    assert list(masks) == [record.name for record in records]
    assert all(masks[name].shape == score.shape for name, score in scores.items())
    assert zeros(masks) == round(sparsity * total)
    if scope == "uniform":
        wanted = {name: (1 - sparsity) * score.numel() for name, score in scores.items()}
        spent = sum(count < 1 for count in wanted.values())  # of the others, on layers that keep one weight anyway
        assert all(abs(int(mask.sum()) - wanted[name]) < 1.001 + spent for name, mask in masks.items())


@pytest.mark.parametrize("scope", ["global", "uniform", "erk"])
def test_floors_and_exact_totals_together(scope, architecture):
    records, scores = records_and_scores(architecture)
    total = sum(score.numel() for score in scores.values())
    masks = Allocation(scope, layer_floor=0.01, row_floor=1).masks(records, scores, 0.9)
    assert zeros(masks) == round(0.9 * total)
    for record in records:
        mask = masks[record.name]
        assert int(mask.sum()) >= 0.01 * mask.numel()
        assert bool(record.view(mask).any(-1).all())  # no row of any matrix is empty


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (1, 2)])
@pytest.mark.parametrize("scope", ["global", "uniform", "erk"])
def test_patterns_hold_in_every_group(scope, pattern, architecture):
    n, m = pattern
    odd = [record.name for record in weight_matrices(architecture) if inputs(record) % m]
    records, scores = records_and_scores(architecture, odd)
    allocation = Allocation(scope, pattern=pattern)
    for sparsity in (1 - n / m, 0.9):
        allocation.check(records, sparsity)
        masks = allocation.masks(records, scores, sparsity)
        assert zeros(masks) == round(sparsity * sum(score.numel() for score in scores.values()))
        for record in records:
            assert kept_in_groups(record, masks[record.name], m) <= n


def inputs(record) -> int:
    """Input channels that a layer reads, by its type."""
    module = record.module
    return module.in_channels // module.groups if isinstance(module, nn.Conv2d) else module.in_features


def kept_in_groups(record, mask: torch.Tensor, m: int) -> int:
    """Most weights that are kept of m consecutive input channels; (out, in, ...) as torch lays weights out."""
    moved = mask.movedim(1, -1)
    return int(moved.reshape(*moved.shape[:-1], -1, m).sum(-1).max())


def test_a_pattern_takes_the_largest_of_each_group_and_the_smallest_groups_first():
    layer = nn.Linear(8, 2)
    (record,) = weight_matrices(layer)
    score = torch.tensor([[1.0, 2, 3, 4, 50, 60, 70, 80], [9, 8, 7, 6, 5, 4, 3, 2]])
    allocation = Allocation(pattern=(2, 4))
    masks = allocation.masks([record], {"weight": score}, 0.5)
    assert torch.equal(score[masks["weight"]], torch.tensor([3.0, 4, 70, 80, 9, 8, 5, 4]))
    part = allocation.masks([record], {"weight": score}, 0.25)["weight"]  # on the way: 4 of the 8, the smallest
    assert torch.equal(score[~part], torch.tensor([1.0, 2, 3, 2]))


def test_uniform_and_erk_are_what_they_say():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(64, 10))
    records, scores = records_and_scores(model)
    masks = Allocation("erk").masks(records, scores, 0.9)
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    dimensions = {"0.weight": 16 + 32 + 6, "1.weight": 32 + 64 + 6, "3.weight": 64 + 10}
    factor = kept["1.weight"] / dimensions["1.weight"]
    for name, size in dimensions.items():
        assert kept[name] == pytest.approx(min(factor * size, scores[name].numel()), abs=1.5)


def test_erk_leaves_a_layer_dense_that_would_keep_more_than_it_has():
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 4))
    records, scores = records_and_scores(model)
    masks = Allocation("erk").masks(records, scores, 0.5)
    assert masks["1.weight"].all() and zeros(masks) == round(0.5 * 91200)


def test_global_ranks_across_layers():
    model = nn.Sequential(nn.Linear(10, 1), nn.Linear(10, 1))
    records, _ = records_and_scores(model)
    scores = {"0.weight": torch.full((1, 10), 0.1), "1.weight": torch.full((1, 10), 1.0)}
    masks = Allocation().masks(records, scores, 0.5)
    assert masks["0.weight"].sum() == 1 and masks["1.weight"].sum() == 9


@pytest.mark.parametrize("scope", ["global", "uniform", "erk"])
def test_rates_that_are_given_hold_and_the_rest_shares_the_rest(scope):
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20), nn.Linear(20, 10))
    records, scores = records_and_scores(model)
    masks = Allocation(scope, layer_sparsity={"0.": 0.25, "2.weight": 1.0}).masks(records, scores, 0.5)
    assert shares(masks)["0.weight"] == 0.25 and shares(masks)["2.weight"] == 1.0
    assert zeros(masks) == 1000
    with pytest.raises(ValueError, match="'head', which no prunable weight"):
        Allocation(layer_sparsity={"head": 0.5}).masks(records, scores, 0.5)


@pytest.mark.parametrize("scope", ["global", "uniform", "erk"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.3])
def test_on_the_way_to_the_target_rates_that_are_given_are_reached_in_part(scope, sparsity):
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20), nn.Linear(20, 10))
    records, scores = records_and_scores(model)
    masks = Allocation(scope, layer_sparsity={"0.": 0.25, "2.weight": 1.0}).masks(records, scores, sparsity)
    assert zeros(masks) == 2000 * sparsity
    found = shares(masks)
    assert found["0.weight"] <= 0.25 and (found["1.weight"] == 0) == (sparsity <= 0.25)


def test_what_cannot_be_reached_is_said_with_what_can():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    records, scores = records_and_scores(model)
    with pytest.raises(ValueError, match=r"0\.95 is not reachable.*the largest is 0\.9,"):
        Allocation(row_floor=1).check(records, 0.95)
    with pytest.raises(ValueError, match=r"0\.6 is not reachable.*the largest is 0\.495,"):
        Allocation(layer_sparsity={"0.": 0.0}).check(records, 0.6)
    with pytest.raises(ValueError, match=r"0\.2 is not reachable.*the smallest is 0\.25 "):
        Allocation(layer_sparsity={"0.": 0.5}).check(records, 0.2)
    Allocation(row_floor=1).check(records, 0.9)
    Allocation(layer_sparsity={"0.": 0.0}).check(records, 0.495)


def test_patterns_that_do_not_fit():
    with pytest.raises(ValueError, match="keeps 4 of 2; n must be"):
        Allocation(pattern=(4, 2))
    (record,) = weight_matrices(nn.Conv2d(3, 8, 3))
    with pytest.raises(ValueError, match=r"weight reads 3 input channels, which groups of 4 do not divide.*exclude"):
        Allocation(pattern=(2, 4)).check([record], 0.5)
    (record,) = weight_matrices(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"target_sparsity=0.4 does not give 2:4, which has 0.5 zeros"):
        Allocation(pattern=(2, 4)).check([record], 0.4)
    with pytest.raises(ValueError, match="can keep 0 to 32"):
        Allocation(pattern=(2, 4), layer_sparsity={"weight": 0.2}).masks([record], {"weight": torch.rand(8, 8)}, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "row"}, "scope='row' is unknown; use one of global, uniform, erk, learned"),
        ({"layer_sparsity": {"a": 1.5}}, "'a' is 1.5, a fraction of zeros"),
        ({"layer_floor": 1.0}, r"layer_floor=1.0 is outside \[0, 1\)"),
        ({"row_floor": -1}, "row_floor=-1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Allocation(**options)


@pytest.mark.parametrize("seed", range(20))
def test_shares_add_up_within_their_bounds(seed):
    generator = torch.Generator().manual_seed(seed)
    maximum = {str(i): int(torch.randint(1, 50, (), generator=generator)) for i in range(7)}
    minimum = {name: int(torch.randint(0, size + 1, (), generator=generator)) for name, size in maximum.items()}
    weights = {name: float(torch.rand((), generator=generator)) + 0.01 for name in maximum}
    low, high = sum(minimum.values()), sum(maximum.values())
    for total in {low, high, (low + high) // 2, low + 1 if low < high else low}:
        counts = share_out(total, weights, minimum, maximum)
        assert sum(counts.values()) == total
        assert all(minimum[name] <= counts[name] <= maximum[name] for name in counts)
        free = [name for name in counts if minimum[name] + 1 < counts[name] < maximum[name] - 1]
        factors = [counts[name] / weights[name] for name in free]
        spread = max((1.5 / weights[name] for name in free), default=math.inf)
        assert not free or max(factors) - min(factors) <= 2 * spread


# ---- no matrix is emptied whole ----


def emptied(records, masks) -> list[str]:
    """Matrices of at least 2 x 2 of which nothing is kept."""
    found = []
    for record in records:
        matrices = record.view(masks[record.name])
        if min(matrices.shape[1:]) > 1:
            found += [f"{record.name}[{i}]" for i, one in enumerate(matrices) if not one.any()]
        elif not matrices.any():
            found.append(record.name)
    return found


@pytest.mark.parametrize("scope", ["global", "uniform", "erk", "learned"])
def test_no_allocation_empties_a_matrix(scope, architecture):
    """Scores by which one ranking would empty every second weight, and the last matrix of every fused one."""
    records, scores = records_and_scores(architecture)
    for place, record in enumerate(records):
        scores[record.name] *= 1e-6 if place % 2 else 1
        record.view(scores[record.name])[-1] *= 1e-3
    total = sum(score.numel() for score in scores.values())
    masks = Allocation(scope).masks(records, scores, 0.95)
    assert not emptied(records, masks) and zeros(masks) == round(0.95 * total)
    for record in records:  # what is kept of a layer is the best of it
        kept = scores[record.name][masks[record.name]]
        assert len(kept) and kept.max() == scores[record.name].max()


def test_the_floor_changes_nothing_where_no_matrix_is_emptied(architecture):
    records, scores = records_and_scores(architecture)
    joined = torch.cat([score.flatten() for score in scores.values()])
    threshold = joined.kthvalue(round(0.9 * len(joined))).values
    masks = Allocation().masks(records, scores, 0.9)
    assert all(torch.equal(masks[name], score > threshold) for name, score in scores.items())


def test_each_part_of_a_fused_weight_keeps_a_weight_within_a_pattern():
    layer = nn.Module()
    layer.qkv = nn.Linear(8, 24)
    records = list(weight_matrices(layer))
    score = torch.rand(24, 8)
    score[8:] *= 1e-6  # keys and values
    masks = Allocation(pattern=(1, 4)).masks(records, {"qkv.weight": score}, 0.95)
    assert records[0].view(masks["qkv.weight"]).flatten(1).any(1).all() and zeros(masks) == round(0.95 * 192)


def test_a_target_that_leaves_less_than_a_weight_a_matrix_is_refused_before_training():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))
    records = list(weight_matrices(model))
    Allocation().check(records, 1 - 10 / 160)
    for scope in ("global", "uniform", "erk"):
        with pytest.raises(ValueError, match=r"one weight of each matrix.*the largest is 0.9375"):
            Allocation(scope).check(records, 0.95)


def test_a_layer_is_emptied_where_it_is_asked_for_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    records, scores = records_and_scores(model)
    masks = Allocation(layer_sparsity={"1.": 1.0}).masks(records, scores, 0.6)
    assert emptied(records, masks) == ["1.weight[0]"] and zeros(masks) == round(0.6 * 128)


def test_a_matrix_that_is_empty_already_stays_so():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(24, 8))
    nn.init.zeros_(model[0].weight)
    pruner = Pruner(weight_matrices(model))
    pruner.keep_zeros()
    pruner.update(0.9)
    assert not pruner.masks["0.weight"].any() and pruner.pruned_count == pruner.target_count(0.9)
