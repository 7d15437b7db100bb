"""Which images a figure is of that is not measured on all of them."""

from __future__ import annotations

import torch

from tscnc_hf.method.adversarial.noise import seeded_generator


def drawn(size: int, n: int, seed: int) -> list[int]:
    """
    Places of n of `size` images (of all, where there are fewer), in the order in which they were drawn. The fewer
    are among the more of the same seed: all figures of a report are of the same images, as far as they go.
    """
    return torch.randperm(size, generator=seeded_generator("cpu", seed, "subset"))[:n].tolist()
