"""Threads of torch on a CPU."""

from __future__ import annotations

import os


def set_cpu_threads(device, processes: int, threads: int | None) -> None:
    """
    As many as asked for. Otherwise all cores for a single process that `accelerate launch` has started, which gives
    it one; torch's own choice for several processes, and with plain `python`.
    """
    import torch

    if device.type != "cpu":
        return
    if threads is None and processes == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if threads is not None:
        torch.set_num_threads(threads)
