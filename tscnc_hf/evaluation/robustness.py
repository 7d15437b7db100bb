"""Clean and robust accuracy of an image classifier under named attacks: one function, one result object."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from tscnc_hf import __version__
from tscnc_hf.method.adversary import pgd, seeded_generator
from tscnc_hf.method.batches import collate
from tscnc_hf.method.pixels import LogitsFn, attack_mode, normalisation, pixel_logits, pixel_quantity
from tscnc_hf.method.threat import check_norm


KNOWN_ATTACKS = "clean, fgsm, pgd-K (K gradient steps, e.g. pgd-20)"


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): fractions in [0, 1]."""
    p, zz = correct / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class AttackResult:
    """Accuracy under one attack: correct of n, and its 95 % Wilson interval [low, high] (fractions)."""

    name: str
    accuracy: float
    low: float
    high: float
    correct: int
    n: int
    parameters: dict = field(default_factory=dict)


@dataclass(frozen=True)
class RobustnessReport:
    """
    Accuracies of one model on one data set.

    Attributes:
        threat_model: {"norm", "epsilon" (pixel units), "seed"}.
        n: number of images.
        attacks: in the order asked for. An image counts under an attack only if it is also classified correctly clean.
        versions: of the libraries that computed it.
    """

    threat_model: dict
    n: int
    attacks: tuple[AttackResult, ...]
    versions: dict

    def __getitem__(self, name: str) -> AttackResult:
        return next(attack for attack in self.attacks if attack.name == name)

    def to_dict(self) -> dict:
        return asdict(self) | {"attacks": [asdict(attack) for attack in self.attacks]}

    def to_markdown(self) -> str:
        lines = ["| attack | accuracy | 95 % interval | correct |", "| --- | ---: | ---: | ---: |"]
        lines += [
            f"| {a.name} | {a.accuracy:.1%} | {a.low:.1%} to {a.high:.1%} | {a.correct} of {a.n} |"
            for a in self.attacks
        ]
        return "\n".join(lines)


def make_attack(name: str, epsilon: float, norm: str = "linf") -> tuple[Callable | None, dict]:
    """
    A named attack `(logits_fn, x, y, generator=) -> x_adv` (None for "clean"), and its full parameters.

    Raises:
        ValueError: no attack has this name (those that exist are listed).
    """
    if name == "clean":
        return None, {}
    if name == "fgsm":
        options = {"steps": 1, "step_size": epsilon, "restarts": 1, "random_start": False}
    elif match := re.fullmatch(r"pgd-([1-9]\d*)", name):
        steps = int(match[1])
        options = {"steps": steps, "step_size": pgd_step_size(epsilon, steps), "restarts": 1, "random_start": True}
    else:
        raise ValueError(f"attack {name!r} does not exist; known are {KNOWN_ATTACKS}")
    return partial(pgd, epsilon=epsilon, norm=norm, **options), options | {"loss": "cross-entropy"}


def pgd_step_size(epsilon: float, steps: int) -> float:
    """2.5 epsilon / steps (Madry et al. 2018), at most epsilon: enough to cross the ball, small enough to settle."""
    return min(epsilon, 2.5 * epsilon / steps)


def evaluate_robustness(
    model: nn.Module,
    dataset: Iterable,
    attacks: Sequence[str] = ("clean", "pgd-20"),
    *,
    epsilon: float | str = "8/255",
    norm: str = "linf",
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    processing_class: object | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> RobustnessReport:
    """
    Clean accuracy and accuracy under white-box attacks.

    Args:
        model (`nn.Module`): a classifier of normalised images; left as it was (modes, statistics, gradients).
        dataset: gives {"pixel_values": (c, h, w) in [0, 1], "labels": int} items.
        attacks (`Sequence[str]`): among "clean", "fgsm" and "pgd-K".
        epsilon (`float` or `str`): radius in pixel units.
        norm (`str`): "linf" or "l2".
        n (`int`, *optional*): the first n images; all by default.
        seed (`int`): of the attacks' random starts; torch's global generator is neither used nor changed.
        processing_class (*optional*): image processor that says how inputs are normalised, unless the config does.
        device (*optional*): defaults to where the model is.
        progress (`bool`): show a progress bar.

    Raises:
        ValueError: unknown attack or norm, epsilon outside [0, 1], no images, n too large.
    """
    check_norm(norm)
    epsilon = pixel_quantity("epsilon", epsilon, norm)
    if not attacks:
        raise ValueError(f"no attack was named; known are {KNOWN_ATTACKS}")
    made = {name: make_attack(name, epsilon, norm) for name in attacks}
    size = len(dataset)
    if size == 0 or (n is not None and not 0 < n <= size):
        raise ValueError(f"n={n} of a data set of {size} images: give n between 1 and {size} (or leave it out)")
    n = size if n is None else n
    device = next(model.parameters()).device if device is None else torch.device(device)
    model.to(device)
    forward = pixel_logits(model, *normalisation(model, processing_class))
    loader = DataLoader(
        Subset(dataset, range(n)), batch_size, collate_fn=collate, generator=torch.Generator().manual_seed(seed)
    )
    correct, done = dict.fromkeys(attacks, 0), 0
    with attack_mode(model), tqdm(total=n, desc="Robust evaluation", unit="img", disable=not progress) as bar:
        for index, batch in enumerate(loader):
            x, y = batch["pixel_values"].to(device), batch["labels"].to(device)
            right = _is_right(forward, x, y)
            for name, (attack, _) in made.items():
                survived = right if attack is None else _survivors(forward, attack, x, y, right, (seed, name, index))
                correct[name] += int(survived.sum())
            done += len(y)
            bar.update(len(y))
            bar.set_postfix({name: f"{count / done:.1%}" for name, count in correct.items()})
    results = tuple(
        AttackResult(name, correct[name] / n, *wilson_interval(correct[name], n), correct[name], n, made[name][1])
        for name in attacks
    )
    threat_model = {"norm": norm, "epsilon": epsilon, "seed": seed}
    versions = {"tscnc_hf": __version__, "torch": torch.__version__, "transformers": version("transformers")}
    return RobustnessReport(threat_model, n, results, versions)


@torch.no_grad()
def _is_right(forward: LogitsFn, x: Tensor, y: Tensor) -> Tensor:
    return forward(x).argmax(-1) == y


def _survivors(forward: LogitsFn, attack: Callable, x: Tensor, y: Tensor, right: Tensor, key: tuple) -> Tensor:
    """Which images are still classified correctly; only those that are right when clean are attacked."""
    survived = right.clone()
    if right.any():
        x, y = x[right], y[right]
        survived[right] = _is_right(forward, attack(forward, x, y, generator=seeded_generator(x.device, *key)), y)
    return survived
