"""Singular values, condition numbers and ranks of a model's weight matrices: a report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.reports.report import Report, by, markdown_table, over_rows


# Singular values below this fraction of the largest count as zero.
RANK_TOLERANCE = 1e-6
RIDGE = 1e-3  # of the cnc column: the default of `condition_number_constraint`


@dataclass(frozen=True)
class MatrixSpectrum:
    """
    One matrix view of a weight.

    Attributes:
        shape: (rows, columns).
        sigma_max, sigma_min: largest and smallest of the min(r, c) singular values.
        condition_number: sigma_max / sigma_min, infinite when the matrix is rank deficient.
        effective_condition_number: the same over the singular values above 1e-6 sigma_max.
        rank, full_rank: number of those, and min(r, c).
        dead_rows, dead_columns: all-zero rows (outputs nothing reaches), all-zero columns (inputs nobody reads).
        stable_rank: sum of sigma^2 / sigma_max^2.
        cnc: `condition_number_constraint` of the matrix at its default ridge.
    """

    name: str
    shape: tuple[int, int]
    sigma_max: float
    sigma_min: float
    condition_number: float
    effective_condition_number: float
    rank: int
    full_rank: int
    dead_rows: int
    dead_columns: int
    stable_rank: float
    cnc: float


@dataclass(frozen=True)
class SpectralReport(Report):
    """The spectrum of every weight matrix with at least two rows and two columns."""

    rows: tuple[MatrixSpectrum, ...]

    median_condition_number = over_rows(statistics.median, "condition_number", math.nan)
    max_condition_number = over_rows(max, "condition_number", math.nan)
    median_effective_condition_number = over_rows(statistics.median, "effective_condition_number", math.nan)
    max_effective_condition_number = over_rows(max, "effective_condition_number", math.nan)
    SUMMARY = (
        "median_condition_number", "max_condition_number",
        "median_effective_condition_number", "max_effective_condition_number", "rank_deficient",
    )  # fmt: skip

    @property
    def rank_deficient(self) -> int:
        """Number of matrices whose rank is below min(r, c)."""
        return sum(row.rank < row.full_rank for row in self.rows)

    def to_markdown(self) -> str:
        rows = [
            (f"`{r.name}`", by(r.shape), f"{r.sigma_max:.3g}", f"{r.condition_number:.3g}",
             f"{r.effective_condition_number:.3g}", f"{r.rank} of {r.full_rank}", r.dead_rows, r.dead_columns,
             f"{r.stable_rank:.1f}", f"{r.cnc:.3f}")
            for r in self.rows
        ]  # fmt: skip
        head = ("matrix", "shape", "sigma max", "kappa", "effective kappa", "rank", "dead rows", "dead columns")
        return markdown_table((*head, "stable rank", "cnc"), rows, text=("shape",))


def singular_values(matrix: Tensor, method: str = "svd") -> Tensor:
    """
    The min(r, c) singular values of a matrix (r, c), largest first, in float64 on the matrix's device.

    `method="gram"` takes square roots of the eigenvalues of the smaller Gram matrix: about ten times faster for
    convolutions, exact to 1e-3 down to 1e-6 of the largest singular value and to 1e-9 down to 1e-3 of it.
    """
    if method not in ("svd", "gram"):
        raise ValueError(f"method={method!r}: use 'svd' or 'gram'")
    matrix = matrix.detach().double()
    if method == "svd":
        return torch.linalg.svdvals(matrix)
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(matrix @ matrix.T).clamp_(min=0).sqrt().flip(0)


def matrix_spectrum(name: str, matrix: Tensor, method: str = "svd") -> MatrixSpectrum:
    """
    The spectrum of one matrix (r, c), any floating dtype, computed in float64; `method` as in `singular_values`.

    Raises:
        ValueError: it has values that are not finite.
    """
    if wrong := int((~matrix.isfinite()).sum()):
        raise ValueError(
            f"{name}: {wrong} of its {matrix.numel()} values are NaN or infinite, and those of a weight are to be "
            "finite. Such a model has no spectrum and answers nothing: go back to a checkpoint from before, or train "
            "with a lower learning rate; of a downloaded model, ask its author"
        )
    zero = matrix == 0
    sigma = singular_values(matrix, method).cpu()
    largest, smallest, full_rank = sigma[0].item(), sigma[-1].item(), sigma.numel()
    kept = sigma[sigma > RANK_TOLERANCE * largest]
    rank = kept.numel() if largest > 0 else 0
    squares = (sigma / largest).square() if rank else sigma
    relative = squares / squares.mean() if rank else squares
    return MatrixSpectrum(
        name=name,
        shape=tuple(matrix.shape),
        sigma_max=largest,
        sigma_min=smallest,
        condition_number=largest / smallest if rank == full_rank else math.inf,
        effective_condition_number=largest / kept[-1].item() if rank else math.inf,
        rank=rank,
        full_rank=full_rank,
        dead_rows=int(zero.all(dim=1).sum()),
        dead_columns=int(zero.all(dim=0).sum()),
        stable_rank=squares.sum().item() if rank else 0.0,
        cnc=math.log1p(RIDGE) - (relative + RIDGE).log().mean().item(),
    )


@torch.no_grad()
def spectral_report(model: nn.Module, exclude: Sequence[str] = (), method: str = "svd") -> SpectralReport:
    """
    The spectrum of every weight matrix of a model (see `weight_matrices`), as the network computes with them.

    Blocks of a fused or grouped weight are separate rows, `name[i]`. One-row matrices (depthwise convolutions) are
    left out: their condition number is 1 by definition.

    Args:
        model (`nn.Module`): any model; gates are not folded in (`tscnc_hf.method.units.gates.folded_gates`).
        exclude (`Sequence[str]`, *optional*): as in `weight_matrices`.
        method (`str`): "svd", or "gram": as in `singular_values`, for a look during training.

    Raises:
        ValueError: a weight has values that are not finite; the message names it.
    """
    rows = []
    for record in weight_matrices(model, exclude):
        matrices = record.matrices
        if min(matrices.shape[-2:]) < 2:
            continue
        for index, matrix in enumerate(matrices):
            name = record.name if len(matrices) == 1 else f"{record.name}[{index}]"
            rows.append(matrix_spectrum(name, matrix, method))
    return SpectralReport(tuple(rows))
