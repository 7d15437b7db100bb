"""How fast training is: images a second, where a step's time goes, and how much of it is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


PARTS = ("attack", "constraints", "masks")


class Speed:
    """
    A stopwatch for a Trainer's log. The last step before each log is measured part by part, on a GPU with events, so
    that the host waits for nothing; the others are only counted.

    Args:
        device: on which steps are taken.
        on (`bool`): False measures nothing.
    """

    def __init__(self, device: torch.device, on: bool):
        self.on, self._cuda = on, device.type == "cuda"
        self._measured = False  # whether this step is
        self._whole, self._marks = None, []  # (start, end) of the last step that was; (part, start, end)
        self.begin(0)

    def begin(self, step: int) -> None:
        """Training begins, or goes on after `step` steps."""
        self._first, self._start = step, time.perf_counter()
        self._clear()

    def _clear(self) -> None:
        self._images, self._aside, self._since = 0, 0.0, time.perf_counter()

    def start_step(self, step: int, logging_steps: float) -> None:
        """Step `step` (from 0) is taken."""
        self._measured = self.on and (step + 1) % max(round(logging_steps), 1) == 0
        if self._measured:
            self._marks, self._whole, self._begun = [], None, self._mark()

    def end_step(self, images: int) -> None:
        """It is over; `images` of all processes."""
        if self.on:
            self._images += images
        if self._measured:
            self._whole, self._measured = (self._begun, self._mark()), False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, a part of the step: one of `PARTS`."""
        if not self._measured:
            yield
            return
        start = self._mark()
        yield
        self._marks.append((name, start, self._mark()))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, what is no step: an evaluation, a checkpoint."""
        start = time.perf_counter()
        yield
        self._aside += time.perf_counter() - start

    def figures(self, step: int, max_steps: int) -> dict[str, float]:
        """
        Since the last log, of which the device has finished all: "images_per_second" (without evaluations and
        checkpoints), "share_attack", "share_constraints", "share_masks" (and averages) and "share_rest" of a step;
        "seconds_left" of this training, at the pace of all of it so far. {} where nothing was measured.
        """
        if not self.on or not self._images:
            return {}
        now = time.perf_counter()
        found = {"images_per_second": self._images / max(now - self._since - self._aside, 1e-9)}
        if step > self._first:
            found["seconds_left"] = (now - self._start) / (step - self._first) * (max_steps - step)
        if self._whole is not None:
            whole, shares = self._seconds(*self._whole), dict.fromkeys(PARTS, 0.0)
            for name, *ends in self._marks:
                shares[name] += self._seconds(*ends) / whole
            found |= {f"share_{name}": share for name, share in (shares | {"rest": 1 - sum(shares.values())}).items()}
            self._whole = None
        self._clear()
        return {name: float(f"{value:.4g}") for name, value in found.items()}

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start, end) -> float:
        return start.elapsed_time(end) / 1000 if self._cuda else end - start
