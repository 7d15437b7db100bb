"""A security curve: accuracy over the radius of the attack."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from torch import nn
from torch.utils.data import Subset

from tscnc_hf.evaluation.measures.robustness import evaluate_robustness
from tscnc_hf.evaluation.measures.robustness_report import AttackResult
from tscnc_hf.evaluation.state import EvaluationState
from tscnc_hf.evaluation.subset import drawn
from tscnc_hf.method.adversarial.pixels import pixel_quantity
from tscnc_hf.method.numbers import whole_number


MULTIPLES = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)  # of the radius that a model was trained for


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy at one radius (pixel units), and its 95 % Wilson interval [low, high] (fractions)."""

    epsilon: float
    accuracy: float
    low: float
    high: float
    correct: int


@dataclass(frozen=True)
class SecurityCurve:
    """
    Attributes:
        norm, attack: what was run, at each radius with the parameters that `make_attack` gives it there.
        n: images.
        points: from the clean accuracy (epsilon 0) upwards; never rising, because the balls contain each other.
    """

    norm: str
    attack: str
    n: int
    points: tuple[CurvePoint, ...]

    def to_dict(self) -> dict:
        return asdict(self) | {"points": [asdict(point) for point in self.points]}

    def to_markdown(self) -> str:
        lines = [f"| epsilon ({self.norm}) | {self.attack} | 95 % interval |", "| ---: | ---: | ---: |"]
        for point in self.points:
            shown = f"{point.epsilon:.4g} ({255 * point.epsilon:.3g}/255)"
            lines.append(f"| {shown} | {point.accuracy:.1%} | {point.low:.1%} to {point.high:.1%} |")
        return "\n".join(lines)


def default_epsilons(epsilon: float, norm: str) -> tuple[float, ...]:
    """Radii around the one of interest: a quarter of it to four times it, for L-infinity at most 1."""
    radii = [multiple * epsilon for multiple in MULTIPLES]
    return tuple(radius for radius in radii if norm != "linf" or radius <= 1)


def security_curve(
    model: nn.Module,
    dataset: Iterable,
    epsilons: Sequence[float | str],
    *,
    attack: str = "pgd-20",
    norm: str = "linf",
    n: int = 256,
    seed: int = 0,
    batch_size: int = 128,
    processing_class: object | None = None,
    state: EvaluationState | None = None,
) -> SecurityCurve:
    """
    Accuracy under one attack at several radii.

    An image that falls at one radius counts as fallen at every larger one and is not attacked again.

    Args:
        epsilons (`Sequence`): radii in pixel units; sorted, 0 (clean images) is always there.
        attack (`str`): see `make_attack`; "clean" has no curve.
        n (`int`): as many images, drawn with the seed, or all where there are fewer.
        state (*optional*): where each radius is kept, and which processes share its images.

    Everything else, and what is raised, as in `evaluate_robustness`.
    """
    if attack == "clean":
        raise ValueError("attack='clean' has no radius; use an attack such as 'pgd-20'")
    if isinstance(epsilons, str):
        raise ValueError(f"epsilons={epsilons!r} is one radius: give a list of them, such as [{epsilons!r}]")
    n, batch_size = whole_number("n", n, 1), whole_number("batch_size", batch_size, 1)
    radii = sorted({pixel_quantity("epsilon", epsilon, norm) for epsilon in epsilons} - {0.0})
    left = sorted(drawn(len(dataset), n, seed))
    count, points = len(left), []
    state = EvaluationState() if state is None else state
    options = {"seed": seed, "processing_class": processing_class, "norm": norm, "distributed": state.world > 1}

    def survivors(name: str, epsilon: float, left: list[int]) -> list[int]:
        size = min(batch_size, math.ceil(len(left) / state.world)) or batch_size
        images, how = Subset(dataset, left), options | {"masking": False, "progress": False, "batch_size": size}
        found = evaluate_robustness(model, images, (name,), epsilon=epsilon, **how).survived[name]
        return [index for index, survived in zip(left, found, strict=True) if survived]

    for epsilon in (0.0, *radii):
        if left or not points:  # without a single image it is for evaluate_robustness to say so
            name = "clean" if epsilon == 0 else attack
            doing = f"Attacking at {len(radii)} radii"
            left = state.together(f"curve-{epsilon:.6g}", partial(survivors, name, epsilon, left), doing)
        result = AttackResult.count(attack, len(left), count)
        points.append(CurvePoint(epsilon, result.accuracy, result.low, result.high, result.correct))
    return SecurityCurve(norm, attack, count, tuple(points))
