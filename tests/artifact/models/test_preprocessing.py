"""What attacks feed a model is what its image processor feeds it: by class, with other settings, or it is refused."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import TimmWrapperImageProcessor, ViTConfig

from tscnc_hf.artifact.models.loading import logits_fn
from tscnc_hf.artifact.models.preprocessing import ModelGeometry, preprocessing


class Inputs(nn.Module):
    """Its "logits" are its inputs."""

    def forward(self, pixel_values):
        return pixel_values.flatten(1)


def noise(height=24, width=20, channels=3, seed=3):
    made = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(made[..., 0] if channels == 1 else made)


def pixels_of(image):
    array = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))[None]


def made_by(processor, image):
    """The processor's own output, its resize and crop left out."""
    off = {name: False for name in ("do_resize", "do_center_crop", "do_pad") if hasattr(processor, name)}
    return processor(images=image, return_tensors="pt", **off)["pixel_values"]


def assert_same(processor, channels=3):
    image = noise(channels=channels)
    ours = logits_fn(Inputs(), processor)(pixels_of(image))
    theirs = made_by(processor, image).float().flatten(1)
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max().clamp(min=1)))


CLASSIFIERS = [
    "Beit", "Bit", "CLIP", "ConvNext", "DeiT", "EfficientNet", "LevitImage", "MobileNetV1", "MobileNetV2", "MobileViT",
    "PoolFormer", "Pvt", "Segformer", "Siglip", "TextNet", "ViT", "PPLCNet", "Perceiver",
]  # fmt: skip


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("backend", ["", "Pil"])
def test_every_image_processor_of_classifiers_as_it_is(name, backend):
    found = getattr(transformers, f"{name.removesuffix('Image')}ImageProcessor{backend}", None)
    if found is None:
        assert backend == "Pil"
        return
    assert_same(found())


@pytest.mark.parametrize(
    "name, options",
    [
        ("EfficientNet", {"include_top": False}),
        ("EfficientNet", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
        ("EfficientNet", {"do_normalize": False, "include_top": False, "rescale_offset": True}),
        ("EfficientNet", {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 50.0, 40.0]}),
        ("MobileViT", {"do_flip_channel_order": False}),
        ("MobileViT", {"do_rescale": False}),
        ("ViT", {"do_normalize": False}),
        ("ViT", {"do_rescale": False, "do_normalize": False}),
        ("ViT", {"do_rescale": False}),
        ("ViT", {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
        ("ViT", {"image_mean": [0.1, 0.2, 0.7], "image_std": [0.3, 0.1, 0.9]}),
        ("ConvNext", {"crop_pct": 0.5, "size": {"shortest_edge": 20}}),
        ("CLIP", {"do_convert_rgb": False, "crop_size": {"height": 12, "width": 30}}),
    ],
)
def test_other_settings(name, options):
    assert_same(getattr(transformers, f"{name}ImageProcessor")(**options))


def test_grey_images():
    assert_same(transformers.ViTImageProcessor(image_mean=[0.3], image_std=[0.2]), channels=1)
    processor = transformers.ViTImageProcessor(image_mean=[0.3], image_std=[0.2], rescale_factor=1 / 128)
    assert_same(processor, channels=1)
    assert_same(processor)  # one value for all three


def test_a_processor_of_images_and_text():
    holder = type("Both", (), {"image_processor": transformers.MobileViTImageProcessor()})()
    assert preprocessing(Inputs(), holder).order == [2, 1, 0]


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_timm(crop_pct):
    data = {"input_size": [3, 24, 24], "mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1], "crop_pct": crop_pct}
    processor = TimmWrapperImageProcessor(data, architecture="resnet18")
    image = noise(24, 24)
    ours = logits_fn(Inputs(), processor)(pixels_of(image))
    values = (np.asarray(image, dtype=np.float32) / 255 - data["mean"]) / data["std"]
    torch.testing.assert_close(ours, torch.from_numpy(values.transpose(2, 0, 1)).float().flatten()[None])


class Standardised(transformers.ViTImageProcessor):
    def _preprocess(self, images, **options):
        made = super()._preprocess(images, **options)
        made["pixel_values"] = made["pixel_values"] - made["pixel_values"].mean()
        return made


class Darker(transformers.ViTImageProcessor):
    def _preprocess(self, images, **options):
        made = super()._preprocess(images, **options)
        made["pixel_values"] = made["pixel_values"] ** 2
        return made


class Grey(transformers.ViTImageProcessor):
    def _preprocess(self, images, **options):
        made = super()._preprocess(images, **options)
        made["pixel_values"] = made["pixel_values"].mean(1, keepdim=True).expand(-1, 3, -1, -1)
        return made


class Blurred(transformers.ViTImageProcessor):
    def _preprocess(self, images, **options):
        made = super()._preprocess(images, **options)
        made["pixel_values"] = nn.functional.avg_pool2d(made["pixel_values"], 3, 1, 1)
        return made


@pytest.mark.parametrize("made", [Standardised, Darker, Grey, Blurred])
def test_what_cannot_be_reproduced_is_refused(made):
    with pytest.raises(ValueError, match=f"image processor {made.__name__} does more to an image than rescaling"):
        preprocessing(Inputs(), made())


@pytest.mark.parametrize("name", ["ImageGPT", "Siglip2"])
def test_inputs_that_are_no_images_are_refused(name):
    processor = getattr(transformers, f"{name}ImageProcessor")
    processor = processor(clusters=[[0, 0, 0], [1, 1, 1]]) if name == "ImageGPT" else processor()
    with pytest.raises(ValueError, match=f"image processor {name}ImageProcessor "):
        preprocessing(Inputs(), processor)


def test_the_processor_of_an_image_classifier_is_used_at_its_own_size():
    """The geometry is the processor's own: resized and cropped, then the values of the file's pixels."""
    processor = transformers.MobileViTImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 12, "width": 10})
    model = Inputs()
    model.config = ViTConfig()
    fit = ModelGeometry(model, processor)
    image = noise(40, 30)
    made = fit(image)
    assert made.shape == (3, 12, 10) and made.dtype == np.uint8
    theirs = processor(images=image, return_tensors="pt")["pixel_values"].flatten(1)
    ours = logits_fn(model, processor)(torch.from_numpy(made)[None] / 255)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
