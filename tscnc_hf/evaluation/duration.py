"""How long an evaluation will take at most, told before it starts: one batch is timed, the rest is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tscnc_hf.evaluation.attacks import Attack
from tscnc_hf.evaluation.measures.masking import QUERIES
from tscnc_hf.method.adversarial.attack_losses import cross_entropy, pixel_gradient
from tscnc_hf.method.adversarial.pixels import LogitsFn


CHECK_STEPS = 10 + 50 + 10 + 10 + 50  # gradients an image of the masking checks
RADII, CURVE_STEPS, LIPSCHITZ_STEPS, EXAMPLES = 6, 20, 10, 8


def passes(attack: Attack) -> tuple[int, int]:
    """(gradients, forwards) an image, of one that withstands all of it, in its precision: others cost less."""
    given = attack.parameters
    if attack.run is None:
        return 0, 1
    targets = 9  # of each image, in the targeted attacks of autoattack
    rounds = {"apgd-ce": 1, "apgd-t": targets, "fab-t": targets, "square": 0}
    gradients = given.get("steps", 0) * given.get("restarts", 1)
    if "attacks" in given:
        gradients = given["steps"] * sum(rounds[part] for part in given["attacks"])
    return gradients, given.get("queries", 0) + given.get("restarts", 1)


def timed(forward: LogitsFn, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Seconds an image of a gradient with respect to the pixels, and of a forward."""

    def seconds(function: Callable[[], object]) -> float:
        begin = time.perf_counter()
        function()
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        return (time.perf_counter() - begin) / len(x)

    def once() -> None:
        with torch.no_grad():
            forward(x)

    once()  # what is set up the first time is not what the others take
    return seconds(lambda: pixel_gradient(forward, lambda logits: cross_entropy(logits, y), x)), seconds(once)


def estimate(
    attacks: list[Attack], n: int, gradient: float, forward: float, *, few: int, checked: int, lipschitz: bool
) -> dict[str, float]:
    """
    Seconds: {"attacks", "checks", "curve", "lipschitz", "examples"}, those but for the first of what comes on top.

    Args:
        n, few, checked: images of the attacks, of curve and Lipschitz bounds, of the masking checks.
        gradient, forward: seconds an image (`timed`).
    """
    counts = [passes(attack) for attack in attacks]
    found = {"attacks": n * sum(gradient * steps + forward * queries for steps, queries in counts)}
    if all(attack.run is None for attack in attacks):
        return found
    found["checks"] = checked * (gradient * CHECK_STEPS + forward * QUERIES)
    found["curve"] = few * RADII * CURVE_STEPS * gradient
    found["lipschitz"] = few * LIPSCHITZ_STEPS * gradient if lipschitz else 0.0
    found["examples"] = EXAMPLES * CURVE_STEPS * gradient + few * forward
    return found


def estimate_text(found: Mapping[str, float], full: bool) -> str:
    """The estimate for people, with how to leave out what comes on top."""
    own = found["attacks"]
    rest = {name: seconds for name, seconds in found.items() if name != "attacks"}
    if not full or not rest:
        return f"At most about {_spoken(own)}"
    parts = ", ".join(f"{name} {_spoken(seconds)}" for name, seconds in rest.items() if seconds > 0)
    total = own + sum(rest.values())
    return (
        f"At most about {_spoken(total)}: attacks {_spoken(own)}; {parts}. full=False (--full false) leaves out these"
    )


def _spoken(seconds: float) -> str:
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
