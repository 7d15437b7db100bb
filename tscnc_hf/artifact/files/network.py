"""What a network computes beside its weights: with other heads, strides or activations the same ones are another."""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tscnc_hf.artifact.files.identity import RunIdentity, weights_digest
from tscnc_hf.artifact.files.tensor_file import value_bytes
from tscnc_hf.artifact.models.config import NOT_THE_MODEL
from tscnc_hf.method.wrappers import unwrapped


# of a config: names of outputs and how many there are, which the weights say; what else a model returns; the
# preprocessing, which is compared by itself
NOT_OF_THE_NETWORK = NOT_THE_MODEL | {
    "architectures", "finetuning_task", "id2label", "label2id", "label_names", "num_classes", "num_labels",
    "output_attentions", "output_hidden_states", "pretrained_cfg", "problem_type", "return_dict", "use_cache",
}  # fmt: skip
OF_TRAINING = re.compile(r".*drop(out|_path).*|initializer_.*")  # nothing of it is left when a model is evaluated
DTYPES = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
}  # fmt: skip
NOT_OF_A_MODULE = {"config", "default_cfg", "pretrained_cfg", "training"}


def model_identity(model: nn.Module) -> dict[str, str]:
    """`weights` of a `RunIdentity`: {"model": digest of the weights, "network": of what is computed with them}."""
    return {"model": weights_digest(model), "network": network_digest(model)}


def other_part(found: RunIdentity, model: nn.Module) -> str | None:
    """
    In what figures with this identity are not of the model: its "weights", or the "network" that computes with them;
    None where they are of it. Those from before 28 November 2026 say the weights alone, and are believed: nothing
    else can be known of them, and a published model must not lose its figures for it.
    """
    if found.weights.get("model") != weights_digest(model):
        return "weights"
    said = found.weights.get("network")
    return None if said is None or said == network_digest(model) else "network"


def network_digest(model: nn.Module) -> str:
    """
    BLAKE2 (32 hexadecimal digits) of what decides a model's outputs beside its state dict: the same in every process,
    with or without `torch.compile` around it.

    Of a model of transformers its class and its config say it, but for names, preprocessing and training. A field at
    its default counts as one that is not there, so that one that transformers adds changes nothing of what was.

    Of any other module: its class and those in it, by name, and their public attributes that are numbers, texts,
    tensors, functions, or lists or maps of these, with the buffers that its state dict leaves out; not what `forward`
    itself sets, as counters are. What the code of a class does otherwise is not looked at.
    """
    return hashlib.blake2b(json.dumps(_network(model), sort_keys=True).encode(), digest_size=16).hexdigest()


def _network(module: nn.Module) -> list[Any]:
    module = unwrapped(module)
    name = type(module).__name__
    if isinstance(module, PreTrainedModel):
        return [name, _fields(module.config)]
    left = NOT_OF_A_MODULE | _set_by_forward(type(module))
    public = {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in left}
    own = {key: _setting(value) for key, value in public.items()}
    own |= {key: _setting(module._buffers[key]) for key in sorted(module._non_persistent_buffers_set)}
    parts = [[key, _network(part)] for key, part in module._modules.items() if part is not None]
    return [name, own, parts]


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    try:
        usual = type(config)().to_dict()
    except Exception:  # whatever a class raises that is nothing without its parts
        usual = {}
    found = {}
    for name, value in config.to_dict().items():
        if name in NOT_OF_THE_NETWORK or OF_TRAINING.fullmatch(name):
            continue
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            found[name] = _fields(part)
        elif name == "model_type" or name not in usual or _plain(value) != _plain(usual[name]):
            found[name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """As config.json has it, where a tuple is a list and a key is a text."""
    return json.loads(json.dumps(value, default=lambda other: type(other).__name__))


@functools.lru_cache
def _set_by_forward(module_class: type[nn.Module]) -> frozenset[str]:
    """Attributes that `forward` sets, that of the class or of one that it is derived from."""
    found = set()
    for base in module_class.__mro__:
        code = getattr(inspect.unwrap(vars(base).get("forward", base)), "__code__", None)
        if code is not None:
            found |= {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
    return frozenset(found)


def _setting(value: Any) -> Any:
    """Plain JSON types; of what has no value that is the same in every process, the name of its class."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.dtype in DTYPES:
        digest = hashlib.blake2b(value_bytes(value.detach().cpu().contiguous()).numpy(), digest_size=16)
        return [str(value.dtype), list(value.shape), digest.hexdigest()]
    if isinstance(value, (list, tuple)):
        return [_setting(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _setting(item) for key, item in value.items()}
    if isinstance(value, functools.partial):
        return [_setting(value.func), _setting(value.args), _setting(value.keywords)]
    if isinstance(value, Callable) and hasattr(value, "__qualname__"):
        return value.__qualname__
    return type(value).__name__
