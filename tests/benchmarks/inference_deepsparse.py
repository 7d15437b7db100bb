"""
`sparse_compile` beside DeepSparse 1.8.0, the last that there is: `make bench-deepsparse`, on an idle machine.

DeepSparse (ended in 2025) needs packages of its own time, so it runs in a process of its own environment, which times
a burst of calls whenever it is its turn. The models are those of `inference.py`; logits are compared first. Its usage
analytics are switched off.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

import numpy as np


BURST = 0.05  # seconds, without the first call


def burst(call: Callable[[], object]) -> float:
    """Median milliseconds of a call."""
    taken, begun = [], time.perf_counter()
    while len(taken) < 2 or time.perf_counter() < begun + BURST:
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken[1:])


def serve(file: str, images: str, threads: int) -> None:
    """In DeepSparse's environment: logits into a file, then a burst for each line that comes."""
    from deepsparse import Engine

    inputs = [np.load(images)]
    engine = Engine(model=file, batch_size=len(inputs[0]), num_cores=threads)
    np.save(f"{images}.logits.npy", engine.run(inputs)[0])
    print("ready", flush=True)
    for _ in sys.stdin:
        print(burst(lambda: engine.run(inputs)), flush=True)


def compare(name: str, zeros: float, batch: int, threads: int, seconds: float, other: str) -> str:
    """A line of the table."""
    import torch

    from tests.benchmarks.inference import MODELS, prune
    from tscnc_hf import sparse_compile
    from tscnc_hf.inference.timing import ratios

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model, images = prune(MODELS[name](), zeros).eval(), torch.rand(batch, 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file, array = f"{folder}/model.onnx", f"{folder}/images.npy"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the older exporter, whose files DeepSparse reads
            torch.onnx.export(model, (images,), file, dynamo=False, opset_version=13)
        np.save(array, images.numpy())
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"NM_DISABLE_ANALYTICS": "True"}
        command = [other, __file__, "--serve", file, array, "--threads", str(threads)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            while (line := process.stdout.readline()) != "ready\n":  # it says its version first
                if not line:
                    raise SystemExit(f"error: {' '.join(command)} ended with {process.wait()}")
            fast = sparse_compile(model, images)
            expected, theirs = fast(images), torch.from_numpy(np.load(f"{array}.logits.npy"))
            difference = float((theirs - expected).abs().max() / (expected.max() - expected.min()))
            ours, others, end = [], [], time.perf_counter() + seconds
            while time.perf_counter() < end or len(ours) < 5:
                ours.append(burst(lambda: fast(images)))
                process.stdin.write("\n")
                process.stdin.flush()
                others.append(float(process.stdout.readline()))
            process.stdin.close()
    middle, (low, high) = ratios(others, ours).median, ratios(others, ours).spread
    return (
        f"| {name} | {zeros:.0%} | {batch} | {statistics.median(ours):.2f} | {statistics.median(others):.2f} | "
        f"{middle:.2f} ({low:.2f} to {high:.2f}) | {difference:.0e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vit_small"])
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.9, 0.95, 0.99])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each line")
    parser.add_argument("--python", help="of the environment that has deepsparse")
    parser.add_argument("--serve", nargs=2, metavar=("MODEL", "IMAGES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve, args.threads)
    print("| model | zeros | batch | ours, ms | DeepSparse, ms | times ours (quartiles) | difference |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for name in args.models:
        for zeros in args.zeros:
            for batch in args.batches:
                print(compare(name, zeros, batch, args.threads, args.seconds, args.python), flush=True)


if __name__ == "__main__":
    main()
