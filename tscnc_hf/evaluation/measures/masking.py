"""
Does a model resist attacks, or only hide its gradients (Athalye, Carlini and Wagner 2018; Carlini et al. 2019)?

Seven checks on a few images. An honest model passes all of them; a model that fails one may be weaker than its
figures. They take about as long as PGD-20 on ten times as many images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tscnc_hf.evaluation.attacks import pgd_step_size, starts
from tscnc_hf.evaluation.state import EvaluationState
from tscnc_hf.method.adversarial.losses import cross_entropy, pixel_gradient
from tscnc_hf.method.adversarial.pgd import pgd
from tscnc_hf.method.adversarial.pixels import LogitsFn
from tscnc_hf.method.adversarial.square import square


QUERIES = 300
ZERO_SHARE = 0.1  # of images whose gradient may vanish: float32 rounds it away where a model is very sure


@dataclass(frozen=True)
class MaskingCheck:
    """One check: what was asked, whether the answer is the honest one, and the figures behind it (fractions)."""

    name: str
    question: str
    passed: bool
    figures: dict[str, float]


@dataclass(frozen=True)
class MaskingReport:
    """
    Attributes:
        n: images that were classified correctly, and attacked.
        checks: in a fixed order.
    """

    n: int
    checks: tuple[MaskingCheck, ...]

    @property
    def suspicious(self) -> bool:
        return not all(check.passed for check in self.checks)

    def to_dict(self) -> dict:
        return {"n": self.n, "suspicious": self.suspicious, "checks": [asdict(check) for check in self.checks]}


def masking_report(
    logits_fn: LogitsFn,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    norm: str = "linf",
    seed: int = 0,
    dense_fn: LogitsFn | None = None,
    share: Callable[[Mapping[str, Callable]], dict] | None = None,
) -> MaskingReport:
    """
    Run the checks on the images that the model classifies correctly.

    Args:
        logits_fn (`Callable`): pixels (b, c, h, w) in [0, 1] -> logits (b, k), the model in evaluation mode.
        x, y (`Tensor`): images and labels; 64 are enough to see what matters.
        epsilon (`float`): radius in pixel units, > 0.
        norm (`str`): "linf" or "l2".
        dense_fn (`Callable`, *optional*): of the model before pruning, for the transfer check.
        share (`Callable`): as `EvaluationState.share`; by default all is computed here, and not kept.

    Differences count from two standard errors of a difference between two attacks on the same images on, at least two
    images.
    """
    share = EvaluationState().share if share is None else share

    def classified() -> list[int]:
        with torch.no_grad():
            return (logits_fn(x).argmax(-1) == y).int().tolist()

    right = torch.tensor(share({"classified": classified})["classified"], device=y.device) == 1
    x, y, index = x[right], y[right], right.nonzero().flatten().cpu()
    n = len(y)
    if n == 0:
        return MaskingReport(0, ())

    def accuracy(x_adv: Tensor) -> float:
        with torch.no_grad():
            return (logits_fn(x_adv).argmax(-1) == y).double().mean().item()

    def attacked(steps: int, key: str, radius: float = epsilon, loss: str = "cross-entropy", fn=logits_fn) -> Tensor:
        start = starts(x, index, radius, norm, seed, "masking", key)
        options = {"epsilon": radius, "steps": steps, "step_size": pgd_step_size(radius, steps), "norm": norm}
        return pgd(fn, x, y, loss=loss, start=start, early_stop=fn is logits_fn, **options)

    def slack(one: float, other: float) -> float:
        p = (one + other) / 2
        return max(2 / n, 2 * math.sqrt(2 * p * (1 - p) / n))

    # any image can become uniform grey, and what the model answers there is right for the images of one class only
    whole = 0.5 if norm == "linf" else 0.5 * math.sqrt(x[0].numel())
    one_class = y.bincount().max().item() / n
    key = (seed, "masking")
    pieces = {  # those that take long first: processes take turns
        "square": lambda: accuracy(
            square(logits_fn, x, y, index=index, epsilon=epsilon, norm=norm, queries=QUERIES, key=key)
        ),
        "many": lambda: accuracy(attacked(50, "a")),
        "huge": lambda: accuracy(attacked(50, "a", radius=whole)),
        **({} if dense_fn is None else {"transfer": lambda: accuracy(attacked(50, "a", fn=dense_fn))}),
        "few": lambda: accuracy(attacked(10, "a")),
        "again": lambda: accuracy(attacked(10, "b")),
        "margin": lambda: accuracy(attacked(10, "a", loss="cw")),
        "zero": lambda: _zero_gradients(logits_fn, x, y),
        "unsteady": lambda: _unsteady(logits_fn, x),
    }
    found = share(pieces)
    few, again, many, margin = (found[name] for name in ("few", "again", "many", "margin"))
    huge, broken_box, zero, unsteady = (found[name] for name in ("huge", "square", "zero", "unsteady"))
    checks = [
        MaskingCheck("determinism", "does it answer the same twice?", unsteady == 0, {"images that differ": unsteady}),
        MaskingCheck("gradients", "has the loss a gradient?", zero <= ZERO_SHARE, {"images without": zero}),
        MaskingCheck(
            "steps", "do more steps break more?", many <= few + slack(many, few), {"PGD-10": few, "PGD-50": many}
        ),
        MaskingCheck(
            "restarts", "do restarts agree?", abs(few - again) <= slack(few, again), {"first": few, "second": again}
        ),
        MaskingCheck(
            "scale", "does the scale of the logits hide nothing?", margin >= many - slack(margin, many),
            {"PGD-50": many, "margin PGD-10": margin},
        ),
        MaskingCheck(
            "black box", "is an attack without gradients weaker?", broken_box >= many - slack(broken_box, many),
            {"PGD-50": many, f"Square, {QUERIES} queries": broken_box},
        ),
        MaskingCheck(
            "large epsilon", "does the largest ball break all but one class?",
            huge <= one_class + slack(huge, one_class),
            {f"PGD-50 at {whole:.3g}": huge, "images of one class": one_class},
        ),
    ]  # fmt: skip
    if dense_fn is not None:
        transfer = found["transfer"]
        checks.append(
            MaskingCheck(
                "transfer", "are the dense model's images weaker?", transfer >= many - slack(transfer, many),
                {"PGD-50": many, "from the dense model": transfer},
            )
        )  # fmt: skip
    return MaskingReport(n, tuple(checks))


def _zero_gradients(logits_fn: LogitsFn, x: Tensor, y: Tensor) -> float:
    """Share of images at which the cross-entropy has no gradient in any pixel."""
    gradient, _, _ = pixel_gradient(logits_fn, lambda logits: cross_entropy(logits, y), x)
    return (gradient.flatten(1).abs().amax(1) == 0).double().mean().item()


@torch.no_grad()
def _unsteady(logits_fn: LogitsFn, x: Tensor) -> float:
    """Share of images whose logits differ between two passes by more than rounding does."""
    first, second = logits_fn(x), logits_fn(x)
    return ((first - second).abs() > 1e-3 * (1 + first.abs())).any(-1).double().mean().item()
