"""
Time and memory over the size of the data set and of the batch: `make bench-inputs`.

Image folders of N and of 10 N generated JPEGs (256 x 224, decoded as they are read), and training steps of
`TSCNCTrainer` with the method on: a one-step attack, both constraints, pruning; ViT-S/16 and ResNet-50 from config at
224 px. Then a small network on 32 px images, held in memory and decoded as they are read.

Every case is a fresh process. Those of one model take their steps in turn, so that what disturbs the machine disturbs
all of them. Time per step is from one step's end to the next one's, decoding included: median (smallest to largest).
Peak memory is the process's largest resident set (ru_maxrss), at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


SIZES = {"n": 150, "10n": 1500}  # training images at 224 px
SMALL_SIZES = {"n": 2000, "10n": 20000}  # at 32 px
BATCHES = (4, 8, 16)
METHOD = {
    "objective": "pgd-at", "adversary": "fgsm-rs", "epsilon": "4/255", "tsc_weight": 1e-8, "cnc_weight": 1e-3,
    "target_sparsity": 0.9, "pruning_interval": 1, "pruning_start": 0.0, "learning_rate": 1e-4,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`size` is a key of SIZES; `in_memory` as in `load_image_data`."""

    model: str
    size: str
    batch: int
    in_memory: bool = False

    @property
    def side(self) -> int:
        return 32 if self.model == "resnet18-small" else 224


def write_images(folder: Path, count: int, side: int) -> None:
    """train/<class>/<number>.jpg and 40 of test; smooth noise, about as many bytes as a photograph."""
    generator = np.random.default_rng(0)
    for split, images in (("train", count), ("test", 40)):
        for number in range(images):
            path = folder / split / f"class{number % 4}" / f"{number:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(generator.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
            noise.resize((side * 8 // 7, side), Image.Resampling.BICUBIC).save(path, quality=90)


def train(case: Case, folder: str, threads: int, steps: int) -> None:
    """In a process of its own: at each line on stdin a step, whose seconds are printed; memory at the end."""
    import torch
    from transformers import TrainerCallback
    from transformers.utils.logging import disable_progress_bar

    from tscnc_hf.artifact.models.building import timm_model
    from tscnc_hf.data.loading import load_image_data
    from tscnc_hf.training.config import TSCNCConfig
    from tscnc_hf.training.trainer import TSCNCTrainer

    answers, sys.stdout = sys.stdout, sys.stderr  # the Trainer prints, too

    def answer(value: float) -> None:
        print(json.dumps(value), file=answers, flush=True)

    disable_progress_bar()
    torch.set_num_threads(threads)
    data = load_image_data(folder, image_size=case.side, in_memory=case.in_memory)
    small = {"channels": [32, 64, 64, 64], "layers": [1, 1, 1, 1]}
    name, model_args = ("resnet18", small) if case.side == 32 else (case.model, {})
    model, processor = timm_model(name, data.class_names, data.image_size, model_args=model_args)

    class InTurn(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.wait()

        def on_step_end(self, *args, **kwargs):
            answer(time.perf_counter() - self.start)
            self.wait()

        def wait(self):
            sys.stdin.readline()
            self.start = time.perf_counter()

    with tempfile.TemporaryDirectory() as output:
        config = TSCNCConfig(
            output, max_steps=steps, per_device_train_batch_size=case.batch, channels_last="resnet" in name,
            eval_strategy="no", save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=True, **METHOD,
        )  # fmt: skip
        trainer = TSCNCTrainer(model, config, train_dataset=data.train, processing_class=processor)
        trainer.add_callback(InTurn())
        answer(len(data.train))
        trainer.train()
    answer(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure(cases: list[Case], folders: dict, threads: int, steps: int) -> dict[Case, tuple[int, list[float], float]]:
    """Case -> (training images, seconds of each step but the first, peak bytes)."""
    command = [sys.executable, __file__, "--threads", str(threads), "--steps", str(steps), "--case"]
    running = {}
    for case in cases:
        what = json.dumps([vars(case), str(folders[case.side, case.size])])
        cache = os.environ | {"HF_DATASETS_CACHE": str(folders[case.side, case.size].with_suffix(".cache"))}
        pipes = {
            "env": cache,
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,
            "text": True,
        }
        running[case] = process = subprocess.Popen([*command, what], **pipes)
        process.images = json.loads(process.stdout.readline())  # ready
    seconds = {case: [] for case in cases}
    for _ in range(steps):
        for case, process in running.items():
            process.stdin.write("\n")
            process.stdin.flush()
            seconds[case].append(json.loads(process.stdout.readline()))
    found = {}
    for case, process in running.items():
        process.stdin.write("\n")
        process.stdin.close()
        found[case] = process.images, seconds[case][1:], json.loads(process.stdout.readline())
        assert process.wait(timeout=60) == 0
    return found


def show(found: dict[Case, tuple[int, list[float], float]]) -> None:
    for case, (images, seconds, peak) in found.items():
        how = "in memory" if case.in_memory else "as read"
        print(
            f"  {case.model:<22} {how:<10} {images:>6,} images  batch {case.batch:>3}  "
            f"{statistics.median(seconds):6.3f} s ({min(seconds):.3f} to {max(seconds):.3f})  {peak / 1e6:7,.0f} MB"
        )


def paired(found: dict, above: Case, below: Case) -> str:
    """Ratio of the times, step by step, and of the peaks."""
    ratios = [a / b for a, b in zip(found[above][1], found[below][1], strict=True)]
    text = f"time {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"{text}, peak memory {found[above][2] / found[below][2]:.3f}"


def linear(found: dict, cases: list[Case]) -> str:
    """The middle batch over the straight line through the smallest and the largest: 1 when linear."""
    low, middle, high = cases
    share = (middle.batch - low.batch) / (high.batch - low.batch)

    def over_line(values: tuple[float, float, float]) -> float:
        return values[1] / (values[0] + share * (values[2] - values[0]))

    times = [over_line(values) for values in zip(*(found[case][1] for case in cases), strict=True)]
    text = f"time {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
    return f"{text}, peak memory {over_line(tuple(found[case][2] for case in cases)):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7, help="of each case; the first is not counted")
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "resnet50"])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case, folder = json.loads(options.case)
        train(Case(**case), folder, options.threads, options.steps)
        return
    with tempfile.TemporaryDirectory() as root:
        folders = {}
        for side, sizes in ((224, SIZES), (32, SMALL_SIZES)):
            for size, count in sizes.items():
                folders[side, size] = Path(root) / f"{side}-{size}"
                write_images(folders[side, size], count, side)
        print(f"Seconds per step, median (smallest to largest) of {options.steps - 1}; peak memory", flush=True)
        for model in options.models:
            batches = [Case(model, "n", batch) for batch in BATCHES]
            larger = Case(model, "10n", BATCHES[1])
            found = measure([*batches, larger], folders, options.threads, options.steps)
            show(found)
            print(f"    ten times the images: {paired(found, larger, batches[1])}")
            print(f"    batch {BATCHES[1]} over the line from {BATCHES[0]} to {BATCHES[2]}: {linear(found, batches)}")
        cases = [Case("resnet18-small", size, 128, kept) for kept in (True, False) for size in SMALL_SIZES]
        found = measure(cases, folders, options.threads, options.steps)
        show(found)
        for below, above in (cases[:2], cases[2:]):
            how = "in memory" if below.in_memory else "as read"
            print(f"    ten times the images, {how}: {paired(found, above, below)}")
        extra = (found[cases[1]][2] - found[cases[0]][2]) / (found[cases[1]][0] - found[cases[0]][0])
        print(f"    in memory: {extra:,.0f} bytes more an image, of which pixels are {3 * 32 * 32:,}")


if __name__ == "__main__":
    main()
