"""A name or folder to a module with its weights and image processor; logits from pixels."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
)

from tscnc_hf.artifact.models.config import CONFIG_FILE, config_digest, image_classifier, label_fields, read_config
from tscnc_hf.artifact.models.narrowed import as_plain, narrowed, recorded_widths
from tscnc_hf.artifact.models.weights import _differences, float_dtypes, read_weights
from tscnc_hf.artifact.packed.file import SPARSE_FILE, read_sparse_file, read_sparse_metadata
from tscnc_hf.artifact.packed.limit import count_nonzero
from tscnc_hf.method.adversarial.pixels import LogitsFn, normalisation, pixel_logits
from tscnc_hf.method.sharding import copy_whole_, is_sharded, unsharded_class


HOW_TO_PACK = "Make one with tscnc_hf.save_sparse(model, folder)"


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


def load_sparse(
    folder_or_hub_id: str | os.PathLike,
    revision: str | None = None,
    token: str | bool | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """The model of a packed checkpoint: an ordinary dense `PreTrainedModel`, in eval mode, bit for bit what was saved.

    Only config.json and `model.sparse.safetensors` are read, or downloaded (from one commit) if `folder_or_hub_id` is
    not a folder here; `revision` and `token` are for the Hub. Checked are the digest of the file, that it was saved
    with this config.json, all names and shapes, and the number of zeros in the finished model.

    Raises:
        FileNotFoundError: there is no packed file, or no such folder and no such model on the Hub.
        ValueError: the file is damaged, it is not of the model that config.json describes, or config.json describes no
            image classifier.
        ImportError: the file is compressed, and zstandard is not installed.
        OSError: the Hub can not be reached or refuses (huggingface_hub's own errors).
    """
    folder = _locate(folder_or_hub_id, revision, token)
    path = folder / SPARSE_FILE
    read_sparse_metadata(path)  # what is no packed file is told first
    digest = config_digest(folder)
    config = read_config(folder)
    model_class = image_classifier(config)
    tensors = read_sparse_file(path, digest, _elements(model_class, config))
    values = sum(map(count_nonzero, tensors.values()))  # now: the model may share memory with the tensors
    model = build_exactly(model_class, config, tensors, path)
    _check_zeros(model, values, path)
    # transformers leaves the text "None" here, which a model card would then name as the base model
    model.config.name_or_path = model.name_or_path = str(folder_or_hub_id)
    return model.to(device)


def load_weights(model: torch.nn.Module, folder: str | os.PathLike) -> None:
    """Load the weights of a checkpoint folder (`model.safetensors`, sharded or not) into an existing model, exactly.

    The model keeps its device and dtype; values are only rounded if its dtype is narrower than the file's. A
    `PreTrainedModel` is read through transformers' key conversion, with the model's own config; any other module must
    have the file's names. Checked before anything is copied, so that an error leaves the model as it was. The global
    random state is not touched.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: a damaged file, or missing, unexpected or mismatched keys; the message names them.
    """
    state = read_weights(Path(folder))
    if isinstance(model, PreTrainedModel):
        state = build_exactly(unsharded_class(model), copy.deepcopy(model.config), state, folder).state_dict()
    load_exactly(model, state, folder)


def _elements(model_class: type[PreTrainedModel], config: Any) -> tuple[int, int]:
    """Between how many and how many elements a file for this model has: wrong by a factor, it is not even decoded.

    Within the factor of two, which leaves room for tied weights, names and shapes are compared, with better words.
    """
    with torch.device("meta"):
        model = narrowed(model_class, config)(copy.deepcopy(config))
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    return math.ceil(count / 2), 2 * count


def _check_zeros(model: PreTrainedModel, values: int, source: Path) -> None:
    state = model.state_dict()
    untied = {(tensor.data_ptr(), tensor.shape): tensor for tensor in state.values()}  # a file has a tied weight once
    found = [sum(map(count_nonzero, weights.values())) for weights in (state, untied)]
    if values not in found:
        raise ValueError(f"{source} holds {values} values that are not zero, the model built from it {found[1]}.")


def _locate(source: str | os.PathLike, revision: str | None, token: str | bool | None) -> Path:
    """The folder with config.json and the packed file: `source` itself, or a snapshot in the Hub's cache."""
    folder = Path(source)
    if folder.is_dir():
        for name, advice in ((SPARSE_FILE, HOW_TO_PACK), (CONFIG_FILE, "Copy it there from the dense checkpoint")):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}. {advice}.")
        return folder
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file; give the folder that holds it.")
    try:
        path = Path(hf_hub_download(str(source), SPARSE_FILE, revision=revision, token=token))
        # the cache keeps a commit's files in a folder named after it: the same commit, whatever is pushed meanwhile
        hf_hub_download(str(source), CONFIG_FILE, revision=path.parent.name, token=token)
    except HFValidationError as error:
        raise FileNotFoundError(f"{str(source)!r} is neither a folder here nor a model id (owner/name).") from error
    except LocalEntryNotFoundError:
        raise  # the Hub could not be asked, which says nothing about what it has
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{str(source)!r} on the Hub lacks {SPARSE_FILE} or {CONFIG_FILE}. {HOW_TO_PACK} and upload the folder, "
            "or load the dense weights with AutoModelForImageClassification.from_pretrained."
        ) from error
    return path.parent


def load_slim(name_or_folder: str | os.PathLike, **options: Any) -> PreTrainedModel:
    """
    An image classifier with its dense weights, from a folder or the Hub, also one whose widths are recorded.

    Args:
        options: of `from_pretrained`.

    Raises:
        ValueError: recorded widths that the model cannot have. Otherwise what `from_pretrained` raises.
    """
    config = options.pop("config", None) or read_config(name_or_folder)
    if not recorded_widths(config):
        options = {"trust_remote_code": False} | options
        return AutoModelForImageClassification.from_pretrained(name_or_folder, config=config, **options)
    model_class = narrowed(image_classifier(config), config)
    return as_plain(model_class.from_pretrained(name_or_folder, config=config, **options))


def build_exactly(
    model_class: type[PreTrainedModel], config: Any, tensors: dict[str, torch.Tensor], source: str | os.PathLike
) -> PreTrainedModel:
    """A new model of `config` in eval mode on the CPU with the checkpoint `tensors` (names as on disk) in it.

    Its dtype is the tensors' floating dtype, or if they have several, one that holds all of them exactly. The model
    may share memory with `tensors`. `source` is for the messages.

    Raises:
        ValueError: missing, unexpected or mismatched keys, or transformers could not convert one.
    """
    dtypes = float_dtypes(tensors)
    model, info = narrowed(model_class, config).from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=reduce(torch.promote_types, dtypes) if dtypes else None,
        ignore_mismatched_sizes=True,  # so that they are listed below with the others
        output_loading_info=True,
    )
    mismatched = [f"{name} {tuple(found)} for {tuple(own)}" for name, found, own in info["mismatched_keys"]]
    as_plain(model)
    _raise_if_different(source, model_class.__name__, info["missing_keys"], info["unexpected_keys"], mismatched)
    if info["error_msgs"]:
        raise ValueError(f"{source}: transformers could not convert the weights: {info['error_msgs']}")
    return model


def load_exactly(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str | os.PathLike) -> None:
    """Strict `load_state_dict` that checks names and shapes first, so that an error leaves the model untouched.

    A model that FSDP2 has sharded takes its parts of the whole tensors that every process gives.

    Raises:
        ValueError: missing, unexpected or mismatched keys; `source` is for the message.
    """
    own = model.state_dict()
    both = own.keys() & state.keys()
    mismatched = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in both
        if state[name].shape != own[name].shape
    ]
    _raise_if_different(source, type(model).__name__, own.keys() - both, state.keys() - both, mismatched)
    if not is_sharded(model):
        model.load_state_dict(state, strict=True)
        return
    for name, tensor in own.items():  # they share memory with the parameters
        copy_whole_(tensor, state[name])


def _raise_if_different(source: Any, model: str, missing: Any, unexpected: Any, mismatched: Any) -> None:
    if missing or unexpected or mismatched:
        raise ValueError(
            f"{source} does not fit the {model}: {_differences(missing, unexpected, mismatched)}. Nothing was loaded; "
            "use a checkpoint of this very architecture."
        )
