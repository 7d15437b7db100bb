"""SIGTERM while training: what schedulers send before they kill."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


EXIT_STATUS = 128 + signal.SIGTERM  # 143, as a shell says it


class Termination:
    """
    Watches for SIGTERM. If `can_wait`, the first one only sets `requested`, for the training loop to save and then
    `end`; without, and with a second one, the process ends at once. It exits with status 143 in either case.
    """

    def __init__(self, can_wait: bool):
        self.can_wait, self.requested = can_wait, False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the signal is ours; not in other threads than the main one, nor over a handler of the user's."""
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTERM, self._received)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _received(self, number, frame) -> None:
        if self.requested or not self.can_wait:
            self.end()
        self.requested = True

    @staticmethod
    def end() -> None:
        raise SystemExit(EXIT_STATUS)
