"""A folder that anyone can load, the same model packed small, and the way back into training.

The dense folder is what `PreTrainedModel.save_pretrained` writes: stock transformers loads it without this package.
The packed file (`sparse_file.py`) lies beside it, under the same key names. Keys on disk are not the names in memory
(ViT renames most of its parameters when it is saved), so every way in goes through transformers' own conversion, and a
key that is missing, unexpected or of another shape is an error.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    PreTrainedModel,
    TimmWrapperForImageClassification,
)

from tscnc_hf.artifact.files.state import STATE_FILE, load_state, save_state
from tscnc_hf.artifact.models.config import read_config
from tscnc_hf.artifact.models.narrowed import narrowed
from tscnc_hf.artifact.models.weights import (
    INDEX_FILE,
    WEIGHTS_FILE,
    build_exactly,
    float_dtypes,
    has_weights,
    load_exactly,
    read_weights,
    same_tensors,
    unsharded_class,
)
from tscnc_hf.artifact.packed.file import SPARSE_FILE, read_sparse_file, read_sparse_metadata, write_sparse_file
from tscnc_hf.artifact.packed.limit import count_nonzero


__all__ = [
    "SPARSE_FILE",
    "STATE_FILE",
    "config_digest",
    "disk_state",
    "load_sparse",
    "load_state",
    "load_weights",
    "save_dense",
    "save_sparse",
    "save_state",
]

CONFIG_FILE = "config.json"
# of config.json, what says nothing of the model that the weights make
NOT_THE_MODEL = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "quantization_config", "tscnc"}
TIMM_PREFIX = "timm_model."
HOW_TO_PACK = "Make one with tscnc_hf.save_sparse(model, folder)"


def save_dense(model: PreTrainedModel, folder: str | os.PathLike, processing_class: Any = None) -> Path:
    """Write the folder that stock `AutoModelForImageClassification.from_pretrained` loads; return its path.

    A timm model gets the names of timm, so that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it as
    well; transformers knows both spellings.

    The weights keep the model's dtype, pruned weights are written as zeros, and `processing_class` (an image
    processor, say) is saved beside them if it is given. Files are written to a temporary folder inside `folder` and
    then moved, each at once. Weights of an earlier save are removed, and so is a packed file that holds other weights
    than these: a folder never holds two models.

    Raises:
        ValueError: the model is no `PreTrainedModel`, or is still reparametrised.
    """
    folder = Path(folder)
    with _saved(model, folder) as fresh:
        if processing_class is not None:
            processing_class.save_pretrained(fresh)
        _remove_other_sparse(folder / SPARSE_FILE, fresh)
        files = [path for path in fresh.rglob("*") if path.is_file()]
        names = {path.relative_to(fresh).as_posix() for path in files}
        # index last: until it is there, the shards that it names are not read
        for path in sorted(files, key=lambda path: path.name == INDEX_FILE):
            target = folder / path.relative_to(fresh)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        for path in [folder / WEIGHTS_FILE, folder / INDEX_FILE, *folder.glob("model-*-of-*.safetensors")]:
            if path.name not in names:
                path.unlink(missing_ok=True)
    return folder


def save_sparse(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    compression: str | None = None,
    value_dtype: str | None = None,
) -> Path:
    """Write config.json and the packed `model.sparse.safetensors` into `folder`; return the path of the packed file.

    Its keys are those of the dense checkpoint. `load_sparse` gives the model back bit for bit, unless `value_dtype` is
    given. Only 0.0 is left out: -0.0, which `weight * mask` makes of negative weights, is kept as a value
    (`weight + 0.0` is free of it).

    Args:
        compression: "zstd" compresses further, without loss, by a fifth or so; whoever reads the file needs zstandard,
            too (pip install 'tscnc-hf[pack]').
        value_dtype: "fp16" or "bf16" rounds the values of packed weights, which makes the file about half as large and
            the model another one: evaluate it again. It keeps its dtype; tensors that are not packed keep their bits.

    Raises:
        ValueError: the model is no `PreTrainedModel`, is still reparametrised, or mixes floating dtypes (transformers
            builds a model in one); an unknown option, a value too large for `value_dtype`; or `folder` holds dense
            weights that differ from what is packed.
        ImportError: zstandard is not installed.
    """
    folder = Path(folder)
    with _saved(model, folder) as fresh:
        tensors = read_weights(fresh)
        if len(float_dtypes(tensors)) > 1:
            raise ValueError(
                f"the model has weights of {sorted(map(str, float_dtypes(tensors)))}; a packed checkpoint holds one "
                "floating dtype. Convert the model first, e.g. model.to(torch.float32)."
            )
        path = fresh / SPARSE_FILE
        options = {"compression": compression, "value_dtype": value_dtype, "config": config_digest(fresh)}
        write_sparse_file(tensors, path, **options)
        packed = read_sparse_file(path) if value_dtype else tensors
        if has_weights(folder) and not same_tensors(read_weights(folder), packed):
            raise ValueError(
                f"{folder} holds dense weights that are not this model's{', rounded,' if value_dtype else ''} and a "
                "folder holds one model only. Call save_dense(model, folder) first, or save into another folder."
            )
        os.replace(path, folder / SPARSE_FILE)
        os.replace(fresh / CONFIG_FILE, folder / CONFIG_FILE)
    return folder / SPARSE_FILE


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


def disk_state(
    model: torch.nn.Module, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor] | None:
    """`state_dict` (by default the model's) for `save_pretrained(state_dict=...)`, a timm model's under timm's names.

    For any other model what was given, None included: transformers renames on its own.
    """
    if not isinstance(model, TimmWrapperForImageClassification):
        return state_dict
    state_dict = model.state_dict() if state_dict is None else state_dict
    return {name.removeprefix(TIMM_PREFIX): tensor for name, tensor in state_dict.items()}


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


@contextmanager
def _saved(model: PreTrainedModel, folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder` (same file system, so that files can be moved) with the saved model in it."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"got {type(model).__name__}, but only a transformers PreTrainedModel can be published as a folder that "
            "others load. Wrap a timm model in TimmWrapperForImageClassification; unwrap a DDP or compiled model."
        )
    attached = [name for name in model.state_dict() if "parametrizations" in name]
    if attached:
        raise ValueError(
            f"{len(attached)} keys belong to torch parametrizations ({attached[0]}, ...), which nobody else can load. "
            "Fold them into the weights first: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        model.save_pretrained(temporary, state_dict=disk_state(model))
        yield Path(temporary)


def _remove_other_sparse(path: Path, fresh: Path) -> None:
    if not path.is_file():
        return
    try:
        same = same_tensors(read_sparse_file(path, config_digest(fresh)), read_weights(fresh))
    except (ValueError, ImportError):  # damaged, or unreadable here: nobody can say that it is this model
        same = False
    if not same:
        path.unlink()


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


def image_classifier(config: Any) -> type[PreTrainedModel]:
    """The class that `AutoModelForImageClassification` would take; itself it takes no state dict without a name."""
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"config.json describes {type(config).__name__}, for which transformers has no image classifier. "
            "load_sparse reads image classifiers; a class of your own can be registered with "
            "AutoModelForImageClassification.register(config_class, model_class)."
        )
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    classes = found if isinstance(found, (tuple, list)) else [found]
    named = [one for one in classes if one.__name__ in (config.architectures or [])]
    return (named or classes)[0]


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
