"""Multiply-accumulates against sums by hand and against torch's own counter on real tensors."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from tscnc_hf.method.reports.flops import flops_report


def hf_vit():
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config)


def test_a_cnn_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4, stride=2),
        nn.Flatten(),
        nn.Linear(36, 5),
    )
    with torch.no_grad():
        model[0].weight[0] = 0
        model[4].weight[:, :18] = 0
    report = flops_report(model, (2, 3, 8, 8))
    by_hand = [2 * 64 * 4 * 27, 2 * 9 * 4 * 9, 2 * 36 * 5]
    assert [row.macs for row in report.rows] == by_hand
    assert [row.sparse_macs for row in report.rows] == [by_hand[0] * 3 // 4, by_hand[1], by_hand[2] // 2]
    assert [row.name for row in report.rows] == ["0", "2", "4"]
    assert (report.macs, report.flops) == (sum(by_hand), 2 * sum(by_hand))


def half_zero() -> nn.Linear:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[:2] = 0
    return layer


def test_a_weight_counts_in_each_layer_that_has_it():
    model = nn.Sequential(half_zero(), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    report = flops_report(model, (3, 4))
    assert [(r.name, r.macs, r.nonzero, r.sparse_macs) for r in report.rows] == [
        ("0", 48, 0.5, 24), ("2", 48, 0.5, 24), ("3", 48, 1.0, 48),
    ]  # fmt: skip


class Twice(nn.Module):
    """One layer in two places, of which the second one or both are called."""

    def __init__(self, both: bool):
        super().__init__()
        self.one, self.two, self.both = nn.Sequential(half_zero()), nn.Sequential(), both
        self.two.append(self.one[0])

    def forward(self, x):
        return self.two(self.one(x) if self.both else x)


@pytest.mark.parametrize("both, rows", [(True, ["one.0", "two.0"]), (False, ["two.0"])])
def test_a_layer_in_two_places_counts_where_it_is_called(both, rows):
    model = Twice(both)
    report = flops_report(model, (3, 4))
    assert [(r.name, r.macs, r.sparse_macs) for r in report.rows] == [(name, 48, 24) for name in rows]
    assert model.one[0] is model.two[0]
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 4))
    assert report.flops == counter.get_total_flops()


def test_a_layer_that_is_called_twice_in_one_place():
    layer = half_zero()
    report = flops_report(nn.Sequential(layer, nn.ReLU(), layer), (3, 4))
    assert (report.macs, report.sparse_macs) == (96, 48)


def test_a_vit_by_hand_with_its_attention():
    report = flops_report(hf_vit(), (1, 3, 8, 8))
    tokens, dim, hidden = 5, 12, 20
    rows = {row.name: row.macs for row in report.rows}
    assert rows["vit.embeddings.patch_embeddings.projection"] == 4 * dim * 48
    for block in ("vit.layers.0", "vit.layers.1"):
        assert rows[f"{block}.attention.q_proj"] == rows[f"{block}.attention.o_proj"] == tokens * dim * dim
        assert rows[f"{block}.attention"] == 2 * tokens * tokens * dim  # queries with keys, weights with values
        assert rows[f"{block}.mlp.fc1"] == rows[f"{block}.mlp.fc2"] == tokens * dim * hidden
    whole = 4 * dim * 48 + 2 * (4 * tokens * dim * dim + 2 * tokens * tokens * dim + 2 * tokens * dim * hidden)
    assert report.macs == whole + dim * 2


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "mixer_s32_224"])
def test_agrees_with_torchs_counter_on_real_tensors(name):
    model = timm.create_model(name, num_classes=5).eval()
    side = 224 if name == "mixer_s32_224" else 64
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side))
    report = flops_report(model, (1, 3, side, side))
    assert report.flops == counter.get_total_flops() == report.to_dict()["flops"]


def test_torchs_attention_layer_counts_its_projections_as_weights():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=nn.SiLU())
    nn.init.zeros_(layer.self_attn.in_proj_weight), nn.init.zeros_(layer.self_attn.out_proj.weight)
    rows = {row.name: row for row in flops_report(layer, (1, 5, 8)).rows}
    attention = rows["self_attn"]
    assert attention.macs == 5 * 8 * 32 + 2 * 5 * 5 * 8
    assert attention.sparse_macs == 2 * 5 * 5 * 8 and attention.nonzero == 0


def test_leaves_the_model_as_it_is_and_names_a_wrong_shape():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flops_report(model, (2, 3, 8, 8))
    assert model.training and model[1].training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.device.type == "cpu"
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 8\).*\(b, c, h, w\)"):
        flops_report(model, (2, 4, 8, 8))


def test_a_model_that_multiplies_nothing_costs_nothing():
    class Sums(nn.Linear):
        def forward(self, x):
            return x.sum(-1)

    report = flops_report(nn.Sequential(Sums(4, 2)), (1, 3, 4, 4))
    assert report.rows == () and report.macs == report.sparse_macs == 0


def test_the_table_ends_with_the_sum():
    report = flops_report(hf_vit(), (1, 3, 8, 8))
    assert f"| all | {report.macs:,} |" in report.to_markdown().splitlines()[-1]
    assert len(report.to_markdown().splitlines()) == len(report.rows) + 3


def test_a_parameter_that_goes_into_a_module_as_it_is():
    """As CaiT's class token: it asks for a gradient, and nothing here has one."""

    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.mixed = nn.Parameter(torch.randn(1, 4)), nn.Linear(4, 3)

        def forward(self, x):
            return self.mixed(self.token) + x.mean((1, 2, 3))[:, None]

    assert flops_report(Token(), (1, 3, 8, 8)).macs == 12
