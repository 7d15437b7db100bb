"""Lipschitz bounds of an image classifier: the product of its layers, and what ascent reaches around each image."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from tscnc_hf.artifact.models.preprocessing import preprocessing
from tscnc_hf.data.batches import check_items, collate
from tscnc_hf.data.identity import random_states_kept
from tscnc_hf.evaluation.fitting import device_of
from tscnc_hf.evaluation.memory import halving
from tscnc_hf.evaluation.state import EvaluationState
from tscnc_hf.evaluation.subset import drawn
from tscnc_hf.method.adversarial.pgd import seeded_generator
from tscnc_hf.method.adversarial.pixels import attack_mode, pixel_logits, pixel_quantity
from tscnc_hf.method.numbers import whole_number
from tscnc_hf.method.reports.lipschitz import LipschitzProduct, lipschitz_product, local_lipschitz


@dataclass(frozen=True)
class LipschitzReport:
    """
    Attributes:
        product: of the layers' operator norms (l2), and of the resize in front of them where there is one.
        local: per image, a lower bound of the local Lipschitz constant (l1 of logits over L-infinity of pixels).
        epsilon, steps: radius in pixel units and gradient steps with which `local` was searched.
    """

    product: LipschitzProduct
    epsilon: float
    steps: int
    local: tuple[float, ...] = field(repr=False)

    def summary(self) -> dict[str, float]:
        return {
            "product_log10": self.product.log10,
            "local_median": statistics.median(self.local),
            "local_mean": statistics.fmean(self.local),
            "local_max": max(self.local),
        }

    def to_dict(self) -> dict:
        """Plain JSON types; minus infinity (an all-zero layer) is the string "-inf"."""
        plain = {key: value if math.isfinite(value) else str(value) for key, value in self.summary().items()}
        rest = {"n": len(self.local), "epsilon": self.epsilon, "steps": self.steps}
        return plain | rest | {"product": self.product.to_dict()}

    def to_markdown(self) -> str:
        values = self.summary()
        lines = ["| Lipschitz constant | |", "| --- | ---: |"]
        lines.append(f"| product of spectral norms, log10 | {values['product_log10']:.2f} |")
        for name in ("median", "mean", "max"):
            lines.append(
                f"| local lower bound, {name} over {len(self.local)} images | {values[f'local_{name}']:.4g} |"
            )
        return "\n".join(lines)


def evaluate_lipschitz(
    model: nn.Module,
    dataset: Iterable,
    *,
    epsilon: float | str = "8/255",
    n: int = 256,
    steps: int = 10,
    seed: int = 0,
    batch_size: int = 128,
    processing_class: object | None = None,
    state: EvaluationState | None = None,
) -> LipschitzReport:
    """
    Bounds from above and from below (`tscnc_hf.method.reports.lipschitz`). The model is left as it was.

    Args:
        model (`nn.Module`): a classifier of normalised images.
        dataset: gives {"pixel_values": (c, h, w) in [0, 1], ...} items.
        epsilon (`float` or `str`): radius of the ball around each image, in pixel units, above 0.
        n (`int`): as many images, drawn with the seed, or all where there are fewer.
        steps (`int`): gradient steps of the search; costs steps forwards and backwards of n images.
        seed, batch_size (`int`): the starts of the search depend on both; halved by itself where memory runs out.
        processing_class (*optional*): image processor that says how inputs are made of pixels, unless the config does.
        state (*optional*): where what was found is kept, and which processes share the images.

    Raises:
        ValueError: epsilon outside (0, 1], no images; n, steps or batch_size below 1, or no whole number.
    """
    epsilon = pixel_quantity("epsilon", epsilon)
    n, steps, seed = whole_number("n", n), whole_number("steps", steps, 1), whole_number("seed", seed)
    batch_size = whole_number("batch_size", batch_size, 1)
    check_items(dataset)
    size = len(dataset)
    if size == 0 or n < 1:
        raise ValueError(f"n={n} of a data set of {size} images: at least one image is needed")
    device = device_of(model)
    how = preprocessing(model, processing_class)
    forward = pixel_logits(model, *how)
    places, state = sorted(drawn(size, n, seed)), EvaluationState() if state is None else state
    n = len(places)

    def gain() -> float | None:
        with random_states_kept():
            size = collate([dataset[places[0]]])["pixel_values"].shape[2:]
        resize = how.resize(*size)
        return None if resize is None else resize.gain(*size)

    def ascend(batch: range, number: int, part: range) -> list[float]:
        x = collate([dataset[places[place]] for place in part])["pixel_values"].to(device)
        generator = seeded_generator(device, seed, "lipschitz", number)
        noise = torch.rand((len(batch), *x.shape[1:]), generator=generator, device=device, dtype=x.dtype)
        noise = noise[part.start - batch.start : part.stop - batch.start]
        return local_lipschitz(forward, x, epsilon=epsilon, steps=steps, noise=noise).tolist()

    def search(batch_size: int) -> tuple[LipschitzProduct, list[float]]:
        pieces, share = {}, min(batch_size, math.ceil(n / state.world))  # a process may have part of a batch
        for first in range(0, n, batch_size):
            batch = range(first, min(first + batch_size, n))
            for start in batch[::share]:
                part = range(start, min(start + share, batch.stop))
                name = f"lipschitz-{batch_size}-{part.start}-{part.stop}"
                pieces[name] = partial(ascend, batch, first // batch_size, part)
        product = {"lipschitz-product": lambda: lipschitz_product(model, gain()).to_dict()}
        found = state.share(pieces | product, doing="Searching local Lipschitz constants")
        plain = found["lipschitz-product"]
        product = LipschitzProduct(float(plain["log10"]), plain["bounds"], tuple(plain["unknown"]))
        return product, [value for name in pieces for value in found[name]]

    with attack_mode(model):
        product, local = halving(search, batch_size)
    return LipschitzReport(product, epsilon, steps, tuple(local))
