"""What an evaluation says while it computes what has no progress bar of its own."""

from __future__ import annotations

import sys

import torch.distributed as dist
from tqdm.auto import tqdm


def announce(text: str, progress: bool = True) -> None:
    """One line on stderr, where the progress bars are, from the first process only."""
    if progress and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        tqdm.write(f"{text} ...", file=sys.stderr)
