"""
The two differentiable terms of TSCNC (Feng, Lin, Gao, Wei, arXiv 2503.20454, for the idea).

The closed forms used here (scale-invariant CNC, TSC on weights scaled by their layer) are ours; see the docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tscnc_hf.method.matrices import WeightMatrix, full_tensor


# Entries of a matrix up to which stacking pays on a CPU: 1.5 to 3 times for the small ViTs of the recipes.
STACK_LIMIT = 2**17


def transformed_l1(t: Tensor, a: float) -> Tensor:
    """
    Transformed l1, rho_a(t) = (a + 1)|t| / (a + |t|) (Zhang and Xin 2014; Ma et al. 2019).

    Args:
        t (`Tensor`): any shape, floating.
        a (`float`): shape, > 0; towards 0 it counts non-zeros (l0), towards infinity it is |t| (l1).

    Returns:
        `Tensor`: same shape and dtype as `t`, in [0, a + 1); zero gradient at t = 0.
    """
    if not a > 0:
        raise ValueError(f"a={a}: the shape of transformed l1 must be positive")
    magnitude = t.abs()
    return (a + 1) * magnitude / (a + magnitude)


def weight_scales(weights: Iterable[WeightMatrix]) -> dict[str, Tensor]:
    """Root mean square of each weight, float32 scalars by name; 1 where all zero (ours: one `a` for all layers)."""
    scales = {}
    for record in weights:
        rms = full_tensor(record.weight).detach().float().pow(2).mean().sqrt()
        scales[record.name] = torch.where(rms > 0, rms, torch.ones_like(rms))
    return scales


def transformed_sparse_constraint(weights: Iterable[WeightMatrix], scales: Mapping[str, Tensor], a: float) -> Tensor:
    """
    TSC on weights: sum over all weights of rho_a(w / s), s the layer's own scale (ours).

    Returns:
        `Tensor`: float32 scalar, between 0 and (a + 1) times the number of weights.
    """
    terms = [
        transformed_l1(full_tensor(record.weight).float() / scales[record.name].to(record.weight.device), a).sum()
        for record in weights
    ]
    return torch.stack(terms).sum()


class _LogMeanRatio(torch.autograd.Function):
    """
    cnc(M) with its gradient in closed form: with A = G/t + rho I, S = A^-1 and t = tr(G)/n,
    d cnc / d M = -2/(n t) (S - (1 - rho tr(S)/n) I) M, so one Cholesky factor serves value and gradient.
    """

    @staticmethod
    def forward(ctx, matrix: Tensor, ridge: float) -> Tensor:
        n = matrix.shape[-2]
        # The value does not depend on the scale: dividing by the largest entry keeps the Gram matrix in range.
        peak = matrix.abs().amax(dim=(-2, -1), keepdim=True)
        scaled = matrix / torch.where(peak > 0, peak, torch.ones_like(peak))
        gram = scaled @ scaled.mT
        mean_square = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        safe = torch.where(mean_square > 0, mean_square, torch.ones_like(mean_square))
        eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        factor, _ = torch.linalg.cholesky_ex(gram / safe + ridge * eye)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        ctx.save_for_backward(scaled, factor, safe, peak)
        ctx.ridge = ridge
        return math.log1p(ridge) - log_det / n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        scaled, factor, mean_square, peak = ctx.saved_tensors
        n = scaled.shape[-2]
        inverse = torch.cholesky_inverse(factor)
        trace = inverse.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        gradient = inverse @ scaled - (1 - ctx.ridge * trace / n) * scaled
        gradient = gradient * (-2 / n) / (mean_square * torch.where(peak > 0, peak, torch.ones_like(peak)))
        return grad[..., None, None] * gradient, None


def condition_number_constraint(matrix: Tensor, ridge: float = 1e-3) -> Tensor:
    """
    CNC, scale-invariant (the closed form is ours): the log of the ratio of the arithmetic to the
    geometric mean of the squared singular values,

        cnc(M) = log(tr(G)/n) - (1/n) log det(G),    G the Gram matrix of the smaller side, n its size,

    computed as log(1 + rho) - (1/n) log det(G / (tr(G)/n) + rho I), which stays finite for rank-deficient matrices.
    Zero iff all singular values are equal; unchanged when M is scaled; log kappa < log 2 + (n/2) cnc (Guggenheimer,
    Edelman and Johnson 1995, for rho = 0).

    Args:
        matrix (`Tensor`): (..., r, c), floating; half precision is computed in float32.
        ridge (`float`, *optional*, defaults to 1e-3): rho > 0, relative to the mean squared singular value.

    Returns:
        `Tensor`: (...), float32 (float64 for float64 input), in [0, log((1 + rho)/rho)]. An all-zero matrix has the
        largest value and a zero gradient. First derivatives only.

    Raises:
        ValueError: fewer than two dimensions, an empty side, or ridge not positive.
    """
    if matrix.ndim < 2 or 0 in matrix.shape[-2:]:
        raise ValueError(f"a matrix (..., r, c) with r, c >= 1 is needed, got shape {tuple(matrix.shape)}")
    if not ridge > 0:
        raise ValueError(f"ridge={ridge} must be positive: without it a rank-deficient matrix has no finite value")
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = matrix.mT
    with torch.autocast(matrix.device.type, enabled=False):
        return _LogMeanRatio.apply(matrix, float(ridge))


def condition_number_penalty(weights: Iterable[WeightMatrix], ridge: float = 1e-3) -> Tensor:
    """
    Sum of `condition_number_constraint` over all matrices of a model; one-row matrices (depthwise convolutions) are
    left out, their condition number is always 1.

    Returns:
        `Tensor`: float32 scalar >= 0; 0 if no matrix has two rows and two columns.
    """
    groups: dict[tuple, list[Tensor]] = {}
    device = None
    for record in weights:
        matrices = record.matrices
        device = matrices.device
        if min(matrices.shape[-2:]) < 2:
            continue
        if matrices.shape[-2] > matrices.shape[-1]:
            matrices = matrices.mT
        # Small matrices of one shape go together, the calls cost more than the arithmetic; on a GPU all do. Large ones
        # on a CPU cost more to copy than that saves.
        together = device.type != "cpu" or matrices[0].numel() <= STACK_LIMIT
        shape = (*matrices.shape[-2:], matrices.dtype)
        groups.setdefault(shape if together else (record.name,), []).append(matrices)
    terms = [condition_number_constraint(torch.cat(group), ridge).sum() for group in groups.values()]
    return torch.stack(terms).sum() if terms else torch.zeros((), device=device)


def constraint_terms(
    weights: Sequence[WeightMatrix],
    scales: Mapping[str, Tensor],
    *,
    tsc_weight: float = 0.0,
    tsc_a: float = 1.0,
    cnc_weight: float = 0.0,
    cnc_ridge: float = 1e-3,
) -> dict[str, Tensor]:
    """
    The weighted constraints of a step: {"tsc_loss", "cnc_loss"}, each only if its weight is positive.

    Args:
        weights (`Sequence[WeightMatrix]`): all that CNC looks at; TSC takes those that have a scale.
        scales (`Mapping[str, Tensor]`): from `weight_scales`, taken before training.
    """
    terms = {}
    if tsc_weight > 0:
        prunable = [record for record in weights if record.name in scales]
        terms["tsc_loss"] = tsc_weight * transformed_sparse_constraint(prunable, scales, tsc_a)
    if cnc_weight > 0:
        terms["cnc_loss"] = cnc_weight * condition_number_penalty(weights, cnc_ridge)
    return terms
