"""Data sets that are read from beginning to end: no length, no item number 7."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from tscnc_hf.data.identity import dataset_split


def is_stream(dataset: Any) -> bool:
    """
    Whether a data set can only be iterated. Tried, not asked for: torch's streams have a `__getitem__`, which raises.
    """
    if isinstance(dataset, IterableDataset):
        return True
    return not has_length(dataset)


def has_length(dataset: Any) -> bool:
    try:
        len(dataset)
    except (TypeError, NotImplementedError):
        return False
    return True


class FirstItems(IterableDataset):
    """
    The first `count` items of a stream, shared out among the workers of a DataLoader, which each read a part.
    ValueError where it has none: it was read before, and does not begin anew.
    """

    def __init__(self, stream: Any, count: int):
        self.stream, self.count = stream, count

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        items = islice(iter(self.stream), len(range(index, self.count, workers)))
        first = list(islice(items, 1))
        if not first and worker is None:
            raise ValueError("the stream has no image: it must begin anew whenever it is iterated")
        return chain(first, items)


class TakenItems(list):
    """The first `count` items of a stream, or all that there are, in memory; `data_split` is the stream's."""

    def __init__(self, stream: Any, count: int):
        super().__init__(islice(stream, count))
        self.data_split = dataset_split(stream)
