"""Square Attack (Andriushchenko et al. 2020): random search with squares of one colour, which needs no gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tscnc_hf.method.adversarial.attack_losses import cw_margin
from tscnc_hf.method.adversarial.ball import per_image, project
from tscnc_hf.method.adversarial.pgd import seeded_generator
from tscnc_hf.method.adversarial.pixels import LogitsFn


# Part of the queries after which the side of the squares halves its area (section 3.2 of the paper, for 10,000).
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
FIRST_SHARE = 0.8  # of the image that the first squares cover


def square(
    logits_fn: LogitsFn,
    x: Tensor,
    y: Tensor,
    *,
    index: Tensor,
    epsilon: float,
    norm: str = "linf",
    queries: int = 300,
    key: tuple = (0,),
) -> Tensor:
    """
    Random search on the margin, image by image: a proposal is kept if it lowers the distance to a wrong answer.

    The L-infinity form follows the paper (stripes at first, then squares of epsilon in a random sign for each
    channel); in L2 the same proposals are projected on the ball, which is weaker than the paper's own L2 form.

    Arguments and result as in `pgd`, but:

    Args:
        index (`Tensor`): (b,), int64; `index` and `key` seed each image's own generator.
        queries (`int`): forward passes of an image, at least 1; broken images are not asked about again.
    """
    generators = [seeded_generator("cpu", *key, "square", place) for place in index.tolist()]
    _, channels, height, width = x.shape
    amplitude = epsilon if norm == "linf" else epsilon / math.sqrt(channels * height * width)
    stripes = torch.stack([_signs((channels, 1, width), g) for g in generators]).to(x)
    best = project(x + amplitude * stripes.expand_as(x), x, epsilon, norm)
    value = _value(logits_fn, best, y)
    left = (value <= 0).nonzero().flatten()
    for query in range(1, queries):
        if len(left) == 0:
            break
        share = FIRST_SHARE / 2 ** sum(query / queries > part for part in HALVINGS)
        side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
        proposal = best[left].clone()
        for place, image in enumerate(left.tolist()):
            g = generators[image]
            top, start = (int(torch.randint(size - side + 1, (), generator=g)) for size in (height, width))
            window = (place, slice(None), slice(top, top + side), slice(start, start + side))
            patch = epsilon if norm == "linf" else epsilon / side
            colour = patch * _signs((channels, 1, 1), g).to(x)
            proposal[window] = x[left[place]][window[1:]] + colour
        proposal = project(proposal, x[left], epsilon, norm)
        new = _value(logits_fn, proposal, y[left])
        better = new > value[left]
        best[left] = torch.where(per_image(better, x), proposal, best[left])
        value[left] = torch.where(better, new, value[left])
        left = left[value[left] <= 0]
    return best


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, shape, generator=generator) - 1


@torch.no_grad()
def _value(logits_fn: LogitsFn, x: Tensor, y: Tensor) -> Tensor:
    return cw_margin(logits_fn(x), y)
