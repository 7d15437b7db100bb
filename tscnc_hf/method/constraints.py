"""
The two differentiable terms of TSCNC (Feng, Lin, Gao, Wei, arXiv 2503.20454, for the idea).

The closed forms used here (scale-invariant CNC, TSC on weights scaled by their layer) are ours; see the docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from tscnc_hf.method.matrices import WeightMatrix, full_tensor


# Entries of a matrix up to which stacking pays on a CPU: 1.5 to 3 times for the small ViTs of the recipes.
STACK_LIMIT = 2**17
CNC_FORMS = ("scale-invariant", "reference")
BLOCK_ROWS = 128  # of a Gram matrix on a CPU: smaller blocks make slower products
FLOAT32_ERROR = 4 * torch.finfo(torch.float32).eps  # of a Gram matrix of size n, n times: a smaller ridge drowns in it
SMALLEST = 1e-15  # root mean square singular value; below it float32 cannot hold the Gram matrix: taken for zero
REFERENCE_RIDGE = 1e-12


def transformed_l1(t: Tensor, a: float) -> Tensor:
    """
    Transformed l1, `rho_a(t) = (a + 1)|t| / (a + |t|)` (Zhang and Xin 2014; Ma et al. 2019).

    Args:
        t (`Tensor`): any shape, floating.
        a (`float`): shape, > 0; towards 0 it counts non-zeros (l0), towards infinity it is `|t|` (l1).

    Returns:
        `Tensor`: same shape and dtype as `t`, in [0, a + 1); zero gradient at t = 0.
    """
    magnitude = t.abs()
    return (_positive(a) + 1) * magnitude / (a + magnitude)


def _positive(a: float) -> float:
    if not a > 0:
        raise ValueError(f"a={a}: the shape of transformed l1 must be positive")
    return float(a)


def weight_scales(weights: Iterable[WeightMatrix]) -> dict[str, Tensor]:
    """
    Root mean square of each weight, over what is not zero, float32 scalars by name; 1 where all is (ours: one `a` for
    all layers, dense or sparse).
    """
    scales = {}
    for record in weights:
        weight = full_tensor(record.weight).detach().float()
        rms = (weight.pow(2).mean() * (weight.numel() / weight.count_nonzero().clamp(min=1))).sqrt()
        scales[record.name] = torch.where(rms > 0, rms, torch.ones_like(rms))
    return scales


class _TransformedL1Sum(torch.autograd.Function):
    """
    Sum of rho_a(w / s) = (a + 1)|w| / (a s + |w|) with its gradient (a + 1) a s sign(w) / (a s + |w|)^2: half the
    passes over memory that autograd takes, and a third of its memory.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, scale: Tensor, a: float) -> Tensor:
        magnitude = _at_least_float32(weight).abs()
        scale = scale.to(magnitude.dtype)
        inverse = magnitude.add(a * scale).reciprocal_()
        ctx.save_for_backward(weight, inverse, scale)
        ctx.a = a
        return (a + 1) * magnitude.mul_(inverse).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        weight, inverse, scale = ctx.saved_tensors
        slope = grad * ((ctx.a + 1) * ctx.a * scale)
        gradient = inverse.square().mul_(slope).mul_(weight.sign())
        return _as_dtype(gradient, weight.dtype), None, None


def transformed_sparse_constraint(weights: Iterable[WeightMatrix], scales: Mapping[str, Tensor], a: float) -> Tensor:
    """
    TSC on weights: sum over all weights of rho_a(w / s), s the layer's own scale (ours).

    Args:
        weights (`Iterable[WeightMatrix]`): floating, any dtype; computed in float32 at least, whatever autocast says.
        scales (`Mapping[str, Tensor]`): s > 0 by name, from `weight_scales`.
        a (`float`): shape, > 0, see `transformed_l1`.

    Returns:
        `Tensor`: float32 scalar (float64 for float64 weights), between 0 and (a + 1) times the number of weights.
    """
    a, terms = _positive(a), []
    for record in weights:
        weight = full_tensor(record.weight)
        with torch.autocast(weight.device.type, enabled=False):
            terms.append(_TransformedL1Sum.apply(weight, scales[record.name].to(weight.device), a))
    return torch.stack(terms).sum()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _as_dtype(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, never to infinity: the gradient with respect to a tiny fp16 matrix is beyond what fp16 can hold."""
    if gradient.dtype == dtype:
        return gradient
    largest = torch.finfo(dtype).max
    return gradient.clamp_(-largest, largest).to(dtype)


def _lower_gram(matrix: Tensor) -> Tensor:
    """
    M M^T of (..., n, m) with anything above the diagonal: Cholesky reads the lower triangle only. In blocks of
    rows on a CPU, which saves up to 3/8 of the arithmetic; one call elsewhere.
    """
    n = matrix.shape[-2]
    blocks = min(4, n // BLOCK_ROWS) if matrix.device.type == "cpu" else 1
    if blocks < 2:
        return matrix @ matrix.mT
    gram, edges = matrix.new_zeros(*matrix.shape[:-1], n), [n * index // blocks for index in range(blocks + 1)]
    for start, end in zip(edges, edges[1:], strict=False):
        gram[..., start:end, :end] = matrix[..., start:end, :] @ matrix[..., :end, :].mT
    return gram


class _LogMeanRatio(torch.autograd.Function):
    """
    cnc(M) with its gradient in closed form: with A = G/t + rho I, S = A^-1 and t = tr(G)/n,
    d cnc / d M = -2/(n t) (S - (1 - rho tr(S)/n) I) M, so one Cholesky factor serves value and gradient. All scaling
    is done on n x n matrices: M is read once for G, once for the gradient.
    """

    @staticmethod
    def forward(ctx, matrix: Tensor, ridge: float) -> Tensor:
        n = matrix.shape[-2]
        # float32's Cholesky of a rank-deficient Gram matrix may fail otherwise
        exact = matrix.double() if ridge < FLOAT32_ERROR * n else _at_least_float32(matrix)
        gram = _lower_gram(exact)
        mean_square = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        mean_square = torch.where(mean_square > SMALLEST**2, mean_square, torch.ones_like(mean_square))
        eye = torch.eye(n, dtype=exact.dtype, device=exact.device)
        factor, _ = torch.linalg.cholesky_ex(gram / mean_square + ridge * eye)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        ctx.save_for_backward(matrix, factor, mean_square)
        ctx.ridge = ridge
        value = math.log1p(ridge) - log_det / n
        return value if matrix.dtype == torch.float64 else value.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        matrix, factor, mean_square = ctx.saved_tensors
        n = matrix.shape[-2]
        inverse = torch.cholesky_inverse(factor)
        trace = inverse.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None]
        inverse.diagonal(dim1=-2, dim2=-1).sub_(1 - ctx.ridge * trace / n)
        inverse.mul_(grad[..., None, None] * (-2 / n) / mean_square)
        return _as_dtype(inverse @ matrix.to(inverse.dtype), matrix.dtype), None


def condition_number_constraint(matrix: Tensor, ridge: float = 1e-3) -> Tensor:
    """
    CNC, scale-invariant (the closed form is ours): the log of the ratio of the arithmetic to the
    geometric mean of the squared singular values,

        cnc(M) = log(tr(G)/n) - (1/n) log det(G),    G the Gram matrix of the smaller side, n its size,

    computed as log(1 + rho) - (1/n) log det(G / (tr(G)/n) + rho I), which stays finite for rank-deficient matrices.
    Zero iff all singular values are equal; unchanged when M is scaled; log kappa < log 2 + (n/2) cnc (Guggenheimer,
    Edelman and Johnson 1995, for rho = 0).

    Args:
        matrix (`Tensor`): (..., r, c), floating; half precision is computed in float32. Entries up to 1e15 in size; a
            matrix whose root mean square singular value is below 1e-15 counts as zero.
        ridge (`float`, *optional*, defaults to 1e-3): rho > 0, relative to the mean squared singular value.

    Returns:
        `Tensor`: (...), float32 (float64 for float64 input), in [0, log((1 + rho)/rho)]. An all-zero matrix has the
        largest value and a zero gradient. First derivatives only.

    Raises:
        ValueError: fewer than two dimensions, an empty side, or ridge not positive.
    """
    wide = _wide(matrix)
    if not ridge > 0:
        raise ValueError(f"ridge={ridge} must be positive: without it a rank-deficient matrix has no finite value")
    with torch.autocast(matrix.device.type, enabled=False):
        return _LogMeanRatio.apply(wide, float(ridge))


def _wide(matrix: Tensor) -> Tensor:
    if matrix.ndim < 2 or 0 in matrix.shape[-2:]:
        raise ValueError(f"a matrix (..., r, c) with r, c >= 1 is needed, got shape {tuple(matrix.shape)}")
    return matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix


def reference_condition_number_constraint(matrix: Tensor) -> Tensor:
    """
    CNC as the first implementation of TSCNC has it: (log(det(G/n) + 1e-5))^2, G and n as above. For fidelity runs.

    It pulls the geometric mean of the squared singular values to n, so it fixes a scale too, and it is nearly flat
    where det(G/n) is far below 1e-5. Computed from a float64 log determinant. Where det(G/n) is below the range of
    float32 (a 100-class head at initialisation: e^-400), the formula is the constant 132.5 without a gradient; here it
    goes on as 132.5 - log det(G/n) + log(1.2e-38): continuous, with the gradient of -log det (ours).

    Takes, returns and raises what `condition_number_constraint` does; >= 0 and finite, at rank deficiency too.
    """
    with torch.autocast(matrix.device.type, enabled=False):
        wide = _wide(matrix).double()
        n = wide.shape[-2]
        gram = wide @ wide.mT / n
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].detach()
        ridge = REFERENCE_RIDGE * mean + torch.finfo(torch.float32).tiny  # so that rank deficiency stays finite
        factor, _ = torch.linalg.cholesky_ex(gram + ridge * torch.eye(n, dtype=gram.dtype, device=gram.device))
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        floor, lowest = log_det.new_tensor(1e-5).log(), math.log(torch.finfo(torch.float32).tiny)
        formula = torch.logaddexp(log_det.clamp(min=lowest), floor).square()
        value = formula + (lowest - log_det).clamp(min=0)
    return value if matrix.dtype == torch.float64 else value.float()


def condition_number_penalty(
    weights: Iterable[WeightMatrix], ridge: float = 1e-3, form: str = "scale-invariant"
) -> Tensor:
    """
    Sum of the constraint over all matrices of a model; one-row matrices (depthwise convolutions) are left out, their
    condition number is always 1.

    Args:
        weights (`Iterable[WeightMatrix]`): pruned weights count as the zeros that they are.
        ridge (`float`, *optional*, defaults to 1e-3): of the scale-invariant form.
        form (`str`, *optional*): "scale-invariant" (`condition_number_constraint`), or "reference"
            (`reference_condition_number_constraint`, over dense layers only, as there).

    Returns:
        `Tensor`: float32 scalar >= 0; 0 if no matrix has two rows and two columns.
    """
    if form not in CNC_FORMS:
        raise ValueError(f"form={form!r} is unknown; use one of {', '.join(CNC_FORMS)}")
    constraint = partial(condition_number_constraint, ridge=ridge)
    if form == "reference":
        constraint = reference_condition_number_constraint
        weights = [record for record in weights if record.weight.ndim == 2]
    groups: dict[tuple, list[Tensor]] = {}
    device = None
    for record in weights:
        matrices = record.matrices
        device = matrices.device
        if min(matrices.shape[-2:]) < 2:
            continue
        matrices = _wide(matrices)
        # Small matrices of one shape go together, the calls cost more than the arithmetic; on a GPU all do. Large ones
        # on a CPU cost more to copy than that saves.
        together = device.type != "cpu" or matrices[0].numel() <= STACK_LIMIT
        shape = (*matrices.shape[-2:], matrices.dtype)
        groups.setdefault(shape if together else (record.name,), []).append(matrices)
    terms = [constraint(torch.cat(group) if len(group) > 1 else group[0]).sum() for group in groups.values()]
    return torch.stack(terms).sum() if terms else torch.zeros((), device=device)


def constraint_terms(
    weights: Sequence[WeightMatrix],
    scales: Mapping[str, Tensor],
    *,
    tsc_weight: float = 0.0,
    tsc_a: float = 10.0,
    cnc_weight: float = 0.0,
    cnc_ridge: float = 1e-3,
    cnc_form: str = "scale-invariant",
) -> dict[str, Tensor]:
    """
    The weighted constraints of a step: {"tsc_loss", "cnc_loss"}, each only if its weight is positive and there are
    weights for it.

    Args:
        weights (`Sequence[WeightMatrix]`): all that CNC looks at; TSC takes those that have a scale.
        scales (`Mapping[str, Tensor]`): from `weight_scales`, taken before training.

    Raises:
        ValueError: a scale is of no weight.
    """
    terms = {}
    if tsc_weight > 0 and scales:
        prunable = [record for record in weights if record.name in scales]
        if len(prunable) < len(scales):
            lost = sorted(scales.keys() - {record.name for record in prunable})
            raise ValueError(f"TSC has a scale for {', '.join(lost)}, which is not among the weights: pass all")
        terms["tsc_loss"] = tsc_weight * transformed_sparse_constraint(prunable, scales, tsc_a)
    if cnc_weight > 0 and weights:
        terms["cnc_loss"] = cnc_weight * condition_number_penalty(weights, cnc_ridge, cnc_form)
    return terms
