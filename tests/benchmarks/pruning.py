"""
What choosing masks costs: `make bench-pruning`.

First the selection alone: the 90 % smallest of 100 million scores, ours beside `torch.kthvalue` of all scores joined,
each in a process of its own, round by round: seconds, and what the process's memory grew by, in units of the scores.
(Ours are exact, which is checked; `score > threshold` drops all ties.)

Then the pruner at work, for each way of choosing: one choice of masks over the pruning interval of 10 steps, and what
is done in every step, as a share of a PGD-10 adversarial training step (ten times forward and gradient of the pixels,
then forward and backward of the weights; the default) and of a one-step one, the cheapest that the method takes.
Medians over rounds, smallest to largest.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from constraints import MODELS, PRUNING_INTERVAL, attack_step, seconds, training_step

from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning.allocation import Allocation
from tscnc_hf.method.pruning.pruner import Pruner
from tscnc_hf.method.pruning.topk import keep_largest


LAYERS = 20
WAYS = {
    "magnitude, global": {},
    "magnitude, erk": {"allocation": "erk"},
    "with floors": {"allocation": Allocation(layer_floor=0.001, row_floor=1)},
    "latent weights": {"latent": True},
    "learned scores": {"criterion": "learned"},
    "movement": {"criterion": "movement"},
}


def by_kthvalue(scores: list[torch.Tensor], pruned: int) -> list[torch.Tensor]:
    joined = torch.cat([score.reshape(-1) for score in scores])
    threshold = joined.kthvalue(pruned).values
    return [score > threshold for score in scores]


def select(how: str, count: int, threads: int) -> None:
    """In a process of its own: prints seconds, growth of the peak memory over the scores, and what is kept."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(count // LAYERS, generator=generator).abs_() for _ in range(LAYERS)]
    pruned = round(0.9 * count)
    function = keep_largest if how == "ours" else by_kthvalue
    function([score[:1000] for score in scores], round(0.9 * 1000 * LAYERS))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    masks = function(scores, pruned)
    elapsed = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * count)
    kept = sum(int(mask.sum()) for mask in masks)
    print(json.dumps({"seconds": elapsed, "memory": grown, "kept": kept}))


def compare_selection(count: int, threads: int, rounds: int) -> None:
    runs: dict[str, list[dict]] = {"ours": [], "kthvalue": []}
    for _ in range(rounds):
        for how, results in runs.items():
            command = [sys.executable, __file__, "--select", how, "--count", str(count), "--threads", str(threads)]
            results.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert all(run["kept"] == count - round(0.9 * count) for run in runs["ours"])
    assert all(0 <= runs["ours"][0]["kept"] - run["kept"] < count / 1000 for run in runs["kthvalue"])
    print(f"The 90 % smallest of {count:,} scores: seconds and peak memory in units of the scores, {rounds} rounds")
    for how, results in runs.items():
        times, memory = [run["seconds"] for run in results], [run["memory"] for run in results]
        print(
            f"  {how:<10} {statistics.median(times):6.2f} s ({min(times):.2f} to {max(times):.2f})   "
            f"{statistics.median(memory):.2f} ({min(memory):.2f} to {max(memory):.2f})"
        )
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs["ours"], runs["kthvalue"], strict=True)]
    print(f"  ours over kthvalue {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})\n")


def share_of_training(name: str, batch_size: int, rounds: int) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    x, y = torch.rand(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruners = {way: Pruner(weight_matrices(model), **options) for way, options in WAYS.items()}
    for pruner in pruners.values():
        pruner.begin(optimizer)
    training_step(model, x, y)

    def around_a_step(pruner: Pruner) -> None:
        pruner.before_step()
        pruner.after_step()
        pruner.apply_()

    steps: dict[str, list[float]] = {"PGD-10": [], "one-step": []}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for index in range(rounds + 1):
        attack, training = seconds(attack_step, model, x, y), seconds(training_step, model, x, y)
        if index:
            steps["PGD-10"].append(10 * attack + training)
            steps["one-step"].append(attack + training)
        for way, pruner in pruners.items():
            gradients = {key: weight.grad.clone() for key, weight in pruner.weights.items()}
            each = seconds(around_a_step, pruner)
            choice = seconds(pruner.update, 0.9)
            for key, weight in pruner.weights.items():
                weight.grad.copy_(gradients[key])  # learned scores turn it into their own
            if index:
                times[way].append(each + choice / PRUNING_INTERVAL)
    whole = ", ".join(f"{kind} step {statistics.median(values):.2f} s" for kind, values in steps.items())
    print(f"{name}, batch {batch_size}: {whole}")
    for way, values in times.items():
        line = f"  {way:<18} {1e3 * statistics.median(values):7.1f} ms a step"
        for kind, taken in steps.items():
            shares = [value / one for value, one in zip(values, taken, strict=True)]
            low, middle, high = min(shares), statistics.median(shares), max(shares)
            line += f"   {kind} {middle:.3%} ({low:.3%} to {high:.3%})"
        print(line)
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000_000)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet18", "vit_small"])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--select", choices=("ours", "kthvalue"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.select:
        select(args.select, args.count, args.threads)
        return
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads")
    compare_selection(args.count, args.threads, args.rounds)
    print("Choosing masks every 10 steps and applying them in each, as a share of a training step, 90 % zeros")
    for name in args.models:
        share_of_training(name, args.batch_size, args.rounds)


if __name__ == "__main__":
    main()
