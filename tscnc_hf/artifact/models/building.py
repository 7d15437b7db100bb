"""Classifiers with fresh weights: a ViT from its sizes, any timm model by its name; with their image processors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import timm
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tscnc_hf.artifact.models.config import label_fields
from tscnc_hf.artifact.models.geometry import PIL_NUMBERS
from tscnc_hf.method.resizing import INTERPOLATIONS


# Statistics of natural images to one digit; batch norm or the first layer absorbs the rest.
MEAN, STD = 0.5, 0.25


def check_input_size(
    image_size: tuple[int, int], input_size: int | Sequence[int] | None, interpolation: str
) -> tuple[int, int]:
    """
    (h, w) of what a model is to get of images of `image_size`.

    Raises:
        ValueError: an unknown interpolation, or nearest to what is no whole multiple: libraries then disagree on which
            pixel is the nearest.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r} is unknown; allowed are {', '.join(INTERPOLATIONS)}")
    if input_size is None:
        return tuple(image_size)
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"input_size={input_size!r}; give a side or (height, width), in pixels, above 0")
    if interpolation == "nearest" and any(new % old for new, old in zip(size, image_size, strict=True)):
        raise ValueError(
            f'interpolation="nearest" from {image_size[0]}x{image_size[1]} to {size[0]}x{size[1]}: which pixel is the '
            "nearest differs from library to library unless the size is a whole multiple. Give an input_size that is, "
            'or "bilinear"'
        )
    return size


def vit_from_config(
    class_names: Sequence[str],
    image_size: tuple[int, int],
    channels: int = 3,
    *,
    patch_size: int | tuple[int, int] = 4,
    hidden_size: int = 192,
    num_hidden_layers: int = 9,
    num_attention_heads: int = 3,
    mlp_ratio: float = 2.0,
    dropout: float = 0.0,
    attention: str | None = None,
    input_size: int | tuple[int, int] | None = None,
    interpolation: str = "bilinear",
) -> tuple[ViTForImageClassification, ViTImageProcessor]:
    """
    A `ViTForImageClassification` with fresh weights, and its image processor.

    Args:
        image_size (`tuple[int, int]`): (h, w) of the images, which is where they are attacked.
        patch_size (`int` or `tuple[int, int]`): side, or height and width, of a patch in pixels of the input.
        attention (`str`, *optional*): how transformers computes attention, "sdpa" (its default) or "eager". Torch's
            kernel for sdpa is several times slower than eager backwards through bf16 on a CPU (torch 2.14). It is no
            part of what is saved.
        input_size (*optional*): side, or (h, w), of what the model gets: its image processor resizes images to this
            size. By default that of the images.
        interpolation (`str`): of that resize: "nearest", "bilinear" or "bicubic".

    Raises:
        ValueError: a size below 1; the patch size does not divide the input, or the heads the hidden size; an
            interpolation that no attack can go through (`check_input_size`).
    """
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if len(patch) != 2:
        raise ValueError(f"patch_size={patch_size}: give a side, or height and width, in pixels")
    sizes = {"patch_size": min(patch), "hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers}
    for name, value in (sizes | {"num_attention_heads": num_attention_heads, "channels": channels}).items():
        if value < 1:
            raise ValueError(f"{name}={value}: give 1 or more")
    if not (mlp_ratio < float("inf") and round(hidden_size * mlp_ratio) >= 1):
        raise ValueError(f"mlp_ratio={mlp_ratio}: hidden_size={hidden_size} times it is to be 1 or more")
    height, width = check_input_size(image_size, input_size, interpolation)
    if height % patch[0] or width % patch[1]:
        size = height if height == width else f"{height}x{width}"
        raise ValueError(f"patch_size={patch_size} does not divide the input size {size}")
    if hidden_size % num_attention_heads:
        raise ValueError(f"num_attention_heads={num_attention_heads} does not divide hidden_size={hidden_size}")
    config = ViTConfig(
        image_size=height if height == width else (height, width),
        patch_size=patch[0] if patch[0] == patch[1] else patch,
        num_channels=channels,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=round(hidden_size * mlp_ratio),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation=attention,
        **label_fields(class_names),
    )
    processor = ViTImageProcessor(
        size={"height": height, "width": width}, image_mean=[MEAN] * channels, image_std=[STD] * channels,
        resample=PIL_NUMBERS[interpolation],
    )  # fmt: skip
    return ViTForImageClassification(config), processor


def timm_model(
    name: str,
    class_names: Sequence[str],
    image_size: tuple[int, int],
    channels: int = 3,
    *,
    model_args: dict | None = None,
    pretrained: bool = False,
    input_size: int | tuple[int, int] | None = None,
    interpolation: str | None = None,
) -> tuple[TimmWrapperForImageClassification, TimmWrapperImageProcessor]:
    """
    Any timm model inside transformers' wrapper, and its image processor.

    Args:
        name (`str`): timm's name of the architecture, e.g. "resnet18", or one of
            `tscnc_hf.artifact.models.cifar_networks`.
        image_size: (h, w) of the images, which is where they are attacked.
        model_args (`dict`, *optional*): keyword arguments of `timm.create_model`, stored in config.json. `img_size` is
            added where the model takes it and is usually of another.
        pretrained (`bool`): download timm's weights (needs the network) instead of timm's own initialisation. Their
            licence, and where they are from, is then what a card says.
        input_size (*optional*): side, or (h, w), of what the model gets: its image processor, and everybody's that
            config.json is read by, resizes images to this size. By default that of the images.
        interpolation (`str`, *optional*): of that resize: "nearest", "bilinear" or "bicubic". By default that of
            timm's weights, or "bilinear".

    Raises:
        ValueError: timm does not know the name (similar names are listed), or refuses the arguments, or they have no
            names; an interpolation that no attack can go through (`check_input_size`).
    """
    model_args = {} if model_args is None else model_args
    if not isinstance(model_args, Mapping) or not all(isinstance(key, str) for key in model_args):
        raise ValueError(f'model_args={model_args!r}: give arguments by name, a map such as {{"drop_path_rate": 0.1}}')
    model_args = dict(model_args)
    if channels != 3:
        model_args.setdefault("in_chans", channels)
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name[:6]}*")[:8])
        raise ValueError(f"timm has no model named {name!r}" + (f"; similar: {similar}" if similar else ""))
    usual = timm.get_pretrained_cfg(name)
    size = check_input_size(image_size, input_size, interpolation or "bilinear")
    sizes = [{}]
    if "img_size" not in model_args and usual is not None and tuple(usual.input_size[-2:]) != size:
        sizes.insert(0, {"img_size": size[0] if size[0] == size[1] else list(size)})
    for own in sizes:
        try:
            options = model_args | own
            source = timm.create_model(name, pretrained=pretrained, num_classes=len(class_names), **options)
            model_args = options
            break
        except (TypeError, ValueError, AssertionError, KeyError) as error:
            if isinstance(error, TypeError) and own:
                continue  # it takes images of any size
            raise ValueError(
                f"timm's {name} does not take model_args={options}: {type(error).__name__} {error}"
            ) from error
    preprocessing = {"mean": [MEAN] * channels, "std": [STD] * channels, "interpolation": "bilinear"}
    preprocessing |= {"crop_pct": 1.0, "crop_mode": "center"}
    if pretrained:
        known = {key: value for key, value in source.pretrained_cfg.items() if value is not None}
        preprocessing = {key: known[key] for key in (*preprocessing, "license") if key in known}
        for key in {"mean", "std"} & preprocessing.keys():  # of three channels, whose weights timm has added up
            if len(values := preprocessing[key]) != channels:
                preprocessing[key] = [sum(values) / len(values)] * channels
    if size == tuple(image_size):  # images are taken as they are, also where timm's evaluation of the weights crops
        preprocessing["crop_pct"] = 1.0
    if interpolation is not None:
        preprocessing["interpolation"] = interpolation
    config = TimmWrapperConfig(
        architecture=name,
        model_args=model_args,
        pretrained_cfg=preprocessing | {"input_size": [channels, *size]},
        **label_fields(class_names),
    )
    model = TimmWrapperForImageClassification(config)
    if pretrained:
        model.config.name_or_path = model.name_or_path = known.get("hf_hub_id") or f"timm's {name}"
    model.timm_model.load_state_dict(source.state_dict())  # the wrapper has overwritten timm's own initialisation
    return model, TimmWrapperImageProcessor(config.pretrained_cfg, architecture=name)
