"""Adversarial examples to look at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import logging

from tscnc_hf.artifact.card.formatting import class_name
from tscnc_hf.artifact.files.state import load_state, save_state
from tscnc_hf.artifact.models.preprocessing import preprocessing
from tscnc_hf.data.batches import check_items, collate
from tscnc_hf.evaluation.attacks import make_attack
from tscnc_hf.evaluation.fitting import device_of
from tscnc_hf.evaluation.memory import InParts
from tscnc_hf.evaluation.state import EvaluationState
from tscnc_hf.evaluation.subset import drawn
from tscnc_hf.method.adversarial.pixels import attack_mode, pixel_logits, pixel_quantity
from tscnc_hf.method.numbers import whole_number


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class AdversarialExamples:
    """
    Images of a data set that are classified correctly, and what an attack makes of them.

    Attributes:
        clean, adversarial: pixels (k, c, h, w) in [0, 1], on the CPU.
        labels, predictions: (k,), int64: the true class, and the predicted one under attack.
        attack, norm, epsilon: what was run.
    """

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    predictions: Tensor
    attack: str
    norm: str
    epsilon: float

    def for_figure(self, class_names: Sequence[str] | None = None) -> dict:
        """Keyword arguments of `tscnc_hf.artifact.card.robustness_figures.examples_figure`."""
        return {
            "clean": self.clean,
            "adversarial": self.adversarial,
            "truth": [class_name(label, class_names) for label in self.labels.tolist()],
            "guesses": [class_name(label, class_names) for label in self.predictions.tolist()],
            "attack": self.attack,
            "norm": self.norm,
            "epsilon": self.epsilon,
        }


def adversarial_examples(
    model: nn.Module,
    dataset: Iterable,
    *,
    epsilon: float | str,
    norm: str = "linf",
    attack: str = "pgd-20",
    count: int = 8,
    n: int = 256,
    seed: int = 0,
    processing_class: object | None = None,
) -> AdversarialExamples | None:
    """
    Attack `count` images that are classified correctly; fewer, or None, where there are fewer of them among n images,
    which are drawn with the seed.

    Other arguments and what is raised as in `evaluate_robustness`.
    """
    epsilon = pixel_quantity("epsilon", epsilon, norm)
    run = make_attack(attack, epsilon, norm).run
    if run is None:
        raise ValueError("attack='clean' makes no adversarial examples; use an attack such as 'pgd-20'")
    count, n, seed = whole_number("count", count, 1), whole_number("n", n, 1), whole_number("seed", seed)
    device = device_of(model)
    check_items(dataset)
    forward = pixel_logits(model, *preprocessing(model, processing_class))
    places = drawn(len(dataset), n, seed)
    batch, places = collate([dataset[place] for place in places]), torch.tensor(places)
    x, y = batch["pixel_values"].to(device), batch["labels"].to(device)
    with attack_mode(model):
        with torch.no_grad():
            guesses = InParts()(lambda part: forward(x[part]), len(x)).argmax(-1)
        right = (guesses == y).nonzero().flatten()[:count]
        if len(right) == 0:
            return None
        places = places[right.cpu()]  # noise is an image's own: the examples are those that the accuracy is of
        x_adv = InParts()(lambda part: run(forward, x[right[part]], y[right[part]], places[part], seed), len(right))
        with torch.no_grad():
            predictions = InParts()(lambda part: forward(x_adv[part]), len(x_adv)).argmax(-1)
    return AdversarialExamples(x[right].cpu(), x_adv.cpu(), y[right].cpu(), predictions.cpu(), attack, norm, epsilon)


def kept_examples(
    state: EvaluationState, model: nn.Module, dataset: Iterable, **options
) -> AdversarialExamples | None:
    """`adversarial_examples(model, dataset, **options)`, or what this has kept of the same evaluation."""
    if state.folder is None:
        return adversarial_examples(model, dataset, **options)
    path, tensors = state.folder / "examples.safetensors", ("clean", "adversarial", "labels", "predictions")
    try:
        found, about = load_state(path)
        if about.pop("of") == state.digest:
            return AdversarialExamples(**found, **about | {"epsilon": float(about["epsilon"])})
    except FileNotFoundError:
        pass
    except ValueError as error:
        logger.warning(f"{error} Made anew")
    examples = adversarial_examples(model, dataset, **options)
    if examples is not None:
        about = {"of": state.digest} | {name: str(getattr(examples, name)) for name in ("attack", "norm", "epsilon")}
        save_state({name: getattr(examples, name) for name in tensors}, path, about)
    return examples
