"""Attacks that search in less than float32: quick on a GPU, and what they find is believed only by float32 itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tscnc_hf.method.adversarial.pixels import LogitsFn


PRECISIONS = ("float32", "tf32", "bf16")
SLACK = {"tf32": 2.0**-9, "bf16": 2.0**-6}  # of the largest logit: by how much the same image's may differ in a batch


def check_precision(precision: str, device: torch.device) -> None:
    """ValueError unless attacks can search in this precision on this device."""
    if precision not in PRECISIONS:
        raise ValueError(f"attack_precision={precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    if precision != "tf32":
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            "attack_precision='tf32' needs an NVIDIA GPU of compute capability 8.0 or more, and attacks are to run "
            f"on {device}, which has no TF32: leave it out, or use attack_precision='bf16'"
        )


@contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """
    Inside, a GPU multiplies float32 matrices and convolves in TF32 ("tf32") or in float32 itself (any other), whatever
    it does outside: by default torch lets it convolve in TF32.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def lowered(forward: LogitsFn, precision: str) -> LogitsFn:
    """The same function of pixels as an attack of this precision calls it, inside of `multiplying`."""
    if precision != "bf16":
        return forward

    def low(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return forward(x)

    return low


def searching(run: Callable[..., Tensor], precision: str) -> Callable[..., Tensor]:
    """
    An attack, `(forward, x, y, index, seed) -> x_adv`, that searches in a precision. It leaves an image alone once it
    thinks it fooled: where `forward` itself is not, and so for an image so near to it that another batch might think
    so, the attack is run again, in float32. So each image that withstands has met all of the attack.
    """
    if precision == "float32":
        return run

    def attack(forward: LogitsFn, x: Tensor, y: Tensor, index: Tensor, seed: int) -> Tensor:
        with multiplying(precision):
            low = lowered(forward, precision)
            x_adv = run(low, x, y, index, seed)
            with torch.no_grad():
                logits = low(x_adv)
        with torch.no_grad():
            right = forward(x_adv).argmax(-1) == y
        again = right & ~(_lead(logits, y) > SLACK[precision] * logits.abs().amax(-1))  # also where it is NaN
        if again.any():
            x_adv = x_adv.clone()
            x_adv[again] = run(forward, x[again], y[again], index[again.to(index.device)], seed)
        return x_adv

    return attack


def _lead(logits: Tensor, y: Tensor) -> Tensor:
    """(b,) by how much the logit of the label is above the largest other one."""
    own = y[:, None]
    return (logits.gather(1, own) - logits.scatter(1, own, -torch.inf).amax(1, keepdim=True))[:, 0]
