"""
What zeros gain at inference on a CPU: `make bench-inference`, on an idle machine.

A ResNet-18 (32 px, stride-1 stem) and a ViT-S/4 whose weights are pruned by magnitude, each layer alike but for the
first and the last, in every runtime that is installed; all in turns, outputs compared first. Of a "half" model half of
the channels, hidden units and heads, drawn at random, were cut out before; folders are of models with the masks that
they were trained with. "Over the best" is the median, over turns, of how many times as long as `sparse_compile` the
best of the other runtimes takes; the best is the one for which that is least. With `--profile`, instead, where the
time of a compiled model goes: for the layers of each kind the multiply-adds, beside the peak that a loop of nothing
else reaches here, and the bytes that a call walks through.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from tscnc_hf import slim, sparse_compile
from tscnc_hf.cli.deployment import bench_model
from tscnc_hf.inference.layers import SparseChain, SparseConvBlock, SparseLayer, SparseLinear, SparseMLP
from tscnc_hf.inference.runtimes.benchmark import measure_latency
from tscnc_hf.inference.runtimes.installed import OURS, RUNTIMES
from tscnc_hf.inference.timing import interleaved
from tscnc_hf.method.reports.flops import flops_report
from tscnc_hf.method.units.groups import structure_groups


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


def half(model: nn.Module) -> nn.Module:
    for group in structure_groups(model):
        keep = torch.zeros(group.count, dtype=torch.bool)
        keep[torch.randperm(group.count)[: -(-group.count // 2)]] = True
        masks = group.unit_masks(keep)
        for part in group.weights:
            part.tensor.data.mul_(masks[part.name])
    return slim(model.eval(), torch.rand(2, 3, 32, 32))[0]


MODELS = {
    "resnet18": resnet18,
    "vit_small": vit_small,
    "half_resnet18": lambda: half(resnet18()),
    "half_vit_small": lambda: half(vit_small()),
}


@torch.no_grad()
def prune(model: nn.Module, zeros: float) -> nn.Module:
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for layer in layers[1:-1]:
        smallest = layer.weight.abs().flatten().kthvalue(max(1, round(zeros * layer.weight.numel()))).values
        layer.weight[layer.weight.abs() <= smallest] = 0
    return model


LOOP = """
typedef float vec __attribute__((vector_size(64)));
extern "C" float loop(long count) {  // 16 chains: as many as hide the latency
  vec sums[16], a = vec{} + 0.5f, b = vec{} + 0.25f;
  for (int k = 0; k < 16; ++k) sums[k] = vec{} + 1.0f * k;  // else one of them is computed, for all
  for (long i = 0; i < count; ++i)
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) sums[k] = sums[k] * a + b;
  float all = 0;
  for (int k = 0; k < 16; ++k) all += sums[k][0];
  return all;
}
"""


def peak(threads: int, count: int = 10_000_000) -> float:
    """Multiply-adds of numbers a second in registers, in 1e9, the best of five."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "loop.cpp"), Path(folder, "loop.so")
        source.write_text(LOOP, encoding="utf-8")
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-Wno-psabi", "-shared", "-fPIC"]
        subprocess.run(["c++", *flags, "-o", library, source], check=True)
        loop = ctypes.CDLL(str(library)).loop
    loop.argtypes, loop.restype = [ctypes.c_long], ctypes.c_float
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(loop, [count] * threads))
            rates.append(count * 16 * 16 * threads / (time.perf_counter() - start) / 1e9)
    return max(rates)


CALLS = (SparseLayer, SparseChain, SparseConvBlock, SparseMLP)


def parts(module: nn.Module, given: tuple, named: dict) -> Iterator[tuple[SparseLayer, int]]:
    """The sparse layers that a call computes, and how many outputs each has for one row of its weights."""
    if isinstance(module, (SparseConvBlock, SparseMLP)):
        for layer in (module.first, module.second):
            given = (layer(*given[:1]),)
            yield layer, given[0].numel() // layer.rows.shape[1]
        return
    made = [given[0]]
    for layer, source, residual in module.steps if isinstance(module, SparseChain) else [(module, 0, -1)]:
        made.append(layer(made[source], made[residual]) if residual >= 0 else layer(made[source]))
        yield layer, made[-1].numel() // layer.rows.shape[1]


@torch.no_grad()
def profile(model: nn.Module, x: Tensor) -> str:
    fast, found, often = sparse_compile(model, x), {}, Counter()

    def seen(module: nn.Module, given: tuple, named: dict) -> None:
        found[module] = given, named
        often[module] += 1  # a model may take its images in parts

    layers = [module for module in fast.modules() if isinstance(module, CALLS)]
    hooks = [layer.register_forward_pre_hook(seen, with_kwargs=True) for layer in layers]
    fast(x)
    for hook in hooks:
        hook.remove()
    small, few = SparseLinear(nn.Linear(16, 16)), torch.ones(1, 16)
    calls = {"all": lambda: fast(x), "small": lambda: small(few)}
    calls |= {m: lambda m=m, g=given, k=named: m(*g, **k) for m, (given, named) in found.items()}
    measured = interleaved(calls, 8, burst=0.03)
    took = {name: timing.median * 1e3 * often.get(name, 1) for name, timing in measured.items()}
    best, alike = peak(torch.get_num_threads()), {}
    for module, (given, named) in found.items():
        layers = list(parts(module, given, named))
        key = tuple(given[0].shape), len(layers), layers[-1][0].rows.shape[1], often[module]
        alike.setdefault(key, []).append((module, layers * often[module]))
    lines = ["| input | layers x calls | million multiply-adds | us | of the peak | weights, KB | activations, KB |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for (shape, count, _, times), group in alike.items():
        work = sum(len(layer.entries) * outputs for _, layers in group for layer, outputs in layers) / 1e6
        us = sum(took[module] for module, _ in group)
        weights = sum(layer.entries.numel() * 4 for _, layers in group for layer, _ in layers) / times / 1e3
        outputs = [layer.rows.shape[1] * outputs for _, layers in group for layer, outputs in layers]
        calls = len(group) * times
        lines.append(
            f"| {tuple(shape)} | {count} x {calls} | {work:.1f} | {us:.0f} | {work * 1e3 / us / best:.0%} | "
            f"{weights:.0f} | {(math.prod(shape) * calls + sum(outputs)) * 4 / 1e3:.0f} |"
        )
    alone = sum(took[module] for module in found)
    work = flops_report(model, tuple(x.shape)).sparse_macs / 1e6
    lines.append(
        f"\nPeak: {best:.0f} billion multiply-adds a second. The whole model: {took['all']:.0f} us, in which its "
        f"{work:.0f} million multiply-adds but zeros are {work * 1e3 / took['all'] / best:.0%} of it; these layers "
        f"alone: {alone:.0f} us in {sum(often.values())} calls; "
        f"a call that computes next to nothing: {took['small']:.1f} us."
    )
    return "\n".join(lines)


def summary_row(name: str, report: dict, batch: int) -> str:
    """One line of the last table, from what `LatencyReport.to_dict` gives."""
    rows = [row for row in report["rows"] if row["batch"] == batch]
    (ours,) = (row for row in rows if row["runtime"] == OURS)
    best = min((row for row in rows if row["runtime"] != OURS), key=lambda row: row["times_ours"])
    quartiles = f"{ours['low_ms']:.2f} to {ours['high_ms']:.2f}"
    return (
        f"| {name} | {report['zeros']:.1%} | {report['threads']} | {batch} | {ours['median_ms']:.2f} ({quartiles}) "
        f"| {best['median_ms']:.2f} ({best['runtime']}) | {best['times_ours']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["resnet18", "vit_small"])
    parser.add_argument("--folders", nargs="*", default=[], help="also these models, with the zeros that they have")
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES))
    parser.add_argument("--seconds", type=float, default=15.0, help="for each batch size")
    parser.add_argument("--profile", action="store_true", help="where the time of a compiled model goes")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}\n")
    everything, summary = [], ["| model | zeros | threads | batch | ours, ms | best other, ms | over the best |"]
    summary.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")

    def keep(name: str, report: dict) -> None:
        everything.append({"model": name} | report)
        summary.extend(summary_row(name, report, batch) for batch in args.batches)
        print("\n".join(summary[-len(args.batches) :]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(everything, indent=1), encoding="utf-8")

    for name in args.models:
        for zeros in args.zeros:
            torch.manual_seed(0)
            model = prune(MODELS[name](), zeros).eval()
            for threads in args.threads:
                if args.profile:
                    torch.set_num_threads(threads)
                    for batch in args.batches:
                        print(f"{name}, {zeros:.0%} zeros, batch {batch}, {threads} threads\n", flush=True)
                        print(profile(model, torch.rand(batch, 3, 32, 32)), "\n", flush=True)
                    continue
                report = measure_latency(
                    model, (3, 32, 32), args.batches, threads, args.runtimes, args.seconds,
                    say=lambda text: print(text, file=sys.stderr, flush=True),
                )  # fmt: skip
                print(f"{name}, {zeros:.0%} zeros, {threads} threads\n\n{report.to_markdown()}\n", flush=True)
                keep(name, report.to_dict())
    for folder in args.folders:
        for threads in args.threads:
            options = {"batch": args.batches, "threads": threads, "runtimes": args.runtimes, "seconds": args.seconds}
            options |= {"revision": None, "image_size": None, "save": False}
            keep(Path(folder).name, bench_model(argparse.Namespace(model=folder, **options)))
    if args.profile:
        return
    print("\n" + "\n".join(summary))


if __name__ == "__main__":
    main()
