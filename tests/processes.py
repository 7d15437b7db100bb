"""Processes that a test starts beside each other."""

import gc
import os
import sys
from collections.abc import Callable

import torch.distributed as dist
import torch.multiprocessing


def run_processes(function: Callable, *args, count: int = 2) -> None:
    """`function(rank, *args)` in new processes; what one raises is raised here. A process group it leaves is ended."""
    torch.multiprocessing.spawn(_run, args=(function, args), nprocs=count)


def _run(rank: int, function: Callable, args: tuple) -> None:
    function(rank, *args)
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    # All is done and checked. A thread of gloo that wants the interpreter while that is torn down would abort it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
