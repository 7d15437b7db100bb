"""
What makes a weight worth keeping: criteria by name, and the way to add one.

A criterion is a function `(matrices, gradients) -> scores`: the prunable weights as `WeightMatrix` records (their
`.weight` whole, float32, with the values that pruned weights would have), and for each name what `gradients` is
registered as, or None. It returns, for each name, scores of the weight's shape; larger = more important.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tscnc_hf.method.matrices import WeightMatrix


Gradients = Mapping[str, Tensor] | None
Criterion = Callable[[Sequence[WeightMatrix], Gradients], Mapping[str, Tensor]]

GATHERED = (None, "mean", "movement")  # what training gathers for a criterion, see `register_criterion`


@dataclass(frozen=True)
class RegisteredCriterion:
    """A criterion and what it needs: `gathers` is one of `GATHERED`, `learned` says that w becomes a score."""

    score: Criterion
    gathers: str | None = None
    learned: bool = False


def register_criterion(name: str, criterion: Criterion, gradients: str | None = None) -> None:
    """
    Let `pruning_criterion=name` use a function of your own.

    Args:
        name (`str`): free, or a name to replace.
        criterion (`Callable`): see the module's docstring.
        gradients (`str`, *optional*): what to gather of the whole loss's gradient g in each step: "mean" (of g, since
            the masks were last chosen) or "movement" (the sum of -g w since pruning began). Otherwise it gets None.

    Raises:
        ValueError: unknown `gradients`.
    """
    if gradients not in GATHERED:
        raise ValueError(f"gradients={gradients!r} is unknown; use None, 'mean' or 'movement'")
    _CRITERIA[name] = RegisteredCriterion(criterion, gradients)


def find_criterion(name: str) -> RegisteredCriterion:
    """ValueError, with the names that exist, when there is no such criterion."""
    if name not in _CRITERIA:
        raise ValueError(
            f"pruning_criterion={name!r} is unknown; use one of {', '.join(_CRITERIA)}, or register_criterion(...)"
        )
    return _CRITERIA[name]


def gate_probability(matrices: Sequence[WeightMatrix], gradients: Gradients = None) -> dict[str, Tensor]:
    """
    |w| P(z != 0), in units of the layer's root mean square, with z the hard-concrete gate of the input channel that w
    reads; 1 where a layer has no gate. ValueError when no layer has one.
    """
    scores = {record.name: _scaled(record.weight) for record in matrices}
    gates = {record.name: record.module._modules.get("gate") for record in matrices}
    if not any(gate is not None for gate in gates.values()):
        raise ValueError("pruning_criterion='gates' needs gates: train with tsc_on='gates', or attach_gates(model)")
    for record in matrices:
        gate = gates[record.name]
        if gate is not None:
            channels = gate.open_probability().detach().repeat_interleave(gate.channels)
            scores[record.name] = scores[record.name] * channels.view(1, -1, *[1] * (record.weight.ndim - 2))
    return scores


def initial_scores(record: WeightMatrix) -> Tensor:
    """
    Scores to begin learning with: w / max|w| * sqrt(6 / fan_in) ("scaled initialisation" of HYDRA, Sehwag et al.
    2020), so that the first choice is magnitude within each layer.
    """
    fan_in = record.view(torch.empty(record.weight.shape, device="meta")).shape[-1]
    return record.weight * ((6 / fan_in) ** 0.5 / record.weight.abs().max().clamp(min=1e-12))


def _scaled(weight: Tensor) -> Tensor:
    return weight.abs() / weight.square().mean().sqrt().clamp(min=1e-12)


def lamp(matrices: Sequence[WeightMatrix], gradients: Gradients = None) -> dict[str, Tensor]:
    """
    w^2 over the sum of squares of all weights of the same layer that are no smaller, itself among them, in [0, 1]
    (LAMP, Lee, Park, Mo, Ahn and Shin 2021, arXiv 2010.07611). A layer's best weight has 1, and what is
    left of a layer ranks the higher the less is left, so that no layer starves.
    """
    scores = {}
    for record in matrices:
        squares, order = record.weight.flatten().square().sort(stable=True)
        no_smaller = squares.flip(0).cumsum(0, dtype=_widest(squares)).flip(0)
        score = torch.empty_like(squares)
        score[order] = (squares / no_smaller.clamp(min=torch.finfo(squares.dtype).tiny)).to(squares.dtype)
        scores[record.name] = score.view(record.weight.shape)
    return scores


def _widest(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.device.type == "mps" else torch.float64  # which Apple's GPUs do not have


def _each(score: Callable[[Tensor, Tensor | None], Tensor]) -> Criterion:
    """A criterion that looks at one weight w at a time, and what was gathered for it, g."""
    return lambda matrices, gradients: {r.name: score(r.weight, gradients and gradients[r.name]) for r in matrices}


_CRITERIA = {
    "magnitude": RegisteredCriterion(_each(lambda w, g: w.abs())),
    # in units of its layer's root mean square: layers of small weights are not emptied first
    "scaled-magnitude": RegisteredCriterion(_each(lambda w, g: _scaled(w))),
    "lamp": RegisteredCriterion(lamp),
    # what the loss would change by if w were zero, to first order (Molchanov et al. 2019). At the start of training,
    # and at once (pruning_schedule "one-shot"), this is SNIP (Lee, Ajanthan and Torr 2019).
    "taylor": RegisteredCriterion(_each(lambda w, g: (w * g).abs()), "mean"),
    # weights that training moves away from zero (Sanh, Wolf and Rush 2020). May be negative.
    "movement": RegisteredCriterion(_each(lambda w, g: g), "movement"),
    "gates": RegisteredCriterion(gate_probability),
    # the records that it is given hold the learned scores in place of the weights
    "learned": RegisteredCriterion(_each(lambda w, g: w.abs()), learned=True),
}
