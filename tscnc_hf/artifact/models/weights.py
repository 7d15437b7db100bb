"""Weights on disk <-> weights in a model, with nothing missing, left over or reshaped."""

from __future__ import annotations

import copy
import json
import os
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tscnc_hf.artifact.files.tensor_file import read_safetensors
from tscnc_hf.artifact.models.narrowed import as_plain, narrowed
from tscnc_hf.method.sharding import copy_whole_, is_sharded, whole_state


WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def has_weights(folder: Path) -> bool:
    """Whether the folder holds dense weights, in one file or in shards."""
    return (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file()


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a dense checkpoint folder under the names on disk, on the CPU, one file or shards.

    Raises:
        FileNotFoundError: no `model.safetensors` and no index, or a shard is not there.
        ValueError: a damaged file or index, or shards that do not hold what the index says.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return read_safetensors(folder / WEIGHTS_FILE)[0]
    path = folder / INDEX_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}: it is no checkpoint folder.")
    try:
        shard_of = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        shards = sorted(set(shard_of.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not an index of shards ({error!r}). Download it or save it again.") from error
    if outside:
        raise ValueError(f"{path}: shards must lie in the same folder; it names {outside[:5]}.")
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        found = read_safetensors(folder / shard)[0]
        expected = {name for name, where in shard_of.items() if where == shard}
        if found.keys() != expected:
            raise ValueError(f"{folder / shard}: {_differences(expected - found.keys(), found.keys() - expected)}.")
        tensors.update(found)
    return tensors


def float_dtypes(tensors: dict[str, torch.Tensor]) -> set[torch.dtype]:
    """The floating dtypes among the tensors."""
    return {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same names, shapes, dtypes and bits (NaN is itself, -0.0 is not 0.0)."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name in one
    )


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


def _differences(missing: Any, unexpected: Any, mismatched: Any = ()) -> str:
    parts = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            parts.append(f"{len(names)} {what}: {listed}")
    return "; ".join(parts)


def unsharded_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class that a model had before `fully_shard` put one in its place, derived from that and from FSDPModule."""
    from torch.distributed.fsdp import FSDPModule

    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


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
