"""The side file of a training checkpoint: masks, gate scores and whatever else must be there to go on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from tscnc_hf.artifact.files.atomic import atomic_file
from tscnc_hf.artifact.files.tensor_file import own_copy, read_safetensors, tensors_digest


STATE_FILE = "tscnc_state.safetensors"
DIGEST = "tscnc_sha256"


def save_state(
    tensors: dict[str, torch.Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> Path:
    """Write `tensors` (any shape, dtype and device; bool for masks) and string `metadata` to one file, atomically.

    Raises:
        ValueError: metadata that is not text, or uses the key "tscnc_sha256".
    """
    metadata = dict(metadata or {})
    wrong = [key for key, value in metadata.items() if not (isinstance(key, str) and isinstance(value, str))]
    if wrong or DIGEST in metadata:
        raise ValueError(f"metadata must be text to text, without {DIGEST!r}; wrong: {wrong or [DIGEST]}. Use str().")
    tensors = {name: own_copy(tensor) for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={**metadata, DIGEST: _digest(tensors, metadata)})
    return Path(path)


def load_state(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors on the CPU, metadata) as they were given to `save_state`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged or not written by `save_state`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such file. A checkpoint needs it to be resumed; resume from another one, or start anew."
        )
    tensors, metadata = read_safetensors(path)
    if metadata.pop(DIGEST, None) != _digest(tensors, metadata):
        raise ValueError(f"{path}: damaged, the SHA-256 digest does not fit. Resume from another checkpoint.")
    # not backed by the mapped file: the next save replaces it
    return {name: own_copy(tensor) for name, tensor in tensors.items()}, metadata


def _digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    return tensors_digest(json.dumps(metadata, sort_keys=True) + "\n", tensors)
