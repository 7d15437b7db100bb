"""Training checkpoints on disk: there under their name as a whole, or not at all.

A checkpoint is written in a hidden folder beside and gets its name, `checkpoint-N`, as the last step; one that is to
go loses its name first. So whoever looks for `checkpoint-*` at any moment finds whole ones. Each also lists its files
with their sizes, for copies that were cut off, and for files that went missing later.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from tscnc_hf.artifact.card.formatting import format_bytes
from tscnc_hf.artifact.files.atomic import write_json
from tscnc_hf.artifact.models.weights import has_weights
from tscnc_hf.artifact.packed.file import SPARSE_FILE


UNFINISHED = ".unfinished-checkpoint"  # hidden: not pushed, and no checkpoint to anybody
FILE_LIST = "checkpoint_files.json"
EARLIER = "_earlier-run-"  # not pushed
REPLACED, REMOVED = "replaced-", "removed-"


class ResumeError(ValueError):
    """A run that can not go on, or begin, from what lies there. The message says why in one line, and what to do."""


def unfinished_folder(run_folder: str | os.PathLike) -> Path:
    """Where checkpoints of a run are written before they get their name."""
    return Path(run_folder) / UNFINISHED


def clear_unfinished(run_folder: str | os.PathLike) -> None:
    """Remove what a run that was killed left behind; a checkpoint that was about to be replaced gets its name back."""
    folder = unfinished_folder(run_folder)
    for path in folder.glob(f"{REPLACED}*"):
        home = folder.parent / path.name.removeprefix(REPLACED)
        if not home.exists():
            os.replace(path, home)
    shutil.rmtree(folder, ignore_errors=True)


def finish_checkpoint(written: Path) -> Path:
    """
    Give a checkpoint in `unfinished_folder`, whose last file has been written, its name in the run's folder; one that
    has the name already is replaced. What is in it is on the disk before, so that the older ones may go.
    """
    files = {path.relative_to(written).as_posix(): path for path in sorted(written.rglob("*")) if path.is_file()}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    sizes.pop(TRAINING_ARGS_NAME, None)  # a pickle that resuming does not read and a push leaves out
    write_json({"files": sizes}, written / FILE_LIST)
    for path in (*files.values(), written / FILE_LIST):
        _flush(path)
    final = written.parent.parent / written.name
    if final.exists():
        os.replace(final, written.with_name(f"{REPLACED}{final.name}"))
    os.replace(written, final)
    if os.name == "posix":  # elsewhere a folder can not be opened
        _flush(final.parent)
    shutil.rmtree(unfinished_folder(final.parent), ignore_errors=True)
    return final


def rotate(run_folder: str | os.PathLike, limit: int | None, keep: set[str]) -> None:
    """Remove the oldest checkpoints until `limit` are left (None: never), but none of the paths in `keep`."""
    checkpoints = sort_checkpoints(str(run_folder), use_mtime=True)
    kept = {os.path.abspath(path) for path in keep}
    old = [path for path in checkpoints if os.path.abspath(path) not in kept]
    excess = len(checkpoints) - max(limit, len(checkpoints) - len(old)) if limit else 0
    for path in old[: max(0, excess)]:
        away = unfinished_folder(run_folder) / f"{REMOVED}{Path(path).name}"
        away.parent.mkdir(exist_ok=True)
        os.replace(path, away)  # removing takes a while: meanwhile nobody is to take it for a checkpoint
    shutil.rmtree(unfinished_folder(run_folder), ignore_errors=True)


def checkpoints(run_folder: str | os.PathLike) -> list[Path]:
    """The checkpoints in a folder, the latest step first; whole or not."""
    named = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(int(match[1]), path) for path in Path(run_folder).glob("*") if (match := named.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def set_aside(run_folder: str | os.PathLike) -> Path | None:
    """
    Move all checkpoints in a folder to its `_earlier-run-1`, or the next number: a run begins anew there, and the
    latest step is to be its own. None where there are none; else where they are now.
    """
    found = checkpoints(run_folder)
    if not found:
        return None
    numbers = [int(path.name.removeprefix(EARLIER)) for path in Path(run_folder).glob(f"{EARLIER}*")]
    away = Path(run_folder) / f"{EARLIER}{max(numbers, default=0) + 1}"
    away.mkdir()
    for path in found:  # the latest first: where this is cut off, what is left has not its step
        os.replace(path, away / path.name)
    return away


def damage(checkpoint: str | os.PathLike) -> str | None:
    """What is wrong with the files of a checkpoint, None if all are there in their sizes."""
    folder = Path(checkpoint)
    try:
        files = json.loads((folder / FILE_LIST).read_text(encoding="utf-8"))["files"].items()
    except (OSError, ValueError, KeyError, AttributeError):
        return f"{FILE_LIST} is missing or damaged"
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name, _ in files}
    wrong = [f"{name} is {'missing' if sizes[name] is None else 'cut off'}" for name, n in files if sizes[name] != n]
    return ", ".join(wrong) or None


def others_text(run_folder: str | os.PathLike) -> str | None:
    """Why a new run can not begin in a folder: what checkpoints an earlier one left there. None if there are none."""
    names = [path.name for path in checkpoints(run_folder)]
    if not names:
        return None
    found = names[0] if len(names) == 1 else f"{len(names)} checkpoints, up to {names[0]},"
    return (
        f"{run_folder} holds {found} of an earlier run: those of a new one would be mixed with them, and the "
        "latest step would be taken for the last one. Go on with the earlier run (resume_from_checkpoint=True, "
        f"--resume true), use another output_dir, or remove {os.path.join(run_folder, PREFIX_CHECKPOINT_DIR)}-*"
    )


def finished_text(run_folder: str | os.PathLike) -> str | None:
    """Why a run can not begin in a folder without checkpoints: a finished model is there. None if there is none."""
    folder = Path(run_folder)
    if checkpoints(folder) or not (has_weights(folder) or (folder / SPARSE_FILE).is_file()):
        return None
    return (
        f"{run_folder} holds a finished model, which this run would replace: use another output_dir, or move that "
        "model away"
    )


def last_whole_checkpoint(run_folder: str | os.PathLike) -> Path | None:
    """The checkpoint of the latest step of those that are whole."""
    return next((path for path in checkpoints(run_folder) if damage(path) is None), None)


def whole_checkpoint_text(run_folder: str | os.PathLike) -> str:
    """A clause for messages: what there is to go on from."""
    last = last_whole_checkpoint(run_folder)
    if last is None:
        return "no checkpoint had been written yet"
    size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    return f"the last checkpoint is intact: {last} ({format_bytes(size)})"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
