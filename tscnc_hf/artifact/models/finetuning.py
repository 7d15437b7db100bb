"""Any image classifier, ours or not, made ready to be trained on: the head, the class names and the size of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, TimmWrapperImageProcessor

from tscnc_hf.artifact.models.config import input_format, label_fields, read_config
from tscnc_hf.artifact.models.loading import load_model
from tscnc_hf.data.class_names import has_no_names, refuse_another_order


def load_for_finetuning(
    name_or_folder: str, class_names: Sequence[str], image_size: tuple[int, int]
) -> tuple[PreTrainedModel, object, str]:
    """
    A classifier with its weights, for the classes and the image size of a data set.

    A model with another number of classes, or without a head, gets a new one. One with as many keeps it: under its own
    names where the data set only numbers its classes, otherwise under those of the data set.

    Args:
        name_or_folder (`str`): Hub id or folder, dense or packed.
        class_names (`Sequence[str]`): of the data set.
        image_size: (h, w) of its images. Where the model took another so far, its config and its image processor are
            changed to say so.

    Returns:
        The model, its image processor, and one sentence on the head and the size.

    Raises:
        ValueError: the same class names in another order; images of this size do not go through the model; see
            `load_model`. OSError: there is no such model.
    """
    config, new = read_config(name_or_folder), list(class_names)
    old = [str(config.id2label[index]) for index in range(config.num_labels)]
    refuse_another_order(old, new)
    kept, had_none = len(old) == len(new), ""
    if kept:
        try:
            model, processor = load_model(name_or_folder)
        except ValueError:  # of a backbone; anything else is raised again below
            kept, had_none = False, ", it had none"
    if not kept:
        model, processor = load_model(name_or_folder, class_names, new_head=True)
    renamed = kept and old != new and not has_no_names(new)
    if kept:
        names = f", renamed from {', '.join(old[:3])} ... to {', '.join(new[:3])} ..." if renamed else ""
        head = f"head for {len(old)} classes kept{names}"
    else:
        head = f"new head for {len(new)} classes" + (had_none or f" in place of one for {len(old)}")
    if renamed or not kept:
        model.config.update(label_fields(class_names))
    side, channels = input_format(model, processor)
    try:
        with torch.no_grad():  # the model comes in eval mode
            model(pixel_values=torch.zeros(1, 1 if channels == "grey" else 3, *image_size))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"images of {image_size[0]}x{image_size[1]} pixels do not go through the model: {error} Leave image_size "
            "out: images are then resized to what the model takes"
        ) from error
    size = f"images of {image_size[0]}x{image_size[1]}"
    if image_size != (side, side):
        processor = _take_size_(model, processor, image_size)
        size += f", of {side}x{side} so far" if side else ""
    return model, processor, f"{head}; {size}"


def _take_size_(model: PreTrainedModel, processor: object, image_size: tuple[int, int]) -> object:
    """Let the model's config say that it takes images of (h, w); returns an image processor that makes such."""
    config, (height, width) = model.config, image_size
    if pretrained := getattr(config, "pretrained_cfg", None):  # timm's
        channels = pretrained.get("input_size", [3])[0]
        config.pretrained_cfg = pretrained | {"input_size": [channels, height, width]}
        return TimmWrapperImageProcessor(config.pretrained_cfg, architecture=config.architecture)
    if hasattr(config, "image_size"):
        config.image_size = height if height == width else [height, width]
    by_shorter_side = "shortest_edge" in (processor.size or {})
    processor.size = {"shortest_edge": min(image_size)} if by_shorter_side else {"height": height, "width": width}
    if getattr(processor, "crop_size", None):
        processor.crop_size = {"height": height, "width": width}
    return processor
