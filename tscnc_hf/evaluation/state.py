"""Where an evaluation stands: a folder with one small file for each batch, so that it can go on later."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from tscnc_hf.artifact.files.atomic import write_json
from tscnc_hf.data.batches import collate


SETTINGS = "evaluation.json"
FORMAT = 2  # of what is in a batch's file, and of how attacks draw: counted up with either


def model_digest(model: nn.Module) -> str:
    """BLAKE2 of the names and bytes of everything in the state dict."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        _add(digest, name, tensor)
    return digest.hexdigest()


def data_digest(dataset: Iterable, n: int, images: int = 16) -> str:
    """BLAKE2 of the pixels and labels of up to `images` of the first n items, evenly spaced, both ends among them."""
    places = sorted({round(part * (n - 1) / max(images - 1, 1)) for part in range(images)})
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(collate([dataset[place] for place in places]).items()):
        _add(digest, name, tensor)
    return digest.hexdigest()


def _add(digest, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


class OtherEvaluation(ValueError):
    """A folder holds an evaluation with other settings, or of other data."""


class EvaluationState:
    """
    What was found of each batch on disk, each written atomically; any number of processes may share a folder.

    Args:
        folder (*optional*): None keeps nothing.
        settings (`Mapping`): whatever decides the result, plain JSON types.

    Raises:
        OtherEvaluation: the folder holds an evaluation with other settings (those that differ are named).
    """

    def __init__(self, folder: str | os.PathLike | None, settings: Mapping):
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        path, settings = self.folder / SETTINGS, json.loads(json.dumps({"format": FORMAT, **settings}))
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            odd = [key for key in {**settings, **found} if settings.get(key) != found.get(key)]
            if odd:
                shown = _difference(odd[0], found.get(odd[0]), settings.get(odd[0]))
                raise OtherEvaluation(
                    f"{self.folder} holds an evaluation with another {', '.join(odd)}{shown and f' ({shown})'}; give "
                    "another folder, or remove that one"
                )
        else:
            write_json(settings, path)

    def read(self, batch: int) -> dict | None:
        """What `write` was given for this batch, or None; also where a crash of the machine left a damaged file."""
        path = self._path(batch)
        try:
            return None if path is None else json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def write(self, batch: int, result: Mapping) -> None:
        if (path := self._path(batch)) is not None:
            write_json(result, path)

    def _path(self, batch: int) -> Path | None:
        return None if self.folder is None else self.folder / f"batch-{batch:06d}.json"


def _difference(key: str, there, now) -> str:
    """In a few words, how two values of a setting differ; nothing of digests, which say nothing to anyone."""
    if key in ("model", "data"):
        return ""
    if not (isinstance(there, dict) and isinstance(now, dict)):
        return f"{key}: {there!r} there, {now!r} now"
    parts = [f"{name} only there" for name in there if name not in now]
    parts += [f"{name} only now" for name in now if name not in there]
    return ", ".join(parts + [f"{name} differs" for name in now if name in there and there[name] != now[name]])


class KeptFigures:
    """
    Figures of a whole evaluation, kept beside its batches once they are computed.

    What is there is read when this is made. Several processes make it before they gather what they found of the
    batches, and write after it: so all of them find the same, and compute the same.

    Args:
        folder (*optional*): of the `EvaluationState`; None keeps nothing.
        names: of the figures that may be there.
    """

    def __init__(self, folder: str | os.PathLike | None, names: Iterable[str]):
        self.folder = None if folder is None else Path(folder)
        self.found = {name: self._read(name) for name in names if self.folder is not None}

    def __call__(self, name: str, compute: Callable[[], dict], of: Mapping | None = None) -> dict:
        """
        What was kept under this name, or else what `compute` gives, plain JSON types.

        Args:
            of (*optional*): whatever decides the figures beside the settings of the evaluation.
        """
        if self.folder is None:
            return compute()
        made_of = {"settings": self._settings(), "of": json.loads(json.dumps(of))}
        kept = self.found[name]
        if isinstance(kept, dict) and {key: kept.get(key) for key in made_of} == made_of and "figures" in kept:
            return kept["figures"]
        figures = compute()
        write_json(made_of | {"figures": figures}, self.folder / f"{name}.json")
        return figures

    def _read(self, name: str) -> dict | None:
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def _settings(self) -> str:
        """Digest of the evaluation's settings, which `EvaluationState` has written by then."""
        return hashlib.blake2b((self.folder / SETTINGS).read_bytes(), digest_size=16).hexdigest()
