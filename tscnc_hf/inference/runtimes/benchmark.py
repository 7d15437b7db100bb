"""How long a forward pass takes, in every runtime that is here: outputs compared first, then all in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tscnc_hf.inference.compiling import TOLERANCE
from tscnc_hf.inference.report import logits_difference
from tscnc_hf.inference.runtimes.installed import OURS, RUNTIMES, installed, prepared
from tscnc_hf.inference.timing import interleaved, ratios
from tscnc_hf.method.adversarial.pixels import logits_of
from tscnc_hf.method.numbers import finite_number, whole_number
from tscnc_hf.method.reports.report import Report, markdown_table


SECONDS = 10.0  # for all runtimes of one batch size
BURST = 0.05  # for one runtime's turn


@dataclass
class Latency:
    """
    Attributes:
        batch: images of a call.
        runtime: its name.
        median_ms, low_ms, high_ms: median and quartiles, over turns.
        difference: the largest of logits to those of torch eager, over their range.
        times_ours: the median, over turns, of this runtime's time divided by that of `sparse_compile`.
        calls: how many turns there were.
    """

    batch: int
    runtime: str
    median_ms: float
    low_ms: float
    high_ms: float
    difference: float
    times_ours: float
    calls: int


@dataclass
class LatencyReport(Report):
    """
    Attributes:
        rows: one a batch size and runtime.
        size: of the images, (channels, height, width).
        threads: of every runtime.
        zeros: share of the weights in linear and convolutional layers that are zero.
        left_out: runtimes that are not installed.
    """

    rows: list[Latency]
    size: tuple[int, int, int]
    threads: int
    zeros: float
    left_out: tuple[str, ...] = ()

    def to_markdown(self) -> str:
        head = ("batch", "runtime", "median, ms", "quartiles, ms", "times ours", "difference")
        return markdown_table(
            head,
            (
                (
                    row.batch, row.runtime, f"{row.median_ms:.2f}", f"{row.low_ms:.2f} to {row.high_ms:.2f}",
                    f"{row.times_ours:.2f}", f"{row.difference:.0e}",
                )
                for row in self.rows
            ),
            text=("runtime",),
        )  # fmt: skip


@torch.no_grad()
def measure_latency(
    model: nn.Module,
    size: tuple[int, int, int],
    batches: Sequence[int] = (1, 64),
    threads: int | None = None,
    names: Sequence[str] = RUNTIMES,
    seconds: float = SECONDS,
    say: Callable[[str], None] = lambda text: None,
) -> LatencyReport:
    """
    Args:
        model: a classifier, float32, on the CPU, in evaluation mode.
        size: (channels, height, width) of the images, which are drawn at random.
        batches: images of a call, each of at least 1.
        threads: of every runtime; by default those that torch has.
        names: runtimes, among RUNTIMES; those that are not installed are left out.
        seconds: for all calls of one batch size, at least.
        say: called with a line on what is being done.

    Raises:
        ValueError: a runtime's logits differ from those of torch eager by more than 1e-4 of their range, or of the
            largest; an unknown name, or none; a batch, a side of the images or threads below 1, seconds below 0. Also
            as `sparse_compile`.
    """
    for name, values in (("names", names), ("batches", batches)):
        if len(values) == 0:
            raise ValueError(f"{name}={values!r}: there is nothing to measure; give one or more")
    if len(size) != 3:
        raise ValueError(f"size={size!r}: give channels, height and width")
    if unknown := [name for name in names if name not in RUNTIMES]:
        raise ValueError(f"{', '.join(unknown)}: no such runtime; there are {', '.join(RUNTIMES)}")
    batches = [whole_number("batches", batch, 1) for batch in batches]
    size = tuple(whole_number("size", side, 1) for side in size)
    threads = None if threads is None else whole_number("threads", threads, 1)
    finite_number("seconds", seconds)
    here = tuple(name for name in names if installed(name))
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        rows = [row for batch in batches for row in _rows(model, torch.randn(batch, *size), here, seconds, say)]
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    zeros = 1 - sum(int(w.count_nonzero()) for w in weights) / max(1, sum(w.numel() for w in weights))
    return LatencyReport(rows, size, used, zeros, tuple(name for name in names if name not in here))


def _rows(
    model: nn.Module, images: Tensor, names: tuple[str, ...], seconds: float, say: Callable[[str], None]
) -> list[Latency]:
    expected = logits_of(model(images))
    calls, differences = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            say(f"{len(images)} images: preparing {name}")
            calls[name] = prepared(name, model, images, Path(folder))
            differences[name] = logits_difference(calls[name](), expected)
            if not differences[name] <= TOLERANCE:
                raise ValueError(
                    f"{name}: logits differ by {differences[name]:.1e} of their range or size from torch's own"
                )
        say(f"{len(images)} images: measuring")
        times = interleaved(calls, seconds, least=5, most=2000, burst=BURST)
    ours = times.get(OURS)
    return [
        Latency(
            len(images),
            name,
            timing.median,
            *timing.spread,
            differences[name],
            ratios(timing.calls, ours.calls).median if ours else float("nan"),
            len(timing.calls),
        )
        for name, timing in times.items()
    ]
