"""
A factor for each layer that training learns, so that the layers find their own sparsities under one exact total.

HARP (Zhao and Wressnegger 2023) learns a rate for each layer beside the scores, with a penalty on the total. Here
(ours) the total is exact by construction: a layer's scores, in units of their root mean square, are multiplied by
exp(theta) and ranked over the whole network. By the straight-through estimator the loss changes with theta by the sum
of g w over the weights near the threshold, those that a small change of theta lets in or out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


NEAR = 2.0  # a weight counts as near the threshold when its score is within this factor of it
BETAS, TINY = (0.9, 0.999), 1e-12


class LayerRates:
    """
    Args:
        names: of the layers.
        learning_rate: of theta, which Adam moves: about the change of log(score) in a step.
    """

    def __init__(self, names: Sequence[str], learning_rate: float = 0.01):
        self.names, self.learning_rate = list(names), learning_rate
        self.theta, self.first, self.second = (torch.zeros(len(self.names)) for _ in range(3))
        self.steps = torch.zeros(len(self.names))  # of each: those with a gradient

    def weigh(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores as they are ranked over the network. ValueError when one is negative: factors would not order it."""
        if any(bool((scores[name] < 0).any()) for name in self.names):
            raise ValueError("scope 'learned' needs scores >= 0; the criterion 'movement' has negative ones")
        factors, weighed = dict(zip(self.names, self.theta.exp(), strict=True)), {}
        for name in self.names:
            score = scores[name]
            if score.square().mean().sqrt() < TINY:  # squares of what is small are zero, long before it is
                score = score / torch.where(score.max() > 0, score.max(), 1.0)
            weighed[name] = score * (factors[name].to(score) / score.square().mean().sqrt().clamp(min=TINY))
        return weighed

    def learn(self, products: Mapping[str, Tensor]) -> None:
        """
        One Adam step; `products` holds, for each layer that had a gradient, the sum of g w over the weights marked as
        near (0-d). The factors of the others stay.
        """
        nothing = torch.zeros((), device=next(iter(products.values())).device)
        gradient = torch.stack([products.get(name, nothing).detach().float() for name in self.names])
        seen = torch.tensor([name in products for name in self.names], device=gradient.device)
        state = (self.theta, self.first, self.second, self.steps)
        theta, first, second, steps = (part.to(gradient) for part in state)
        self.steps = steps + seen
        self.first = torch.where(seen, BETAS[0] * first + (1 - BETAS[0]) * gradient, first)
        self.second = torch.where(seen, BETAS[1] * second + (1 - BETAS[1]) * gradient.square(), second)
        first, second = self.first / (1 - BETAS[0] ** self.steps), self.second / (1 - BETAS[1] ** self.steps)
        self.theta = torch.where(seen, theta - self.learning_rate * first / (second.sqrt() + TINY), theta)
        self.theta -= self.theta.mean()  # a factor common to all layers changes no ranking

    def state(self) -> dict[str, Tensor]:
        return {"theta": self.theta, "first": self.first, "second": self.second, "steps": self.steps}

    def load(self, state: Mapping[str, Tensor]) -> None:
        keys = ("theta", "first", "second", "steps")
        self.theta, self.first, self.second, self.steps = (state[key] for key in keys)


def near_threshold(
    weighed: Mapping[str, Tensor], masks: Mapping[str, Tensor], ranked: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """
    Which weights are near the threshold that masks were cut at, the smallest score that is kept for its rank.

    Args:
        weighed: name -> scores, as they were ranked.
        masks: name -> bool, True = kept.
        ranked: name -> bool, of the scores that were ranked together, by default all of those with masks.

    Returns:
        Bool, of the scores' shapes. What is kept though a larger score was pruned (the best weight of a matrix, what
        a floor keeps) stays whatever its rank, and is not among them.
    """
    if ranked is None:
        ranked = {name: torch.ones_like(mask) for name, mask in masks.items()}
    pruned = {name: ranked[name] & ~mask for name, mask in masks.items()}
    highest = [weighed[name][part].max() for name, part in pruned.items() if bool(part.any())]
    highest = torch.stack(highest).max() if highest else torch.tensor(0.0)
    kept = {name: ranked[name] & mask & (weighed[name] >= highest) for name, mask in masks.items()}
    lowest = [weighed[name][part].min() for name, part in kept.items() if bool(part.any())]
    threshold = torch.stack(lowest).min() if lowest else highest.clamp(min=0)
    near = {name: (score >= threshold / NEAR) & (score <= threshold * NEAR) for name, score in weighed.items()}
    return {name: part & (kept[name] | pruned[name]) if name in masks else part for name, part in near.items()}
