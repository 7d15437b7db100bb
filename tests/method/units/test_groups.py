"""Which units a model is made of, and that their masks reach all of a unit and nothing else."""

import pytest
import timm
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.units.groups import structure_groups
from tscnc_hf.method.units.sites import gate_sites


def groups_of(model) -> dict:
    return {group.name: group for group in structure_groups(model)}


def timm_vit(**kwargs):
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 5} | kwargs
    return timm.create_model("vit_tiny_patch16_224", **settings)


def hf_vit():
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config)


def test_a_basic_block_and_a_bottleneck():
    settings = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1], "num_classes": 5}
    basic = groups_of(timm.create_model("resnet18", **settings))
    assert list(basic) == [f"layer{i}.0.conv2" for i in (1, 2, 3, 4)]
    assert [p.name for p in basic["layer1.0.conv2"].parts] == [
        *("layer1.0.conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn1.bias"),
        *("layer1.0.bn1.running_mean", "layer1.0.bn1.running_var", "layer1.0.conv2.weight"),
    ]
    bottleneck = groups_of(timm.create_model("resnet50", **settings))
    assert {f"layer{i}.0.conv{j}" for i in (1, 2, 3, 4) for j in (2, 3)} == bottleneck.keys()
    assert all(group.kind == "channels" and not group.blocked for group in bottleneck.values())


def test_vgg_down_to_the_classifier():
    with torch.device("meta"):  # 129 million weights
        names = [group.name for group in structure_groups(timm.create_model("vgg11_bn", num_classes=5))]
    assert names[-3:] == ["pre_logits.fc1", "pre_logits.fc2", "head.fc"] and len(names) == 10


def test_a_chain_with_depthwise_convolution_and_squeeze_excitation():
    groups = groups_of(timm.create_model("mobilenetv3_small_050", num_classes=5))
    chain = groups["blocks.2.0.conv_pwl"]
    assert [(p.name.removeprefix("blocks.2.0."), p.role, p.dim) for p in chain.weights] == [
        ("conv_pw.weight", "make", 0),
        ("conv_dw.weight", "depthwise", 0),
        ("se.conv_reduce.weight", "squeeze", 1),
        ("se.conv_expand.weight", "excite", 0),
        ("conv_pwl.weight", "read", 1),
    ]
    assert groups["blocks.2.0.se.conv_expand"].kind == "hidden"
    assert groups["classifier"].count == 1024 and groups["classifier"].kind == "channels"


def test_heads_and_hidden_units():
    for model, attention, mlp, units in (
        (timm_vit(), "blocks.1.attn.proj", "blocks.1.mlp.fc2", (4, 64)),
        (hf_vit(), "vit.layers.1.attention.o_proj", "vit.layers.1.mlp.fc2", (3, 20)),
    ):
        groups = groups_of(model)
        assert (groups[attention].count, groups[mlp].count) == units
        assert (groups[attention].kind, groups[mlp].kind) == ("heads", "hidden")
        assert len(groups) == 4


@pytest.mark.parametrize("make", [timm_vit, lambda: timm.create_model("resnet18")])
def test_every_place_for_gates_is_a_group(make):
    model = make()
    groups = groups_of(model)
    for site in gate_sites(model):
        assert groups[site.name].count == site.count and groups[site.name].reader is site.reader


def test_masks_zero_one_head_and_nothing_else():
    model = timm_vit()
    group = groups_of(model)["blocks.0.attn.proj"]
    keep = torch.tensor([True, False, True, True])
    masks = group.unit_masks(keep)
    assert masks.keys() == {"blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"}
    expected = torch.ones(3, 4, 4, 16, dtype=torch.bool)  # q, k, v; head; channel of the head; input
    expected[:, 1] = False
    assert torch.equal(masks["blocks.0.attn.qkv.weight"], expected.reshape(48, 16))
    assert torch.equal(masks["blocks.0.attn.proj.weight"][0], keep.repeat_interleave(4))


def test_sums_over_units_count_every_weight_once():
    model = timm.create_model("mobilenetv3_small_050", num_classes=5)
    group = groups_of(model)["blocks.2.0.conv_pwl"]
    sums = group.unit_sums({part.name: part.tensor.detach().square() for part in group.weights})
    block = model.blocks[2][0]
    first = [block.conv_pw.weight[7], block.conv_dw.weight[7], block.se.conv_reduce.weight[:, 7]]
    first += [block.se.conv_expand.weight[7], block.conv_pwl.weight[:, 7]]
    torch.testing.assert_close(sums[7], sum(part.square().sum() for part in first))
    with pytest.raises(ValueError, match="conv_pw.weight"):
        group.unit_sums({"other": torch.ones(1)})


def test_weights_have_the_names_of_the_matrices():
    for model in (timm_vit(), hf_vit(), timm.create_model("mobilenetv3_small_050")):
        known = {record.name for record in weight_matrices(model)}
        assert {part.name for group in structure_groups(model) for part in group.weights} <= known


def test_what_cannot_be_cut_is_blocked():
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=12, num_heads=(2, 2, 2, 2))
    heads = [group for group in structure_groups(swin) if group.kind == "heads"]
    assert len(heads) == 4 and all("relative_position_bias_table" in group.blocked for group in heads)

    tied = timm_vit()
    tied.blocks[1].mlp.fc1.weight = tied.blocks[0].mlp.fc1.weight
    groups = groups_of(tied)
    assert "tied" in groups["blocks.0.mlp.fc2"].blocked and "tied" in groups["blocks.1.mlp.fc2"].blocked
    assert not groups["blocks.0.attn.proj"].blocked

    shared = nn.Linear(6, 6)
    twice = nn.Sequential(shared, nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), shared)
    assert all("2 places" in group.blocked for group in structure_groups(twice))

    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 3))
    assert "groups" in structure_groups(grouped)[0].blocked

    parametrized = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    nn.utils.parametrizations.weight_norm(parametrized[0])
    assert "computed" in structure_groups(parametrized)[0].blocked


def test_what_mixes_units_ends_a_group():
    assert structure_groups(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))) == []
    assert structure_groups(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3))) == []
    # global response normalisation divides by a mean over all hidden units
    model = timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    assert structure_groups(model) == []
    # conv2 of a pair reads half of the channels that a gated unit makes
    assert structure_groups(nn.Sequential(nn.Linear(4, 12), nn.GLU(), nn.Linear(6, 3))) == []
