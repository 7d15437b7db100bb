"""A module -> a folder: config.json and the packed file beside the dense weights, and what a run publishes."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

import torch
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers import PreTrainedModel, TimmWrapperForImageClassification

from tscnc_hf.artifact.models.config import CONFIG_FILE, config_digest
from tscnc_hf.artifact.models.recorded_widths import as_plain, narrowed
from tscnc_hf.artifact.models.weights import TIMM_PREFIX, float_dtypes, has_weights, read_weights, same_tensors
from tscnc_hf.artifact.packed.file import SPARSE_FILE, read_sparse_file, write_sparse_file
from tscnc_hf.method.sharding import unsharded_class, whole_state


def whole_copy(model: PreTrainedModel, keep: bool = True) -> PreTrainedModel | None:
    """
    A sharded model as a plain one, in eval mode on the CPU. All processes call it; those that do not `keep` only help
    to gather the weights, and get None.
    """
    state = whole_state(model, keep)
    if state is None:
        return None
    model_class = unsharded_class(model)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and at once replaced
        whole = narrowed(model_class, model.config)(copy.deepcopy(model.config))
    as_plain(whole)
    whole.load_state_dict(state)
    return whole.eval()


def save_sparse(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    compression: str | None = None,
    value_dtype: str | None = None,
) -> Path:
    """Write config.json and the packed `model.sparse.safetensors` into `folder`; return the path of the packed file.

    Dense weights beside it, which stock transformers loads, are what `model.save_pretrained(folder)` writes. The keys
    are those of the dense checkpoint, a timm model's without "timm_model.". `load_sparse` gives the model back bit for
    bit, unless `value_dtype` is given, but for -0.0, which `weight * mask` makes of negative weights: it comes back as
    0.0.

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
    check_publishable(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:  # files can be moved within a disk
        fresh = Path(temporary)
        model.save_pretrained(fresh, state_dict=disk_state(model))
        tensors, path = read_weights(fresh), fresh / SPARSE_FILE
        if len(float_dtypes(tensors)) > 1:
            raise ValueError(
                f"the model has weights of {sorted(map(str, float_dtypes(tensors)))}; a packed checkpoint holds one "
                "floating dtype. Convert the model first, e.g. model.to(torch.float32)."
            )
        options = {"compression": compression, "value_dtype": value_dtype, "config": config_digest(fresh)}
        write_sparse_file(tensors, path, **options)
        packed = read_sparse_file(path) if value_dtype else tensors
        if has_weights(folder) and not same_tensors(read_weights(folder), packed):
            raise ValueError(
                f"{folder} holds dense weights that are not this model's{', rounded,' if value_dtype else ''} and a "
                "folder holds one model only. Call model.save_pretrained(folder) first, or save into another folder."
            )
        os.replace(path, folder / SPARSE_FILE)
        os.replace(fresh / CONFIG_FILE, folder / CONFIG_FILE)
    return folder / SPARSE_FILE


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


def check_publishable(model: object) -> None:
    """
    Raises:
        ValueError: no library would load the model from a folder, or it would load another one.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"got {type(model).__name__}, but only a transformers PreTrainedModel can be published as a folder that "
            "others load. Wrap a timm model in TimmWrapperForImageClassification; unwrap a DDP or compiled model."
        )
    attached = [name for name, module in model.named_modules() if _reparametrized(module)]
    if attached:
        raise ValueError(
            f"{len(attached)} layers compute a weight from other parameters ({attached[0]}, ...), which nobody else "
            "can load. Fold them into plain weights first: torch.nn.utils.parametrize.remove_parametrizations(layer, "
            "'weight'), torch.nn.utils.prune.remove(layer, 'weight'), remove_weight_norm or remove_spectral_norm."
        )


def _reparametrized(module: torch.nn.Module) -> bool:
    """Whether torch computes a parameter of the module from others, in its newer or its older way."""
    hooks = tuple(map(type, module._forward_pre_hooks.values()))
    return hasattr(module, "parametrizations") or any(
        issubclass(hook, (BasePruningMethod, WeightNorm, SpectralNorm)) for hook in hooks
    )
