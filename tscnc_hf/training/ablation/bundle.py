"""A finished cell as a file or a few: what is worth carrying away from a machine that is about to go."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from tscnc_hf.artifact.files.atomic import atomic_file
from tscnc_hf.artifact.repository.opening import is_dense_file, published_files


PART_BYTES = 15 << 20


def check_names(names: Sequence[str]) -> None:
    """ValueError where the bundles of two cells would have one name."""
    taken: dict[str, str] = {}
    for name in names:
        if (other := taken.setdefault(_file_name(name), name)) != name:
            raise ValueError(
                f"bundles: those of {other!r} and {name!r} would both be {_file_name(name)}.tar; rename an arm"
            )


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)


def bundle(
    folder: str | os.PathLike, target: str | os.PathLike, name: str, part_bytes: int = PART_BYTES
) -> list[Path]:
    """
    Write a tar of what is published of a model's folder, but for dense weights: the packed file holds them. It lies
    in `target` as NAME.tar or, where it is larger than `part_bytes`, as NAME.tar.00, NAME.tar.01, ...
    (`cat NAME.tar* | tar x`); NAME is `name` in letters, digits, "." and "-". One that is there is replaced.

    Raises:
        ValueError: the folder has no packed file.
    """
    folder, target, name = Path(folder), Path(target), _file_name(name)
    names = [one for one in published_files(folder) if not is_dense_file(one)]
    names = [one for one in names if one.endswith("model.sparse.safetensors") or not one.endswith(".safetensors")]
    if not any(one.endswith(".safetensors") for one in names):
        raise ValueError(f"{folder} has no packed file: only a model of transformers, or of timm in it, has one")
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for one in names:
            tar.add(folder / one, f"{name}/{one}")
    content, before = made.getbuffer(), set(target.glob(f"{name}.tar*"))
    count = -(-len(content) // part_bytes)
    parts = [target / f"{name}.tar{f'.{part:02d}' if count > 1 else ''}" for part in range(count)]
    for part, path in enumerate(parts):
        with atomic_file(path) as temporary:
            temporary.write_bytes(content[part * part_bytes : (part + 1) * part_bytes])
    for path in before - set(parts):
        path.unlink()
    return parts
