"""Where an evaluation stands: a folder with a file for each piece of it, which processes share, to go on later."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import should_reduce_batch_size
from transformers.utils import logging

from tscnc_hf.artifact.files.atomic import write_json
from tscnc_hf.artifact.files.identity import Difference, RunIdentity
from tscnc_hf.data.batches import collate
from tscnc_hf.data.identity import dataset_identity, digest, spread
from tscnc_hf.evaluation.memory import announce


logger = logging.get_logger(__name__)

IDENTITY_FILE = "evaluation.json"
FORMAT = 5  # of what is in a piece's file, of how attacks draw, and of what tells data apart: counted up with each


class OtherEvaluation(ValueError):
    """A folder holds an evaluation with other settings, of other weights or of other data."""


def data_identity(dataset, places: Sequence[int]) -> dict[str, Any]:
    """What tells images of a data set from others, a digest of a few among it; plain JSON types."""
    items = collate([dataset[places[place]] for place in spread(len(places))])
    pixels = digest(value for _, value in sorted(items.items()))
    return {"n": len(places), "set": dataset_identity(dataset), "pixels": pixels}


def begun(folder: Path | None) -> bool:
    """Whether a folder of the state of an evaluation has some of it."""
    return folder is not None and any(folder.glob("batch-*.json"))


class EvaluationState:
    """
    What was found, piece by piece, each written atomically; any number of processes may share a folder. A piece says
    what it is of, and is not believed by an evaluation of anything else.

    Args:
        folder (*optional*): None keeps nothing.
        identity (*optional*): of the evaluation. Other code is a warning: what is finished is kept.
        rank, world (`int`): of this process among those that share the work.
        progress (`bool`): say what is being done.
        writing: makes the context in which files are written, and nothing is read.

    Raises:
        OtherEvaluation: the folder holds an evaluation with other options, data or weights (what differs is named).
    """

    def __init__(
        self,
        folder: str | os.PathLike | None = None,
        identity: RunIdentity | None = None,
        rank: int = 0,
        world: int = 1,
        progress: bool = False,
        writing: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.folder = None if folder is None else Path(folder)
        self.rank, self.world, self.progress, self._said = rank, world, progress, None
        self.writing = writing
        if self.folder is None:
            return
        self.digest = identity.digest()
        found = self._read(IDENTITY_FILE, RunIdentity.from_dict)
        if found is None:
            with writing():
                write_json(identity.to_dict(), self.folder / IDENTITY_FILE)
            return
        if other := found.differences(identity, ("options", "data", "weights")):
            raise OtherEvaluation(
                f"{self.folder} holds an evaluation {_described(other)}; give another folder, or remove that one"
            )
        if (other := found.differences(identity, ("code",))) and rank == 0:
            logger.warning(f"{self.folder} was begun with other code, and is kept: {', '.join(map(str, other))}")

    @property
    def begun(self) -> bool:
        """Whether some of it is kept."""
        return begun(self.folder)

    def read(self, name: str, of: Any = None) -> Any:
        """What `write` was given under this name, or None; also where a crash of the machine left a damaged file."""
        kept = self._read(f"{name}.json") or {}
        return kept.get("found") if kept and kept.get("of") == self._of(of) else None

    def write(self, name: str, found: Any, of: Any = None) -> None:
        """
        Keep a piece.

        Args:
            found: plain JSON types, not None.
            of (*optional*): what decides it beside the identity of the evaluation, plain JSON types.
        """
        if self.folder is not None:
            with self.writing():
                write_json({"of": self._of(of), "found": found}, self.folder / f"{name}.json")

    def share(
        self, pieces: Mapping[str, Callable[[], Any]], of: Any = None, prefix: str = "", doing: str = ""
    ) -> dict[str, Any]:
        """
        What each piece gives, plain JSON types: read where it is kept, else computed by one of the processes, in turn,
        and kept. All call this with the same names in the same order, and all get everything.

        Args:
            of (*optional*): as in `write`.
            prefix (`str`): of the names under which pieces are kept.
            doing (`str`): what is said before something is computed.

        Raises:
            RuntimeError: memory ran out in one of the processes; it is raised in all of them.
        """
        found, lacking = {}, None
        for name in list(pieces)[self.rank :: self.world]:
            value = self.read(prefix + name, of)
            if value is None:
                self._say(doing)
                try:
                    value = pieces[name]()
                except RuntimeError as error:
                    if self.world == 1 or not should_reduce_batch_size(error):
                        raise
                    lacking = str(error)
                    break
                self.write(prefix + name, value, of)
            found[name] = value
        if self.world > 1:
            gathered = gather_object([(found, lacking)])
            found = {name: value for part, _ in gathered for name, value in part.items()}
            if short := [error for _, error in gathered if error is not None]:
                raise RuntimeError(short[0])
        return found

    def together(self, name: str, compute: Callable[[], Any], doing: str = "") -> Any:
        """As `share`, of one piece that the processes compute together."""
        kept = [self.read(name) if self.rank == 0 else None]  # one decides for all
        if self.world > 1:
            broadcast_object_list(kept)
        if kept[0] is None:
            self._say(doing)
            kept = [compute()]
            if self.rank == 0:
                self.write(name, kept[0])
        return kept[0]

    def _of(self, of: Any) -> dict[str, Any]:
        return {"evaluation": self.digest, "and": json.loads(json.dumps(of))}

    def _read(self, file: str, made: Callable[[Any], Any] = dict) -> Any:
        """What `made` makes of a file's JSON; None where there is no such file, or it can not be read."""
        try:
            return None if self.folder is None else made(json.loads((self.folder / file).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            logger.warning(f"{self.folder / file} is damaged ({error}): what it was is computed anew")
            return None

    def _say(self, doing: str) -> None:
        if doing and doing != self._said:
            announce(doing, self.progress)
            self._said = doing


def _described(differences: Sequence[Difference]) -> str:
    """Of what else a folder holds an evaluation, in words."""
    known = [one for one in differences if (one.name, one.before) != ("network", None)]
    if not known:
        return (
            "that an older version of tscnc-hf began, which did not keep what the network computes beside its "
            "weights: whether it was this one, nobody can tell"
        )
    return f"with another {_named(known)}"


def _named(differences: Sequence[Difference]) -> str:
    """What differs, by names that say something: no digests, and not that another n or seed draws other images."""
    data = [difference for difference in differences if difference.part == "data"]
    counts = [difference for difference in data if difference.name == "n"]
    options = [difference for difference in differences if difference.part == "options"] + counts
    drawn_anew = counts or any(difference.name == "seed" for difference in options)
    names = list(dict.fromkeys(difference.name.split(".")[0] for difference in options))
    names += ["data"] if data and not drawn_anew else []
    weights = {difference.name for difference in differences if difference.part == "weights"}
    names += ["model"] if "model" in weights else []
    if weights == {"network"}:
        names.append("network (the same weights, and other settings in its config or its modules)")
    if not options:
        return ", ".join(names)
    first = options[0]
    if first.name.split(".")[0] != "attacks":
        return f"{', '.join(names)} ({first.name}: {first.before!r} there, {first.now!r} now)"
    parts = {}
    for _, name, before, now in (difference for difference in options if difference.name.startswith("attacks.")):
        how = "only there" if now is None else "only now" if before is None else "differs"
        parts.setdefault(name.split(".")[1], set()).add(how)
    shown = [f"{name} {how.pop() if len(how) == 1 else 'differs'}" for name, how in parts.items()]
    return f"{', '.join(names)} ({', '.join(shown)})"
