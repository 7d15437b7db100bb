"""What is zero in a model: a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from tscnc_hf.method.matrices import computed_weights, full_tensor, weight_matrices
from tscnc_hf.method.reports.report import Report, by, markdown_table


@dataclass(frozen=True)
class LayerSparsity:
    """Zeros of one prunable weight; `sparsity` is the fraction of zeros."""

    name: str
    shape: tuple[int, ...]
    numel: int
    zeros: int
    sparsity: float


@dataclass(frozen=True)
class SparsityReport(Report):
    """
    Zeros per prunable weight and in all. Fractions are fractions of zeros.

    Attributes:
        rows: one per prunable weight.
        prunable, zeros, sparsity: over the prunable weights.
        parameters, parameter_zeros, parameter_sparsity: over all parameters.
        computed: name -> why, of weights whose layers multiply with other numbers than they store: in no report.
    """

    rows: tuple[LayerSparsity, ...]
    prunable: int
    zeros: int
    sparsity: float
    parameters: int
    parameter_zeros: int
    parameter_sparsity: float
    computed: dict[str, str] = field(default_factory=dict)

    def to_markdown(self) -> str:
        rows = [
            (f"`{r.name}`", by(r.shape), f"{r.zeros:,} of {r.numel:,}", f"{r.sparsity:.2%}") for r in self.rows
        ] + [
            ("all prunable", "", f"{self.zeros:,} of {self.prunable:,}", f"{self.sparsity:.2%}"),
            (
                "all parameters",
                "",
                f"{self.parameter_zeros:,} of {self.parameters:,}",
                f"{self.parameter_sparsity:.2%}",
            ),
        ]
        left_out = [f"Not counted: `{name}`, {why}." for name, why in self.computed.items()]
        table = markdown_table(("weight", "shape", "zeros", "sparsity"), rows, text=("shape",))
        return "\n\n".join([table, *left_out])


def sparsity_report(model: nn.Module, exclude: Sequence[str] = ()) -> SparsityReport:
    """Count the exact zeros of a model, per prunable weight (see `weight_matrices`) and over all parameters."""
    rows = []
    for record in weight_matrices(model, exclude):
        weight = full_tensor(record.weight).detach()
        zeros = int((weight == 0).sum())
        rows.append(
            LayerSparsity(record.name, tuple(weight.shape), weight.numel(), zeros, zeros / max(weight.numel(), 1))
        )
    parameters = [full_tensor(parameter).detach() for parameter in model.parameters()]
    count, all_zeros = sum(p.numel() for p in parameters), sum(int((p == 0).sum()) for p in parameters)
    prunable, zeros = sum(row.numel for row in rows), sum(row.zeros for row in rows)
    return SparsityReport(
        tuple(rows),
        prunable,
        zeros,
        zeros / max(prunable, 1),
        count,
        all_zeros,
        all_zeros / max(count, 1),
        computed_weights(model),
    )
