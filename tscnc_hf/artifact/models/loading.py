"""A name or folder to a module, whatever lies there: dense weights, packed ones, layers narrower than the config says.

Every way in ends in `build_exactly` or `load_weights`: a weight that is missing, unexpected or of another shape is an
error that names it. Keys on disk are not those in memory (ViT renames most of its parameters when it is saved), so a
`PreTrainedModel` is always read through transformers' own conversion.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash, get_checkpoint_shard_files

from tscnc_hf.artifact.files.identity import weights_digest
from tscnc_hf.artifact.files.tensor_file import unreadable
from tscnc_hf.artifact.models.config import (
    CONFIG_FILE,
    class_of,
    config_digest,
    label_fields,
    read_config,
    read_processor,
)
from tscnc_hf.artifact.models.preprocessing import preprocessing
from tscnc_hf.artifact.models.recorded_widths import as_plain, narrowed
from tscnc_hf.artifact.models.weights import (
    INDEX_FILE,
    WEIGHTS_FILE,
    differences,
    exact_dtype,
    float_dtypes,
    has_weights,
    read_weights,
    same_tensors,
    stored_dtypes,
)
from tscnc_hf.artifact.packed.file import SPARSE_FILE, read_sparse_file, read_sparse_metadata
from tscnc_hf.artifact.packed.limit import count_nonzero
from tscnc_hf.method.adversarial.pixels import LogitsFn, pixel_logits
from tscnc_hf.method.copying import copied
from tscnc_hf.method.sharding import copy_whole_, is_sharded, unsharded_class


DTYPE_OPTIONS = ("dtype", "torch_dtype")  # as transformers calls it, and as it did before
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder")
SAME = "use a checkpoint of this very architecture"
TWO_MODELS = (
    "{} holds other weights than the dense file beside it. One of them is of another model: remove it, then `tscnc "
    "pack` or `tscnc unpack` makes the other from what is left"
)
HOW_TO_PACK = "Make one with tscnc_hf.save_sparse(model, folder)"


def logits_fn(model: nn.Module, processing_class: object | None = None) -> LogitsFn:
    """
    A function from pixels in [0, 1], float (b, c, h, w), to float32 logits (b, k), with the whole preprocessing
    inside: resize, crop and normalisation, as the image processor does them. So an attack on it changes the image
    itself, at the image's own size.

    Raises:
        ValueError: neither the image processor nor the model's config says how inputs are normalised, or the image
            processor does what cannot be reproduced (`preprocessing`; of its resize that is found when images come).
    """
    return pixel_logits(model, *preprocessing(model, processing_class))


def load_model(
    name_or_folder: str | os.PathLike, class_names: Sequence[str] | None = None, **options: Any
) -> tuple[PreTrainedModel, object]:
    """A classifier and its image processor, of one commit. Arguments and errors: `load_slim`."""
    options = _pinned(name_or_folder, options)
    return load_slim(name_or_folder, class_names, **options), read_processor(name_or_folder, **_hub(options))


def load_slim(
    name_or_folder: str | os.PathLike,
    class_names: Sequence[str] | None = None,
    *,
    new_head: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """
    An image classifier from a folder or the Hub, in eval mode, also one whose widths are recorded. Its dense weights
    are read, or the packed file where there are none. Config and weights are of one commit. Unless a `dtype` is given
    it is that of the weights in safetensors files, whatever config.json says: what is measured is what is stored.

    Args:
        class_names (`Sequence[str]`, *optional*): of the data set; another number of classes gets a new head.
        new_head (`bool`): give the model a head for `class_names` even if it has as many, or none.
        options: of `from_pretrained`, such as `revision`, `token` or `dtype`; not `ignore_mismatched_sizes`.

    Raises:
        OSError: there is no such model, or it has no weights.
        ValueError: recorded widths that the model cannot have; weights that are missing, unexpected or of another
            shape, but for a new head and the one in its place; a packed file is to get a new head; the model is no
            image classifier; a damaged file.
    """
    options = _pinned(name_or_folder, options)
    given = dict(options)
    hub = _hub(options)
    config = options.pop("config", None) or read_config(name_or_folder, **hub)
    new_head = new_head or (class_names is not None and len(class_names) != config.num_labels)
    if new_head:
        config = read_config(name_or_folder, **hub, **label_fields(class_names))
    if _dtype_given(options) is None and options.get("variant") is None:
        files = _dense_files(name_or_folder, **_hub(options))
        options["dtype"] = exact_dtype(stored_dtypes(files))
        if files:
            options.pop("force_download", None)  # which has been done
    try:
        return build_exactly(class_of(config), config, name_or_folder, new_head=new_head, **options)
    except OSError as no_dense_weights:
        if has_weights(Path(name_or_folder)):
            raise
        try:
            model = load_sparse(name_or_folder, **given)
        except FileNotFoundError:
            raise no_dense_weights from None
    if new_head:
        raise ValueError(
            f"{name_or_folder} is packed and has {model.num_labels} classes, the data {len(class_names)}: a new "
            f"head can be given to the dense weights only. Make them with `tscnc unpack {name_or_folder}`"
        )
    return model


def load_sparse(
    folder_or_hub_id: str | os.PathLike,
    revision: str | None = None,
    token: str | bool | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> PreTrainedModel:
    """The model of a packed checkpoint: an ordinary dense `PreTrainedModel`, in eval mode, bit for bit what was saved.

    Only config.json and `model.sparse.safetensors` are read, or downloaded (from one commit) if `folder_or_hub_id` is
    not a folder here; `revision` and `token` are for the Hub. Checked are the digest of the file, that it was saved
    with this config.json, all names and shapes, and the number of zeros in the finished model; in a folder here also
    that dense weights beside the file are the same.

    Args:
        options: of `from_pretrained`, such as `dtype` or `subfolder`.

    Raises:
        FileNotFoundError: there is no packed file, or no such folder and no such model on the Hub.
        ValueError: the file is damaged, it is not of the model that config.json describes, dense weights beside it are
            of another model, or config.json describes no image classifier.
        ImportError: the file is compressed, and zstandard is not installed.
        OSError: the Hub can not be reached or refuses (huggingface_hub's own errors).
    """
    folder = _locate(folder_or_hub_id, revision=revision, token=token, **_hub(options))
    path = folder / SPARSE_FILE
    read_sparse_metadata(path)  # what is no packed file is told first
    digest = config_digest(folder)
    options = {key: value for key, value in options.items() if key not in HUB_OPTIONS}
    config = options.pop("config", None) or read_config(folder)
    found = class_of(config)
    # A file with another number of elements by a factor of two is not even decoded. Within it, which leaves room for
    # tied weights, names and shapes are compared, with better words.
    count = sum(tensor.numel() for tensor in _empty(found, config).state_dict().values())
    tensors = read_sparse_file(path, digest, (math.ceil(count / 2), 2 * count))
    values = sum(map(count_nonzero, tensors.values()))  # now: the model may share memory with the tensors
    dense = read_weights(folder) if Path(folder_or_hub_id).is_dir() and has_weights(folder) else tensors
    same = same_tensors(dense, tensors)
    exact = {key: value for key, value in options.items() if key not in DTYPE_OPTIONS}
    model = build_exactly(found, config, path, tensors, **exact)
    if not same:  # or the dense weights have the names that they have in memory
        other = build_exactly(found, config, folder, dense, **exact)
        if not same_tensors(other.state_dict(), model.state_dict()):
            raise ValueError(TWO_MODELS.format(path))
    state = model.state_dict()
    untied = {(tensor.data_ptr(), tensor.shape): tensor for tensor in state.values()}  # a file has a tied weight once
    counts = [sum(map(count_nonzero, weights.values())) for weights in (state, untied)]
    if values not in counts:
        raise ValueError(f"{path} holds {values} values that are not zero, the model built from it {counts[1]}.")
    if _dtype_given(options) is not None:  # only now: what is rounded may become zero
        model = build_exactly(found, config, path, tensors, **options)
    # transformers leaves the text "None" here, which a model card would then name as the base model
    model.config.name_or_path = model.name_or_path = str(folder_or_hub_id)
    return model.to(device)


def load_weights(model: nn.Module, folder: str | os.PathLike) -> None:
    """Load the weights of a checkpoint folder (`model.safetensors`, sharded or not) into an existing model, exactly.

    The model keeps its device and dtype; values are only rounded if its dtype is narrower than the file's. A
    `PreTrainedModel` is read through transformers' key conversion, with the model's own config; any other module must
    have the file's names. Checked before anything is copied, so that an error leaves the model as it was. The global
    random state is not touched. A model that FSDP2 has sharded takes its parts; every process calls this.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: a damaged file, or missing, unexpected or mismatched keys; the message names them.
    """
    state = read_weights(Path(folder))
    if isinstance(model, PreTrainedModel):
        state = build_exactly(unsharded_class(model), copy.deepcopy(model.config), folder, state).state_dict()
    own = model.state_dict()
    both = own.keys() & state.keys()
    shapes = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in both}
    mismatched = [f"{name} {stored} for {wanted}" for name, (stored, wanted) in shapes.items() if stored != wanted]
    _raise_if_different(folder, type(model).__name__, own.keys() - both, state.keys() - both, mismatched)
    if not is_sharded(model):
        model.load_state_dict(state, strict=True)
        return
    for name, tensor in own.items():  # they share memory with the parameters
        copy_whole_(tensor, state[name])


def holds_weights(folder: str | os.PathLike, model: nn.Module) -> bool:
    """Whether a checkpoint folder has exactly the model's weights."""
    other = copied(model)
    try:
        load_weights(other, folder)
    except (OSError, ValueError):  # none, damaged ones, or those of another network
        return False
    return weights_digest(other) == weights_digest(model)


def build_exactly(
    model_class: type[PreTrainedModel],
    config: Any,
    source: str | os.PathLike,
    tensors: dict[str, torch.Tensor] | None = None,
    *,
    new_head: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A new model of `config`, in eval mode, with the dense weights of a folder or Hub id in it.

    Args:
        source: the folder or Hub id.
        tensors: weights to use instead (names as on disk), on the CPU, which the model may share memory with; `source`
            is then for the messages. The model gets their floating dtype, or one that holds all of them exactly.
        new_head: weights whose shape the number of classes decides may be missing, or of another number of classes;
            what the file has beside the layers of the model (a pooler, another head) is then left out.
        options: of `from_pretrained`.

    Raises:
        ValueError: missing, unexpected or mismatched weights, or transformers could not read or convert one.
    """
    if tensors is not None:
        options = {"state_dict": tensors, "dtype": exact_dtype(float_dtypes(tensors))} | options
    try:
        model, found = narrowed(model_class, config).from_pretrained(
            source if tensors is None else None,
            config=config,
            ignore_mismatched_sizes=True,  # so that they are listed below with the others
            output_loading_info=True,
            **options,
        )
    except SafetensorError as error:
        raise unreadable(source, error) from error
    as_plain(model)
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    # No weights: counts of batches, which old files do not have, and what a model computes itself and old files store.
    missing = {key for key in found["missing_keys"] if key in own and not key.endswith("num_batches_tracked")}
    mismatched = {key: tuple(stored) for key, stored, _ in found["mismatched_keys"]}
    unexpected, advice = set(found["unexpected_keys"]) - {name for name, _ in model.named_buffers()}, SAME
    head = head_weights(model_class, config) if missing or mismatched else set()
    if new_head:
        missing -= head
        mismatched = {k: stored for k, stored in mismatched.items() if k not in head or stored[1:] != own[k][1:]}
        unexpected = {key for key in unexpected if not _is_beside_the_layers(key, model)}
    elif missing and missing <= head:
        advice = "a backbone without a classifier can be fine-tuned (recipes/finetune.py)"
    shapes = [f"{key} {stored} for {own[key]}" for key, stored in mismatched.items()]
    _raise_if_different(source, model_class.__name__, missing, unexpected, shapes, advice)
    if found["error_msgs"]:
        raise ValueError(f"{source}: transformers could not convert the weights: {found['error_msgs']}")
    return model


def _hub(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in HUB_OPTIONS if key in options}


def _pinned(source: str | os.PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """Options whose revision is the commit that the branch or tag has now, whatever is pushed while files are read."""
    if os.path.isdir(source):
        return options
    try:
        commit = extract_commit_hash(cached_file(source, CONFIG_FILE, **_hub(options)), None)
    except OSError:  # whoever reads the config says why
        commit = None
    return options if commit is None else options | {"revision": commit}


def _dtype_given(options: dict[str, Any]) -> Any:
    return next((options[key] for key in DTYPE_OPTIONS if options.get(key) is not None), None)


def _dense_files(source: str | os.PathLike, **hub: Any) -> list[str]:
    """The safetensors files of a folder or Hub id, in the cache if they were not here; none where there are none."""
    try:
        return [cached_file(source, WEIGHTS_FILE, **hub)]
    except OSError:  # whoever loads the weights says why
        pass
    try:
        return get_checkpoint_shard_files(source, cached_file(source, INDEX_FILE, **hub), **hub)[0]
    except (OSError, ValueError, LookupError, TypeError):  # none either, or a damaged one
        return []


def _raise_if_different(
    source: Any, model: str, missing: Any, unexpected: Any, mismatched: Any, advice: str = SAME
) -> None:
    if missing or unexpected or mismatched:
        raise ValueError(
            f"{source} does not fit the {model}: {differences(missing, unexpected, mismatched)}. Nothing was loaded; "
            f"{advice}."
        )


def _empty(model_class: type[PreTrainedModel], config: Any, more_labels: int = 0) -> PreTrainedModel:
    """The model of a config with no memory for its weights."""
    config = copy.deepcopy(config)
    config.num_labels += more_labels
    with torch.device("meta"):
        return narrowed(model_class, config)(config)


def head_weights(model_class: type[PreTrainedModel], config: Any) -> set[str]:
    """The weights whose shape the number of classes decides."""
    one, other = (_empty(model_class, config, more).state_dict() for more in (0, 1))
    return {key for key in one if one[key].shape != other[key].shape}


def _is_beside_the_layers(key: str, model: PreTrainedModel) -> bool:
    """Whether an unexpected weight lies where this model has nothing, as a pooler or another head, and in no layer."""
    prefix = f"{model.base_model_prefix}."
    around = model.base_model if key.startswith(prefix) else model
    children = {name for part in (around, model.base_model) for name, _ in part.named_children()}
    return key.removeprefix(prefix).split(".")[0] not in children


def _locate(source: str | os.PathLike, revision: str | None = None, subfolder: str = "", **hub: Any) -> Path:
    """The folder with config.json and the packed file: `source` itself, or a snapshot in the Hub's cache."""
    folder = Path(source)
    if folder.is_dir():
        folder = folder / subfolder
        for name, advice in ((SPARSE_FILE, HOW_TO_PACK), (CONFIG_FILE, "Copy it there from the dense checkpoint")):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}. {advice}.")
        return folder
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file; give the folder that holds it.")
    inside = f"{subfolder}/" if subfolder else ""
    try:
        path = Path(hf_hub_download(str(source), inside + SPARSE_FILE, revision=revision, **hub))
        # the cache keeps a commit's files in a folder named after it: the same commit, whatever is pushed meanwhile
        commit = path.parents[inside.count("/")].name
        hf_hub_download(str(source), inside + CONFIG_FILE, revision=commit, **hub)
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
