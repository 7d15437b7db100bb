"""The epoch, told to every data set that wants to know it, however deep it lies inside others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


LEAVES = (str, bytes, int, float, torch.Tensor, np.ndarray, np.generic, nn.Module, type, type(None))


def set_epoch(dataset: Any, epoch: int) -> None:
    """
    Call `set_epoch(epoch)` of a data set and of all that it holds: `Subset`, `ConcatDataset`, `ChainDataset`, a data
    set of somebody's own with another one in an attribute, tuples and dictionaries of them, in any depth.
    """
    for part in _parts(dataset):
        if callable(found := getattr(part, "set_epoch", None)):
            found(epoch)


def _parts(whole: Any) -> Iterator[Any]:
    """The data sets inside, each once, the innermost first."""
    seen: dict[int, Any] = {}

    def visit(thing: Any) -> Iterator[Any]:
        if isinstance(thing, LEAVES) or id(thing) in seen:
            return
        seen[id(thing)] = thing  # kept, so that no other gets its id
        if isinstance(thing, Mapping):
            for item in thing.values():
                yield from visit(item)
        elif isinstance(thing, (list, tuple)):  # of data sets; or of items, of which there may be millions
            for item in thing:
                if not isinstance(item, (*LEAVES, list, tuple, Mapping)):
                    yield from visit(item)
        elif any(hasattr(type(thing), name) for name in ("__getitem__", "__iter__", "set_epoch")):
            for held in vars(thing).values() if hasattr(thing, "__dict__") else ():
                yield from visit(held)
            yield thing

    yield from visit(whole)
