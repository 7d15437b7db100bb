"""safetensors files, and what to say of those that are not."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open


COMPACT = json.JSONEncoder(separators=(",", ":")).encode
DOWNLOAD_AGAIN = "Download the file or save it again."
SMALL = 1 << 14  # bytes of a tensor that is copied and not mapped
# safetensors' names, as far as torch has them
STORED_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Inside, what is wrong with a safetensors file is a ValueError that names it; FileNotFoundError without it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        yield
    except Exception as error:  # of safetensors, torch or json, on bytes that somebody else wrote
        raise unreadable(path, error) from error


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of any safetensors file. Errors: `reading`."""
    with reading(path), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def mapped_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a file that safetensors has found whole, in mapped memory: the fastest way to all of them.

    Raises:
        Whatever it is (`reading`): something in the header does not fit after all, or torch does not have its dtype.
    """
    tensors = {}
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in json.loads(file.read(start - 8)).items():
            if name != "__metadata__":
                dtype, (begin, end) = STORED_DTYPES[entry["dtype"]], entry["data_offsets"]
                flat = _part(file, start + begin, end - begin, dtype) if end > begin else torch.empty(0, dtype=dtype)
                tensors[name] = flat.reshape(entry["shape"])
    return tensors


def _part(file: BinaryIO, offset: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """A mapping of its own for each large tensor, so that its memory is let go when it is."""
    if length < SMALL:
        file.seek(offset)
        return torch.frombuffer(bytearray(file.read(length)), dtype=dtype)
    skipped = offset % mmap.ALLOCATIONGRANULARITY
    # torch wants memory that may be written to; the file is not
    data = mmap.mmap(file.fileno(), skipped + length, offset=offset - skipped, access=mmap.ACCESS_COPY)
    return torch.frombuffer(data, dtype=dtype, count=length // dtype.itemsize, offset=skipped)


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
