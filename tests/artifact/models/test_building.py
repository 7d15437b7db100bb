"""Models from scratch: timm's own initialisation, class names, image processors, normalisation."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification

from tscnc_hf.artifact.models.building import timm_model, vit_from_config
from tscnc_hf.artifact.models.config import input_format
from tscnc_hf.artifact.models.loading import load_model, logits_fn
from tscnc_hf.artifact.models.preprocessing import preprocessing
from tscnc_hf.method.adversarial.pixels import pixel_inputs


NAMES = ["red panda", "owl", "fox"]


@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        ("resnet18", {}),
        ("resnet18", {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}),
        ("vit_tiny_patch16_224", {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}),
    ],
)
def test_the_initialisation_is_timms_own(name, model_args):
    torch.manual_seed(3)
    model, _ = timm_model(name, NAMES, (8, 8), model_args=model_args)
    torch.manual_seed(3)
    plain = timm.create_model(name, pretrained=False, num_classes=3, **model_args)
    own = model.timm_model.state_dict()
    assert own.keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(own[key], value), key
    if name == "resnet18":
        block = model.timm_model.layer1[0]
        assert (block.bn2.weight == 0).all()
        fan_out = block.conv1.out_channels * 9
        assert float(block.conv1.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def uint8_images(channels=3, count=4, size=8) -> np.ndarray:
    shape = (count, size, size, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_saved_model_comes_back_with_names_processor_and_logits(kind, channels, tmp_path):
    """Our pixels in [0, 1] and transformers' own processor on uint8 images end in the same logits."""
    sizes = {"patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "vit":
        model, processor = vit_from_config(NAMES, (8, 8), channels, **sizes)
    else:
        options = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}
        model, processor = timm_model("resnet18", NAMES, (8, 8), channels, model_args=options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.id2label == dict(enumerate(NAMES))
    assert again.config.label2id == {name: index for index, name in enumerate(NAMES)}
    stock = AutoImageProcessor.from_pretrained(tmp_path)
    images = uint8_images(channels)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    if channels == 3:
        inputs = stock([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
        assert torch.allclose(inputs, (pixels - 0.5) / 0.25, atol=1e-5)
    else:  # the processors of transformers are made for colour: the definition itself
        inputs = (pixels - 0.5) / 0.25
    with torch.no_grad():
        expected = again(pixel_values=inputs).logits
        assert expected.std() > 1e-3
        assert torch.allclose(logits_fn(model, processor)(pixels), expected, atol=1e-5)
        assert torch.allclose(logits_fn(again, stock)(pixels), expected, atol=1e-5)
        if kind == "resnet":  # its config is enough
            assert torch.allclose(logits_fn(again)(pixels), expected, atol=1e-5)
        loaded, its_processor = load_model(str(tmp_path))
        assert torch.equal(logits_fn(loaded, its_processor)(pixels), logits_fn(again, stock)(pixels))


def test_another_number_of_classes_gets_a_new_head_and_keeps_the_rest(tmp_path):
    sizes = {"patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, processor = vit_from_config(NAMES, (8, 8), **sizes)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    five = ["a", "b", "c", "d", "e"]
    other, _ = load_model(str(tmp_path), five)
    assert other.classifier.weight.shape == (5, 32)
    assert list(other.config.id2label.values()) == five
    for name, tensor in model.vit.state_dict().items():
        assert torch.equal(tensor, other.vit.state_dict()[name])
    same, _ = load_model(str(tmp_path), NAMES)
    assert torch.equal(same.classifier.weight, model.classifier.weight)
    assert same.config.id2label == dict(enumerate(NAMES))


def test_one_channel_models_train_on_grey_images(make_config):
    from tscnc_hf.data.loading import load_image_data
    from tscnc_hf.training.trainer import TSCNCTrainer

    data = load_image_data("digits", channels="grey", augmentation="crop")
    options = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}
    for model, processor in (
        timm_model("resnet18", data.class_names, data.image_size, data.channels, model_args=options),
        vit_from_config(
            data.class_names, data.image_size, data.channels, patch_size=4, hidden_size=32, num_hidden_layers=1,
            num_attention_heads=2,
        ),
    ):  # fmt: skip
        assert data.channels == 1
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        assert first.in_channels == 1
        args = make_config()
        trainer = TSCNCTrainer(model, args, train_dataset=data.train.subset(range(64)), processing_class=processor)
        trainer.train()
        pruner = trainer.compressor.pruner
        assert pruner.pruned_count == pruner.target_count(0.9)


# ---- errors ----


def test_an_unknown_name_lists_similar_ones():
    with pytest.raises(ValueError, match="no model named 'resnet19'; similar: .*resnet"):
        timm_model("resnet19", NAMES, (8, 8))
    with pytest.raises(ValueError, match="no model named 'qqqqqqq'$"):
        timm_model("qqqqqqq", NAMES, (8, 8))


@pytest.mark.parametrize(
    ("name", "model_args"),
    [("resnet18", {"depth": 3}), ("vit_tiny_patch16_224", {"img_size": 8, "embed_dim": 30, "num_heads": 4})],
)
def test_arguments_that_timm_refuses(name, model_args):
    with pytest.raises(ValueError, match=f"timm's {name} does not take model_args=") as caught:
        timm_model(name, NAMES, (8, 8), model_args=model_args)
    assert str(model_args) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((8, 6), {}, "patch_size=4 does not divide the input size 8x6"),
        ((8, 8), {"patch_size": 3}, "patch_size=3 does not divide the input size 8"),
        (
            (8, 8),
            {"hidden_size": 32, "num_attention_heads": 3},
            "num_attention_heads=3 does not divide hidden_size=32",
        ),
    ],
)
def test_sizes_that_do_not_fit(size, options, message):
    with pytest.raises(ValueError, match=message):
        vit_from_config(NAMES, size, **options)


def test_a_model_may_get_another_size_than_images_have():
    """Of both builders the image processor says so; a ViT of timm is told the size of its input."""
    timm_vit = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    made = (
        vit_from_config(NAMES, (8, 8), patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        input_size=32, interpolation="nearest"),
        timm_model("vit_tiny_patch16_224", NAMES, (8, 8), model_args=timm_vit, input_size=32, interpolation="nearest"),
        timm_model("resnet18", NAMES, (8, 8), model_args={"channels": [8] * 4}, input_size=(32, 32),
                   interpolation="nearest"),
    )  # fmt: skip
    image = uint8_images(count=1)[0]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    for model, processor in made:
        inputs = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
        assert inputs.shape == (1, 3, 32, 32) and input_format(model, processor) == (32, "rgb")
        ours = pixel_inputs(pixels, *preprocessing(model, processor))
        # transformers normalises values of 0 to 255, and rounds once otherwise; timm's do exactly the same
        assert (ours - inputs).abs().max() <= (1e-6 if isinstance(model, ViTForImageClassification) else 0)
        with torch.no_grad():
            logits = model.eval()(pixel_values=ours).logits
            assert torch.equal(logits_fn(model, processor)(pixels), logits)


@pytest.mark.parametrize(
    ("input_size", "interpolation", "message"),
    [
        (32, "lanczos", "interpolation='lanczos' is unknown; allowed are nearest, bilinear, bicubic"),
        (20, "nearest", "from 8x8 to 20x20: which pixel is the nearest differs from library to library"),
        ((32, 20), "nearest", "from 8x8 to 32x20"),
        (0, "bilinear", "input_size=0; give a side"),
        ((8, 8, 8), "bilinear", r"input_size=\(8, 8, 8\); give a side"),
    ],
)
def test_an_input_size_that_cannot_be(input_size, interpolation, message):
    for build in (vit_from_config, lambda *given, **options: timm_model("resnet18", *given, **options)):
        with pytest.raises(ValueError, match=message):
            build(NAMES, (8, 8), input_size=input_size, interpolation=interpolation)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_timm_models_of_another_image_size_are_told_the_size(size):
    small = {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model, processor = timm_model("vit_tiny_patch16_224", ["a", "b"], size, model_args=small)
    assert model.config.model_args["img_size"] in (32, [32, 48])
    assert model(pixel_values=torch.zeros(1, 3, *size)).logits.shape == (1, 2)
    again = type(model)(type(model.config).from_dict(model.config.to_dict()))
    assert again(pixel_values=torch.zeros(1, 3, *size)).logits.shape == (1, 2)
    resnet, _ = timm_model("resnet18", ["a", "b"], size, model_args={"channels": [8] * 4, "layers": [1] * 4})
    assert "img_size" not in resnet.config.model_args


def test_pretrained_weights_for_grey_images(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **given: create(name, **given))  # no network
    small = {"channels": [8] * 4, "layers": [1] * 4}
    model, processor = timm_model("resnet18", NAMES, (16, 16), channels=1, model_args=small, pretrained=True)
    assert len(model.config.pretrained_cfg["mean"]) == len(model.config.pretrained_cfg["std"]) == 1
    image = Image.fromarray(np.full((16, 16), 128, dtype=np.uint8))
    assert processor(image)["pixel_values"].shape == (1, 1, 16, 16)
    assert logits_fn(model, processor)(torch.rand(2, 1, 16, 16)).shape == (2, 3)


def test_a_vit_of_oblong_images_and_patches(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, processor = vit_from_config(NAMES, (8, 12), 3, patch_size=(4, 2), **sizes)
    assert model.vit.embeddings.position_embeddings.shape[1] == 1 + 2 * 6
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert input_format(str(tmp_path)) == ((8, 12), "rgb")
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    stock = AutoModelForImageClassification.from_pretrained(tmp_path)
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(image), return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(logits_fn(model, processor)(pixels), stock(**inputs).logits)
    with pytest.raises(ValueError, match=r"patch_size=\(4, 8\) does not divide the input size 8x12"):
        vit_from_config(NAMES, (8, 12), patch_size=(4, 8), **sizes)


def test_the_kind_of_attention_is_used_and_is_no_part_of_what_is_saved(tmp_path):
    sizes = {"patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, _ = vit_from_config(NAMES, (8, 8), attention="eager", **sizes)
    assert model(torch.rand(1, 3, 8, 8), output_attentions=True).attentions[0].shape == (1, 2, 5, 5)  # sdpa has none
    model.save_pretrained(tmp_path)
    assert "attn" not in (tmp_path / "config.json").read_text().replace("attention_probs", "")
    with pytest.raises(ValueError, match="flash_nonsense"):
        vit_from_config(NAMES, (8, 8), attention="flash_nonsense", **sizes)


@pytest.mark.parametrize("wrong", [[1], 5, "x", {1: 2}])
def test_arguments_of_timm_without_names_are_refused(wrong):
    with pytest.raises(ValueError, match="^model_args=.*: give arguments by name, a map such as"):
        timm_model("resnet18", ["a", "b"], (8, 8), model_args=wrong)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"mlp_ratio": 0}, "mlp_ratio=0: "),
        ({"mlp_ratio": -1}, "mlp_ratio=-1: "),
        ({"mlp_ratio": float("nan")}, "mlp_ratio=nan: "),
        ({"channels": 0}, "channels=0: give 1 or more"),
        ({"patch_size": (4,)}, r"patch_size=\(4,\): give a side, or height and width"),
    ],
)
def test_sizes_of_which_no_vit_is_made(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        vit_from_config(["a", "b"], (8, 8), **wrong)
