"""What could not be written, said in one line: a full disk, a read-only folder, a limit."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tscnc_hf.artifact.card.formatting import format_bytes


# torch.save says what went wrong in the words of its writer: "unexpected pos 576 vs 534" is a full disk
TORCH_WRITER = re.compile(r"inline_container\.cc|PytorchStreamWriter")
SPACE, WRITABLE = "free some space", "make the folder writable, or use another one"
REMEDIES = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: WRITABLE,
    errno.EACCES: WRITABLE,
    errno.EPERM: WRITABLE,
}
NUMBERS = {os.strerror(number): number for number in REMEDIES}


class StorageError(OSError):
    """Something of a run could not be written. The message says what, why, and what to do."""


@contextmanager
def writing(what: str, folder: str | os.PathLike, also: Callable[[], str] = str) -> Iterator[None]:
    """
    Inside, what keeps `what` from being written to `folder` becomes a `StorageError` of one line, with the space that
    is left there, what to do, and what `also` gives. Other errors pass.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not TORCH_WRITER.search(str(error)):
            raise
        reason, number = _reason(error)
        home = next(path for path in (Path(folder).absolute() / "_").parents if path.is_dir())
        free = format_bytes(shutil.disk_usage(home).free)
        remedy = REMEDIES.get(number, f"{SPACE}, if that is what is missing, or look at the file system")
        raise StorageError(
            f"{what} could not be written to {os.path.abspath(folder)}: {reason} ({free} free there). "
            f"To go on, {remedy}{also()}"
        ) from error


def check_writable(folder: str | os.PathLike) -> None:
    """StorageError if no file can be made in `folder`: better before training than after."""
    probe = Path(folder) / f".{secrets.token_hex(4)}.tmp"
    with writing("The output of this run", folder):
        try:
            probe.write_bytes(b"1")
        finally:
            probe.unlink(missing_ok=True)


def _reason(error: BaseException) -> tuple[str, int | None]:
    """The reason as the system words it, and its number if it can be told."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or text, error.errno
    for words, number in NUMBERS.items():
        if words in text:
            return words, number
    if isinstance(error, RuntimeError):
        return "torch could not write on, the disk is full or a limit is reached", None
    return text.replace("\n", " "), None
