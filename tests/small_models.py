"""A ViT and a ResNet in timm's wrapper, pruned, with random statistics; and whether two models are the same."""

import pytest
import torch
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)


NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


PIXELS = {
    "input_size": [3, 8, 8],
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.2470, 0.2435, 0.2616],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def pruned(model, seed=0):
    """Nine in ten weights of every matrix are zero, all others are random, BatchNorm statistics included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.05)
            if tensor.ndim > 1:
                tensor.mul_(torch.rand(tensor.shape, generator=generator) < 0.1)
    return model.eval()


def vit(seed=0, hidden_size=32):
    config = ViTConfig(
        hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8,
        patch_size=2, num_labels=10, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)},
    )  # fmt: skip
    return pruned(ViTForImageClassification(config), seed)


def resnet(seed=0):
    config = TimmWrapperConfig(
        architecture="resnet18", model_args={"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}, pretrained_cfg=PIXELS,
        num_labels=10, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)},
    )  # fmt: skip
    return pruned(TimmWrapperForImageClassification(config), seed)


MODELS = pytest.mark.parametrize("make", [vit, resnet])


def images(dtype=torch.float32):
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def logits(model):
    return model(pixel_values=images(model.dtype)).logits


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def differs(one, other):
    one, other = one.state_dict(), other.state_dict()
    return any(not torch.equal(one[name], other[name]) for name in one)
