"""What something was made of: one object for checkpoints, evaluations, rows of results and cards to compare."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tscnc_hf.artifact.files.tensor_file import value_bytes


PARTS = ("options", "data", "code", "weights")
ASKED = "asked."  # how data was asked for, which matters only where other data came of it
PACKAGES = ("tscnc-hf", "torch", "transformers", "timm", "accelerate", "datasets")


class Difference(NamedTuple):
    """One thing in which two identities differ; None stands for what was not there."""

    part: str
    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}={self.before!r} (now {self.now!r})"


@dataclass(frozen=True)
class RunIdentity:
    """
    What made a checkpoint, an evaluation, a row of results or a card.

    Attributes:
        options: name -> value, of whatever was set.
        data: of the data sets (`tscnc_hf.data.identity`), nested; under "asked" how they were asked for.
        code: versions of packages, and the commit.
        weights: name -> digest of a model (`weights_digest`).
        usual: values of options that are not there, their defaults. They are not compared, and an option at its
            default is no part of the digest: one that is added later changes nothing of what was.

    All values are plain JSON types.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    code: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)
    usual: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, now: RunIdentity, parts: Sequence[str] = PARTS) -> list[Difference]:
        """
        In what `now` differs from this one, part by part. Names of nested values are joined by dots. How data was
        asked for is named first, and only where other data came of it.
        """
        found, usual = [], {**self.usual, **now.usual}
        for part in parts:
            before, after = flat(getattr(self, part)), flat(getattr(now, part))
            missing = usual if part == "options" else {}
            pairs = {n: (before.get(n, missing.get(n)), after.get(n, missing.get(n))) for n in {**before, **after}}
            names = [name for name, (was, is_now) in pairs.items() if was != is_now]
            if not all(name.startswith(ASKED) for name in names):
                names.sort(key=lambda name: not name.startswith(ASKED))
                found += [Difference(part, name.removeprefix(ASKED), *pairs[name]) for name in names]
        return found

    def digest(self, parts: Sequence[str] = ("options", "data", "weights")) -> str:
        """SHA-256 (16 hexadecimal digits) of some parts, by default of all but the code."""
        parted = {part: flat(getattr(self, part)) for part in parts}
        if "options" in parted:
            parted["options"] = {
                k: v for k, v in parted["options"].items() if k not in self.usual or self.usual[k] != v
            }
        if "data" in parted:
            parted["data"] = {k: v for k, v in parted["data"].items() if not k.startswith(ASKED)}
        return hashlib.sha256(json.dumps(parted, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The four parts, plain JSON types."""
        return {part: _plain(getattr(self, part)) for part in PARTS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunIdentity:
        """
        What `to_dict` gave.

        Raises:
            ValueError: it is nothing that `to_dict` gives.
        """
        if not isinstance(values, Mapping) or not all(isinstance(values.get(part), Mapping) for part in PARTS):
            raise ValueError(f"an identity has the parts {', '.join(PARTS)}; this is {str(values)[:80]!r}")
        return cls(**{part: values[part] for part in PARTS})


def weights_digest(model: nn.Module) -> str:
    """
    BLAKE2 (32 hexadecimal digits) of the names, shapes, dtypes and values of everything in the state dict. -0.0 counts
    as 0.0: a packed file, which keeps no sign of zeros, holds the same model.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(value_bytes(tensor.detach().cpu().contiguous()).numpy())
    return digest.hexdigest()


def code_identity() -> dict[str, str]:
    """Versions of Python and of the packages that decide results, and the commit of this code where it has one."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # not needed by all that we do
            continue
    return found | ({"commit": revision} if (revision := commit()) else {})


def commit() -> str | None:
    """The revision of the code, with "-dirty" where files differ from it; None where this file is in no repository."""
    here = Path(__file__)
    for command in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--abbrev=12"]):
        try:
            done = subprocess.run(["git", "-C", here.parent, *command], capture_output=True, text=True, timeout=30)
        except OSError:
            return None
        if done.returncode != 0:  # it may lie in somebody else's repository
            return None
    return done.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """What a GPU is called; "cpu" and others are their type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested maps as one, names joined by dots; an empty map counts as a value."""
    found = {}
    for name, value in _plain(values).items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found
