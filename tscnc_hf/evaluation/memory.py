"""What an evaluation does when a device's memory runs out: less at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from tqdm.auto import tqdm


Result = TypeVar("Result")


def halving(function: Callable[[int], Result], size: int) -> Result:
    """`function(size)`; with half the size, and so on, whenever memory runs out. What fails with 1 is raised."""
    while True:
        try:
            return function(size)
        except RuntimeError as error:
            if size <= 1 or not should_reduce_batch_size(error):
                raise
            size //= 2
        clear_device_cache(garbage_collection=True)  # outside the handler, which keeps the failed tensors alive


class InParts:
    """Calls a function on slices of a batch, halved for good whenever memory runs out."""

    def __init__(self) -> None:
        self.limit: int | None = None

    def __call__(self, function: Callable[[slice], Tensor], count: int) -> Tensor:
        def run(limit: int) -> Tensor:
            result = torch.cat([function(slice(first, first + limit)) for first in range(0, count, limit)])
            if limit < count:
                self.limit = limit
            return result

        return halving(run, min(count, self.limit or count))


def announce(text: str, progress: bool = True) -> None:
    """One line on stderr, where the progress bars are, from the first process only."""
    if progress and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        tqdm.write(f"{text} ...", file=sys.stderr)
