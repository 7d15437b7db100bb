"""The lines of JSON that cells leave: read, added, compared."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock

from tscnc_hf.artifact.files.atomic import atomic_file
from tscnc_hf.artifact.files.identity import device_name


if TYPE_CHECKING:
    from tscnc_hf.training.ablation.grid import Cell


KEY = ("model", "arm", "sparsity", "seed", "split")  # which cell a row is of
DENSE = "dense"  # the arm of dense trainings, and the beginning of the names of those that are one arm's own


def origin(device: torch.device, revision: str | None) -> dict:
    """What a row says of when, with which code and on which machine it was computed; the figures are without it."""
    found = {"date": date.today().isoformat(), "commit": revision, "torch": torch.__version__}
    return found | {"device": device_name(device), "threads": torch.get_num_threads()}


def trained_by(training: Mapping[str, str]) -> dict:
    """
    What a row says of the training: its seconds, of the last start where it was cut off, and its code, which is not
    always that which measured it. `training`: the metadata of the weights; None of what older ones do not say.
    """
    seconds = training.get("seconds")
    return {"seconds": seconds and float(seconds), "trained_commit": training.get("commit") or None}


class Results:
    """
    Rows of a JSON-lines file, one a cell. The file is replaced as a whole, so that a kill leaves all that was there;
    several processes may add to it.

    Raises:
        ValueError: the file is not made of such lines.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.rows = read_rows(self.path) if self.path.exists() else []

    def find(self, label: str, cell: Cell, fingerprint: str, split: str = "test") -> dict | None:
        """
        The row of a cell, None where there is none yet.

        Raises:
            ValueError: there is one of other settings.
        """
        key = (label, cell.arm, cell.sparsity, cell.seed, split)
        for row in self.rows:
            if tuple(row[name] for name in KEY) == key:
                self._check(row, fingerprint)
                return row
        return None

    def _check(self, row: Mapping, fingerprint: str) -> None:
        if row["settings"] != fingerprint:
            raise ValueError(
                f"{self.path} holds {row['arm']}-{row['sparsity']:g}-s{row['seed']} of {row['model']} with other "
                f"settings ({row['settings']}, now {fingerprint}): give another results file, or remove its line to "
                "run it anew"
            )

    def add(self, row: Mapping) -> None:
        """
        Also what other processes have added is in `rows` then. Where one of them has added this cell, its row stays.

        Raises:
            ValueError: that one is of other settings.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            self.rows = read_rows(self.path) if self.path.exists() else []
            same = next((one for one in self.rows if all(one[name] == row[name] for name in KEY)), None)
            if same is not None:
                self._check(same, row["settings"])
                return
            self.rows.append(dict(row))
            lines = [json.dumps(row, allow_nan=False) + "\n" for row in self.rows]
            with atomic_file(self.path) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")


def read_rows(path: str | os.PathLike) -> list[dict]:
    """
    The rows of a results file.

    Raises:
        ValueError: a line is not a row; it is named.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            [row[key] for key in (*KEY, "accuracy", "settings")]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a row of an ablation ({error!r})") from error
        rows.append(row)
    return rows


def differences(before: Mapping, after: Mapping) -> dict[str, tuple]:
    """
    What two rows of the same cell disagree in, but for time, date and code: {} when it was reproduced exactly. The
    Lipschitz bound, which only grids that leave whole folders measure, counts where both have it.
    """
    passing = {"seconds", "date", "commit", "trained_commit", "device", "torch", "threads"}
    passing |= {"local_lipschitz"} - (set(before) & set(after))
    keys = sorted((set(before) | set(after)) - passing)
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
