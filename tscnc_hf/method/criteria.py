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

# what training gathers for a criterion, weight by weight; g is the gradient of the whole loss in a step
GATHERED = {
    None: "nothing",
    "mean": "the mean of g over the steps since the masks were last chosen",
    "movement": "the sum of -g w over all steps since pruning began",
}


@dataclass(frozen=True)
class RegisteredCriterion:
    """A criterion and what it needs: `gathers` is a key of `GATHERED`, `learned` says that w becomes a score."""

    score: Criterion
    gathers: str | None = None
    learned: bool = False


_CRITERIA: dict[str, RegisteredCriterion] = {}


def register_criterion(name: str, criterion: Criterion, gradients: str | None = None) -> None:
    """
    Let `pruning_criterion=name` use a function of your own.

    Args:
        name (`str`): free, or a name to replace.
        criterion (`Callable`): see the module's docstring.
        gradients (`str`, *optional*): "mean" (of the gradient since the masks were last chosen) or "movement" (the sum
            of -gradient * weight since pruning began); without it the criterion gets None.

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


def magnitude(matrices: Sequence[WeightMatrix], gradients: Gradients = None) -> dict[str, Tensor]:
    """|w|."""
    return {record.name: record.weight.abs() for record in matrices}


def scaled_magnitude(matrices: Sequence[WeightMatrix], gradients: Gradients = None) -> dict[str, Tensor]:
    """|w| in units of its layer's root mean square: layers of small weights are not emptied first."""
    return {record.name: record.weight.abs() / _scale(record.weight) for record in matrices}


def taylor(matrices: Sequence[WeightMatrix], gradients: Gradients = None) -> dict[str, Tensor]:
    """
    |w g|, what the loss would change by if w were zero, to first order (Molchanov et al. 2019). At the start of
    training and at once (pruning_schedule "one-shot") this is SNIP (Lee, Ajanthan and Torr 2019).
    """
    return {record.name: (record.weight * gradients[record.name]).abs() for record in matrices}


def movement(matrices: Sequence[WeightMatrix], gradients: Gradients = None) -> dict[str, Tensor]:
    """Sum of -g w: weights that training moves away from zero (Sanh, Wolf and Rush 2020). May be negative."""
    return dict(gradients)


def gate_probability(matrices: Sequence[WeightMatrix], gradients: Gradients = None) -> dict[str, Tensor]:
    """
    |w| P(z != 0), in units of the layer's root mean square, with z the hard-concrete gate of the input channel that w
    reads; 1 where a layer has no gate. ValueError when no layer has one.
    """
    scores = scaled_magnitude(matrices)
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


def _scale(weight: Tensor) -> Tensor:
    return weight.square().mean().sqrt().clamp(min=1e-12)


register_criterion("magnitude", magnitude)
register_criterion("scaled-magnitude", scaled_magnitude)
register_criterion("taylor", taylor, gradients="mean")
register_criterion("movement", movement, gradients="movement")
register_criterion("gates", gate_probability)
# the records that it is given hold the learned scores in place of the weights
_CRITERIA["learned"] = RegisteredCriterion(magnitude, learned=True)
