"""What a data set is, whatever it is called: enough to tell whether two runs saw the same images."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from tscnc_hf.data.batches import LABEL_KEYS


PLACES = 64  # items that are looked at where looking at all would take long


def spread(size: int, count: int = PLACES) -> list[int]:
    """Up to `count` places of [0, size), evenly spaced, both ends among them."""
    return sorted({round(part * (size - 1) / max(count - 1, 1)) for part in range(count)}) if size else []


def digest(parts: Iterable[Any]) -> str:
    """BLAKE2 (16 hexadecimal digits) of tensors and arrays (their shape, dtype and bytes), bytes and plain values."""
    made = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, (torch.Tensor, np.ndarray)):
            array = np.ascontiguousarray(part.detach().cpu().numpy() if isinstance(part, torch.Tensor) else part)
            made.update(f"{array.shape} {array.dtype}".encode())
            part = array.reshape(-1).view(np.uint8)
        made.update(part if isinstance(part, (bytes, np.ndarray)) else repr(part).encode())
    return made.hexdigest()


def dataset_identity(dataset: Any) -> dict[str, Any]:
    """
    What tells a data set from others, plain JSON types. Ours say it themselves (`identity`). Of any other with a
    length: how many items, and a digest of the labels of up to 64 of them, as pixels may be augmented at random; of a
    `Subset` or `ConcatDataset` of ours, theirs. Of a stream nothing is known. Random states are left as they were.
    """
    if isinstance(own := getattr(dataset, "identity", None), Mapping):
        return dict(own)
    if isinstance(dataset, Subset):
        return {"part": digest([np.asarray(dataset.indices)]), "of": dataset_identity(dataset.dataset)}
    if isinstance(dataset, ConcatDataset):
        return {str(place): dataset_identity(part) for place, part in enumerate(dataset.datasets)}
    try:
        size = len(dataset)
        with random_states_kept():
            items = [dataset[place] for place in spread(size)]
    except (TypeError, NotImplementedError, KeyError):
        return {}
    found = {"items": size}
    labels = [item[key] for item in items if isinstance(item, Mapping) for key in LABEL_KEYS if key in item]
    return found | ({"labels": digest(np.asarray(label) for label in labels)} if labels else {})


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Inside, Python's, numpy's and torch's global generators may be used; afterwards they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
