"""
The attacks of an evaluation by name, with their full parameters.

Random starts are drawn image by image from (seed, attack, restart, index of the image), so that neither the batch
size nor the number of processes nor an interruption changes what an image meets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import count

import torch
from torch import Tensor, nn

from tscnc_hf import __version__
from tscnc_hf.evaluation.precision import searching
from tscnc_hf.method.adversarial.apgd import apgd
from tscnc_hf.method.adversarial.ball import check_norm, random_start
from tscnc_hf.method.adversarial.pgd import pgd, seeded_generator
from tscnc_hf.method.adversarial.pixels import LogitsFn


KNOWN_ATTACKS = (
    "clean, fgsm, pgd-K and cw-K (K gradient steps, e.g. pgd-20), pgd-KxR (R restarts, e.g. pgd-20x5), apgd, "
    "apgd-dlr, square, apgd-ce+t, autoattack"
)
OURS = {"implementation": "tscnc_hf", "version": __version__}
APGD_STEPS = 100
FIFTHS = 5  # squares of Square in l2 that a height is cut into
AUTOATTACK = "autoattack"
PARTS = {
    AUTOATTACK: ("apgd-ce", "apgd-t", "fab-t", "square"),
    "apgd-ce+t": ("apgd-ce", "apgd-t"),
    "square": ("square",),
}
INSTALL = 'pip install "tscnc-hf[eval]"'


Run = Callable[[LogitsFn, Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Attack:
    """
    Attributes:
        name: as asked for.
        parameters: everything that decides its strength, plain JSON types.
        run: (logits_fn, x, y, index, seed) -> x_adv; x (b, c, h, w) in [0, 1], y and index (b,), int64: labels, and
            places of the images in the data set. None for "clean".
        classes: how many a model needs at least.
        tiles: whether it starts from squares of a fifth of an image's height, which have to lie in the image.
        parts: name -> what `run` does one after the other, each to the images that withstood those before; one that
            is called like the attack unless said otherwise. An evaluation keeps what each of them found.
    """

    name: str
    parameters: dict = field(default_factory=dict)
    run: Run | None = None
    classes: int = 1
    tiles: bool = False
    parts: Mapping[str, Run] = field(default_factory=dict)

    def __post_init__(self):
        if self.run is not None and not self.parts:
            object.__setattr__(self, "parts", {self.name: self.run})


def make_attack(name: str, epsilon: float, norm: str = "linf", precision: str = "float32") -> Attack:
    """
    A named attack.

    Args:
        name (`str`): "clean"; "fgsm" (one step of size epsilon from the image); "pgd-K", "pgd-KxR"; "cw-K" (PGD on the
            margin); "apgd" and "apgd-dlr" (100 steps); "square" (5,000 queries), "autoattack" (standard) and
            "apgd-ce+t" (its first two parts, the same to the last draw), all three from pyautoattack.
        epsilon (`float`): radius in pixel units.
        norm (`str`): "linf" or "l2".
        precision (`str`): in which it searches, "float32", "tf32" or "bf16" (`searching`): only what fools the model
            in float32 counts.

    Raises:
        ValueError: no attack has this name (those that exist are listed), or unknown norm.
        ImportError: the attack needs pyautoattack, which is not installed.
    """
    check_norm(norm)
    if not isinstance(name, str):
        raise ValueError(f"attack {name!r} is no name; known are {KNOWN_ATTACKS}")
    if name == "clean":
        return Attack(name)
    attack = _from_pyautoattack(name, epsilon, norm) if name in PARTS else _ours(name, epsilon, norm)
    parts = {part: searching(run, precision) for part, run in attack.parts.items()}
    run = partial(_in_turn, parts=tuple(parts.values()))
    return replace(attack, parameters=attack.parameters | {"precision": precision}, run=run, parts=parts)


def _ours(name: str, epsilon: float, norm: str) -> Attack:
    if name in ("apgd", "apgd-dlr"):
        options = {"steps": APGD_STEPS, "loss": "dlr" if name == "apgd-dlr" else "cross-entropy"}
        run = partial(_apgd, name=name, epsilon=epsilon, norm=norm, **options)
        return Attack(name, {"restarts": 1} | options | OURS, run, 3 if name == "apgd-dlr" else 2)
    options = {"restarts": 1, "random_start": True, "loss": "cross-entropy"}
    if name == "fgsm":
        options |= {"steps": 1, "step_size": epsilon, "random_start": False}
    elif match := re.fullmatch(r"(pgd|cw)-([1-9]\d*)(?:x([1-9]\d*))?", name):
        steps = int(match[2])
        options |= {"steps": steps, "step_size": pgd_step_size(epsilon, steps), "restarts": int(match[3] or 1)}
        options["loss"] = "cw" if match[1] == "cw" else "cross-entropy"
    else:
        raise ValueError(f"attack {name!r} does not exist; known are {KNOWN_ATTACKS}")
    run = partial(_pgd, name=name, epsilon=epsilon, norm=norm, **options)
    return Attack(name, options | {"early_stop": True} | OURS, run, 2)


def check_attacks(
    names: Sequence[str] | str,
    classes: int,
    *,
    epsilon: float = 0.0,
    norm: str = "linf",
    image_size: tuple[int, int] | None = None,
) -> None:
    """
    Whether these attacks can be run on a model of so many classes and images (h, w): known before it is trained.

    Raises:
        ValueError, ImportError: as `make_attack`; none is named; one needs more classes, or images of another size.
    """
    names = [names] if isinstance(names, str) else list(names or ())
    if not names:
        raise ValueError(f"no attack was named; known are {KNOWN_ATTACKS}")
    for name in names:
        check_fit(make_attack(name, epsilon, norm), classes, image_size)


def check_fit(attack: Attack, classes: int, image_size: tuple[int, int] | None = None) -> None:
    """ValueError where the attack needs more classes, or images of another size (h, w)."""
    if classes < attack.classes:
        rest = "; pgd-20, apgd and square do with two" if classes > 1 else ": with one class no answer is wrong"
        raise ValueError(f"attack {attack.name!r} needs at least {attack.classes} classes, there are {classes}{rest}")
    if image_size is None or not attack.tiles:
        return
    height, width = image_size
    if height < FIFTHS:
        raise ValueError(
            f"attack {attack.name!r} in l2 needs images of at least {FIFTHS} pixels in height (its squares are a "
            f"fifth of that), these have {height}; pgd-20 and apgd do with fewer"
        )
    if not _tiled(height, width):
        side = next(side for side in count(max(height, width)) if _tiled(side, side))
        raise ValueError(
            f"attack {attack.name!r} in l2 cannot start on images of {height}x{width}: the last of its squares, of "
            f"{height // FIFTHS} pixels, does not lie in them. Bring images to another size, such as {side}x{side}, "
            "or take pgd-20 or apgd, which do with any"
        )


def _tiled(height: int, width: int) -> bool:
    """Whether what is left beside whole squares is as much as pyautoattack's Square leaves free before the first."""
    side = height // FIFTHS
    free = (height - FIFTHS * side) // 2
    return side == 1 or width < side or min(height % side, width % side) >= free


def pgd_step_size(epsilon: float, steps: int) -> float:
    """2.5 epsilon / steps (Madry et al. 2018), at most epsilon: enough to cross the ball, small enough to settle."""
    return min(epsilon, 2.5 * epsilon / steps)


def starts(x: Tensor, index: Tensor, epsilon: float, norm: str, *key: int | str) -> Tensor:
    """A random start for each image, from a CPU generator of its own: the same on every device."""
    drawn = [
        random_start(image[None], epsilon, norm, seeded_generator("cpu", *key, place))
        for image, place in zip(x.cpu(), index.tolist(), strict=True)
    ]
    return torch.cat(drawn).to(x.device)


def _in_turn(forward, x, y, index, seed, *, parts: Sequence[Run]) -> Tensor:
    """Each part, on the images that withstood those before."""
    x_adv = parts[0](forward, x, y, index, seed)
    for part in parts[1:]:
        with torch.no_grad():
            left = forward(x_adv).argmax(-1) == y
        if left.any():
            x_adv[left] = part(forward, x[left], y[left], index[left.to(index.device)], seed)
    return x_adv


def _pgd(forward, x, y, index, seed, *, name, epsilon, norm, restarts, random_start, **options) -> Tensor:
    result, left = x.clone(), torch.arange(len(x), device=x.device)
    for run in range(restarts):
        start = starts(x[left], index[left.cpu()], epsilon, norm, seed, name, run) if random_start else None
        found = pgd(
            forward, x[left], y[left], epsilon=epsilon, norm=norm, early_stop=True, start=start,
            random_start=random_start, **options,
        )  # fmt: skip
        result[left] = found
        if run + 1 < restarts:
            with torch.no_grad():
                left = left[forward(found).argmax(-1) == y[left]]
            if len(left) == 0:
                break
    return result


def _apgd(forward, x, y, index, seed, *, name, epsilon, norm, **options) -> Tensor:
    start = starts(x, index, epsilon, norm, seed, name, 0)
    return apgd(forward, x, y, epsilon=epsilon, norm=norm, start=start, **options)


class _Logits(nn.Module):
    """A module, which is what pyautoattack takes, around a function of pixels."""

    def __init__(self, forward: LogitsFn):
        super().__init__()
        self.logits = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


def _from_pyautoattack(name: str, epsilon: float, norm: str) -> Attack:
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError(f"attack {name!r} needs the package pyautoattack: {INSTALL}") from error
    parameters = {"implementation": "pyautoattack", "version": version("pyautoattack")}
    key = "square" if name == "square" else AUTOATTACK  # its parts draw what they draw in it
    parts = {
        name if name == part else f"{name}: {part}": partial(
            _autoattack, AutoAttack, part=part, key=key, epsilon=epsilon, norm=norm
        )
        for part in PARTS[name]
    }
    tiles = norm == "l2" and "square" in PARTS[name]
    if name == "square":
        return Attack(name, parameters | {"queries": 5000, "restarts": 1}, None, 2, tiles, parts)
    parameters |= {"attacks": list(PARTS[name]), "steps": 100}
    parameters |= {"queries": 5000} if "square" in PARTS[name] else {}
    return Attack(name, parameters, None, 4, tiles, parts)  # for its targeted losses


def _autoattack(autoattack, forward, x, y, index, seed, *, part, key, epsilon, norm) -> Tensor:
    """
    One part of the standard AutoAttack. It is called by itself: the loop around it forgets the images at which a part
    has stopped.
    """
    with torch.no_grad():
        classes = forward(x[:1]).shape[-1]
    seed = seeded_generator("cpu", seed, key).initial_seed() % 2**31  # the same for all batches, as in the reference
    norm = {"linf": "Linf", "l2": "L2"}[norm]
    attack = autoattack(_Logits(forward), norm=norm, eps=epsilon, seed=seed, device=x.device, version="standard")
    attack.apgd.loss, attack.fab.targeted = "ce", True
    for targeted in (attack.apgd_targeted, attack.fab):  # nine wrong classes by default, an index error with fewer
        targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
    parts = {"apgd-ce": attack.apgd, "apgd-t": attack.apgd_targeted, "fab-t": attack.fab, "square": attack.square}
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():  # it seeds torch's global generator
        return parts[part].perturb(x, y)
