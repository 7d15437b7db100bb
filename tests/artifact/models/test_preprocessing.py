"""What attacks feed a model is what its image processor feeds it: by class, with other settings, or it is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperImageProcessor, ViTConfig

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


ROUNDED = 1.2 / 255  # in pixel units: image libraries round 8-bit images after each direction of a resize


def assert_same(processor, channels=3, size=(40, 36)):
    """Images of 40x36, resized and cropped, as the processor itself makes them."""
    image = noise(*size, channels=channels)
    ours = logits_fn(Inputs(), processor)(pixels_of(image))
    theirs = processor(images=image, return_tensors="pt")["pixel_values"].float().flatten(1)
    assert theirs.std() > 0.01
    how = preprocessing(Inputs(), processor)
    resize, least = how.resize(*size), 1e-5 * float(theirs.abs().max().clamp(min=1))
    allowed = least if resize is None or resize.interpolation == "nearest" else ROUNDED / min(map(abs, how.std))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed)


CLASSIFIERS = [
    "Beit", "Bit", "CLIP", "ConvNext", "DeiT", "EfficientNet", "LevitImage", "MobileNetV1", "MobileNetV2", "MobileViT",
    "PoolFormer", "Pvt", "Segformer", "Siglip", "TextNet", "ViT", "PPLCNet",
]  # fmt: skip


def smaller(processor):
    """Sizes an eighth of what they are."""
    for name in ("size", "crop_size"):
        if said := getattr(processor, name, None):
            setattr(processor, name, {key: value // 8 for key, value in dict(said).items() if value})
    if hasattr(processor, "resize_short"):
        processor.resize_short //= 8
    return processor


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("backend", ["", "Pil"])
def test_every_image_processor_of_classifiers(name, backend):
    found = getattr(transformers, f"{name.removesuffix('Image')}ImageProcessor{backend}", None)
    if found is None:
        assert backend == "Pil"
        return
    assert_same(smaller(found()))


@pytest.mark.parametrize("name", ["ViT", "DeiT", "ConvNext", "LevitImage"])
def test_at_the_sizes_that_they_have(name):
    assert_same(getattr(transformers, f"{name.removesuffix('Image')}ImageProcessor")())


def test_a_crop_before_the_resize_is_refused_by_name():
    how = preprocessing(Inputs(), smaller(transformers.PerceiverImageProcessor()))  # its values are as any other's
    with pytest.raises(ValueError, match="PerceiverImageProcessor makes 28x28 of an image of 40x36, and by no resize"):
        how.resize(40, 36)
    assert how._replace(geometry=None).resize(40, 36) is None


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
    processor = getattr(transformers, f"{name}ImageProcessor")(**options)
    assert_same(processor if "size" in options or "crop_size" in options else smaller(processor))


def test_grey_images():
    assert_same(transformers.ViTImageProcessor(image_mean=[0.3], image_std=[0.2]), channels=1)
    processor = transformers.ViTImageProcessor(image_mean=[0.3], image_std=[0.2], rescale_factor=1 / 128)
    assert_same(processor, channels=1)
    assert_same(processor)  # one value for all three


def test_a_processor_of_images_and_text():
    holder = type("Both", (), {"image_processor": transformers.MobileViTImageProcessor()})()
    assert preprocessing(Inputs(), holder).order == [2, 1, 0]


@pytest.mark.parametrize("size", [(24, 24), (40, 33), (12, 9)])
@pytest.mark.parametrize(
    "options",
    [
        {"crop_pct": 1.0},
        {"crop_pct": 0.875},
        {"crop_pct": 0.9, "interpolation": "bicubic"},
        {"crop_pct": 0.8, "crop_mode": "squash"},
        {"crop_pct": 0.875, "input_size": [3, 24, 18]},
    ],
)
def test_timm(options, size):
    data = {"input_size": [3, 24, 24], "mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1], "interpolation": "bilinear"}
    processor = TimmWrapperImageProcessor(data | options, architecture="resnet18")
    assert_same(processor, size=size)


def test_nearest_to_what_is_no_whole_multiple_is_refused_where_libraries_disagree(monkeypatch):
    """Whether they do is a matter of their versions: here the processor takes the other one of two pixels as near."""
    data = {"input_size": [3, 36, 30], "interpolation": "nearest", "crop_pct": 1.0}
    processor = TimmWrapperImageProcessor(data, architecture="resnet18")
    assert_same(processor, size=(18, 15))
    real = TimmWrapperImageProcessor.preprocess

    def other(self, images, *args, **options):
        if images.size == (20, 24):
            rows, columns = np.arange(36) * 2 // 3, np.arange(30) * 2 // 3
            images = Image.fromarray(np.asarray(images)[rows][:, columns])
        return real(self, images, *args, **options)

    monkeypatch.setattr(TimmWrapperImageProcessor, "preprocess", other)
    with pytest.raises(ValueError, match="36x30 of an image of 24x20, .*nearest is the same in all libraries"):
        logits_fn(Inputs(), processor)(pixels_of(noise(24, 20)))


def test_nearest_by_a_whole_multiple_is_exact_and_the_others_are_as_documented():
    data = {"input_size": [3, 96, 96], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}
    image, off = noise(24, 24), {}
    for interpolation in ("nearest", "bilinear", "bicubic"):
        processor = TimmWrapperImageProcessor(data | {"interpolation": interpolation}, architecture="resnet18")
        theirs = processor(images=image, return_tensors="pt")["pixel_values"].flatten(1)
        ours = logits_fn(Inputs(), processor)(pixels_of(image))
        off[interpolation] = float((ours - theirs).abs().max()) * 0.25 * 255
    assert off["nearest"] == 0
    assert 0.5 < off["bilinear"] < 1.1 and 0.5 < off["bicubic"] < 1.2  # of 255: they round twice, attacks do not


def test_the_config_of_a_timm_model_is_its_image_processor():
    config = TimmWrapperConfig(
        architecture="resnet18", model_args={"channels": [8] * 4, "layers": [1] * 4}, num_labels=10,
        pretrained_cfg={"input_size": [3, 64, 64], "interpolation": "nearest", "crop_pct": 1.0, "mean": [0.1] * 3,
                        "std": [0.3] * 3},
    )  # fmt: skip
    model = TimmWrapperForImageClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pixels, stock = pixels_of(noise(16, 16)), TimmWrapperImageProcessor(config.pretrained_cfg, architecture="resnet18")
    with torch.no_grad():
        expected = model(stock(images=noise(16, 16), return_tensors="pt")["pixel_values"]).logits
        assert torch.equal(logits_fn(model)(pixels), expected)
        assert torch.equal(logits_fn(model, stock)(pixels), expected)
        says = SimpleNamespace(image_mean=[0.1] * 3, image_std=[0.3] * 3)  # of values only
        assert torch.equal(logits_fn(model, says)(pixels), expected)
        as_they_are = preprocessing(model, stock)._replace(geometry=None)
        assert logits_fn(model, as_they_are)(pixels).sub(expected).abs().max() > 1e-3


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
    fitted = preprocessing(model, processor)._replace(geometry=None)
    ours = logits_fn(model, fitted)(torch.from_numpy(made)[None] / 255)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda wrong: wrong, lambda wrong: SimpleNamespace(image_processor=wrong)])
def test_a_class_of_image_processors_is_none(wrap, build):
    """It has means and deviations, those of no model, and nothing that could be saved."""
    with pytest.raises(ValueError, match="processing_class=ViTImageProcessor is a class.*from_pretrained"):
        preprocessing(build("vit")[0], wrap(transformers.ViTImageProcessor))
