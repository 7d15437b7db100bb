"""The config of a model, by name or folder, without running what a repository brings along."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as CLASSIFIERS
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig, PreTrainedModel, TimmWrapperConfig


CONFIG_FILE = "config.json"
# of config.json, what says nothing of the model that the weights make
NOT_THE_MODEL = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "quantization_config", "tscnc"}
NOT_COMPUTED = {"architectures", "label2id", "model_type", "pretrained_cfg", "problem_type"}  # or said by other fields
COLOURS = {1: "grey", 3: "rgb"}  # as `channels` of load_image_data
NOT_OURS = {
    "num_classes", "checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
}  # fmt: skip


def read_config(name_or_folder: str | os.PathLike, **options: Any) -> PreTrainedConfig:
    """
    `AutoConfig.from_pretrained`, but never with code of the repository, and also for what timm itself writes.

    timm's `push_to_hf_hub` (1.0.31) records `num_classes` among the arguments of the model, transformers (5.24) passes
    it beside them, and no such model can be built: it is taken out, `num_labels` says the same. So are arguments with
    which timm would load other files: a downloaded config is not to choose them, nor with an architecture
    "hf-hub:..." or "local-dir:...", which is refused.

    Raises:
        OSError: there is no such config. ValueError: it is of no known architecture, or of one that lies elsewhere, or
            needs code to be run.
    """
    config = AutoConfig.from_pretrained(name_or_folder, trust_remote_code=False, **options)
    if isinstance(config, TimmWrapperConfig) and ":" in str(config.architecture):
        raise ValueError(
            f"{name_or_folder}: config.json names the architecture {config.architecture!r}, which would be read from "
            "another folder or repository. Write timm's own name there, such as 'resnet18'; a config of your own code "
            "is passed as config=..."
        )
    if isinstance(config, TimmWrapperConfig) and config.model_args:
        config.model_args = {key: value for key, value in config.model_args.items() if key not in NOT_OURS}
    return config


def read_processor(name_or_folder: str | os.PathLike, **options: Any) -> Any:
    """
    `AutoImageProcessor.from_pretrained`, but never with code of the repository, nor a question whether to run it.

    Raises:
        OSError: there is none. ValueError: it is of no known class, or needs code to be run.
    """
    try:
        return AutoImageProcessor.from_pretrained(name_or_folder, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(  # transformers advises an option that is not for use here
            f"the image processor of {name_or_folder} is code of its own (auto_map in preprocessor_config.json), "
            "which is never run here. Save one of transformers' there that does the same, such as ViTImageProcessor"
        ) from error


def input_format(
    model: PreTrainedModel | PreTrainedConfig | str, processing_class: object | None = None
) -> tuple[int | tuple[int, int] | None, str | None]:
    """Size, a side or (h, w) in pixels, and channels ("rgb" or "grey") of the images that a model takes; None where
    nothing says.

    Args:
        model: itself, its config, or its name or folder, of which config and image processor are read.

    Raises:
        OSError: there is no such model. ValueError: it is of no known architecture.
    """
    if isinstance(model, str):
        model, processing_class = read_config(model), read_processor(model)
    config = getattr(model, "config", model)
    pretrained = getattr(config, "pretrained_cfg", None) or {}
    if "input_size" in pretrained:
        return _side_or_pair(pretrained["input_size"][-2:]), COLOURS.get(pretrained["input_size"][0])
    config = getattr(config, "vision_config", config)  # of CLIP and its like
    size = getattr(processing_class, "crop_size", None) if getattr(processing_class, "do_center_crop", False) else None
    size = dict(size or getattr(processing_class, "size", None) or {})
    made = (size["height"], size["width"]) if {"height", "width"} <= size.keys() else size.get("shortest_edge")
    size = _side_or_pair(getattr(config, "image_size", None)) or _side_or_pair(made)
    return size, COLOURS.get(getattr(config, "num_channels", None))


def _side_or_pair(size: int | Sequence[int] | None) -> int | tuple[int, int] | None:
    if not size or isinstance(size, int):
        return size or None
    height, width = size
    return height if height == width else (height, width)


def label_fields(class_names: Sequence[str]) -> dict:
    """What a config says of the classes."""
    return {
        "num_labels": len(class_names),
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
    }


def config_digest(folder: str | os.PathLike) -> str:
    """SHA-256 (hexadecimal) of what a folder's config.json says of its model, as `packed_format.md` describes.

    Raises:
        ValueError: the file is no JSON object.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in NOT_THE_MODEL}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON object ({error}). Download it or save it again.") from error
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def what_is_computed(model: nn.Module) -> dict[str, Any]:
    """
    The fields of a model's config that decide what it computes with its weights, or what its outputs are called, plain
    JSON types; empty where it has no config of transformers. The preprocessing is none of them.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return {}
    fields = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in fields.items() if name not in NOT_THE_MODEL | NOT_COMPUTED}


def class_of(config: PreTrainedConfig, classifier: bool = True) -> type[PreTrainedModel]:
    """
    The class that `AutoModelForImageClassification` would take (itself it takes no state dict without a name); unless
    a `classifier` is wanted, the class of transformers that the config names, whatever it is for.

    Raises:
        ValueError: there is none.
    """
    names = config.architectures or []
    if not classifier:
        for name in names:
            found = getattr(transformers, name, None)  # a name of transformers itself, never one of the repository
            if isinstance(found, type) and issubclass(found, PreTrainedModel):
                return found
    if type(config) not in CLASSIFIERS:
        raise ValueError(
            f"config.json describes {type(config).__name__} with the architectures {names}, for which transformers "
            f"has {'no image classifier' if classifier else 'no model class'}. A class of your own can be registered: "
            "AutoModelForImageClassification.register(config_class, model_class)."
        )
    found = CLASSIFIERS[type(config)]
    classes = found if isinstance(found, (tuple, list)) else [found]
    return next((one for one in classes if one.__name__ in names), classes[0])
