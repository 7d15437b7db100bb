"""
The networks of published tables on images of 32 px, under names that timm knows: a 3x3 stem of stride 1 with no
pooling behind it, 10 classes. They are timm's own classes with another stem, so their weights have timm's names.
Importing this module registers them; `import tscnc_hf` sees to it that it is imported with timm.

Whoever loads one needs `import tscnc_hf`: without it timm and transformers say that they do not know the architecture.
What everybody can load is timm's `resnet18`, with images that its preprocessing resizes to 128 px.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import BatchNormAct2d, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn


def _stem(in_chans: int, channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_chans, channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as timm draws the others
    return conv


class CifarResNet(ResNet):
    """timm's `ResNet` for 32 px: stages at 32, 16, 8, 4 (He et al. 2016, the widths of ImageNet)."""

    def __init__(self, *args: Any, in_chans: int = 3, **kwargs: Any):
        super().__init__(*args, in_chans=in_chans, **kwargs)
        self.conv1, self.maxpool = _stem(in_chans, self.bn1.num_features), nn.Identity()
        _divide(self.feature_info, 2, 4)


class WideResNet(ResNetV2):
    """timm's `ResNetV2` of basic blocks for 32 px: stages at 32, 16, 8 (Zagoruyko and Komodakis 2016)."""

    def __init__(self, *args: Any, in_chans: int = 3, stem_chs: int = 16, **kwargs: Any):
        super().__init__(*args, in_chans=in_chans, stem_chs=stem_chs, **kwargs)
        self.stem = nn.Sequential()
        self.stem.add_module("conv", _stem(in_chans, stem_chs))
        _divide(self.feature_info, 2, 4)


def _divide(feature_info: list[dict[str, Any]], stem: int, stages: int) -> None:
    """What the stem no longer reduces."""
    for place, info in enumerate(feature_info):
        info["reduction"] //= stages if place else stem


def _cfg(first_conv: str, classifier: str) -> dict[str, Any]:
    return {
        "num_classes": 10, "input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bilinear",
        "pool_size": (4, 4), "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616),
        "first_conv": first_conv, "classifier": classifier,
    }  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "cifar_resnet18.untrained": _cfg("conv1", "fc"),
        "cifar_wrn28_10.untrained": _cfg("stem.conv", "head.fc") | {"pool_size": (8, 8)},
        "cifar_wrn40_4.untrained": _cfg("stem.conv", "head.fc") | {"pool_size": (8, 8)},
    }
)


def _build(network: Callable, name: str, pretrained: bool, given: dict[str, Any], **usual: Any) -> nn.Module:
    return build_model_with_cfg(network, name, pretrained, **{"num_classes": 10} | usual | given)


def _wide(name: str, pretrained: bool, given: dict[str, Any], blocks: int, widen: int) -> nn.Module:
    channels = tuple(widen * width for width in (16, 32, 64))
    usual = {"basic": True, "bottle_ratio": 1.0, "norm_layer": BatchNormAct2d, "conv_layer": create_conv2d}
    return _build(WideResNet, name, pretrained, given, layers=[blocks] * 3, channels=channels, **usual)


@register_model
def cifar_resnet18(pretrained: bool = False, **given: Any) -> CifarResNet:
    """ResNet-18 of the CIFAR tables: 11.17 M weights, 0.56 GMACs at 32 px."""
    return _build(CifarResNet, "cifar_resnet18", pretrained, given, block=BasicBlock, layers=(2, 2, 2, 2))


@register_model
def cifar_wrn28_10(pretrained: bool = False, **given: Any) -> WideResNet:
    """WRN-28-10: 36.5 M weights, 5.2 GMACs at 32 px."""
    return _wide("cifar_wrn28_10", pretrained, given, blocks=4, widen=10)


@register_model
def cifar_wrn40_4(pretrained: bool = False, **given: Any) -> WideResNet:
    """WRN-40-4: 8.9 M weights, 1.3 GMACs at 32 px."""
    return _wide("cifar_wrn40_4", pretrained, given, blocks=6, widen=4)
