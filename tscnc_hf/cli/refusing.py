"""What several processes of a launch refuse alike is said by one of them."""

from __future__ import annotations

import hashlib
import os


def first_to_say(text: str) -> bool:
    """
    Whether no other process of the launch has said this. Before they are connected, when all read the same options,
    the first of each machine speaks.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    from torch import distributed

    if not distributed.is_initialized():
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        store = distributed.distributed_c10d._get_default_store()
        return store.add(f"tscnc-said-{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except RuntimeError:  # the process that keeps it has ended
        return True


def refusal(text: str) -> SystemExit:
    """Ends the process with status 1, and the text on stderr where nobody else has said it."""
    return SystemExit(text if first_to_say(text) else 1)
