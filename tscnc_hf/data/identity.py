"""What a data set is, whatever it is called: enough to tell whether two runs saw the same images."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from tscnc_hf.data.batches import LABEL_KEYS


HUB_FILE = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@")  # as `datasets` records where a file was
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
    length: how many items, and a digest of all labels where they are at hand (`stored_labels`), else of those of up to
    64 items; not of pixels, which may be augmented at random, but where the items are a list. Of a `Subset` or
    `ConcatDataset` the parts'. Of a stream nothing is known. Random states are left as they were.
    """
    if isinstance(own := getattr(dataset, "identity", None), Mapping):
        return dict(own)
    if isinstance(dataset, Subset):
        return {"part": digest([np.asarray(dataset.indices)]), "of": dataset_identity(dataset.dataset)}
    if isinstance(dataset, ConcatDataset):
        return {str(place): dataset_identity(part) for place, part in enumerate(dataset.datasets)}
    try:
        size, labels = len(dataset), stored_labels(dataset)
        with random_states_kept():
            items = dataset if isinstance(dataset, list) else [dataset[place] for place in spread(size)]
    except (TypeError, NotImplementedError, KeyError):
        return {}
    found, items = {"items": size}, [item for item in items if isinstance(item, Mapping)]
    if labels is None:
        labels = [item[key] for item in items for key in LABEL_KEYS if key in item]
    if isinstance(dataset, list):
        found["pixels"] = digest(_array(item["pixel_values"]) for item in items if "pixel_values" in item)
    return found | ({"labels": digest(_array(label) for label in labels)} if len(labels) else {})


def dataset_name(dataset: Any) -> str | None:
    """
    The name of a data set, as far as it knows one: the Hub id that `datasets` has read it from, else the name that its
    builder has given it, or our own loader. Of a `Subset` or a `ConcatDataset` that of its parts, if it is one.
    """
    if isinstance(dataset, Subset):
        return dataset_name(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        names = {dataset_name(part) for part in dataset.datasets}
        return names.pop() if len(names) == 1 else None
    info = getattr(dataset, "info", None)
    for source in getattr(info, "download_checksums", None) or ():
        if found := HUB_FILE.match(str(source)):
            return found[1]
    name = getattr(info, "dataset_name", None) or getattr(dataset, "data_name", None)
    if not isinstance(name, str) or name == getattr(info, "builder_name", None):  # "imagefolder" is none
        return None
    return name


def dataset_split(dataset: Any) -> str | None:
    """
    The split that images are from, as far as a data set knows it: what `datasets` says, or our own loader, which calls
    rows of train that were held out by what they were held out for. A part of train that `datasets` has split off has
    none. Of a `Subset` or a `ConcatDataset` that of its
    parts, if it is one.
    """
    if isinstance(dataset, Subset):
        return dataset_split(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        splits = {dataset_split(part) for part in dataset.datasets}
        return splits.pop() if len(splits) == 1 else None
    if own := getattr(dataset, "data_split", None):
        return own
    if type(getattr(dataset, "info", None)).__name__ != "DatasetInfo" or dataset.split is None:
        return None  # other libraries name other things so
    split = str(dataset.split)
    if split == "train" and not _is_whole(dataset, split):
        return None  # rows that were held out of it say that they are it
    return split


def _is_whole(dataset: Any, split: str) -> bool:
    """Whether a data set of `datasets` certainly has all rows of its split."""
    known = (dataset.info.splits or {}).get(split)
    return known is not None and hasattr(dataset, "__len__") and len(dataset) == known.num_examples


def stored_labels(dataset: Any) -> np.ndarray | None:
    """
    All class ids of a data set with a length, integers (n,), where no image need be read for them: of a column, of a
    list of items, of an attribute `labels` that has one integer an item. None where there are none such.
    """
    if isinstance(dataset, Subset):
        labels = stored_labels(dataset.dataset)
        return None if labels is None else labels[list(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [stored_labels(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate(parts)
    key = next((key for key in LABEL_KEYS if key in (getattr(dataset, "column_names", None) or ())), None)
    if key is not None:
        labels = dataset.select_columns([key]).with_format("numpy")[:][key]
    elif isinstance(dataset, list) and all(isinstance(item, Mapping) for item in dataset):
        found = [next((item[key] for key in LABEL_KEYS if key in item), None) for item in dataset]
        labels = [label.tolist() if isinstance(label, torch.Tensor) else label for label in found]
    else:
        labels = getattr(dataset, "labels", None)
    try:
        labels = _array(labels)
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels if labels.shape == (len(dataset),) and np.issubdtype(labels.dtype, np.integer) else None


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    return (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Inside, Python's, numpy's and torch's global generators may be used; afterwards they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
