"""safetensors files, and what to say of those that are not."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open


COMPACT = json.JSONEncoder(separators=(",", ":")).encode
DOWNLOAD_AGAIN = "Download the file or save it again."


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Inside, what is wrong with a safetensors file is a ValueError that names it; FileNotFoundError without it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        yield
    except Exception as error:  # of safetensors, torch or json, on bytes that somebody else wrote
        raise unreadable(path, error) from error


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Inside, a ValueError names the file and says what to do."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error} {DOWNLOAD_AGAIN}") from error


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of any safetensors file. Errors: `reading`."""
    with reading(path), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def unreadable(path: str | os.PathLike, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a whole safetensors file, truncated or damaged ({error}). {DOWNLOAD_AGAIN}")


def tensors_digest(header: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 (hexadecimal) over `header`, and the names, dtypes, shapes and bytes of contiguous CPU `tensors`.

    The order of the dict does not matter. `packed_format.md` gives the exact bytes.
    """
    sha = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(COMPACT([name, dtype_name(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        plain = tensor.dtype == torch.uint8 and tensor.ndim == 1
        sha.update((tensor if plain else tensor.reshape(-1).view(torch.uint8)).numpy())
    return sha.hexdigest()


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous CPU copy, bit for bit, that shares memory with nothing (safetensors refuses tied tensors)."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype without the module: "float32"."""
    return str(dtype).removeprefix("torch.")
