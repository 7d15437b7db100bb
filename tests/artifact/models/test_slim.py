"""Slimmed models on disk: stock transformers loads them where the config can say the widths, and refuses them loudly
where it cannot."""

import json

import pytest
import timm
import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from tests.processes import run_python
from tscnc_hf import load_slim, load_sparse, save_sparse, slim
from tscnc_hf.artifact.models.loading import load_model, load_weights
from tscnc_hf.artifact.repository.opening import open_repository
from tscnc_hf.artifact.repository.recard import rebuild_card
from tscnc_hf.method.units.groups import structure_groups


SIZE = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0}


def hf_vit():
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, image_size=32, patch_size=8
    )
    return ViTForImageClassification(config)


def wrapped(name: str, **model_args):
    config = TimmWrapperConfig(architecture=name, model_args=model_args, num_labels=5, pretrained_cfg=SIZE)
    return TimmWrapperForImageClassification(config)


def of_two_towers(config_class, model_class):
    tower = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    vision = tower | {"image_size": 32, "patch_size": 8}
    return model_class(config_class(vision_config=vision, text_config=tower | {"vocab_size": 16}, num_labels=5))


def hf_swin(heads=(2, 4)):
    shape = {"embed_dim": 16, "depths": [1, 1], "num_heads": list(heads), "window_size": 4}
    return SwinForImageClassification(SwinConfig(image_size=32, patch_size=4, num_labels=5, **shape))


STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 16)}
LAYERS = {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 16)}
WIDE = {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32), "stem_width": (16, 16)}
MODELS = {
    "hf_vit": hf_vit,
    "hf_swin": hf_swin,
    "hf_swin of equal heads": lambda: hf_swin((4, 4)),
    "clip": lambda: of_two_towers(CLIPConfig, CLIPForImageClassification),
    "siglip": lambda: of_two_towers(SiglipConfig, SiglipForImageClassification),
    "convnext": lambda: wrapped("convnext_atto", **STAGES),
    "inception-next": lambda: wrapped("inception_next_atto", **STAGES),
    "seresnet18": lambda: wrapped("seresnet18", channels=[8, 8, 16, 16], layers=[1, 1, 1, 1]),
    "vgg11_bn": lambda: wrapped("vgg11_bn", mlp_ratio=1 / 64),
    "fastvit": lambda: wrapped("fastvit_t8", **LAYERS),
    "maxvit": lambda: wrapped("maxvit_pico_rw_256", img_size=32, **WIDE),
    "resnest14d": lambda: wrapped("resnest14d", channels=[8, 8, 16, 16], layers=[1, 1, 1, 1]),
    "cait": lambda: wrapped("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=4),
    "timm_vit": lambda: wrapped("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=4),
    "resnet18": lambda: wrapped("resnet18", channels=[8, 8, 16, 16], layers=[1, 1, 1, 1]),
    "resnet50": lambda: wrapped("resnet50", channels=[8, 8, 16, 16], layers=[1, 1, 1, 1]),
    "mobilenetv3": lambda: wrapped("mobilenetv3_small_050"),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(kind: str, share: float | None, kinds=("heads", "hidden", "channels")):
    """A model of which each group of units keeps this share of its units, or a random one (None)."""
    model = MODELS[kind]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:  # biases and batch norms
            nn.init.uniform_(parameter, 0.2, 1)
    for group in structure_groups(model):
        if group.kind not in kinds:
            continue
        dead = round(group.count * (1 - share)) if share else int(torch.randint(1, group.count, ()))
        keep = torch.ones(group.count, dtype=torch.bool)
        keep[torch.randperm(group.count)[:dead]] = False
        masks = group.unit_masks(keep)
        for part in group.weights:
            part.tensor.data.mul_(masks[part.name])
    return model


def images():
    return torch.randn(3, 3, 32, 32)


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


STOCK = """
import json, sys
sys.modules["tscnc_hf"] = None  # cannot be imported
import torch
from transformers import AutoModelForImageClassification
for folder in sys.argv[1:]:
    try:
        model = AutoModelForImageClassification.from_pretrained(folder)
        with torch.no_grad():
            torch.save(model(torch.load(folder + "/x.pt")).logits, folder + "/logits.pt")
        said = ""
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    with open(folder + "/said.txt", "w") as file:
        file.write(said)
"""
SAYABLE = {
    "hf_vit": ("heads", "hidden"),
    "timm_vit": ("hidden",),
    "resnet18": ("channels",),
    "resnet50": ("channels",),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Slimmed models on disk, and what stock transformers makes of them in a process that cannot import this library:
    (model, slimmed, report, images, folder) by kind and by whether the config can say the widths."""
    torch.manual_seed(0)
    found = {}
    for kind, kinds in SAYABLE.items():
        for sayable in (True, False):
            model = make(kind, 0.5 if sayable else None, kinds)
            small, report = slim(model)
            folder, x = tmp_path_factory.mktemp("slim"), images()
            small.save_pretrained(folder)
            torch.save(x, folder / "x.pt")
            found[kind, sayable] = model, small, report, x, folder
    folders = [str(folder) for *_, folder in found.values()]
    run_python(["-c", STOCK, *folders])
    return found


@pytest.mark.parametrize("kind", SAYABLE)
def test_widths_that_the_config_can_say_load_everywhere(kind, stock):
    model, small, report, x, folder = stock[kind, True]
    assert report.config == "config" and report.removed > 0 and report.macs_after < report.macs_before
    torch.testing.assert_close(logits(small, x), logits(model, x), rtol=0, atol=1e-4)
    config = json.loads((folder / "config.json").read_text())
    assert "slim" not in config.get("tscnc", {})
    assert (folder / "said.txt").read_text() == ""
    torch.testing.assert_close(torch.load(folder / "logits.pt"), logits(small, x), rtol=0, atol=1e-6)
    if kind == "hf_vit":
        assert (config["intermediate_size"], config["num_attention_heads"], config["head_dim"]) == (20, 2, 6)


@pytest.mark.parametrize("kind", SAYABLE)
def test_stock_transformers_refuses_recorded_widths(kind, stock):
    _, _, report, _, folder = stock[kind, False]
    assert report.config == "recorded"
    assert (folder / "said.txt").read_text().startswith("RuntimeError")
    assert "mismatch" in (folder / "said.txt").read_text() and not (folder / "logits.pt").exists()


@pytest.mark.parametrize("kind", MODELS)
def test_other_widths_are_recorded_and_come_back(kind, tmp_path):
    model = make(kind, None)
    small, report = slim(model)
    assert report.config == "recorded"
    x = images()
    torch.testing.assert_close(logits(small, x), logits(model, x), rtol=0, atol=1e-4)
    small.save_pretrained(tmp_path)
    save_sparse(small, tmp_path)
    expected = logits(small, x)
    for again in (load_slim(tmp_path), load_sparse(tmp_path)):
        assert type(again) is type(model) and not again.training
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small.parameters(), strict=True))
        torch.testing.assert_close(logits(again, x), expected, rtol=0, atol=1e-5)  # some CPUs sum by where tensors lie
        assert again.config.tscnc["slim"] == small.config.tscnc["slim"]
    assert "load_slim" in json.loads((tmp_path / "config.json").read_text())["tscnc"]["slim"]["note"]


def test_uniform_widths_are_for_the_config(tmp_path):
    model = make("hf_vit", None)
    assert slim(model)[1].config == "recorded"
    small, report = slim(model, uniform=True)
    assert report.config == "config" and report.removed > 0
    assert small.config.intermediate_size == small.vit.layers[0].mlp.fc1.out_features < 40
    x = images()
    torch.testing.assert_close(logits(small, x), logits(model, x), rtol=0, atol=1e-4)

    model = make("resnet18", 0.5)
    model.timm_model.layer2[0].conv2.weight.data[:, :6] = 0  # emptier than the others, which keep a half
    assert slim(model)[1].config == "recorded"
    small, report = slim(model, uniform=True)
    assert report.config == "config" and small.config.model_args["block_reduce_first"] == 2


def test_slimmed_again_the_record_is_of_the_whole(tmp_path):
    first, _ = slim(make("resnet18", None))
    for group in structure_groups(first):
        part = group.weights[-1]
        part.tensor.data[:, 0] = 0
    second, report = slim(first)
    assert report.removed > 0
    second.save_pretrained(tmp_path)
    x = images()
    torch.testing.assert_close(logits(load_slim(tmp_path), x), logits(first, x), rtol=0, atol=1e-4)
    third, report = slim(load_slim(tmp_path))
    assert report.config == "as before" and third.config.tscnc == second.config.tscnc


def test_training_loads_a_slimmed_folder_also_with_a_new_head(tmp_path):
    small, _ = slim(make("mobilenetv3", None))
    small.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    torch.testing.assert_close(logits(model, images()[:1] * 0), logits(small, images()[:1] * 0))
    other, _ = load_model(str(tmp_path), ["a", "b"])
    assert logits(other, images()).shape == (3, 2)
    assert torch.equal(other.timm_model.conv_head.weight, small.timm_model.conv_head.weight)
    load_weights(small, tmp_path)
    with pytest.raises(ValueError, match="of another shape"):
        load_weights(MODELS["mobilenetv3"](), tmp_path)


def test_damaged_records_are_refused(tmp_path):
    small, _ = slim(make("hf_vit", None))
    small.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for damage, match in (
        ({"vit.layers.0.mlp.fc1": {"out_features": 10**9}}, "from 1 to"),
        ({"vit.layers.9.mlp.fc1": {"out_features": 2}}, "no such layer"),
        ({"vit.layers.0.mlp.fc1": {"forward": 1}}, "must be one of"),
        ([1], "must hold widths"),
    ):
        bad = good | {"tscnc": {"slim": good["tscnc"]["slim"] | {"widths": damage}}}
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=match):
            load_slim(tmp_path)


def test_a_plain_module_has_no_config():
    model = timm.create_model("resnet18", channels=[8] * 4, layers=[1] * 4)
    model.layer1[0].conv2.weight.data[:, :3] = 0
    small, report = slim(model, torch.randn(2, 3, 32, 32))
    assert report.config == "" and report.removed == 3
    assert isinstance(small, type(model))


def test_a_card_says_what_it_takes_to_load(tmp_path):
    for name, share, own in (("own", None, True), ("plain", 0.5, False)):
        small, _ = slim(make("hf_vit", share))
        small.save_pretrained(tmp_path / name)
        text = rebuild_card(open_repository(tmp_path / name)).read_text()
        assert ("transformers alone does not load it" in text and "load_slim(" in text) == own
        assert ("With transformers alone" in text) == (not own)
        assert "out_features" not in text
