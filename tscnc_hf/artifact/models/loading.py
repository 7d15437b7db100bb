"""A name or folder to a module with its weights and image processor; logits from pixels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import (
    AutoImageProcessor,
    PreTrainedModel,
)

from tscnc_hf.artifact.models.checkpoint import load_sparse
from tscnc_hf.artifact.models.config import label_fields, read_config
from tscnc_hf.artifact.models.narrowed import recorded_widths
from tscnc_hf.artifact.models.slim import load_slim
from tscnc_hf.method.adversarial.pixels import LogitsFn, normalisation, pixel_logits


def logits_fn(model: nn.Module, processing_class: object | None = None) -> LogitsFn:
    """
    A function from pixels in [0, 1], float (b, c, h, w), to float32 logits (b, k), normalisation inside.

    Raises:
        ValueError: neither the image processor nor the model's config says how inputs are normalised.
    """
    return pixel_logits(model, *normalisation(model, processing_class))


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
