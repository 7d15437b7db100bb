"""
What the constraints and the masks cost, as a share of a PGD-10 adversarial training step of the same model in the same
run: `make bench-constraints`.

Each round times, one after the other: one attack step (forward and gradient of the pixels, evaluation mode), one
training step (forward and backward, training mode), TSC and CNC with their backward, the mask update (its cost over
the pruning interval) and masking. A PGD-10 step is ten attack steps and a training step. For comparison: CNC through
autograd over a Cholesky loop, and through a full SVD. Weights are 90 % zeros. Shares are medians over rounds, with
the smallest and the largest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tscnc_hf.method.adversarial.pixels import attack_mode
from tscnc_hf.method.constraints import constraint_terms, weight_scales
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning.pruner import Pruner


PRUNING_INTERVAL = 10  # the default of TSCNCConfig
RIDGE = 1e-3
TINY = 1e-30  # magnitude pruning at initialisation empties whole layers of the widest model


def resnet18() -> nn.Module:
    """The CIFAR form: a 3x3 stem of stride 1, no pooling behind it."""
    model = timm.create_model("resnet18", num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def vit_small() -> nn.Module:
    return timm.create_model("vit_small_patch16_224", img_size=32, patch_size=4, num_classes=10)


class WideBlock(nn.Module):
    """Pre-activation block of a wide residual network (Zagoruyko and Komodakis 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(out))))


def wrn_28_10() -> nn.Module:
    layers, inputs = [nn.Conv2d(3, 16, 3, padding=1, bias=False)], 16
    for outputs, stride in ((160, 1), (320, 2), (640, 2)):
        for index in range(4):
            layers.append(WideBlock(inputs, outputs, stride if index == 0 else 1))
            inputs = outputs
    head = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)]
    return nn.Sequential(*layers, *head)


MODELS = {"resnet18": resnet18, "vit_small": vit_small, "wrn_28_10": wrn_28_10}


def attack_step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    with attack_mode(model):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
        x.detach().add_(gradient.sign_(), alpha=2 / 255).clamp_(0, 1)


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


def cholesky_loop(model: nn.Module) -> None:
    """The same CNC, layer by layer, differentiated by autograd."""
    total = torch.zeros(())
    for matrix in _matrices(model):
        gram = matrix @ matrix.T
        scaled = gram / gram.diagonal().mean().clamp(min=TINY) + RIDGE * torch.eye(len(gram))
        total = total - 2 * torch.linalg.cholesky(scaled).diagonal().log().mean()
    total.backward()


def full_svd(model: nn.Module) -> None:
    """The same CNC from singular values."""
    total = torch.zeros(())
    for matrix in _matrices(model):
        squares = torch.linalg.svdvals(matrix).square()
        total = total - (squares / squares.mean().clamp(min=TINY) + RIDGE).log().mean()
    total.backward()


def _matrices(model: nn.Module) -> list[Tensor]:
    matrices = [matrix for record in weight_matrices(model) for matrix in record.matrices]
    return [m if m.shape[0] <= m.shape[1] else m.T for m in matrices if min(m.shape) > 1]


def seconds(function: Callable, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def measure(name: str, batch_size: int, rounds: int, slow: bool) -> dict[str, list[float]]:
    """Seconds of each part in each round; the first round, which warms up, is left out."""
    torch.manual_seed(0)
    model = MODELS[name]().train()
    if name != "vit_small":
        model.to(memory_format=torch.channels_last)
    x, y = torch.rand(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    if name != "vit_small":
        x = x.contiguous(memory_format=torch.channels_last)
    pruner = Pruner(weight_matrices(model))
    scales = weight_scales(weight_matrices(model))
    pruner.update(0.9)
    pruner.apply_()

    def constraints() -> None:
        weights = list(weight_matrices(model))
        terms = constraint_terms(weights, scales, tsc_weight=1e-6, cnc_weight=1e-2, cnc_ridge=RIDGE)
        sum(terms.values()).backward()

    parts = {
        "attack step": lambda: attack_step(model, x, y),
        "training step": lambda: training_step(model, x, y),
        "constraints": constraints,
        "masking": lambda: (pruner.mask_gradients_(), pruner.apply_()),
        "mask update": lambda: pruner.update(0.9),
    }
    if slow:
        parts |= {"Cholesky loop": lambda: cholesky_loop(model), "full SVD": lambda: full_svd(model)}
    times: dict[str, list[float]] = {part: [] for part in parts}
    for index in range(rounds + 1):
        for part, function in parts.items():
            elapsed = seconds(function)
            if index:
                times[part].append(elapsed)
    return times


def shares(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Each part as a share of the PGD-10 step of its round."""
    step = [10 * a + t for a, t in zip(times["attack step"], times["training step"], strict=True)]
    times = times | {"mask update": [value / PRUNING_INTERVAL for value in times["mask update"]]}
    result = {
        part: [value / whole for value, whole in zip(values, step, strict=True)]
        for part, values in times.items()
        if part not in ("attack step", "training step")
    }
    ours = ("constraints", "masking", "mask update")
    return {"all of it": [sum(result[part][i] for part in ours) for i in range(len(step))]} | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fast", action="store_true", help="without the slow forms of CNC")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, batch {args.batch_size}, {args.rounds} rounds")
    print("share of a PGD-10 step: median (smallest to largest)\n")
    for name in args.models:
        times = measure(name, args.batch_size, args.rounds, not args.fast)
        step = 10 * statistics.median(times["attack step"]) + statistics.median(times["training step"])
        print(f"{name}: PGD-10 step {step:.2f} s")
        for part, values in shares(times).items():
            low, middle, high = min(values), statistics.median(values), max(values)
            own = "" if part == "all of it" else f"  {1e3 * statistics.median(times[part]):8.1f} ms"
            print(f"  {part:<14} {middle:7.3%} ({low:.3%} to {high:.3%}){own}", flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
