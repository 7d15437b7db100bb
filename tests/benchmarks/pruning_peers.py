"""
Pruning under adversarial training, beside other libraries: `make bench-peers`.

The same network, images, epochs and seeds for each: torch's own `torch.nn.utils.prune`, NNCF and, for channels,
Torch-Pruning under one training loop written by hand (`train`), and `TSCNCTrainer` with the same options. A dense
network is trained by the loop once a seed, all start from it, and "not pruned" goes on without pruning. Sparsity rises
by one cubic in the first part of training, and masks are chosen at the same steps. Where libraries differ:

* Zeros: torch's and our plain arm rank the weights of all layers by magnitude, NNCF by magnitude over the norm of
  their layer, our arm LAMP by the square over the sum of the squares in its layer that are no smaller. With NNCF and
  ours a pruned weight can return until the schedule ends.
* Channels: every layer loses the same share, until so many multiply-adds are gone. Torch-Pruning cuts them out while
  training, those of residual streams too, in a few rounds, since each makes new parameters, of which the optimizer
  knows nothing. Ours zeroes those inside of blocks, and `slim` cuts them out in the end.

What each leaves on disk is tried in a process without this library (stock_loading.py). Times are of all in turn in one
process: a step over one of the loop without pruning, median (quartiles), of steps in which no mask is chosen, and what
a choice takes on top.

Rows are lines of JSON, one a cell. Started again it goes on: finished cells are skipped. A library that is not
installed is left out, and named. All of it is in torch's default memory format: NNCF's ranking fails on the other.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from stock_loading import attempt
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from tscnc_hf import (
    TSCNCConfig,
    TSCNCTrainer,
    evaluate_robustness,
    flops_report,
    load_slim,
    load_sparse,
    save_sparse,
    slim,
    sparsity_report,
)
from tscnc_hf.artifact.files.identity import RunIdentity, commit
from tscnc_hf.artifact.files.state import load_state, save_state
from tscnc_hf.artifact.models.building import MEAN, STD, timm_model
from tscnc_hf.artifact.models.saving import disk_state
from tscnc_hf.data.loading import ImageData, load_image_data
from tscnc_hf.method.adversarial.pixels import pixel_quantity
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning.pruner import Pruner
from tscnc_hf.method.pruning.unit_allocation import unit_allocation
from tscnc_hf.training.ablation.grid import Cell
from tscnc_hf.training.ablation.rows import Results, origin


ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "recipes/configs/ablation_cnn.yaml"
CLIP = 1.0  # what the Trainer clips gradients to
WARM = 2  # steps that are not timed


@dataclass(frozen=True)
class Recipe:
    """How the network is trained, by the loop and by the Trainer. Names and units are those of `TSCNCConfig`."""

    epsilon: float
    learning_rate: float
    weight_decay: float
    warmup_steps: float
    per_device_train_batch_size: int
    pruning_end: float
    pruning_interval: int
    channel_rounds: int = 5


# ---- the loop ----


def batches(data, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Epoch after epoch, each in an order of its own."""
    generator, epoch = torch.Generator().manual_seed(seed), 0
    while True:
        data.set_epoch(epoch)
        for indices in torch.randperm(len(data), generator=generator).split(size):
            yield data.__getitems__(indices.tolist())
        epoch += 1


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, recipe.learning_rate)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    return model((x - MEAN) / STD).logits


def train(
    model: nn.Module,
    given: Iterable[Mapping[str, Tensor]],
    steps: int,
    recipe: Recipe,
    seed: int,
    prune: Callable[[int], bool] = lambda done: False,
) -> Iterator[None]:
    """
    PGD-AT on the images of FGSM-RS, as everybody writes it; `next` takes a step.

    Args:
        prune: is called with how many steps are done; true if the model has new parameters since.
    """
    generator, epsilon = torch.Generator().manual_seed(seed), recipe.epsilon
    optimizer, warm = adamw(model, recipe), math.ceil(recipe.warmup_steps * steps)
    for step, batch in zip(range(steps), given, strict=False):
        x, y = batch["pixel_values"], batch["labels"]
        late = 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(steps - warm, 1))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * (step / warm if step < warm else late)
        model.eval()
        start = (x + epsilon * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits(model, start), y), start)
        moved = start.detach() + 1.25 * epsilon * gradient.sign()
        x_adv = (x + (moved - x).clamp(-epsilon, epsilon)).clamp(0, 1)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(logits(model, x_adv), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if prune(step + 1):
            optimizer = adamw(model, recipe)
        yield


class Cubic:
    """done steps -> what is to be gone by then, at the steps where masks are chosen; None at the others."""

    def __init__(self, target: float, steps: int, recipe: Recipe, rounds: int | None = None):
        self.target, self.end = target, max(round(recipe.pruning_end * steps), 1)
        self.interval = recipe.pruning_interval if rounds is None else math.ceil(self.end / rounds)

    def __call__(self, done: int) -> float | None:
        if done != self.end and (done > self.end or done % self.interval):
            return None
        return self.target * (1 - (1 - done / self.end) ** 3)

    @property
    def choices(self) -> list[int]:
        """The steps at which masks are chosen; 0 is before the first."""
        return [done for done in range(self.end + 1) if self(done) is not None]


# ---- the libraries: each is made with a model, called after each step, and gives a plain model back ----


class NotPruned:
    package = None  # where it is from

    def __init__(self, model: nn.Module, target: float, steps: int, recipe: Recipe, x: Tensor):
        """`target` is the share of weights, or of multiply-adds, that goes; `x` a batch that the model takes."""
        self.model = model

    def __call__(self, done: int) -> bool:
        return False

    def finish(self) -> nn.Module:
        return self.model


class TorchPrune(NotPruned):
    """Which has no schedule of its own, and counts what is to go among what is still there."""

    def __init__(self, model, target, steps, recipe, x):
        super().__init__(model, target, steps, recipe, x)
        self.due, self.pruned = Cubic(target, steps, recipe), 0
        self.layers = [(module, "weight") for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        self.count = sum(module.weight.numel() for module, _ in self.layers)

    def __call__(self, done):
        share = self.due(done)
        if share is not None and (more := round(share * self.count) - self.pruned) > 0:
            prune.global_unstructured(self.layers, prune.L1Unstructured, amount=more)
            self.pruned += more
        return False

    def finish(self):
        for layer in self.layers:
            prune.remove(*layer)
        return self.model


class NNCF(NotPruned):
    package = "nncf"

    def __init__(self, model, target, steps, recipe, x):
        import nncf
        from nncf.torch.function_hook.pruning.magnitude.schedulers import MultiStepMagnitudePruningScheduler

        mode, due, self.x = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL, Cubic(target, steps, recipe), x
        self.model = nncf.prune(model, mode, ratio=0.0, examples_inputs=x)
        self.scheduler = MultiStepMagnitudePruningScheduler(
            self.model, mode=mode, steps={done: due(done) for done in due.choices}
        )
        self.choices = due.choices

    def __call__(self, done):
        if done in self.choices:
            self.scheduler.step(done)
        return False

    def finish(self):
        import nncf

        return nncf.strip(self.model, strip_format=nncf.StripFormat.IN_PLACE, example_input=self.x)


class TorchPruning(NotPruned):
    package = "torch-pruning"

    def __init__(self, model, target, steps, recipe, x):
        import torch_pruning

        super().__init__(model, target, steps, recipe, x)
        self.due, self.shape = Cubic(target, steps, recipe, recipe.channel_rounds), (1, *x.shape[1:])
        self.dense = flops_report(model, self.shape).macs
        self.pruner = torch_pruning.pruner.BasePruner(
            model, x, torch_pruning.importance.GroupMagnitudeImportance(), pruning_ratio=1.0, iterative_steps=200,
            ignored_layers=[model.timm_model.get_classifier()],
            output_transform=lambda output: output.logits,
        )  # fmt: skip

    def __call__(self, done):
        gone = self.due(done)
        if gone is None:
            return False
        while flops_report(self.model, self.shape).macs > (1 - gone) * self.dense:
            self.pruner.step()
        return True


BARE = "not pruned"
PEERS = {BARE: NotPruned, "torch.nn.utils.prune": TorchPrune, "NNCF": NNCF, "Torch-Pruning": TorchPruning}
TSC = "TSCNCTrainer, TSC"
LAMP = "TSCNCTrainer, LAMP"
OURS = ("TSCNCTrainer, plain", LAMP, TSC, "TSCNCTrainer, channels")
CHANNELS = ("Torch-Pruning", "TSCNCTrainer, channels")
STEP = "a step"  # the row of times


def package_of(arm: str) -> str | None:
    return PEERS[arm].package if arm in PEERS else None


def missing(arm: str) -> str | None:
    """Why an arm is left out."""
    package = package_of(arm)
    if package is None or find_spec(package.replace("-", "_")):
        return None
    return f"{arm} is left out: {package} is not installed (make bench-peers installs it)"


def sparsity_for(model: nn.Module, gone: float, shape: tuple[int, ...]) -> float:
    """
    The sparsity at which pruning the channels of this network takes so many multiply-adds off. What training makes of
    the same sparsity differs a little.

    Raises:
        ValueError: channels inside of blocks cannot take so many off.
    """
    low, high, dense, reached = 0.0, 1.0, flops_report(model, shape).macs, False
    pruned = copy.deepcopy(model)
    records = list(weight_matrices(pruned))
    allocation = unit_allocation(pruned, records, ("channels",), "uniform")
    for _ in range(9):
        tried, pruner = (low + high) / 2, Pruner(records, allocation=allocation)
        pruned.load_state_dict(model.state_dict())
        try:
            pruner.check(tried)
        except ValueError:  # more than channels can give
            high = tried
            continue
        pruner.update(tried)
        pruner.apply_()
        enough = flops_report(pruned, shape).sparse_macs <= (1 - gone) * dense
        low, high, reached = (low, tried, True) if enough else (tried, high, reached)
    if not reached:
        raise ValueError(f"channels={gone}: those inside of blocks cannot take so many multiply-adds off, give less")
    return high


# ---- the benchmark ----


class Benchmark:
    def __init__(self, args: argparse.Namespace):
        given = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
        keys = ("learning_rate", "weight_decay", "warmup_steps", "per_device_train_batch_size", "pruning_end")
        keys = (*keys, "pruning_interval")
        self.recipe = Recipe(pixel_quantity("epsilon", given["epsilon"]), **{key: given[key] for key in keys})
        self.args, self.given, self.label = args, given, given["label"]
        self.data: ImageData = load_image_data(
            args.dataset, augmentation=given["augmentation"], train_limit=args.train_limit, test_limit=args.test_limit
        )
        self.shape = (1, self.data.channels, *self.data.image_size)
        self.results, self.folder = Results(args.results), Path(args.results).parent
        whole = math.ceil(len(self.data.train) / self.recipe.per_device_train_batch_size)
        self.steps = args.steps or args.epochs * whole
        self.dense_steps = args.steps or args.dense_epochs * whole

    def network(self, seed: int):
        """(model, image processor), with fresh weights."""
        torch.manual_seed(seed)
        shape = (self.data.class_names, self.data.image_size, self.data.channels)
        return timm_model(self.given["architecture"], *shape, model_args=self.given["model_args"])

    def identity(self, **more) -> RunIdentity:
        """Of the dense training, and of whatever decides what comes after."""
        options = asdict(self.recipe) | {"dense_steps": self.dense_steps}
        options |= {name: self.given[name] for name in ("architecture", "model_args", "augmentation")}
        return RunIdentity(options | more, self.data.train.identity)

    def settings(self, arm: str) -> str:
        """Of everything that decides an arm's row but the code."""
        options = {"steps": self.args.timed_steps if arm == STEP else self.steps}
        options |= {"test": self.data.test.identity, "attack_steps": self.args.attack_steps} if arm != STEP else {}
        options |= {"tsc_weight": self.args.tsc_weight, "tsc_a": self.args.tsc_a} if arm in (TSC, STEP) else {}
        libraries = [name for name in (PEERS if arm == STEP else [arm]) if package_of(name) and missing(name) is None]
        options |= {package_of(name): version(package_of(name)) for name in libraries}
        return self.identity(**options).digest()

    def dense(self, seed: int) -> nn.Module:
        """A new copy of the dense network of a seed, which is trained where it was not."""
        model, _ = self.network(seed)
        path = self.folder / f"dense-s{seed}-{self.identity().digest()}.safetensors"
        if not path.exists():
            given = batches(self.data.train, self.recipe.per_device_train_batch_size, seed)
            for _ in train(model, given, self.dense_steps, self.recipe, seed):
                pass
            save_state(dict(model.state_dict()), path)
        model.load_state_dict(load_state(path)[0])
        return model

    def loop(self, arm: str, model: nn.Module, target: float, steps: int, seed: int) -> tuple[NotPruned, Iterator]:
        """A library, and the loop with it; `next` takes a step."""
        x = torch.rand(2, *self.shape[1:], generator=torch.Generator().manual_seed(0))
        library = PEERS[arm](model, target, steps, self.recipe, x)
        given = batches(self.data.train, self.recipe.per_device_train_batch_size, 1000 + seed)
        return library, train(library.model, given, steps, self.recipe, 1000 + seed, library)

    def trainer(self, arm: str, model: nn.Module, target: float, steps: int, seed: int, folder: str) -> TSCNCTrainer:
        options = {"target_sparsity": target}
        if arm == LAMP:
            options |= {"pruning_criterion": "lamp"}
        if arm == TSC:
            options |= {"tsc_weight": self.args.tsc_weight, "tsc_a": self.args.tsc_a}
        if arm in CHANNELS:
            options = {"target_sparsity": sparsity_for(model, target, self.shape), "pruning_structure": "channels"}
            options |= {"pruning_scope": "uniform"}
        recipe = {name: value for name, value in asdict(self.recipe).items() if name != "channel_rounds"}
        config = TSCNCConfig(
            folder, objective="pgd-at", adversary="fgsm-rs", pruning_start=0.0, max_steps=steps, seed=1000 + seed,
            lr_scheduler_type="cosine", max_grad_norm=CLIP, eval_strategy="no", save_strategy="no", logging_steps=100,
            report_to="none", disable_tqdm=True, use_cpu=True, **recipe, **options,
        )  # fmt: skip
        processor = self.network(seed)[1]
        trainer = TSCNCTrainer(model, config, train_dataset=self.data.train, processing_class=processor)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def run(self, cell: Cell) -> dict:
        """Trains a cell and measures it: a row."""
        model = self.dense(cell.seed)
        dense = flops_report(model, self.shape).macs
        start = time.perf_counter()
        if cell.arm in PEERS:
            library, steps = self.loop(cell.arm, model, cell.sparsity, self.steps, cell.seed)
            for _ in steps:
                pass
            pruned = library.finish()
        else:
            with tempfile.TemporaryDirectory() as folder:
                trainer = self.trainer(cell.arm, model, cell.sparsity, self.steps, cell.seed, folder)
                trainer.train()
            pruned = trainer.model
        seconds = time.perf_counter() - start
        pruned.eval().zero_grad()
        report = evaluate_robustness(
            pruned, self.data.test, ["clean", f"pgd-{self.args.attack_steps}"], epsilon=self.recipe.epsilon,
            seed=cell.seed, batch_size=250, processing_class=self.network(0)[1], masking=False, progress=False,
        )  # fmt: skip
        flops = flops_report(pruned, self.shape)
        return {
            "n": report.n,
            "accuracy": {attack.name: attack.accuracy for attack in report.attacks},
            "zeros": sparsity_report(pruned).sparsity,
            "macs": flops.sparse_macs / dense,
            "parameters": sum(parameter.numel() for parameter in pruned.parameters()),
            "disk": self.left_on_disk(cell.arm, pruned),
            "seconds": round(seconds, 1),
        }

    def left_on_disk(self, arm: str, model: nn.Module) -> dict[str, dict]:
        """Form -> bytes of its weights, and what stock libraries, and for our own forms we, make of its folder."""
        x, found = torch.rand(4, *self.shape[1:], generator=torch.Generator().manual_seed(1)), {}
        with tempfile.TemporaryDirectory() as root, torch.no_grad():
            right = {"inputs": (x - MEAN) / STD, "logits": logits(model, x)}
            if arm in CHANNELS:
                small = slim(model)[0] if arm in OURS else model
                forms = {"cut": lambda folder: small.save_pretrained(folder, state_dict=disk_state(small))}
            else:
                forms = {"dense": lambda folder: model.save_pretrained(folder, state_dict=disk_state(model))}
                if arm in OURS:
                    forms["packed"] = lambda folder: save_sparse(model, folder)
                    forms["packed, zstd"] = lambda folder: save_sparse(model, folder, compression="zstd")
            folders = {form: Path(root, form.replace(", ", "-")) for form in forms}
            for form, save in forms.items():
                save(folders[form])
                found[form] = {"bytes": sum(file.stat().st_size for file in folders[form].glob("*.safetensors"))}
                save_file(right, folders[form] / "expected.safetensors")
            for form, said in zip(forms, stock_libraries(list(folders.values())), strict=True):
                found[form] |= {library: answer.replace(root, "...") for library, answer in said.items()}
                if arm in OURS and form != "dense":
                    load = load_slim if form == "cut" else load_sparse
                    found[form]["tscnc_hf"] = attempt(partial(load, folders[form]), right)
            if arm == "Torch-Pruning":  # what its README has: a pickle of the module
                torch.save(model, Path(root, "model.pth"))
                found["pickle"] = {"bytes": Path(root, "model.pth").stat().st_size}
                found["pickle"]["torch.load"] = attempt(lambda: torch.load(Path(root, "model.pth")), right)
        return found

    def time_steps(self, target: float, gone: float, seed: int) -> dict[str, dict]:
        """
        Arm -> a step of it, also over one of the loop without pruning. Each of ours is trained beside that, the first
        one beside all libraries.
        """
        times: dict[str, list[tuple[int, float, float]]] = {}
        for arm in OURS:
            beside = [name for name in PEERS if missing(name) is None] if arm == OURS[0] else [BARE]
            amounts = {name: gone if name in CHANNELS else target for name in (arm, *beside)}
            count = self.args.timed_steps
            turns = InTurn({name: self.loop(name, self.dense(seed), amounts[name], count, seed)[1] for name in beside})
            with tempfile.TemporaryDirectory() as folder:
                trainer = self.trainer(arm, self.dense(seed), amounts[arm], count, seed, folder)
                trainer.add_callback(turns)
                trainer.train()
            for name, taken in ({arm: turns.own} | turns.times).items():
                done = range(1, count + 1)
                times.setdefault(name, []).extend(zip(done, taken, turns.times[BARE], strict=True))
        rounds = {"Torch-Pruning": self.recipe.channel_rounds}
        return {
            name: spread(steps, Cubic(1.0, self.args.timed_steps, self.recipe, rounds.get(name)).choices)
            for name, steps in times.items()
        }


def stock_libraries(folders: list[Path]) -> list[dict[str, str]]:
    """What they make of each, in a process of their own."""
    command = [sys.executable, ROOT / "tests/benchmarks/stock_loading.py", *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


class InTurn(TrainerCallback):
    """After each step of the Trainer one of each loop, all timed."""

    def __init__(self, loops: dict[str, Iterator]):
        self.loops, self.times, self.own = loops, {name: [] for name in loops}, []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.own.append(time.perf_counter() - self.start)
        for name, loop in self.loops.items():
            start = time.perf_counter()
            next(loop)
            self.times[name].append(time.perf_counter() - start)
        self.start = time.perf_counter()


def spread(steps: list[tuple[int, float, float]], choices: list[int]) -> dict:
    """
    Args:
        steps: how many are done with a step, its seconds, and those of the bare one beside it.
        choices: how many are done where masks are chosen.

    Returns:
        Of the steps that choose no masks, without the first, which warm up: their number, the median of the seconds,
        and of the ratio between its quartiles. The median of the seconds that a choice takes on top.
    """
    usual = [(own, bare) for done, own, bare in steps if done > WARM and done not in choices]
    middle = statistics.median(own for own, _ in usual)
    ratio = statistics.quantiles((own / bare for own, bare in usual), n=4)
    choice = statistics.median(own for done, own, _ in steps if done in choices) - middle
    return {"steps": len(usual), "seconds": middle, "ratio": ratio, "choice": choice}


def say(row: Mapping) -> str:
    if "times" in row:
        lines = [
            f"  {arm:<23} {1e3 * found['seconds']:6.1f} ms   {found['ratio'][1]:.3f} ({found['ratio'][0]:.3f} to "
            f"{found['ratio'][2]:.3f}); a choice of masks {1e3 * found['choice']:.1f} ms more"
            for arm, found in row["times"].items()
        ]
        return "\n".join(["A step, and over one of the loop without pruning:", *lines])
    shown = ", ".join(f"{name} {value:.1%}" for name, value in row["accuracy"].items())
    disk = ", ".join(f"{form} {said['bytes']:,} bytes" for form, said in row["disk"].items())
    return (
        f"{row['arm']:<23} {row['sparsity']:.0%}, seed {row['seed']}: {shown}; zeros {row['zeros']:.2%}, "
        f"multiply-adds {row['macs']:.1%}; {disk}; {row['seconds']:.0f} s"
    )


def summary(rows: list[Mapping]) -> str:
    """Means over the seeds, with the smallest and the largest, as Markdown."""
    cells: dict[tuple, list[Mapping]] = {}
    for row in rows:
        if "times" not in row:
            cells.setdefault((row["sparsity"], row["arm"]), []).append(row)
    lines = ["| | gone | seeds | clean | PGD | zeros | multiply-adds | bytes |", "| --- |" + " ---: |" * 7]

    def over_seeds(values: list[float]) -> str:
        return f"{100 * statistics.fmean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"

    for (gone, arm), same in sorted(cells.items()):
        clean, robust = zip(*(row["accuracy"].values() for row in same), strict=True)
        sizes = {form: statistics.fmean(row["disk"][form]["bytes"] for row in same) for form in same[0]["disk"]}
        lines.append(
            f"| {arm} | {gone:.0%} | {len(same)} | {over_seeds(clean)} | {over_seeds(robust)} | "
            f"{statistics.fmean(row['zeros'] for row in same):.2%} | "
            f"{statistics.fmean(row['macs'] for row in same):.1%} | "
            f"{', '.join(f'{form} {size:,.0f}' for form, size in sizes.items())} |"
        )
    said = {
        (arm, form, library): answer
        for (_, arm), same in sorted(cells.items())
        for form, answers in same[0]["disk"].items()
        for library, answer in answers.items()
        if library != "bytes"
    }
    lines += ["", *(f"{arm}, {form}, {library}: {answer}" for (arm, form, library), answer in said.items())]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG, help="network and recipe")
    parser.add_argument("--dataset", default="uoft-cs/cifar10", help='Hub id, folder, or "digits"')
    parser.add_argument("--train_limit", type=int, default=8000, help="images to train on")
    parser.add_argument("--test_limit", type=int, default=1000)
    parser.add_argument("--dense_epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3, help="of pruning")
    parser.add_argument("--steps", type=int, help="in place of either number of epochs, for a rehearsal")
    parser.add_argument("--attack_steps", type=int, default=20, help="of PGD on the test images")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.95, 0.99])
    parser.add_argument("--channels", type=float, default=0.5, help="share of the multiply-adds that goes")
    parser.add_argument("--tsc_weight", type=float, default=1e-5)
    parser.add_argument("--tsc_a", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=(*PEERS, *OURS), default=[*PEERS, *OURS])
    parser.add_argument("--timed_steps", type=int, default=60, help="of each; 0 times none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", default="outputs/peers/rows.jsonl", help="file of rows, one a finished cell")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    benchmark = Benchmark(args)
    print(f"torch {torch.__version__}, {args.threads} threads; {benchmark.data.description}")
    print(f"{benchmark.dense_steps} steps dense, {benchmark.steps} steps while pruning; rows in {args.results}")
    for reason in filter(None, map(missing, args.arms)):
        print(reason)
    amounts = {arm: [args.channels] for arm in CHANNELS} | {BARE: [0.0]}
    cells = [Cell(STEP, args.sparsities[0], args.seeds[0])] if args.timed_steps else []
    for seed in args.seeds:
        for arm in args.arms:
            if missing(arm) is None:
                cells += [Cell(arm, amount, seed) for amount in amounts.get(arm, args.sparsities)]
    rows, revision = [], commit()
    for cell in cells:
        settings = benchmark.settings(cell.arm)
        row = benchmark.results.find(benchmark.label, cell, settings)
        if row is None:
            row = {"model": benchmark.label, "arm": cell.arm, "sparsity": cell.sparsity, "seed": cell.seed}
            if cell.arm == STEP:
                row |= {"accuracy": {}, "times": benchmark.time_steps(cell.sparsity, args.channels, cell.seed)}
            else:
                row |= benchmark.run(cell)
            row |= {"version": version(package)} if (package := package_of(cell.arm)) else {}
            row |= {"split": "test"} | origin(torch.device("cpu"), revision) | {"settings": settings}
            benchmark.results.add(row)
        rows.append(row)
        print(say(row), flush=True)
    print(f"\n{summary(rows)}")


if __name__ == "__main__":
    main()
