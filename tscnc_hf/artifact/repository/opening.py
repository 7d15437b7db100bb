"""A model repository, in a folder here or on the Hub: what lies in it, what of it is published, the model in it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, constants, errors, snapshot_download
from transformers import PreTrainedModel

from tscnc_hf.artifact.models.config import CONFIG_FILE, class_of, config_digest, read_config
from tscnc_hf.artifact.models.loading import TWO_MODELS, build_exactly
from tscnc_hf.artifact.models.preprocessing import RESIZE
from tscnc_hf.artifact.models.recorded_widths import KEY
from tscnc_hf.artifact.models.weights import INDEX_FILE, WEIGHTS_FILE, has_weights, read_weights, same_tensors
from tscnc_hf.artifact.packed.file import SPARSE_FILE, read_sparse_file


CARD_FILE = "README.md"
RESULTS_FILE = "results.json"
FIGURES_PAGE = "robustness.md"
METHOD_FILE = "tscnc_config.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors$")
TRAINED_FILE = "trained.safetensors"  # what other cells of an ablation start from
STATE_FOLDER = "state"  # where an evaluation stands: of use to nobody but its next start
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
READABLE = ("*.json", "*.md", "*.txt", "figures/*", "LICENSE*")  # what a repository has beside its weights


@dataclass(frozen=True)
class Repository:
    """
    Attributes:
        name: what was asked for: a folder, or a Hub id.
        folder: where its files are: the folder itself, or a snapshot in the Hub's cache.
        commit: of the snapshot; None for a folder here.
        sizes: bytes of the weight files, downloaded or not: {"dense_bytes", "sparse_bytes"}, each if it is there.
    """

    name: str
    folder: Path
    commit: str | None
    sizes: dict[str, int]


def is_dense_file(name: str) -> bool:
    """Whether a file of this name, at the top of a repository, holds dense weights or the index of their shards."""
    return name in (WEIGHTS_FILE, INDEX_FILE) or SHARD.fullmatch(name) is not None


def weight_sizes(files: Iterable[tuple[str, int]]) -> dict[str, int]:
    """{"dense_bytes", "sparse_bytes"}, each if it is there, of (name, bytes) at the top of a repository."""
    files = dict(files)
    dense = [WEIGHTS_FILE] if WEIGHTS_FILE in files else [name for name in files if SHARD.fullmatch(name)]
    sizes = {"dense_bytes": sum(files[name] for name in dense)} if dense else {}
    return sizes | ({"sparse_bytes": files[SPARSE_FILE]} if SPARSE_FILE in files else {})


def folder_sizes(folder: str | os.PathLike) -> dict[str, int]:
    """`weight_sizes` of a folder here."""
    return weight_sizes((path.name, path.stat().st_size) for path in Path(folder).iterdir() if path.is_file())


@contextmanager
def talking_to_the_hub() -> Iterator[None]:
    """Inside, a connection that fails is a ConnectionError, and so an OSError as all that the Hub itself answers."""
    try:
        yield
    except errors.HTTPError as error:
        if isinstance(error, OSError):
            raise
        raise ConnectionError(f"the Hub at {constants.ENDPOINT} can not be reached: {error}") from error


@talking_to_the_hub()
def open_repository(
    source: str | os.PathLike, revision: str | None = None, token: str | bool | None = None, weights: str = "any"
) -> Repository:
    """
    A folder here, or what is needed of a repository on the Hub, downloaded from one commit.

    Args:
        weights (`str`): which to download: "any" (the packed file where there is one: it is smaller), "dense",
            "packed".

    Raises:
        FileNotFoundError: no such folder, and no such repository or revision that may be read.
        OSError: the Hub can not be reached, or refuses.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{source} is a folder here, which has no revision {revision!r}; leave it out")
        return Repository(str(source), folder, None, folder_sizes(folder))
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file; give the folder that holds it")
    try:
        info = HfApi(token=token).model_info(str(source), revision=revision, files_metadata=True)
    except errors.HFValidationError:
        raise FileNotFoundError(f"{str(source)!r} is neither a folder here nor a model id (owner/name)") from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{source} on the Hub has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"there is no folder {str(source)!r} here, and no such model on the Hub that you may read; a private one "
            "needs a token (hf auth login, or HF_TOKEN)"
        ) from None
    except errors.OfflineModeIsEnabled:
        folder = Path(snapshot_download(str(source), revision=revision, local_files_only=True))
        return Repository(str(source), folder, folder.name, folder_sizes(folder))
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    packed = SPARSE_FILE in files and weights != "dense"
    wanted = [SPARSE_FILE] if packed or weights == "packed" else [name for name in files if is_dense_file(name)]
    folder = Path(snapshot_download(str(source), revision=info.sha, token=token, allow_patterns=[*READABLE, *wanted]))
    return Repository(str(source), folder, info.sha, weight_sizes(files.items()))


def published_files(folder: str | os.PathLike) -> list[str]:
    """
    What is published of a folder, as paths in it, in the order of a push: weights, then what describes them, and the
    card last.

    Left out are pickles (`.bin`, `.pt`, ... and so `training_args.bin` and optimizer states), hidden files and what
    starts with "_", training checkpoints (`checkpoint-*`), the state of an evaluation (`state/`), and what other
    cells of an ablation start from (`trained.safetensors`).
    """
    folder, names = Path(folder), []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith((".", "_")) for part in parts)
        kept = not hidden and not parts[0].startswith("checkpoint-") and parts[0] != STATE_FOLDER
        kept = kept and parts != (TRAINED_FILE,)
        if kept and path.is_file() and path.suffix not in PICKLES:
            names.append("/".join(parts))
    return sorted(names, key=lambda name: (name == CARD_FILE, not name.endswith(".safetensors")))


def read_json(path: Path) -> dict:
    """The JSON object of a file; {} where there is no such file, or no object in it: then it is somebody else's.

    Raises:
        ValueError: the file is no JSON.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    return value if isinstance(value, dict) else {}


def read_card(path: Path) -> ModelCardData:
    """
    The front matter of a card; an empty one where there is no card.

    Raises:
        ValueError: it cannot be read.
    """
    if not path.is_file():
        return ModelCardData()
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data
    except Exception as error:  # of a YAML parser, on text that somebody else wrote
        raise ValueError(f"{path}: its front matter can not be read ({error})") from error


def method_settings(folder: Path, config: Any) -> dict:
    """The options that a model was trained with, from tscnc_config.json or `config.tscnc`; {} where nobody says."""
    recorded = getattr(config, "tscnc", None) or {}
    ours = {key: value for key, value in recorded.items() if key not in (KEY, RESIZE)}
    return read_json(folder / METHOD_FILE) or ours


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """
    The tensors of a checkpoint folder under the names on disk: the dense weights, or else the packed ones.

    Raises:
        FileNotFoundError: there are neither.
        ValueError: a damaged file; or both are there, and are not the same weights.
    """
    packed = folder / SPARSE_FILE
    if not has_weights(folder) and not packed.is_file():
        raise FileNotFoundError(f"{folder} has no weights: {WEIGHTS_FILE}, {INDEX_FILE} or {SPARSE_FILE}")
    digest = config_digest(folder) if packed.is_file() and (folder / CONFIG_FILE).is_file() else None
    if not has_weights(folder):
        return read_sparse_file(packed, digest)
    tensors = read_weights(folder)
    if packed.is_file() and not same_tensors(read_sparse_file(packed, digest), tensors):
        raise ValueError(TWO_MODELS.format(packed))
    return tensors


def read_model(repository: Repository) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """
    The model that config.json describes, with all weights of the repository in it, and those weights as they are on
    disk (`read_tensors`).

    Any class of transformers, and timm's models in their wrapper. No code of the repository is run.

    Raises:
        FileNotFoundError: there are no weights, or no config.json.
        ValueError: config.json names no class of transformers, or the tensors do not fit it; see `read_tensors`.
    """
    folder, tensors = repository.folder, read_tensors(repository.folder)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}: it is no model of transformers or timm")
    config = read_config(folder)
    return build_exactly(class_of(config, classifier=False), config, repository.name, tensors), tensors


def output_folder(repository: Repository, output: str | os.PathLike | None, what: str) -> Path:
    """Where `what` is written: to `output`, by default to the repository itself. ValueError if that is on the Hub."""
    if output is None and repository.commit is not None:
        raise ValueError(f"{repository.name} is on the Hub: say where {what} with --output FOLDER")
    return repository.folder if output is None else Path(output)
