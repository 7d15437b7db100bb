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

from tscnc_hf.artifact.models.building import timm_model
from tscnc_hf.artifact.models.loading import load_model, logits_fn
from tscnc_hf.cli.evaluate import EvaluationArguments, evaluate_model
from tscnc_hf.evaluation.measures.robustness import evaluate_robustness
from tscnc_hf.training import image_checks
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


def test_a_processor_of_another_size_is_saved_with_the_size_of_the_data(make_config, tmp_path, monkeypatch):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=10)
    model, items = ResNetForImageClassification(config), images(12, 10)
    given = ViTImageProcessor()  # 224 x 224
    args = make_config(max_steps=1, target_sparsity=0, output_dir=str(tmp_path))
    said = []
    monkeypatch.setattr(image_checks.logger, "warning", said.append)
    trainer = TSCNCTrainer(model, args, None, items, processing_class=given)
    assert "Images are 12x10" in said[0] and "saved with the model makes 12x10" in said[0]
    trainer.train()
    trainer.save_model()
    with torch.no_grad():
        ours = trainer.adversary.logits(model.eval())(torch.stack([item["pixel_values"] for item in items]) / 255)
    torch.testing.assert_close(ours, of_stock(tmp_path, items), rtol=1e-4, atol=1e-6)
    assert dict(given.size) == {"height": 224, "width": 224}  # the one given is not changed


@pytest.mark.parametrize("kind", ["timm", "convnext"])
def test_a_model_of_oblong_images_is_evaluated_on_such(kind, make_config, tmp_path, capsys):
    if kind == "timm":
        model, processor = timm_model("resnet18", NAMES, (12, 10), model_args=SMALL)
    else:
        from transformers import ConvNextConfig, ConvNextForImageClassification, ConvNextImageProcessor

        config = ConvNextConfig(
            image_size=12, patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10,
            id2label=dict(enumerate(NAMES)),
        )  # fmt: skip
        model, processor = ConvNextForImageClassification(config), ConvNextImageProcessor(size={"shortest_edge": 12})
    args = make_config(max_steps=1, target_sparsity=0, output_dir=str(tmp_path / "model"))
    trainer = TSCNCTrainer(model, args, None, images(12, 10), processing_class=processor)
    trainer.train()
    trainer.save_model()
    options = {"dataset": "digits", "attacks": ["clean"], "n": 4, "output_dir": str(tmp_path / "out")}
    evaluate_model(EvaluationArguments(str(tmp_path / "model"), device="cpu", cpu_threads=1, **options))
    assert "12x10" in capsys.readouterr().out.split("Data: ")[1].splitlines()[0]


def test_a_model_of_timm_itself_says_how_it_normalises(make_config):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, **SMALL)
    trainer = TSCNCTrainer(model, make_config(max_steps=1), None, images(32, 32))
    assert trainer.adversary.mean == list(model.pretrained_cfg["mean"])
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
