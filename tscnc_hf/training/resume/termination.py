"""SIGTERM and Ctrl-C while training: what schedulers send before they kill, and what users press."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


EXIT_STATUS = 128 + signal.SIGTERM  # 143, as a shell says it
INTERRUPTED_STATUS = 128 + signal.SIGINT  # 130
ON_INTERRUPT = b"\nCtrl-C: this step ends and a checkpoint is saved. Again: end at once\n"
DEFAULTS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


class Termination:
    """
    Watches for SIGTERM and SIGINT. If `can_wait`, the first one only sets `requested`, for the training loop to save
    and then `end`; without, and with a second one, training ends at once. On SIGTERM that is a `SystemExit` with
    status 143, on SIGINT the `KeyboardInterrupt` that it is everywhere in Python.
    """

    def __init__(self, can_wait: bool):
        self.can_wait, self._process = can_wait, os.getpid()
        self.requested: signal.Signals | None = None
        self.ended_by: signal.Signals | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the signals are ours; not in other threads than the main one, nor over a handler of the user's."""
        main = threading.current_thread() is threading.main_thread()
        ours = [number for number, handler in DEFAULTS.items() if main and signal.getsignal(number) == handler]
        for number in ours:
            signal.signal(number, self._received)
        try:
            yield
        finally:
            for number in ours:
                signal.signal(number, DEFAULTS[number])

    def _received(self, number, frame) -> None:
        if self.requested or not self.can_wait:
            self.end(number)
        self.requested = signal.Signals(number)
        # Workers that read data are forked with this handler, and Ctrl-C reaches them too: they go on, without a word.
        if number == signal.SIGINT and os.getpid() == self._process:
            os.write(2, ON_INTERRUPT)  # print may be in the middle of a line of its own

    def end(self, number: int | None = None) -> None:
        """End as the signal `number` says, or else the one that came first."""
        self.ended_by = signal.Signals(number or self.requested)
        if self.ended_by == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(EXIT_STATUS)
