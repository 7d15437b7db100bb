"""Dense folder <-> packed file, both ways and with the same values, without ever overwriting another model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from tscnc_hf.artifact.files.atomic import atomic_file
from tscnc_hf.artifact.files.tensor_file import own_copy
from tscnc_hf.artifact.models.config import config_digest
from tscnc_hf.artifact.models.weights import WEIGHTS_FILE, has_weights, same_tensors
from tscnc_hf.artifact.packed.file import SPARSE_FILE, read_sparse_file, write_sparse_file
from tscnc_hf.artifact.repository.opening import (
    CARD_FILE,
    CONFIG_FILE,
    FIGURES_PAGE,
    RESULTS_FILE,
    Repository,
    is_dense_file,
    output_folder,
    published_files,
    read_model,
    read_tensors,
)


def pack(
    repository: Repository,
    output: str | os.PathLike | None = None,
    compression: str | None = None,
    value_dtype: str | None = None,
) -> Path:
    """
    Write `model.sparse.safetensors`, with the names and bits of the dense weights (-0.0 becomes 0.0), and return its
    path.

    Args:
        repository: from `open_repository`, with dense weights.
        output: another folder, which then gets everything but the dense weights; by default the file is written
            beside them.
        compression, value_dtype: as in `save_sparse`. Where rounding changes a value, it makes another model, which
            needs an `output`, and gets neither the card nor the figures of this one.

    Raises:
        FileExistsError: the output holds another model.
        FileNotFoundError, ValueError: no weights, damaged ones, or some that do not fit config.json.
    """
    folder, target = repository.folder, output_folder(repository, output, "the files go")
    _, tensors = read_model(repository)  # what does not load is not packed
    digest = config_digest(folder)
    with atomic_file(target / SPARSE_FILE) as temporary:
        write_sparse_file(tensors, temporary, compression=compression, value_dtype=value_dtype, config=digest)
        packed = read_sparse_file(temporary, digest)
        _refuse_other_model(folder, target, packed)
    rounded = value_dtype and not same_tensors(packed, tensors)
    left_out = (CARD_FILE, RESULTS_FILE, FIGURES_PAGE, "figures/") if rounded else ()
    _copy_side_files(folder, target, left_out)
    return target / SPARSE_FILE


def unpack(repository: Repository, output: str | os.PathLike | None = None) -> Path:
    """
    Write `model.safetensors` from a packed file: the names and bits that were packed. Arguments, errors and what
    happens with `output` as in `pack`.
    """
    folder, target = repository.folder, output_folder(repository, output, "the files go")
    _, tensors = read_model(repository)
    _refuse_other_model(folder, target, tensors)
    if not has_weights(target):
        with atomic_file(target / WEIGHTS_FILE) as temporary:
            # the metadata is what transformers writes, and asks for in some versions
            save_file({name: own_copy(tensor) for name, tensor in tensors.items()}, temporary, {"format": "pt"})
    _copy_side_files(folder, target)
    return target / WEIGHTS_FILE


def _refuse_other_model(folder: Path, target: Path, tensors: dict[str, torch.Tensor]) -> None:
    if (target / CONFIG_FILE).is_file() and config_digest(target) != config_digest(folder):
        raise FileExistsError(f"{target} holds the {CONFIG_FILE} of another model; give another folder")
    there = has_weights(target) or (target / SPARSE_FILE).is_file()
    if there and not same_tensors(read_tensors(target), tensors):
        raise FileExistsError(f"{target} holds other weights than would be written; give another folder")


def _copy_side_files(source: Path, target: Path, left_out: tuple[str, ...] = ()) -> None:
    """Everything that is published but weights; what is there already stays. The config last: now it can be loaded."""
    names = [name for name in published_files(source) if not (is_dense_file(name) or name == SPARSE_FILE)]
    if target != source and target.resolve().is_relative_to(
        source.resolve()
    ):  # what was written there before is not of it
        within = f"{target.resolve().relative_to(source.resolve()).as_posix()}/"
        names = [name for name in names if not name.startswith(within)]
    for name in sorted(names, key=lambda name: name == CONFIG_FILE):
        if not name.startswith(left_out) and not (target / name).is_file():
            with atomic_file(target / name) as temporary:
                shutil.copyfile(source / name, temporary)
