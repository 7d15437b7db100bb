"""
What slimming gains at inference on a CPU: `make bench-slimming`.

Half and a quarter of the channels inside the blocks of a ResNet-18 (CIFAR form), or of the hidden units and heads of a
ViT-Small (patch 4), are kept; the others are zeroed at random and `slim` cuts them out. Dense and slim models take the
same batch, one after the other in each round. Speed-up is dense time over slim time of a round, the FLOP ratio counts
attention in, and the share is speed-up over FLOP ratio. Medians over rounds, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch
from torch import nn

from tscnc_hf import slim
from tscnc_hf.method.units.groups import structure_groups


GOALS = {2: 0.75, 4: 0.6}  # share of the FLOP ratio at a half and a quarter


def resnet18() -> nn.Module:
    model = timm.create_model("resnet18", num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)  # timm starts with blocks that add nothing
    return model.to(memory_format=torch.channels_last)


def resnet18_nchw() -> nn.Module:
    return resnet18().to(memory_format=torch.contiguous_format)


def vit_small() -> nn.Module:
    return timm.create_model("vit_small_patch16_224", img_size=32, patch_size=4, num_classes=10)


MODELS = {"resnet18": resnet18, "resnet18_nchw": resnet18_nchw, "vit_small": vit_small}


@torch.no_grad()
def kill(model: nn.Module, divisor: int, offset: int) -> None:
    """Zero all but a share of the units of every group, chosen at random; of heads at least one more than none."""
    for group in structure_groups(model):
        kept = max(-(-group.count // divisor) - (offset if group.kind != "heads" else 0), 1)
        keep = torch.zeros(group.count, dtype=torch.bool)
        keep[torch.randperm(group.count)[:kept]] = True
        masks = group.unit_masks(keep)
        for part in group.weights:
            part.tensor.mul_(masks[part.name])


@torch.no_grad()
def seconds(model: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    model(x)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet18", "vit_small"])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--offset", type=int, default=0, help="keep so many units less, for odd widths")
    parser.add_argument("--multiple_of", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} threads, batch {args.batch_size}, {args.rounds} rounds")
    print("median (smallest to largest)\n")
    for name in args.models:
        dense = MODELS[name]().eval()
        x = torch.randn(args.batch_size, 3, 32, 32)
        if name == "resnet18":
            x = x.contiguous(memory_format=torch.channels_last)
        models, reports = {"dense": dense}, {}
        for divisor in GOALS:
            pruned = MODELS[name]().eval()
            pruned.load_state_dict(dense.state_dict())
            kill(pruned, divisor, args.offset)
            start = time.perf_counter()
            models[f"1/{divisor}"], reports[divisor] = slim(pruned, x[:2], multiple_of=args.multiple_of)
            print(f"{name}: slim to 1/{divisor} took {time.perf_counter() - start:.1f} s")
        times: dict[str, list[float]] = {key: [] for key in models}
        for index in range(args.rounds + 1):
            for key, model in models.items():
                elapsed = seconds(model, x)
                if index:  # the first round warms up
                    times[key].append(elapsed)
        print(f"{name}: dense {1e3 * statistics.median(times['dense']):.0f} ms")
        for divisor, report in reports.items():
            ratio = report.macs_before / report.macs_after
            gains = [a / b for a, b in zip(times["dense"], times[f"1/{divisor}"], strict=True)]
            low, middle, high = min(gains), statistics.median(gains), max(gains)
            print(
                f"  1/{divisor} kept: {report.parameters_after / report.parameters_before:.1%} of the parameters, "
                f"FLOP ratio {ratio:.2f}, speed-up {middle:.2f} ({low:.2f} to {high:.2f}), "
                f"share {middle / ratio:.2f} ({low / ratio:.2f} to {high / ratio:.2f}), goal {GOALS[divisor]}, "
                f"largest difference {report.difference:.0e}",
                flush=True,
            )
        print()


if __name__ == "__main__":
    main()
