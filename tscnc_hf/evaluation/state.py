"""Where an evaluation stands: a folder with one small file for each batch, so that it can go on later."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from tscnc_hf.artifact.atomic import write_json


SETTINGS = "evaluation.json"


def model_digest(model: nn.Module) -> str:
    """BLAKE2 of the names and bytes of everything in the state dict."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class EvaluationState:
    """
    What was found of each batch on disk, each written atomically; any number of processes may share a folder.

    Args:
        folder (*optional*): None keeps nothing.
        settings (`Mapping`): whatever decides the result, plain JSON types.

    Raises:
        ValueError: the folder holds an evaluation with other settings (the first that differ are named).
    """

    def __init__(self, folder: str | os.PathLike | None, settings: Mapping):
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        path, settings = self.folder / SETTINGS, json.loads(json.dumps(settings))
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            odd = [key for key in {**settings, **found} if settings.get(key) != found.get(key)]
            if odd:
                raise ValueError(
                    f"{self.folder} holds an evaluation with another {', '.join(odd)} "
                    f"({odd[0]}: {found.get(odd[0])!r} there, {settings.get(odd[0])!r} now); give another folder"
                )
        else:
            write_json(settings, path)

    def read(self, batch: int) -> dict | None:
        """What `write` was given for this batch, or None."""
        path = self._path(batch)
        return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else None

    def write(self, batch: int, result: Mapping) -> None:
        if (path := self._path(batch)) is not None:
            write_json(result, path)

    def _path(self, batch: int) -> Path | None:
        return None if self.folder is None else self.folder / f"batch-{batch:06d}.json"
