"""Auto-PGD (Croce and Hein 2020): PGD with momentum whose step size halves by itself where it stops to pay."""

from __future__ import annotations

import torch
from torch import Tensor

from tscnc_hf.method.adversarial.attack_losses import margin, pixel_gradient
from tscnc_hf.method.adversarial.ball import check_norm, l2_norm, per_image, project, steepest
from tscnc_hf.method.adversarial.noise import normal_like, uniform_like
from tscnc_hf.method.adversarial.pixels import LogitsFn


MOMENTUM = 0.75  # share of the gradient step in a move, from the second on
RHO = 0.75  # share of steps since the last checkpoint that must have raised the loss


def checkpoints(steps: int) -> list[int]:
    """The steps after which the step size may halve (section 3.2 of the paper), for a budget of `steps`."""
    first, shortest, shrink = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    marks, interval = [], first
    while (marks[-1] if marks else 0) + interval <= steps:
        marks.append((marks[-1] if marks else 0) + interval)
        interval = max(interval - shrink, shortest)
    return marks


def apgd(
    logits_fn: LogitsFn,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int = 100,
    norm: str = "linf",
    loss: str = "cross-entropy",
    early_stop: bool = True,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """
    APGD, untargeted. Arguments as in `pgd`, but:

    Args:
        steps (`int`): gradient steps, at least 1.
        loss (`str`): "cross-entropy" (APGD-CE), "dlr" (APGD-DLR) or "cw".
        start (`Tensor`, *optional*): pixels to start from, projected; by default on the surface of the ball.

    Returns:
        `Tensor`: per image the last iterate that was misclassified or, if none was, the one of the largest loss;
        within epsilon of x and within [0, 1].

    Raises:
        ValueError: unknown norm or loss, steps below 1.
    """
    check_norm(norm)
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one is needed")
    value_of = margin(loss)
    begin = project(_surface(x, epsilon, norm, generator) if start is None else start, x, epsilon, norm)
    # `state` holds what belongs to the images that are still attacked
    result, broken = begin.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    gradient, value, logits = pixel_gradient(logits_fn, lambda z: value_of(z, y), begin)
    wrong = logits.argmax(-1) != y
    state = {
        "index": torch.arange(len(x), device=x.device), "x": x, "y": y, "now": begin, "before": begin,
        "gradient": gradient, "value": value, "best": begin, "best_gradient": gradient, "best_value": value,
        "step": torch.full_like(value, 2 * epsilon), "rises": torch.zeros_like(value),
        "halved": torch.ones_like(wrong), "best_at_mark": value,
    }  # fmt: skip
    broken |= wrong
    state = _without(state, wrong) if early_stop else state
    marks, last_mark = set(checkpoints(steps)), 0
    for step in range(1, steps + 1):
        if len(state["index"]) == 0:
            break
        s = state
        ahead = s["now"] + per_image(s["step"], x) * steepest(s["gradient"], norm)
        moved = project(ahead, s["x"], epsilon, norm)
        if step > 1:
            moved = s["now"] + MOMENTUM * (moved - s["now"]) + (1 - MOMENTUM) * (s["now"] - s["before"])
            moved = project(moved, s["x"], epsilon, norm)
        labels = s["y"]
        gradient, value, logits = pixel_gradient(logits_fn, lambda z, labels=labels: value_of(z, labels), moved)
        wrong = logits.argmax(-1) != labels
        s["rises"] = s["rises"] + (value > s["value"])
        s |= {"before": s["now"], "now": moved, "gradient": gradient, "value": value}
        better = value > s["best_value"]
        for name, new in (("best", moved), ("best_gradient", gradient), ("best_value", value)):
            s[name] = torch.where(per_image(better, new), new, s[name])
        hit = s["index"][wrong]
        result[hit], broken[hit] = moved[wrong], True
        rest = s["index"][~broken[s["index"]]]
        result[rest] = s["best"][~broken[s["index"]]]
        if step in marks:
            _halve(s, step - last_mark)
            last_mark = step
        state = _without(s, wrong) if early_stop else s
    return result


def _surface(x: Tensor, epsilon: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """A random point on the ball's surface."""
    if norm == "linf":
        noise = 2 * uniform_like(x, generator) - 1
        length = noise.flatten(1).abs().amax(1)
    else:
        noise = normal_like(x, generator)
        length = l2_norm(noise)
    return x + epsilon * noise / per_image(length.clamp_(min=torch.finfo(x.dtype).tiny), x)


def _halve(state: dict[str, Tensor], interval: int) -> None:
    """Halve the step and go back to the best point where the loss rose too seldom, or nothing has improved."""
    seldom = state["rises"] <= RHO * interval
    stuck = ~state["halved"] & (state["best_at_mark"] >= state["best_value"])
    halve = seldom | stuck
    state["step"] = torch.where(halve, state["step"] / 2, state["step"])
    for now, best in (("now", "best"), ("gradient", "best_gradient")):
        state[now] = torch.where(per_image(halve, state[now]), state[best], state[now])
    state |= {"halved": halve, "best_at_mark": state["best_value"], "rises": torch.zeros_like(state["rises"])}


def _without(state: dict[str, Tensor], wrong: Tensor) -> dict[str, Tensor]:
    """Only the images that are not wrong yet."""
    return {name: value[~wrong] for name, value in state.items()} if wrong.any() else state
