"""
Does a model resist attacks, or only hide its gradients (Athalye, Carlini and Wagner 2018; Carlini et al. 2019)?

Seven checks on a few images. An honest model passes all of them; a model that fails one may be weaker than its
figures. They take about as long as PGD-20 on ten times as many images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from tscnc_hf.evaluation.attacks import pgd_step_size, starts
from tscnc_hf.evaluation.state import EvaluationState
from tscnc_hf.method.adversarial.attack_losses import cross_entropy, pixel_gradient
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
        checks: in a fixed order; none were run where n is 0.
        looked_at: images, n of them right.
    """

    n: int
    checks: tuple[MaskingCheck, ...]
    looked_at: int

    @property
    def suspicious(self) -> bool | None:
        """Whether a check failed; None where none was run."""
        return not all(check.passed for check in self.checks) if self.checks else None

    def to_dict(self) -> dict:
        checks = [asdict(check) for check in self.checks]
        return {"n": self.n, "looked_at": self.looked_at, "suspicious": self.suspicious, "checks": checks}


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
    parts: int = 1,
) -> MaskingReport:
    """
    Run the checks on the images that the model classifies correctly.

    Args:
        logits_fn (`Callable`): pixels (b, c, h, w) in [0, 1] -> logits (b, k), the model in evaluation mode.
        x, y (`Tensor`): images and labels; 64 are enough to see what matters.
        epsilon (`float`): radius in pixel units, > 0.
        norm (`str`): "linf" or "l2".
        dense_fn (`Callable`, *optional*): of the model before pruning, for the transfer check.
        share (`Callable`, *optional*): as `EvaluationState.share`; by default all is computed here, and not kept.
        parts (`int`): among so many processes, each with a part of the images.

    Differences count from two standard errors of a difference between two attacks on the same images on, at least two
    images.
    """
    share = EvaluationState().share if share is None else share

    def classified() -> list[int]:
        with torch.no_grad():
            return (logits_fn(x).argmax(-1) == y).int().tolist()

    right = torch.tensor(share({"classified": classified})["classified"], device=y.device) == 1
    looked_at = len(y)
    x, y, index = x[right], y[right], right.nonzero().flatten().cpu()
    n = len(y)
    if n == 0:
        return MaskingReport(0, (), looked_at)

    def held(x_adv: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            return logits_fn(x_adv).argmax(-1) == y[part]

    def attacked(
        part: slice, steps: int, key: str, radius: float = epsilon, loss: str = "cross-entropy", fn=logits_fn
    ) -> Tensor:
        start = starts(x[part], index[part], radius, norm, seed, "masking", key)
        options = {"epsilon": radius, "steps": steps, "step_size": pgd_step_size(radius, steps), "norm": norm}
        x_adv = pgd(fn, x[part], y[part], loss=loss, start=start, early_stop=fn is logits_fn, **options)
        return held(x_adv, part)

    def broken_box(part: slice) -> Tensor:
        options = {"epsilon": epsilon, "norm": norm, "queries": QUERIES, "key": (seed, "masking")}
        return held(square(logits_fn, x[part], y[part], index=index[part], **options), part)

    def slack(one: float, other: float) -> float:
        p = (one + other) / 2
        return max(2 / n, 2 * math.sqrt(2 * p * (1 - p) / n))

    # any image can become uniform grey, and what the model answers there is right for the images of one class only
    whole = 0.5 if norm == "linf" else 0.5 * math.sqrt(x[0].numel())
    one_class = y.bincount().max().item() / n
    measured = {
        "few": partial(attacked, steps=10, key="a"),
        "many": partial(attacked, steps=50, key="a"),
        "again": partial(attacked, steps=10, key="b"),
        "margin": partial(attacked, steps=10, key="a", loss="cw"),
        "huge": partial(attacked, steps=50, key="a", radius=whole),
        "square": broken_box,
        "zero": lambda part: _zero_gradients(logits_fn, x[part], y[part]),
        "unsteady": lambda part: _unsteady(logits_fn, x[part]),
        **({} if dense_fn is None else {"transfer": partial(attacked, steps=50, key="a", fn=dense_fn)}),
    }
    size = math.ceil(n / parts)
    slices = [slice(first, min(first + size, n)) for first in range(0, n, size)]
    pieces = {
        f"{name}-{part.start}-{part.stop}": lambda of=of, part=part: int(of(part).sum())
        for name, of in measured.items()
        for part in slices
    }
    counts = share(pieces)
    found = {name: sum(counts[f"{name}-{part.start}-{part.stop}"] for part in slices) / n for name in measured}
    few, again, many, margin = (found[name] for name in ("few", "again", "many", "margin"))
    huge, black_box, zero, unsteady = (found[name] for name in ("huge", "square", "zero", "unsteady"))
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
            "black box", "is an attack without gradients weaker?", black_box >= many - slack(black_box, many),
            {"PGD-50": many, f"Square, {QUERIES} queries": black_box},
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
    return MaskingReport(n, tuple(checks), looked_at)


def _zero_gradients(logits_fn: LogitsFn, x: Tensor, y: Tensor) -> Tensor:
    """Images at which the cross-entropy has no gradient in any pixel."""
    gradient, _, _ = pixel_gradient(logits_fn, lambda logits: cross_entropy(logits, y), x)
    return gradient.flatten(1).abs().amax(1) == 0


@torch.no_grad()
def _unsteady(logits_fn: LogitsFn, x: Tensor) -> Tensor:
    """Images whose logits differ between two passes by more than rounding does."""
    first, second = logits_fn(x), logits_fn(x)
    return ((first - second).abs() > 1e-3 * (1 + first.abs())).any(-1)
