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

from tscnc_hf.artifact.card.card import CARD_MARK
from tscnc_hf.artifact.models.config import CLASSIFIERS, CONFIG_FILE, class_of, config_digest, read_config
from tscnc_hf.artifact.models.loading import TWO_MODELS, build_exactly
from tscnc_hf.artifact.models.preprocessing import RESIZE
from tscnc_hf.artifact.models.recorded_widths import KEY
from tscnc_hf.artifact.models.weights import INDEX_FILE, WEIGHTS_FILE, has_weights, read_weights, same_tensors
from tscnc_hf.artifact.packed.file import SPARSE_FILE, read_sparse_file


CARD_FILE = "README.md"
RESULTS_FILE = "results.json"
FIGURES_PAGE = "robustness.md"
METHOD_FILE = "tscnc_config.json"
LATENCY_FILE = "latency.json"  # of `tscnc bench --save`
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors$")
TRAINED_FILE = "trained.safetensors"  # what other cells of an ablation start from
STATE_FOLDER = "state"  # where an evaluation stands: of use to nobody but its next start
# files of these kinds are pickles, or may hold one
PICKLES = {
    ".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pk", ".pkl", ".pt", ".pt2", ".pth", ".pyc",
}  # fmt: skip
NUMBERS = ("target_sparsity", "tsc_weight", "cnc_weight", "pruning_start", "pruning_end")  # which a card counts with
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
        try:
            folder = Path(snapshot_download(str(source), revision=revision, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            at = "" if revision is None else f" of revision {revision!r}"
            raise FileNotFoundError(
                f"there is no folder {str(source)!r} here, and no model of that name{at} in the Hub's cache; the Hub "
                "itself is not asked while HF_HUB_OFFLINE is set"
            ) from None
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

    Left out are pickles (`.bin`, `.pt`, ... in any case and before other endings, and so `training_args.bin` and
    optimizer states), hidden files and what starts with "_", training checkpoints (`checkpoint-*`) and the state of an
    evaluation (`state/`) in whatever folder, links to folders, and what other cells of an ablation start from
    (`trained.safetensors`).

    Raises:
        ValueError: a file is a link to what lies outside of the folder, but for a snapshot in the Hub's cache.
    """
    folder, names = Path(folder), []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith((".", "_")) for part in parts)
        kept = not hidden and not any(part.startswith("checkpoint-") or part == STATE_FOLDER for part in parts)
        kept = kept and parts != (TRAINED_FILE,)
        if kept and path.is_file() and not PICKLES.intersection(suffix.lower() for suffix in path.suffixes):
            if path.is_symlink() and not _is_within(path, folder):
                raise ValueError(
                    f"{path} is a link to {path.resolve()}, outside of the folder, and would be published. Put a copy "
                    "in its place if it is to be, or take it away"
                )
            names.append("/".join(parts))
    return sorted(names, key=lambda name: (name == CARD_FILE, not name.endswith(".safetensors")))


def _is_within(link: Path, folder: Path) -> bool:
    """Whether a link leads to a file of the folder; the files of a snapshot are links to the blobs of its cache."""
    inside, target = folder.resolve(), link.resolve()
    repository = next((parent.parent for parent in inside.parents if parent.name == "snapshots"), None)
    blobs = [] if repository is None else [repository / "blobs", repository.parent / "blobs"]  # and those it shares
    return any(target.is_relative_to(place) for place in (inside, *blobs))


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


def of_another_author(path: Path) -> bool:
    """
    Whether there is a README.md that this library did not write.

    Raises:
        ValueError: it is no text.
    """
    try:
        return path.is_file() and CARD_MARK not in path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}). Save it as UTF-8, which the Hub asks for, too") from error


def method_settings(folder: Path, config: Any) -> dict:
    """
    The options that a model was trained with, from tscnc_config.json or `config.tscnc`; {} where nobody says.

    Raises:
        ValueError: no options of this library.
    """
    recorded = getattr(config, "tscnc", None) or {}
    ours = {key: value for key, value in recorded.items() if key not in (KEY, RESIZE)}
    kept = read_json(folder / METHOD_FILE)
    settings, source = kept or ours, folder / (METHOD_FILE if kept else CONFIG_FILE)
    parts = settings.get("pruning_exclude") or []
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError(
            f"{source}: pruning_exclude is {parts!r}, and is to be a list of parts of names, such as "
            '["classifier"]. Correct it'
        )
    for name in NUMBERS:
        if not isinstance(settings.get(name), int | float | None):
            raise ValueError(f"{source}: {name} is {settings[name]!r}, and is to be a number. Correct it")
    return settings


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
        ValueError: config.json names no class of transformers, or none can be built of it, or the tensors do not fit
            it; see `read_tensors`.
    """
    folder, tensors = repository.folder, read_tensors(repository.folder)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}: it is no model of transformers or timm")
    try:
        config = read_config(folder)
        _check_record(config, path)
        return build_exactly(class_of(config, classifier=False), config, repository.name, tensors), tensors
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:  # whatever a class raises of fields that make no sense to it
        raise ValueError(
            f"{path}: no model can be built of it ({type(error).__name__}: {error}). Download it or save it again"
        ) from error


def _check_record(config: Any, path: Path) -> None:
    """ValueError where what this library records in a config has another form."""
    record = getattr(config, "tscnc", None) or {}
    if not isinstance(record, dict) or not isinstance(record.get(RESIZE) or {}, dict):
        raise ValueError(f'{path}: "tscnc" is {record!r}, not as it was saved. Download it or save it again')


def is_image_classifier(model: PreTrainedModel) -> bool:
    """Whether it is of a class that `AutoModelForImageClassification` builds, and tells classes apart."""
    found = CLASSIFIERS[type(model.config)] if type(model.config) in CLASSIFIERS else ()
    classes = found if isinstance(found, (tuple, list)) else (found,)
    return type(model) in classes and model.config.num_labels > 0


def refuse_other_model(folder: Path, target: Path, tensors: dict[str, torch.Tensor]) -> None:
    """
    Raises:
        FileExistsError: `target` holds other weights than the `tensors` of `folder`, or another config.json.
    """
    if (target / CONFIG_FILE).is_file() and config_digest(target) != config_digest(folder):
        raise FileExistsError(f"{target} holds the {CONFIG_FILE} of another model; give another folder")
    there = has_weights(target) or (target / SPARSE_FILE).is_file()
    if there and not same_tensors(read_tensors(target), tensors):
        raise FileExistsError(f"{target} holds other weights than would be written; give another folder")


def output_folder(repository: Repository, output: str | os.PathLike | None, what: str) -> Path:
    """Where `what` is written: to `output`, by default to the repository itself. ValueError if that is on the Hub."""
    if output is None and repository.commit is not None:
        raise ValueError(f"{repository.name} is on the Hub: say where {what} with --output FOLDER")
    return repository.folder if output is None else Path(output)
