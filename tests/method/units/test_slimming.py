"""A slimmed model is smaller and answers as the one it was made of: the unslimmed model is the truth throughout."""

import copy
import types

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.mlp_mixer import MlpMixer
from timm.models.vgg import VGG
from torch import nn
from torch.nn.utils import prune
from transformers import ViTConfig, ViTForImageClassification

from tscnc_hf.inference.layers import SparseLinear
from tscnc_hf.method.units.gates import attach_gates, gate_parameters, gated_layers
from tscnc_hf.method.units.groups import structure_groups
from tscnc_hf.method.units.slimming import cut_dead_units
from tscnc_hf.method.units.widths import changed_widths, set_widths_


RESNET = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1], "num_classes": 5}


def hf_vit():
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, image_size=32, patch_size=8
    )
    return ViTForImageClassification(config)


def timm_vit(**kwargs):
    settings = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 5,
    } | kwargs
    return timm.create_model("vit_tiny_patch16_224", **settings)


class Functional(nn.Module):
    """A torchvision-like network: activations and flattening are in the forward code only."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 12, 3, 2))
        self.classifier = nn.Sequential(nn.Linear(12 * 16, 20), nn.Tanh(), nn.Linear(20, 5))

    def forward(self, x):
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(F.silu(self.features(x)), 4), 1))


MODELS = {
    "resnet18": lambda: timm.create_model("resnet18", **RESNET),
    "resnet50": lambda: timm.create_model("resnet50", **RESNET),
    "seresnet50": lambda: timm.create_model("seresnet50", **RESNET),
    "vgg": lambda: VGG([8, "M", 12, 10, "M"], num_classes=5, mlp_ratio=1 / 64, norm_layer=nn.BatchNorm2d),
    "mobilenetv2": lambda: timm.create_model("mobilenetv2_050", num_classes=5),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
    "convnext": lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=5),
    "mixer": lambda: MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=16),
    "hf_vit": hf_vit,
    "timm_vit": timm_vit,
    "functional": Functional,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def prepared(kind: str) -> nn.Module:
    """In evaluation mode, with batch-norm statistics and biases of its own, so that nothing is zero by chance."""
    model = MODELS[kind]().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.5)
    return model


def side(model) -> int:
    return 64 if "Mobile" in type(model).__name__ or "Efficient" in type(model).__name__ else 32


def images(model) -> torch.Tensor:
    return torch.randn(3, 3, side(model), side(model), dtype=next(model.parameters()).dtype)


def logits(model, x):
    output = model(x)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_same(slimmed, model):
    x = images(model)
    with torch.no_grad():
        expected = logits(model, x)
        assert expected.std() > 1e-3  # there is something to get wrong
        torch.testing.assert_close(logits(slimmed, x), expected, rtol=0, atol=1e-4)
        exact = logits(copy.deepcopy(model).double(), x.double())
        found = logits(copy.deepcopy(slimmed).double(), x.double())
    # biases that constants were added to are rounded to float32, nothing else differs
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6 * exact.abs().max().item())


def kill(model, groups=None, share=0.5) -> dict[str, torch.Tensor]:
    """Zero the weights of random units of every group, at least one stays and one goes; returns what was kept."""
    kept = {}
    for group in groups or structure_groups(model):
        keep = torch.rand(group.count) > share
        keep[0], keep[1] = True, False
        masks = group.unit_masks(keep)
        for part in group.weights:
            part.tensor.data.mul_(masks[part.name])
        kept[group.name] = keep
    return kept


@pytest.mark.parametrize("kind", MODELS)
def test_cuts_what_nobody_reads(kind):
    model = prepared(kind)
    kept = kill(model)
    slimmed, report = cut_dead_units(model, images(model))
    assert_same(slimmed, model)
    assert {row.name: row.kept for row in report.rows} == {name: int(keep.sum()) for name, keep in kept.items()}
    assert all(not row.why and row.left == 0 for row in report.rows)
    assert report.parameters_after == sum(p.numel() for p in slimmed.parameters()) < report.parameters_before
    assert report.macs_after < report.macs_before and report.difference < 1e-12
    for group in structure_groups(slimmed):
        assert group.count == kept[group.name].sum()


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_dead_nothing_cut(kind):
    model = prepared(kind)
    slimmed, report = cut_dead_units(model, images(model))
    assert report.removed == 0 and report.difference == 0 and slimmed is not model
    assert all(torch.equal(a, b) for a, b in zip(slimmed.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["hf_vit", "timm_vit", "convnext", "mixer", "resnet50", "functional", "vgg"])
def test_a_constant_goes_into_the_bias_of_its_reader(kind):
    """Only the makers' weights are zero: what they make is a constant, after norms and activations mostly not 0."""
    model = prepared(kind)
    expected = {}
    for group in structure_groups(model):
        keep = torch.rand(group.count) > 0.5
        keep[0], keep[1] = True, False
        for part in group.parts:
            if part.role == "make" and part.tensor_name == "weight":
                rows = part.by_unit(part.tensor.data)  # (units, blocks of rows)
                line = part.expand(keep)
                if part.blocks == 3:  # a head is constant if its values are, whatever queries and keys
                    line[: len(line) // 3 * 2] = True
                assert len(rows) == group.count
                part.tensor.data[~line] = 0
        expected[group.name] = int(keep.sum())
    slimmed, report = cut_dead_units(model, images(model))
    assert_same(slimmed, model)
    for row in report.rows:
        if row.left:
            assert "pads with zeros" in row.why
        else:
            assert row.kept == expected[row.name] and row.constant == row.units - row.kept
    folded = [row.name for row in report.rows if not row.left]
    assert folded and report.removed > 0
    if kind == "resnet50":
        assert {f"layer{i}.0.conv3" for i in (1, 2, 3, 4)} <= set(folded)  # 1x1, through the mean of bn3
    if kind in ("hf_vit", "timm_vit", "convnext", "mixer"):
        assert len(folded) == len(report.rows)


@pytest.mark.parametrize("kind", ["resnet18", "mobilenetv2", "mobilenetv3"])
def test_behind_zero_padding_only_zero_counts(kind):
    model = prepared(kind)
    name = "layer1.0.conv2" if kind == "resnet18" else "blocks.2.0.conv_pwl"
    group = next(group for group in structure_groups(model) if group.name == name)
    norm = next(part.module for part in group.parts if part.role == "norm")
    group.parts[0].tensor.data[:6] = 0
    norm.running_mean[:6], norm.weight.data[:6] = 0, 1
    norm.bias.data[:3], norm.bias.data[3:6] = -4, 1  # ReLU, ReLU6 and hard swish make 0 of -4
    if kind != "resnet18":
        last = [part.module for part in group.parts if part.role == "norm"][-1]
        last.running_mean[:6], last.bias.data[:6] = 0, 0
    slimmed, report = cut_dead_units(model, images(model))
    assert_same(slimmed, model)
    row = next(row for row in report.rows if row.name == name)
    assert (row.units - row.kept, row.constant) == (3, 3)
    if kind == "resnet18":
        assert row.left == 3 and "pads with zeros" in row.why
    else:  # a depthwise convolution with padding makes a picture of a constant: those units live
        assert row.left == 0


def test_a_depthwise_row_of_zeros_is_a_constant_too():
    model = prepared("mobilenetv2")
    block = model.blocks[2][0]
    block.conv_dw.weight.data[4:9] = 0
    slimmed, report = cut_dead_units(model, images(model))
    assert_same(slimmed, model)
    row = next(row for row in report.rows if row.name == "blocks.2.0.conv_pwl")
    assert (row.units - row.kept, row.constant) == (5, 5)


def test_squeeze_excitation_reads_and_multiplies():
    model = prepared("mobilenetv3")
    block = model.blocks[2][0]
    block.conv_pwl.weight.data[:, :3] = 0  # units 0 to 2 still move the factors of all others
    block.se.conv_reduce.weight.data[:, 0] = 0  # unit 0 does not
    block.conv_dw.weight.data[5] = 0  # constant, but multiplied by what depends on the image
    block.bn2.bias.data[5], block.bn2.running_mean[5] = 2, 0
    slimmed, report = cut_dead_units(model, images(model))
    assert_same(slimmed, model)
    row = next(row for row in report.rows if row.name == "blocks.2.0.conv_pwl")
    assert (row.units - row.kept, row.unread) == (1, 1)


def test_units_that_are_only_inactive_stay():
    model = prepared("resnet18")
    model.layer1[0].bn1.bias.data[:] = -100  # ReLU gives 0 for every image one would think of
    slimmed, report = cut_dead_units(model, images(model))
    assert report.removed == 0


@pytest.mark.parametrize("kind", ["resnet50", "hf_vit", "timm_vit", "mobilenetv3"])
def test_a_block_that_is_dead_altogether_keeps_one_unit(kind):
    model = prepared(kind)
    for group in structure_groups(model)[:2]:
        for part in group.weights:
            nn.init.zeros_(part.tensor)
    slimmed, report = cut_dead_units(model, images(model))
    assert_same(slimmed, model)
    assert [row.kept for row in report.rows[:2]] == [1, 1]
    assert all(row.left == 1 and row.why == "one unit must stay" for row in report.rows[:2])


def test_what_only_a_dead_unit_read_is_dead():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    model[4].weight.data[:, 2:] = 0
    model[2].weight.data[:2, 3:] = 0  # units 3 to 5 of the first layer are read by dead units only
    slimmed, report = cut_dead_units(model, torch.randn(3, 4))
    assert [(row.kept, row.unread) for row in report.rows] == [(3, 3), (2, 3)]
    x = torch.randn(3, 4)
    torch.testing.assert_close(slimmed(x), model(x))


def test_closed_gates_become_cuts():
    model = prepared("timm_vit")
    attach_gates(model)
    for parameter in gate_parameters(model):
        nn.init.normal_(parameter, std=3)
        parameter.data[0], parameter.data[1] = -4.0, 4.0
    slimmed, report = cut_dead_units(model, images(model))
    closed = {name: int((layer.gate.deterministic() == 0).sum()) for name, layer in gated_layers(model).items()}
    assert {row.name: row.unread for row in report.rows} == closed
    assert_same(slimmed, model)
    assert not gate_parameters(slimmed) and gate_parameters(model)


def test_shared_and_tied_layers_are_left_alone():
    shared = nn.Linear(6, 6)
    twice = nn.Sequential(shared, nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), shared).eval()
    shared.weight.data[:, 2] = 0
    twice[2].weight.data[:, 1] = 0
    slimmed, report = cut_dead_units(twice, torch.randn(2, 6))
    assert report.removed == 0 and sum(row.left for row in report.rows) == 2
    assert all("2 places" in row.why for row in report.rows)

    tied = prepared("timm_vit")
    kill(tied)
    tied.blocks[1].mlp.fc1.weight = tied.blocks[0].mlp.fc1.weight
    slimmed, report = cut_dead_units(tied, images(tied))
    assert_same(slimmed, tied)
    assert slimmed.blocks[1].mlp.fc1.weight is slimmed.blocks[0].mlp.fc1.weight
    assert [row.kept < row.units for row in report.rows] == [True, False, True, False]


class Tapped(nn.Module):
    """Names and order say conv1 -> conv2; the forward code reads conv1's channels in a second place."""

    def __init__(self):
        super().__init__()
        self.conv1, self.act, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)
        self.mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        first = self.act(self.conv1(x))
        return self.mlp((first + self.conv2(first)).mean((2, 3)))


def test_where_names_mislead_the_group_is_left_alone():
    model = Tapped().eval()
    model.conv2.weight.data[:, :3] = 0
    model.mlp[2].weight.data[:, :3] = 0
    slimmed, report = cut_dead_units(model, torch.randn(2, 3, 8, 8))
    rows = {row.name: row for row in report.rows}
    assert rows["conv2"].kept == 6 and rows["conv2"].left == 3 and "differently" in rows["conv2"].why
    assert rows["mlp.2"].kept == 5
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(slimmed(x), model(x))


def test_hooked_layers_are_left_alone():
    model = prepared("resnet18")
    kill(model)
    model.layer1[0].conv2.register_forward_pre_hook(lambda module, args: None)
    report = cut_dead_units(model, images(model))[1]
    assert [row.kept == row.units for row in report.rows] == [True, False, False, False]
    assert "hook" in report.rows[0].why


def test_widths_that_are_asked_for():
    model = prepared("timm_vit")
    kept = kill(model)
    slimmed, report = cut_dead_units(model, images(model), multiple_of=8)
    assert_same(slimmed, model)
    for row in report.rows:
        alive = int(kept[row.name].sum())
        assert row.kept == (alive if row.kind == "heads" else -(-alive // 8) * 8)
        assert row.left == row.kept - alive
    slimmed, report = cut_dead_units(model, images(model), uniform=True)
    assert_same(slimmed, model)
    for kind in ("heads", "hidden"):
        most = max(int(kept[row.name].sum()) for row in report.rows if row.kind == kind)
        assert {row.kept for row in report.rows if row.kind == kind} == {most}
    report = cut_dead_units(model, images(model), kinds=("hidden",))[1]
    assert {row.kind for row in report.rows} == {"hidden"} and report.removed > 0


def test_training_goes_on_with_the_slimmed_model():
    model = prepared("resnet18").train()
    model.conv1.weight.requires_grad_(False)
    kill(model)
    slimmed, _ = cut_dead_units(model, images(model))
    assert slimmed.training and slimmed.layer1[0].bn1.training
    assert not slimmed.conv1.weight.requires_grad and slimmed.layer1[0].conv1.weight.requires_grad
    optimizer = torch.optim.SGD([p for p in slimmed.parameters() if p.requires_grad], 0.05, momentum=0.9)
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 5
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(slimmed(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in slimmed.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_keeps_dtype_and_memory_format():
    model = prepared("resnet18").to(torch.bfloat16, memory_format=torch.channels_last)
    kill(model)
    slimmed, report = cut_dead_units(model, images(model))
    weight = slimmed.layer3[0].conv2.weight
    assert weight.dtype == torch.bfloat16 and weight.is_contiguous(memory_format=torch.channels_last)
    assert report.difference < 1e-12


def test_finds_the_input_shape_or_asks_for_it():
    assert cut_dead_units(prepared("hf_vit"))[1].input_shape == (1, 3, 32, 32)
    resnet = prepared("resnet18")
    assert cut_dead_units(resnet)[1].input_shape == (1, 3, *resnet.pretrained_cfg["input_size"][1:])
    with pytest.raises(ValueError, match="example_inputs"):
        cut_dead_units(Functional())
    with pytest.raises(ValueError, match=r"\(b, 1, 32, 32\).*example_inputs"):
        cut_dead_units(resnet, torch.randn(2, 1, 32, 32))
    with pytest.raises(ValueError, match="multiple_of=0"):
        cut_dead_units(resnet, multiple_of=0)
    with pytest.raises(ValueError, match="rows"):
        cut_dead_units(resnet, kinds=("rows",))


@pytest.mark.parametrize("kind", ["resnet50", "mobilenetv3", "timm_vit", "hf_vit"])
def test_widths_rebuild_the_slimmed_model(kind):
    model = prepared(kind)
    kill(model)
    slimmed, _ = cut_dead_units(model, images(model))
    widths = changed_widths(model, slimmed)
    rebuilt = MODELS[kind]().eval()
    set_widths_(rebuilt, widths)
    rebuilt.load_state_dict(slimmed.state_dict())
    assert_same(rebuilt, model)
    name = next(iter(widths))
    for wrong, match in (
        ({"nowhere": {"in_features": 3}}, "nowhere"),
        ({name: {"weight": 3}}, "weight=3"),
        ({name: {key: 10**6 for key in widths[name]}}, "from 1 to"),
        ({name: {key: True for key in widths[name]}}, "True"),
    ):
        before = {key: tensor.shape for key, tensor in rebuilt.state_dict().items()}
        with pytest.raises(ValueError, match=match):
            set_widths_(rebuilt, wrong)
        assert {key: tensor.shape for key, tensor in rebuilt.state_dict().items()} == before


def test_a_forward_that_belongs_to_another_model_is_refused():
    model = prepared("resnet18")
    kill(model)
    x, forward = images(model), model.forward
    model.forward = types.MethodType(lambda self, x: type(self).forward(self, x), model)  # of its own: fine
    assert cut_dead_units(model, x)[1].removed > 0
    model.forward = lambda x: forward(x)
    with pytest.raises(ValueError, match="ResNet is compiled, or its forward"):
        cut_dead_units(model, x)
    del model.forward
    with pytest.raises(ValueError, match="_orig_mod"):
        cut_dead_units(torch.compile(model), x)


def test_the_report_reads_well():
    model = prepared("timm_vit")
    kill(model)
    report = cut_dead_units(model, images(model))[1]
    assert "| `blocks.0.attn.proj` | heads | 4 |" in report.to_markdown()
    assert "MACs, input 1 x 3 x 32 x 32" in report.to_markdown()
    plain = report.to_dict()
    assert plain["removed"] == sum(row["units"] - row["kept"] for row in plain["rows"]) > 0


@pytest.mark.parametrize(
    "attach, advice",
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
        (nn.utils.weight_norm, "remove_weight_norm"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_a_weight_that_is_computed_anew_is_named(attach, advice):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)).eval()
    attach(model[2])
    with pytest.raises(ValueError, match=f"2.weight is computed from other parameters.*{advice}"):
        cut_dead_units(model, torch.randn(2, 3, 8, 8))


def test_a_compiled_copy_is_not_slimmed():
    model = nn.Sequential(nn.Flatten(), SparseLinear(nn.Linear(12, 10)), nn.ReLU(), nn.Linear(10, 5)).eval()
    with pytest.raises(ValueError, match="copy by sparse_compile.*slim the model that it was compiled from"):
        cut_dead_units(model, torch.randn(2, 3, 2, 2))
