"""How fast training is: images a second, where a step's time goes, and how much of it is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


PARTS = ("attack", "constraints", "masks")
STEPS = 1000  # that are remembered between two logs


class Speed:
    """
    A stopwatch for a Trainer's log. Steps are measured part by part, on a GPU with events, so that the host waits for
    nothing before a log. All of them, or the last 1,000: masks are chosen in one step of ten, on which a log may fall.

    Args:
        device: on which steps are taken.
        on (`bool`): False measures nothing.
    """

    def __init__(self, device: torch.device, on: bool):
        self.on, self._cuda = on, device.type == "cuda"
        self._marks = None  # of this step, (part, start, end); None between steps
        self.begin(0)

    def begin(self, step: int) -> None:
        """Training begins, or goes on after `step` steps."""
        self._first, self._start = step, time.perf_counter()
        self._clear()

    def _clear(self) -> None:
        self._images, self._aside, self._since = 0, 0.0, time.perf_counter()
        self._steps = deque(maxlen=STEPS)  # (start, end, marks)

    def start_step(self) -> None:
        """A step begins."""
        if self.on:
            self._marks, self._begun = [], self._mark()

    def end_step(self, images: int) -> None:
        """It is over; `images` of all processes."""
        if self.on:
            self._images += images
            self._steps.append((self._begun, self._mark(), self._marks))
            self._marks = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, a part of the step: one of `PARTS`."""
        if self._marks is None:
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
        checkpoints), "share_attack", "share_constraints", "share_masks" (and averages) and "share_rest" of all steps;
        "seconds_left" of this training, at the pace of all of it so far. {} where nothing was measured.
        """
        if not self.on or not self._images:
            return {}
        now = time.perf_counter()
        found = {"images_per_second": self._images / max(now - self._since - self._aside, 1e-9)}
        if step > self._first:
            found["seconds_left"] = (now - self._start) / (step - self._first) * (max_steps - step)
        whole, shares = sum(self._seconds(start, end) for start, end, _ in self._steps), dict.fromkeys(PARTS, 0.0)
        for name, *ends in (mark for *_, marks in self._steps for mark in marks):
            shares[name] += self._seconds(*ends) / whole
        found |= {f"share_{name}": share for name, share in (shares | {"rest": 1 - sum(shares.values())}).items()}
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
