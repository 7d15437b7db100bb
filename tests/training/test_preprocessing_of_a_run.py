"""A run attacks what its image processor feeds the model, at the size of the data, and saves a processor that does."""

import json

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    EfficientNetImageProcessor,
    MobileViTConfig,
    MobileViTForImageClassification,
    MobileViTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from tscnc_hf.artifact.models.building import timm_model, vit_from_config
from tscnc_hf.artifact.models.loading import load_model, logits_fn
from tscnc_hf.artifact.repository.inspection import inspect_model, summary_rows
from tscnc_hf.artifact.repository.opening import open_repository
from tscnc_hf.cli.evaluate import EvaluationArguments, evaluate_model
from tscnc_hf.evaluation.measures.robustness import evaluate_robustness
from tscnc_hf.method.resizing import Resize
from tscnc_hf.training.trainer import TSCNCTrainer


NAMES = [str(digit) for digit in range(10)]
SMALL = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}


def images(height, width, n=8):
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)
    return [{"pixel_values": image, "labels": place % 10} for place, image in enumerate(made)]


def mobile_vit():
    config = MobileViTConfig(
        num_labels=10, image_size=32, hidden_sizes=[8, 8, 8], neck_hidden_sizes=[4, 4, 4, 4, 4, 4, 8],
        num_attention_heads=2,
    )  # fmt: skip
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return MobileViTForImageClassification(config), MobileViTImageProcessor(**sizes)


def efficient_net():
    config = EfficientNetConfig(
        num_labels=10, image_size=32, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, dropout_rate=0.0,
        drop_connect_rate=0.0,
    )  # fmt: skip
    return EfficientNetForImageClassification(config), EfficientNetImageProcessor(size={"height": 32, "width": 32})


def of_stock(folder, items) -> torch.Tensor:
    """The logits of these images as a pipeline of transformers computes them from the folder alone."""
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
    )
    pictures = [Image.fromarray(item["pixel_values"].permute(1, 2, 0).numpy()) for item in items]
    with torch.no_grad():
        return model(**processor(images=pictures, return_tensors="pt")).logits


@pytest.mark.parametrize("build_one", [mobile_vit, efficient_net])
def test_what_is_attacked_is_what_others_will_see(build_one, make_config, tmp_path):
    torch.manual_seed(0)
    (model, processor), items = build_one(), images(32, 32)
    args = make_config(max_steps=1, target_sparsity=0, tsc_weight=0, cnc_weight=0, output_dir=str(tmp_path))
    trainer = TSCNCTrainer(model, args, None, items, items, processing_class=processor)
    trainer.train()
    trainer.save_model()
    pixels = torch.stack([item["pixel_values"] for item in items]) / 255
    with torch.no_grad():
        of_trainer = trainer.adversary.logits(model.eval())(pixels)
        loaded = logits_fn(*load_model(tmp_path))(pixels)
        config_only = logits_fn(load_model(tmp_path)[0])(pixels)  # what the run wrote into config.json
    theirs = of_stock(tmp_path, items)
    assert theirs.std() > 1e-4
    labelled = [item | {"labels": int(label)} for item, label in zip(items, theirs.argmax(-1), strict=True)]
    report = evaluate_robustness(tmp_path, labelled, "clean", masking=False, progress=False)
    assert report["clean"].accuracy == 1
    for ours in (of_trainer, loaded, config_only):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def quadrupled():
    return timm_model("resnet18", NAMES, (8, 8), model_args=SMALL, input_size=32, interpolation="nearest")


def pretrained_vit():
    """One of larger images, as if from the Hub."""
    sizes = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return vit_from_config(NAMES, (24, 24), **sizes)


def cropping():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=10)
    return ResNetForImageClassification(config), ConvNextImageProcessor(size={"shortest_edge": 14}, resample=3)


@pytest.mark.parametrize(
    "build_one, resize",
    [
        (quadrupled, Resize(32, 32, "nearest")),
        (pretrained_vit, Resize(24, 24, "bilinear")),
        (cropping, Resize(16, 16, "bicubic", (1, 1, 14, 14))),
    ],
)
def test_the_attacker_acts_on_the_image_itself(build_one, resize, make_config, tmp_path, caplog):
    """Trained, tested, saved, and loaded by stock libraries: images of 8x8, whatever the model gets of them."""
    torch.manual_seed(0)
    (model, processor), items = build_one(), images(8, 8)
    args = make_config(
        max_steps=2, objective="pgd-at", adversary="pgd", attack_steps=2, epsilon="8/255", target_sparsity=0,
        output_dir=str(tmp_path),
    )  # fmt: skip
    trainer = TSCNCTrainer(model, args, None, items, items, processing_class=processor)
    output = "x".join(map(str, resize.output))
    assert f"Images are 8x8, and are attacked at that size; the model gets them resized to {output}" in caplog.text
    trainer.train()
    assert trainer.evaluate()["eval_robust_accuracy"] <= 1
    results = trainer.test(items, attacks=["clean", "pgd-2"], full=False)["robustness"]
    assert results["image_size"] == [3, 8, 8] and results["resized"] == resize.to_dict()
    trainer.save_model()
    x = (torch.stack([item["pixel_values"] for item in items]) / 255).requires_grad_()
    forward = trainer.adversary.logits(model.eval())
    assert torch.autograd.grad(forward(x).pow(2).sum(), x)[0].abs().amin(dim=(0, 1)).shape == (8, 8)
    loaded, stock = load_model(tmp_path)
    theirs, pixels = of_stock(tmp_path, items), x.detach()
    with torch.no_grad():
        for ours in (forward(pixels), logits_fn(loaded, stock)(pixels), logits_fn(loaded)(pixels)):
            assert ours.std() > 1e-5
            if resize.interpolation == "nearest":
                assert torch.equal(ours, theirs)
            else:  # theirs rounds the resized image to 8 bits
                assert (ours - theirs).abs().max() < 0.1 * theirs.std()
    card = (tmp_path / "README.md").read_text()
    assert f"The images have 8x8 pixels, and the model's own preprocessing resizes them to {output} (" in card
    assert "They act on the image of 8x8 pixels, before it is resized for the model." in card
    found = dict(summary_rows(inspect_model(open_repository(tmp_path), spectrum=False)))
    assert found["images"].startswith(f"attacked at 8x8, and resized to {output} ({resize.interpolation}")


def test_a_resize_is_recorded_for_images_of_its_size(make_config, tmp_path):
    """Without the image processor, config.json says what is done to images of the size trained on, to no others."""
    (model, processor), items = pretrained_vit(), images(8, 8)
    trainer = TSCNCTrainer(model, make_config(output_dir=str(tmp_path)), None, items, processing_class=processor)
    trainer.save_model()
    again = TSCNCTrainer(load_model(tmp_path)[0], make_config(output_dir=str(tmp_path)), processing_class=processor)
    again.save_model()  # of no data set: what is known stays
    alone = logits_fn(load_model(tmp_path)[0])
    assert alone(torch.rand(1, 3, 8, 8)).shape == (1, 10)
    with pytest.raises(ValueError, match="config says how images of 8x8 are resized, and these are 24x24"):
        alone(torch.rand(1, 3, 24, 24))


@pytest.mark.parametrize("kind", ["timm", "convnext"])
def test_a_model_of_oblong_images_is_attacked_at_the_data_s_size(kind, make_config, tmp_path, capsys):
    if kind == "timm":
        (model, processor), output = timm_model("resnet18", NAMES, (12, 10), model_args=SMALL), "12x10"
    else:
        config = ConvNextConfig(
            image_size=12, patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10,
            id2label=dict(enumerate(NAMES)),
        )  # fmt: skip
        model, processor = ConvNextForImageClassification(config), ConvNextImageProcessor(size={"shortest_edge": 12})
        output = "12x12"
    args = make_config(max_steps=1, target_sparsity=0, output_dir=str(tmp_path / "model"))
    trainer = TSCNCTrainer(model, args, None, images(12, 10), processing_class=processor)
    trainer.train()
    trainer.save_model()
    options = {"dataset": "digits", "attacks": ["clean"], "n": 4, "output_dir": str(tmp_path / "out")}
    evaluate_model(EvaluationArguments(str(tmp_path / "model"), device="cpu", cpu_threads=1, **options))
    printed = capsys.readouterr().out
    assert "8x8" in printed.split("Data: ")[1].splitlines()[0]
    assert f"attacked at 8x8, and resized to {output} (bi" in printed.split("Images: ")[1].splitlines()[0]


def test_a_model_of_timm_itself_says_how_it_normalises(make_config):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, **SMALL)
    trainer = TSCNCTrainer(model, make_config(max_steps=1), None, images(32, 32))
    assert trainer.adversary.preprocessing.mean == list(model.pretrained_cfg["mean"])
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    model.eval()
    torch.testing.assert_close(trainer.adversary.logits(model)(x), model((x - mean) / std))
    assert evaluate_robustness(model, images(32, 32), "clean", masking=False, progress=False).n == 8


def test_a_processor_that_cannot_be_reproduced_ends_before_training(make_config):
    class Squared(ViTImageProcessor):
        def _preprocess(self, images, **options):
            made = super()._preprocess(images, **options)
            made["pixel_values"] = made["pixel_values"] ** 2
            return made

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    with pytest.raises(ValueError, match="image processor Squared does more to an image"):
        TSCNCTrainer(network, make_config(), None, images(8, 8), processing_class=Squared())


def test_a_processor_beside_timm_s_own_preprocessing(make_config, tmp_path):
    """Whoever reads config.json, as timm does, and whoever reads preprocessor_config.json find the same."""
    model, _ = timm_model("resnet18", NAMES, (8, 8), model_args=SMALL)
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1] * 3, image_std=[0.2] * 3)
    args = make_config(max_steps=1, target_sparsity=0, output_dir=str(tmp_path))
    TSCNCTrainer(model, args, None, images(8, 8), processing_class=processor).save_model()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.1] * 3 and config["pretrained_cfg"]["std"] == [0.2] * 3
    assert AutoImageProcessor.from_pretrained(tmp_path).data_config["std"] == (0.2,) * 3
    with pytest.raises(ValueError, match="changes the order of channels, which the config of a timm model cannot say"):
        TSCNCTrainer(model, args, None, images(8, 8), processing_class=MobileViTImageProcessor())
