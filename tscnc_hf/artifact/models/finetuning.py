"""Any image classifier, ours or not, made ready to be trained on: the head, the class names and the size of images."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    ViTImageProcessor,
)

from tscnc_hf.artifact.models.config import input_format, label_fields, read_config
from tscnc_hf.artifact.models.loading import head_weights, load_model
from tscnc_hf.artifact.models.preprocessing import acts, agrees, image_processor, preprocessing
from tscnc_hf.data.class_names import class_numbers, compare_class_names, refuse_another_order
from tscnc_hf.data.columns import normal_name
from tscnc_hf.method.adversarial.pixels import Preprocessing


def load_for_finetuning(
    name_or_folder: str,
    class_names: Sequence[str],
    image_size: tuple[int, int],
    input_size: tuple[int, int] | None = None,
) -> tuple[PreTrainedModel, object, str]:
    """
    A classifier with its weights, for the classes and the image size of a data set. Its image processor stays as it
    is, and resizes the images inside of what is attacked, unless they have the size that it makes: then it leaves them
    alone.

    A model with another number of classes, or without a head, gets a new one. One with as many keeps it: under its own
    names where the data set only numbers its classes ("3" is "LABEL_3"), otherwise under those of the data set; what
    it has learnt of a class that both name goes to the number that the data set gives it.

    Args:
        name_or_folder (`str`): Hub id or folder, dense or packed.
        class_names (`Sequence[str]`): of the data set.
        image_size: (h, w) of its images, at which they are attacked.
        input_size (*optional*): (h, w) of what the model gets from now on, for those that take images of several
            sizes: its config and its image processor are changed to say so.

    Returns:
        The model, its image processor, and one sentence on the head and the size.

    Raises:
        ValueError: the same class names or numbers in another order; images of this size do not go through the model;
            see `load_model`. OSError: there is no such model.
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
    rows = _rows(old, new) if kept else []
    moved, numbers = rows != sorted(rows), class_numbers(new)
    renamed = moved or (kept and old != new and (numbers is None or class_numbers(old) not in (None, numbers)))
    if kept:
        names = f", renamed from {', '.join(old[:3])} ... to {', '.join(new[:3])} ..." if renamed else ""
        where = ", its rows moved to where the data set has their classes" if moved else ""
        head = f"head for {len(old)} classes kept{where}{names}"
    else:
        head = f"new head for {len(new)} classes" + (had_none or f" in place of one for {len(old)}")
    if moved:
        _move_rows_(model, rows)
    if renamed or not kept:
        model.config.update(label_fields(class_names))
    before, channels = input_format(model, processor)
    channels = 1 if channels == "grey" else 3
    if input_size is None:
        resize = preprocessing(model, processor).resize(*image_size)
        made = image_size if resize is None else resize.output
    else:
        made = tuple(input_size)
    try:
        with torch.no_grad():  # the model comes in eval mode
            model(pixel_values=torch.zeros(1, channels, *made))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"images of {made[0]}x{made[1]} pixels do not go through the model: {error} Leave input_size out: the "
            "model's image processor then resizes images to what it takes"
        ) from error
    if made == image_size or input_size is not None:
        processor, _ = fitted(model, processor, (channels, *made))
    size = f"images of {image_size[0]}x{image_size[1]}"
    if resize := preprocessing(model, processor).resize(*image_size):
        size += f", resized to {made[0]}x{made[1]} ({resize.interpolation}) for the model"
    before = (before, before) if isinstance(before, int) else before
    if before not in (None, made):
        size += f", which took {before[0]}x{before[1]} so far" if resize else f", of {before[0]}x{before[1]} so far"
    return model, processor, f"{head}; {size}"


def _rows(old: Sequence[str], new: Sequence[str]) -> list[int]:
    """
    Of which class of the model each class of a data set, of as many, gets the row of the head: of the same name or
    number where one that both have is at another place in each; rows that are left go to the others in order.
    """
    left = list(range(len(old)))
    try:
        compare_class_names(old, new)
        return left
    except ValueError:  # some are at another place; that all are has been refused
        pass
    ours, theirs = class_numbers(old), class_numbers(new)
    if ours is None or theirs is None:
        ours, theirs = ([normal_name(name.strip().casefold()) for name in names] for names in (old, new))
    rows = [ours.index(name) if name in ours else None for name in theirs]
    left = [row for row in left if row not in rows]
    return [left.pop(0) if row is None else row for row in rows]


@torch.no_grad()
def _move_rows_(model: PreTrainedModel, rows: Sequence[int]) -> None:
    state = model.state_dict()
    for name in head_weights(type(model), model.config):
        state[name].copy_(state[name][list(rows)])


def described(
    model: nn.Module, processor: object | None, how: Preprocessing, shape: tuple[int, int, int]
) -> tuple[object | None, str]:
    """
    The image processor to publish with a model that gets images of `shape` (c, h, w) as `how` says, and what one
    should know, in one sentence, "" where there is nothing. Of a timm model in transformers' wrapper, config.json is
    all that anybody reads, and is changed to say the same.

    Raises:
        ValueError: it cannot say so.
    """
    resize, said = how.resize(*shape[1:]), ""
    if resize is not None:
        said = (
            f"images are {shape[1]}x{shape[2]}, and are attacked at that size; the model gets them resized to "
            f"{resize.output[0]}x{resize.output[1]} ({resize.interpolation}), as by its image processor"
        )
    if not (isinstance(model, TimmWrapperForImageClassification) and model.config.pretrained_cfg):
        return processor, said
    made, changed = _of_timm(model.config, how, shape, type(image_processor(processor)).__name__)
    return (None if processor is None else made), "; ".join(filter(None, (said, changed)))


def fitted(model: nn.Module, processor: object | None, shape: tuple[int, int, int]) -> tuple[object, str]:
    """
    The image processor of a model that is to get images of `shape` (c, h, w) as they are, and what was changed in one
    sentence ("" where nothing was). Where the one given would resize or crop them, this is a copy with another size,
    and the model's config says that size, too, if its weights fit any. Of a timm model in transformers' wrapper,
    config.json is all that anybody reads.

    Raises:
        ValueError: no image processor does to such images what this one does to their values; see `preprocessing`.
    """
    (_, height, width), name = shape, type(image_processor(processor)).__name__
    how = preprocessing(model, processor)._replace(geometry=None)
    if isinstance(model, TimmWrapperForImageClassification) and model.config.pretrained_cfg:
        made, changed = _of_timm(model.config, how, shape, name)
        return (None if processor is None else made), changed
    one = image_processor(processor)
    if not acts(one) or agrees(one, how, shape):
        return processor, ""
    made = _of_size(one, height, width)
    if not agrees(made, how, shape) and how.order is None:
        mean, std = (list(values) for values in how[:2])  # its class cannot make such images, this can
        made = ViTImageProcessor(size={"height": height, "width": width}, image_mean=mean, image_std=std)
    if not agrees(made, how, shape):
        raise ValueError(
            f"the image processor {name} does not leave images of {height}x{width} as they are, whatever its size: "
            "resize the images to what it makes"
        )
    if hasattr(getattr(model, "config", None), "image_size"):
        _say_size_(model, height, width)
    return made, f"the image processor {name} makes {height}x{width} from now on"


def _of_timm(
    config: TimmWrapperConfig, how: Preprocessing, shape: tuple[int, int, int], name: str
) -> tuple[object, str]:
    made = TimmWrapperImageProcessor(config.pretrained_cfg, architecture=config.architecture)
    if agrees(made, how, shape):
        return made, ""
    if how.order is not None:
        raise ValueError(
            f"the image processor {name} changes the order of channels, which the config of a timm model cannot say: "
            "nobody would load the model as it was trained. Pass one that does not, or none"
        )
    mean, std = ((values * shape[0])[: shape[0]] for values in how[:2])
    resize = how.resize(*shape[1:])
    height, width = shape[1:] if resize is None else resize.output
    share = 1.0 if resize is None else min(height / resize.height, width / resize.width)
    own = {"input_size": [shape[0], height, width], "mean": mean, "std": std, "crop_pct": share}
    own |= {} if resize is None else {"interpolation": resize.interpolation}
    for mode in ("center", "squash"):
        said = config.pretrained_cfg | own | {"crop_mode": mode}
        made = TimmWrapperImageProcessor(said, architecture=config.architecture)
        if agrees(made, how, shape):
            config.pretrained_cfg = said
            return made, (
                f"the model's pretrained_cfg described other inputs than {height}x{width} with mean {mean} and "
                f"standard deviation {std}, which it is trained on: it describes these now"
            )
    raise ValueError(
        f"what the image processor {name} does to images of {shape[1]}x{shape[2]} the config of a timm model cannot "
        "say: nobody would load the model as it was trained. Pass none: timm's own then resizes them"
    )


def _of_size(processor: object, height: int, width: int) -> object:
    made = copy.copy(processor)
    by_shorter_side = "shortest_edge" in dict(processor.size or {})
    made.size = {"shortest_edge": min(height, width)} if by_shorter_side else {"height": height, "width": width}
    if getattr(processor, "crop_size", None):
        made.crop_size = {"height": height, "width": width}
    if getattr(processor, "crop_pct", None):
        made.crop_pct = 1.0
    return made


def _say_size_(model: PreTrainedModel, height: int, width: int) -> None:
    """Let the config say the size of the images, unless the shapes of weights depend on it."""
    said = copy.deepcopy(model.config)
    said.image_size = height if height == width else [height, width]
    with torch.device("meta"):
        before, after = (type(model)(copy.deepcopy(one)).state_dict() for one in (model.config, said))
    if {name: weight.shape for name, weight in before.items()} == {n: weight.shape for n, weight in after.items()}:
        model.config.image_size = said.image_size
