"""The dense weights of a folder, one file or shards, as tensors; and whether two lots of tensors are the same."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tscnc_hf.artifact.files.tensor_file import read_safetensors, reading, value_bytes


WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # in a header
TIMM_PREFIX = "timm_model."  # of the wrapper's parameters; transformers reads a timm model under either spelling


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
            raise ValueError(f"{folder / shard}: {differences(expected - found.keys(), found.keys() - expected)}.")
        tensors |= found
    return tensors


def float_dtypes(tensors: dict[str, torch.Tensor]) -> set[torch.dtype]:
    """The floating dtypes among the tensors."""
    return {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}


def stored_dtypes(files: Iterable[str | Path]) -> set[torch.dtype]:
    """Those of 16 bits or more in safetensors files, of which the headers are read. Errors: `reading`."""
    found: set[str] = set()
    for path in files:
        with reading(path), safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}
    return {STORED[name] for name in found & STORED.keys()}


def exact_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The floating dtype that holds the values of all of these exactly, None where there are none."""
    dtypes = list(dtypes)
    return reduce(torch.promote_types, dtypes) if dtypes else None


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """
    Whether both have the same names, shapes, dtypes and bits (NaN is itself; -0.0 is 0.0, as a packed file has it).
    Names of a timm model are the same with and without its wrapper's prefix.
    """
    one, other = ({name.removeprefix(TIMM_PREFIX): tensor for name, tensor in x.items()} for x in (one, other))
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(value_bytes(one[name].contiguous()), value_bytes(other[name].contiguous()))
        for name in one
    )


def differences(missing: Any, unexpected: Any, mismatched: Any = ()) -> str:
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    return "; ".join(
        f"{len(names)} {what}: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in lists.items()
        if names
    )
