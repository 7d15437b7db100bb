"""
What zeros gain at inference on a CPU: `make bench-inference`, on an idle machine.

A ResNet-18 (32 px, stride-1 stem) and a ViT-S/4 whose weights are pruned by magnitude, each layer alike but for the
first and the last, in every runtime that is installed; all in turns, outputs compared first. "Over the best" is the
median of the fastest other runtime over that of `sparse_compile`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import timm
import torch
from torch import nn

from tscnc_hf.inference.runtimes.benchmark import measure_latency
from tscnc_hf.inference.runtimes.installed import OURS, RUNTIMES


def resnet18() -> nn.Module:
    model = timm.create_model("resnet18", num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: timm starts with blocks that add nothing
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def vit_small() -> nn.Module:
    return timm.create_model("vit_small_patch16_224", img_size=32, patch_size=4, num_classes=10)


MODELS = {"resnet18": resnet18, "vit_small": vit_small}


@torch.no_grad()
def prune(model: nn.Module, zeros: float) -> nn.Module:
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for layer in layers[1:-1]:
        smallest = layer.weight.abs().flatten().kthvalue(max(1, round(zeros * layer.weight.numel()))).values
        layer.weight[layer.weight.abs() <= smallest] = 0
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES))
    parser.add_argument("--seconds", type=float, default=15.0, help="for each batch size")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}\n")
    everything, summary = [], ["| model | zeros | threads | batch | ours, ms | best other, ms | over the best |"]
    summary.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in args.models:
        for zeros in args.zeros:
            torch.manual_seed(0)
            model = prune(MODELS[name](), zeros).eval()
            for threads in args.threads:
                report = measure_latency(
                    model, (3, 32, 32), args.batches, threads, args.runtimes, args.seconds,
                    say=lambda text: print(text, file=sys.stderr, flush=True),
                )  # fmt: skip
                print(f"{name}, {zeros:.0%} zeros, {threads} threads\n\n{report.to_markdown()}\n", flush=True)
                everything.append({"model": name, "zeros_asked": zeros} | report.to_dict())
                for batch in args.batches:
                    (ours,) = (row for row in report.rows if row.batch == batch and row.runtime == OURS)
                    best = report.best_other(batch)
                    summary.append(
                        f"| {name} | {zeros:.0%} | {threads} | {batch} | {ours.median_ms:.2f} | {best.median_ms:.2f} "
                        f"({best.runtime}) | {best.times_ours:.2f} |"
                    )
    if report.left_out:
        print(f"Not installed: {', '.join(report.left_out)}.\n")
    print("\n".join(summary))
    if args.json:
        args.json.write_text(json.dumps(everything, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
