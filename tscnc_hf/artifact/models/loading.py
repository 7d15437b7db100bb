"""Image classifiers by name or from scratch, with class names and image processor; logits from pixels."""

from __future__ import annotations

from collections.abc import Sequence

import timm
from torch import nn
from transformers import (
    AutoImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.pytorch_utils import Conv1D

from tscnc_hf.artifact.models.checkpoint import load_sparse
from tscnc_hf.artifact.models.config import read_config
from tscnc_hf.artifact.models.narrowed import recorded_widths
from tscnc_hf.artifact.models.slim import load_slim
from tscnc_hf.method.adversarial.pixels import LogitsFn, normalisation, pixel_logits
from tscnc_hf.method.matrices import register_matrix_view


# Statistics of natural images to one digit; batch norm or the first layer absorbs the rest.
MEAN, STD = 0.5, 0.25

register_matrix_view(Conv1D, lambda module, weight: weight.T[None])  # its weight is (in, out)


def logits_fn(model: nn.Module, processing_class: object | None = None) -> LogitsFn:
    """
    A function from pixels in [0, 1], float (b, c, h, w), to float32 logits (b, k), normalisation inside.

    Raises:
        ValueError: neither the image processor nor the model's config says how inputs are normalised.
    """
    return pixel_logits(model, *normalisation(model, processing_class))


def vit_from_config(
    class_names: Sequence[str],
    image_size: tuple[int, int],
    channels: int = 3,
    *,
    patch_size: int = 4,
    hidden_size: int = 192,
    num_hidden_layers: int = 9,
    num_attention_heads: int = 3,
    mlp_ratio: float = 2.0,
    dropout: float = 0.0,
) -> tuple[ViTForImageClassification, ViTImageProcessor]:
    """
    A `ViTForImageClassification` with fresh weights, and its image processor.

    Raises:
        ValueError: a size below 1; the patch size does not divide the image, or the heads the hidden size.
    """
    sizes = {"patch_size": patch_size, "hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers}
    for name, value in (sizes | {"num_attention_heads": num_attention_heads}).items():
        if value < 1:
            raise ValueError(f"{name}={value}: give 1 or more")
    height, width = image_size
    if height != width:
        raise ValueError(f"image_size={image_size}: this ViT takes square images; resize them with image_size=")
    if height % patch_size:
        raise ValueError(f"patch_size={patch_size} does not divide the image size {height}")
    if hidden_size % num_attention_heads:
        raise ValueError(f"num_attention_heads={num_attention_heads} does not divide hidden_size={hidden_size}")
    config = ViTConfig(
        image_size=height,
        patch_size=patch_size,
        num_channels=channels,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=round(hidden_size * mlp_ratio),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **label_fields(class_names),
    )
    processor = ViTImageProcessor(
        size={"height": height, "width": width}, image_mean=[MEAN] * channels, image_std=[STD] * channels
    )
    return ViTForImageClassification(config), processor


def timm_model(
    name: str,
    class_names: Sequence[str],
    image_size: tuple[int, int],
    channels: int = 3,
    *,
    model_args: dict | None = None,
    pretrained: bool = False,
) -> tuple[TimmWrapperForImageClassification, TimmWrapperImageProcessor]:
    """
    Any timm model inside transformers' wrapper, and its image processor.

    Args:
        name (`str`): timm's name of the architecture, e.g. "resnet18".
        model_args (`dict`, *optional*): keyword arguments of `timm.create_model`, stored in config.json.
        pretrained (`bool`): download timm's weights (needs the network) instead of timm's own initialisation.

    Raises:
        ValueError: timm does not know the name (similar names are listed), or refuses the arguments.
    """
    model_args = dict(model_args or {})
    if channels != 3:
        model_args.setdefault("in_chans", channels)
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name[:6]}*")[:8])
        raise ValueError(f"timm has no model named {name!r}" + (f"; similar: {similar}" if similar else ""))
    try:
        source = timm.create_model(name, pretrained=pretrained, num_classes=len(class_names), **model_args)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise ValueError(
            f"timm's {name} does not take model_args={model_args}: {type(error).__name__} {error}"
        ) from error
    if pretrained:
        keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        preprocessing = {key: source.pretrained_cfg[key] for key in keys if key in source.pretrained_cfg}
    else:
        preprocessing = {"mean": [MEAN] * channels, "std": [STD] * channels, "interpolation": "bilinear"}
        preprocessing |= {"crop_pct": 1.0, "crop_mode": "center"}
    config = TimmWrapperConfig(
        architecture=name,
        model_args=model_args,
        pretrained_cfg=preprocessing | {"input_size": [channels, *image_size]},
        **label_fields(class_names),
    )
    model = TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(source.state_dict())  # the wrapper has overwritten timm's own initialisation
    return model, TimmWrapperImageProcessor(config.pretrained_cfg, architecture=name)


def load_model(name_or_folder: str, class_names: Sequence[str] | None = None) -> tuple[PreTrainedModel, object]:
    """
    A classifier from the Hub or a local folder, and its image processor. The packed file is read where there are no
    dense weights beside it.

    Args:
        class_names (`Sequence[str]`, *optional*): of the data set; another number of classes gets a new head.

    Raises:
        OSError: there is no such model, or it has no weights.
        ValueError: weights are missing or have another shape, but for those of a new head; a packed file is to get a
            new head; the model is no image classifier.
    """
    config = read_config(name_or_folder)
    new_head = class_names is not None and len(class_names) != config.num_labels
    if new_head:
        config = read_config(name_or_folder, **label_fields(class_names))
    options = {"config": config, "ignore_mismatched_sizes": new_head}
    try:
        if recorded_widths(config):
            model = load_slim(name_or_folder, **options)
        else:
            model, found = load_slim(name_or_folder, **options, output_loading_info=True)
            _check_complete(name_or_folder, model, found, may_lack_head=class_names is not None)
    except OSError as no_dense_weights:
        try:
            model = load_sparse(name_or_folder)
        except FileNotFoundError:
            raise no_dense_weights from None
        if new_head:
            raise ValueError(
                f"{name_or_folder} is packed and has {model.num_labels} classes, the data {len(class_names)}: a new "
                f"head can be given to the dense weights only. Make them with `tscnc unpack {name_or_folder}`"
            ) from None
    return model, AutoImageProcessor.from_pretrained(name_or_folder)


def _check_complete(name: str, model: PreTrainedModel, found: dict, may_lack_head: bool) -> None:
    """Whatever the file lacks, transformers has drawn at random, with no more than a warning."""
    state = model.state_dict()  # statistics of batch norms too, but for their counts, which old files do not have
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    lacking = {key: None for key in found["missing_keys"] if key in shapes}
    lacking |= {key: tuple(stored) for key, stored, _ in found["mismatched_keys"]}
    wrong = [
        f"{key} {shapes.get(key, '')}" + (f", there {stored}" if stored else "")
        for key, stored in sorted(lacking.items())
        if not may_lack_head or not _is_head(shapes.get(key), stored, model.num_labels)
    ]
    if wrong:
        raise ValueError(
            f"the weights of {name} are not those of the model that its config describes. Missing or of another "
            f"shape: {'; '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}. Mend the folder or take another "
            "checkpoint; a backbone without a classifier can be fine-tuned (recipes/finetune.py)"
        )


def _is_head(shape: tuple | None, stored: tuple | None, classes: int) -> bool:
    """Whether a weight of this shape, stored in the other (None: not at all), can belong to a head for `classes`."""
    return bool(shape) and shape[0] == classes and (stored is None or stored[1:] == shape[1:])


def input_format(
    model: PreTrainedModel | PreTrainedConfig, processing_class: object | None = None
) -> tuple[int | None, int | None]:
    """Side in pixels and channels of the images that a model, or that of a config, takes; None where nothing says."""
    config = getattr(model, "config", model)
    pretrained = getattr(config, "pretrained_cfg", None) or {}
    if "input_size" in pretrained:
        return pretrained["input_size"][-1], pretrained["input_size"][0]
    size = getattr(processing_class, "crop_size", None) if getattr(processing_class, "do_center_crop", False) else None
    size = dict(size or getattr(processing_class, "size", None) or {})
    side = getattr(config, "image_size", None) or size.get("height") or size.get("shortest_edge")
    return side if isinstance(side, int) else None, getattr(config, "num_channels", None)


def label_fields(class_names: Sequence[str]) -> dict:
    """What a config says of the classes."""
    return {
        "num_labels": len(class_names),
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
    }
