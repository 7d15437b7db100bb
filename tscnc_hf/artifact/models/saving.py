"""A module -> a folder: config.json and the packed file beside the dense weights, and what a run publishes."""

from __future__ import annotations

import copy
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
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
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.sharding import unsharded_class, whole_state
from tscnc_hf.method.wrappers import unwrapped


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
    model = unwrapped(model)
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

    For any other model what was given, None included: transformers renames on its own. Unless a tensor is not
    contiguous or shares memory with another one (weights that are tied, views of a larger one), which files cannot
    express: each then has a copy of its own, so that stock loaders find every name. Ties that a transformers model
    declares it handles itself.
    """
    wrapped = isinstance(model, TimmWrapperForImageClassification)
    full = model.state_dict() if state_dict is None else state_dict
    separate = _separate(full, getattr(model, "all_tied_weights_keys", None) or {})
    if wrapped:
        return {name.removeprefix(TIMM_PREFIX): tensor for name, tensor in (separate or full).items()}
    return state_dict if separate is None else separate


def _separate(state: dict[str, torch.Tensor], tied: Mapping[str, str]) -> dict[str, torch.Tensor] | None:
    """The state with contiguous tensors that share no memory, but for declared ties; None if it is so already."""
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    if any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):  # sharded: gathered elsewhere
        return None
    places = {n: t.untyped_storage().data_ptr() for n, t in tensors.items() if n not in tied and t.numel()}
    owners = Counter(places.values())
    alone = {name for name, tensor in tensors.items() if tensor.is_contiguous() and owners[places.get(name)] < 2}
    if len(alone) == len(tensors):
        return None
    copies = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items() if n not in alone}
    return {**state, **copies}


def refuse_parts(model: torch.nn.Module) -> None:
    """
    Raises:
        ValueError: what `save_pretrained` writes is a part of the model only, an adapter, while constraints and
            pruning change all of it; or its weights are quantised or expanded, so that none of them can be pruned.
    """
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    adapted = classes & {"PeftModel", "BaseTunerLayer"} or getattr(model, "_hf_peft_config_loaded", False)
    adapted = adapted or getattr(model, "peft_config", None) or getattr(model, "adapters_config", None)
    if adapted:
        raise ValueError(
            f"the {type(model).__name__} has adapters (PEFT): base weights and factors would be constrained and "
            "pruned, and the adapter alone saved, which is another model. Merge it first: "
            "model = model.merge_and_unload(), or train the model without it"
        )
    odd = [record.name for record in weight_matrices(model) if not record.weight.is_floating_point()]
    if getattr(model, "is_quantized", False) or odd:
        raise ValueError(
            f"the {type(model).__name__} is quantised{f' ({odd[0]})' if odd else ''}: its weights cannot be "
            "constrained or pruned. Load it in a floating dtype, or call model.dequantize()"
        )
    spread = [name for name, weight in model.named_parameters() if _is_expanded(weight)]
    if spread:
        raise ValueError(
            f"{spread[0]} is expanded: several of its numbers are one in memory, so that none can be trained, or "
            "loaded, alone. Make it whole first: torch.nn.Parameter(weight.detach().clone())"
        )
    if lost := {name for name, _ in model.named_parameters()} - model.state_dict().keys():
        raise ValueError(
            f"{type(model).__name__}.state_dict() leaves out {', '.join(sorted(lost)[:3])}: what would be saved is a "
            "part of the model"
        )


def _is_expanded(weight: torch.Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True))


def check_publishable(model: object) -> None:
    """
    Raises:
        ValueError: no library would load the model from a folder, or it would load another one.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"got {type(model).__name__}, but only a transformers PreTrainedModel can be published as a folder that "
            "others load. Wrap a timm model in TimmWrapperForImageClassification."
        )
    refuse_parts(model)
    if compiled := [name for name in model.state_dict() if "_orig_mod." in name]:
        raise ValueError(
            f"{len(compiled)} keys are those of a compiled module ({compiled[0]}, ...), which nobody else can load. "
            "Put module._orig_mod in its place first"
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
