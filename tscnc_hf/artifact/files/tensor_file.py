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


# bytes of an element -> integer dtype in which "all bits zero" and exact copies are plain
BIT_PATTERNS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SIGNED_ZEROS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
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


def magnitude_bits(tensor: torch.Tensor) -> torch.Tensor:
    """
    The bits of a contiguous tensor (at most 8 bytes an element), flat, as integers that are 0 where it is a zero of
    either sign: of floats all but the sign. Not by comparing values, which may flush denormal numbers to zero.
    """
    bits = tensor.reshape(-1).view(BIT_PATTERNS[tensor.element_size()])
    return bits & torch.iinfo(bits.dtype).max if tensor.dtype in SIGNED_ZEROS else bits


def is_minus_zero(tensor: torch.Tensor) -> torch.Tensor:
    """Bool, flat: where a contiguous tensor is -0.0."""
    bits = tensor.reshape(-1).view(BIT_PATTERNS[tensor.element_size()])
    return bits == torch.iinfo(bits.dtype).min if tensor.dtype in SIGNED_ZEROS else torch.zeros_like(bits, dtype=bool)


def value_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, uint8 and flat, with every zero as 0.0: the same for the same values."""
    flat = tensor.reshape(-1)
    negative = is_minus_zero(flat)
    return (flat.masked_fill(negative, 0.0) if negative.any() else flat).view(torch.uint8)


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype without the module: "float32"."""
    return str(dtype).removeprefix("torch.")
