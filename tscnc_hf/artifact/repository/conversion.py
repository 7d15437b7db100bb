"""Dense folder <-> packed file, both ways and with the same values, without ever overwriting another model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file

from tscnc_hf.artifact.files.atomic import atomic_file
from tscnc_hf.artifact.files.tensor_file import own_copy
from tscnc_hf.artifact.models.config import config_digest
from tscnc_hf.artifact.models.weights import INDEX_FILE, WEIGHTS_FILE, has_weights, same_tensors
from tscnc_hf.artifact.packed.file import SPARSE_FILE, read_sparse_file, write_sparse_file
from tscnc_hf.artifact.repository.opening import (
    CARD_FILE,
    CONFIG_FILE,
    FIGURES_PAGE,
    LATENCY_FILE,
    RESULTS_FILE,
    Repository,
    is_dense_file,
    of_another_author,
    output_folder,
    published_files,
    read_model,
    refuse_other_model,
)


OF_THE_VALUES = (CARD_FILE, RESULTS_FILE, FIGURES_PAGE, LATENCY_FILE, "figures/")  # what is said of them


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
            needs an `output`, and gets neither the card, the figures and the latencies of this one nor its exports.

    Raises:
        FileExistsError: the output holds another model, or other files beside it than would be written. Only a card
            that this library wrote stays, with its figures: it is of that folder.
        FileNotFoundError, ValueError: no weights, damaged ones, or some that do not fit config.json.
    """
    folder, target = repository.folder, output_folder(repository, output, "the files go")
    _, tensors = read_model(repository)  # what does not load is not packed
    digest = config_digest(folder)
    with atomic_file(target / SPARSE_FILE) as temporary:
        write_sparse_file(tensors, temporary, compression=compression, value_dtype=value_dtype, config=digest)
        packed = read_sparse_file(temporary, digest)
        refuse_other_model(folder, target, packed)
        names = _side_files(folder, target, rounded=value_dtype is not None and not same_tensors(packed, tensors))
    _copy(folder, target, names)
    return target / SPARSE_FILE


def unpack(repository: Repository, output: str | os.PathLike | None = None) -> Path:
    """
    Write `model.safetensors` from a packed file: the names and bits that were packed. Arguments, errors and what
    happens with `output` as in `pack`. The path is that of the index where the weights are there in shards.
    """
    folder, target = repository.folder, output_folder(repository, output, "the files go")
    _, tensors = read_model(repository)
    refuse_other_model(folder, target, tensors)
    names = _side_files(folder, target)
    if not has_weights(target):
        with atomic_file(target / WEIGHTS_FILE) as temporary:
            # the metadata is what transformers writes, and asks for in some versions
            save_file({name: own_copy(tensor) for name, tensor in tensors.items()}, temporary, {"format": "pt"})
    _copy(folder, target, names)
    return target / (WEIGHTS_FILE if (target / WEIGHTS_FILE).is_file() else INDEX_FILE)


def _side_files(source: Path, target: Path, rounded: bool = False) -> list[str]:
    """
    What the target lacks of everything that is published but weights. The config last: now it can be loaded.

    Raises:
        FileExistsError: it has one of these with another content.
    """
    if target.resolve() == source.resolve():
        return []
    names = [name for name in published_files(source) if not (is_dense_file(name) or name == SPARSE_FILE)]
    if target.resolve().is_relative_to(source.resolve()):
        within = f"{target.resolve().relative_to(source.resolve()).as_posix()}/"  # written there before: not of it
        names = [name for name in names if not name.startswith(within)]
    if rounded:
        names = [name for name in names if not name.startswith(OF_THE_VALUES) and not name.endswith(".onnx")]
    there = [name for name in names if (target / name).is_file()]
    card = target / CARD_FILE
    if card.is_file() and not of_another_author(card):  # it is made of the rest, for the name and the sizes there
        there = [name for name in there if name != CARD_FILE and not name.startswith("figures/")]
    if others := [name for name in there if (source / name).read_bytes() != (target / name).read_bytes()]:
        raise FileExistsError(
            f"{target} has {', '.join(others[:3])} of another content than {source}; give another folder, or take "
            "away there what is out of date"
        )
    return sorted((name for name in names if not (target / name).is_file()), key=lambda name: name == CONFIG_FILE)


def _copy(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        with atomic_file(target / name) as temporary:
            shutil.copyfile(source / name, temporary)
