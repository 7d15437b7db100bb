"""What became of each layer of a compiled model, and how long it takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tscnc_hf.method.reports.report import Report, by, markdown_table


def logits_difference(logits: Tensor, expected: Tensor) -> float:
    """
    The largest difference, over the range of the logits expected or the largest of them, whichever is more: of one
    logit and one image there is no range. Infinite where other logits are infinite or no numbers than expected.
    """
    finite = expected.isfinite()
    if logits.shape != expected.shape or not torch.equal(finite, logits.isfinite()):
        return float("inf")
    if not torch.equal(logits[~finite].nan_to_num(), expected[~finite].nan_to_num()):  # inf and -inf stay apart
        return float("inf")
    if not finite.any():
        return 0.0
    known = expected[finite]
    scale = torch.maximum(known.max() - known.min(), known.abs().max()).clamp(min=1e-12)
    return float((logits[finite] - known).abs().max() / scale)


@dataclass
class LayerRow:
    """
    Attributes:
        name: of the layer in the model.
        shape: of its weight.
        zeros: share of its weights that are zero, batch norm folded.
        dense_ms, sparse_ms: of one call on the example, as `race` has it; `sparse_ms` is NaN where none was tried.
        chosen: "dense", or the kernel: what lies side by side in its vectors.
    """

    name: str
    shape: tuple[int, ...]
    zeros: float
    dense_ms: float
    sparse_ms: float
    chosen: str


@dataclass
class CompileReport(Report):
    """
    Attributes:
        rows: the layers, in the order in which they are called.
        before_ms: median time of one forward pass of the example, of the model.
        after_ms: of what was made of it: as many times that as it takes in the middle of turns of both.
        difference: the largest of logits on the example, as `logits_difference` has it.
        threads: of torch, that all was measured with.
        example: shape of the example.
        said: what else there is to say; why nothing was changed.
    """

    rows: list[LayerRow]
    before_ms: float
    after_ms: float
    difference: float
    threads: int
    example: tuple[int, ...]
    said: str = ""

    SUMMARY = ("speedup", "sparse_layers")

    @property
    def speedup(self) -> float:
        return self.before_ms / self.after_ms

    @property
    def sparse_layers(self) -> int:
        return sum(row.chosen != "dense" for row in self.rows)

    def to_markdown(self) -> str:
        head = ("layer", "weight", "zeros", "dense, ms", "sparse, ms", "chosen")
        table = markdown_table(
            head,
            (
                (
                    f"`{row.name}`", by(row.shape), f"{row.zeros:.1%}", f"{row.dense_ms:.3f}",
                    "" if row.sparse_ms != row.sparse_ms else f"{row.sparse_ms:.3f}", row.chosen,
                )
                for row in self.rows
            ),
            text=("chosen",),
        )  # fmt: skip
        whole = (
            f"{by(self.example)} on {self.threads} thread{'s' if self.threads > 1 else ''}: {self.before_ms:.2f} ms "
            f"before, {self.after_ms:.2f} ms after ({self.speedup:.2f} times as fast), logits within "
            f"{self.difference:.1e} of their range or size."
        )
        return "\n\n".join(filter(None, [table, whole, self.said]))
