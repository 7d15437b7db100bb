"""
Pruning under adversarial training with other libraries: `make bench-peers`.

The same network, images, epochs and seeds for each: torch's own `torch.nn.utils.prune`, NNCF and, for channels,
Torch-Pruning under one training loop written by hand (`train`), and `TSCNCTrainer` with the same options. A dense
network is trained by the loop once a seed, all start from it, and "not pruned" goes on without pruning. Sparsity rises
by one cubic in the first part of training, masks are chosen at the same steps. Where libraries differ:

* Zeros: ours and torch's rank the weights of all layers by magnitude, NNCF by magnitude over the norm of their layer.
  NNCF and ours let a pruned weight return until the schedule ends.
* Channels: until the network has so many multiply-adds less. Torch-Pruning cuts them out while training, residual
  streams too, in a few rounds, since each makes new parameters, of which the optimizer knows nothing; ours zeroes those
  inside of blocks, and cuts them out in the end.

What each leaves is tried in a process without this library (stock_loading.py). Seconds a step are of all in turn in one
process, over the loop without pruning beside it: median (quartiles), and all steps together.

Rows are lines of JSON, one a cell. Started again it goes on: finished cells are skipped. A library that is not
installed is left out, and named.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import TrainerCallback

from tscnc_hf import TSCNCConfig, TSCNCTrainer, evaluate_robustness, flops_report, load_slim, load_sparse, save_sparse
from tscnc_hf import slim, sparsity_report
from tscnc_hf.artifact.files.identity import RunIdentity
from tscnc_hf.artifact.files.state import load_state, save_state
from tscnc_hf.artifact.models.building import MEAN, STD, timm_model
from tscnc_hf.artifact.models.saving import disk_state
from tscnc_hf.data.loading import ImageData, load_image_data
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning.pruner import Pruner
from tscnc_hf.method.pruning.unit_allocation import unit_allocation
from tscnc_hf.training.ablation.grid import Cell
from tscnc_hf.training.ablation.rows import Results, origin


ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "recipes/configs/ablation_cnn.yaml"
CLIP = 1.0  # what the Trainer clips gradients to


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
    return torch.optim.AdamW([{"params": decayed, "weight_decay": recipe.weight_decay},
                              {"params": rest, "weight_decay": 0.0}])  # fmt: skip


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
        self.interval = recipe.pruning_interval if rounds is None else max(self.end // rounds, 1)

    def __call__(self, done: int) -> float | None:
        if done != self.end and (done > self.end or done % self.interval):
            return None
        return self.target * (1 - (1 - done / self.end) ** 3)

    @property
    def choices(self) -> list[int]:
        return [done for done in range(self.end + 1) if self(done) is not None]


# ---- the libraries: each is made with a model, called after each step, and gives a plain model back ----


class NotPruned:
    needs = package = None

    def __init__(self, model: nn.Module, target: float, steps: int, recipe: Recipe, x: Tensor):
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
    needs, package = "nncf", "nncf"

    def __init__(self, model, target, steps, recipe, x):
        import nncf
        from nncf.torch.function_hook.pruning.magnitude.schedulers import MultiStepMagnitudePruningScheduler

        mode, due, self.x = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL, Cubic(target, steps, recipe), x
        self.model = nncf.prune(model, mode, ratio=0.0, examples_inputs=x)
        self.scheduler = MultiStepMagnitudePruningScheduler(
            self.model, mode=mode, steps={done: due(done) for done in due.choices}
        )
        self.choices = set(due.choices)

    def __call__(self, done):
        if done in self.choices:
            self.scheduler.step(done)
        return False

    def finish(self):
        import nncf

        return nncf.strip(self.model, strip_format=nncf.StripFormat.IN_PLACE, example_input=self.x)


class TorchPruning(NotPruned):
    needs, package = "torch_pruning", "torch-pruning"

    def __init__(self, model, target, steps, recipe, x):
        import torch_pruning

        super().__init__(model, target, steps, recipe, x)
        self.due, self.shape = Cubic(target, steps, recipe, recipe.channel_rounds), (1, *x.shape[1:])
        self.dense = flops_report(model, self.shape).macs
        self.pruner = torch_pruning.pruner.BasePruner(
            model, x, torch_pruning.importance.GroupMagnitudeImportance(), global_pruning=True, pruning_ratio=1.0,
            iterative_steps=400, ignored_layers=[model.timm_model.get_classifier()],
            output_transform=lambda output: output.logits,
        )  # fmt: skip

    def __call__(self, done):
        gone = self.due(done)
        if gone is None:
            return False
        while flops_report(self.model, self.shape).macs > (1 - gone) * self.dense:
            self.pruner.step()
        return True


PEERS = {
    "not pruned": NotPruned,
    "torch.nn.utils.prune": TorchPrune,
    "NNCF": NNCF,
    "Torch-Pruning": TorchPruning,
}
OURS = ("TSCNCTrainer, plain", "TSCNCTrainer, TSC", "TSCNCTrainer, channels")
CHANNELS = ("Torch-Pruning", "TSCNCTrainer, channels")


def missing(arm: str) -> str | None:
    """Why an arm is left out."""
    needs = PEERS[arm].needs if arm in PEERS else None
    if needs is None or find_spec(needs):
        return None
    return f"{arm} is left out: {PEERS[arm].package} is not installed (make bench-peers installs it)"


def sparsity_for(model: nn.Module, gone: float, shape: tuple[int, ...]) -> float:
    """
    The sparsity at which pruning the channels of this network leaves so many multiply-adds less. What training makes of
    the same sparsity differs a little.
    """
    low, high, dense = 0.0, 1.0, flops_report(model, shape).macs
    for _ in range(12):
        tried, pruned = (low + high) / 2, copy.deepcopy(model)
        records = list(weight_matrices(pruned))
        pruner = Pruner(records, allocation=unit_allocation(pruned, records, ("channels",), "global"))
        try:
            pruner.check(tried)
            pruner.update(tried)
            pruner.apply_()
            enough = flops_report(pruned, shape).sparse_macs <= (1 - gone) * dense
        except ValueError:  # more than channels can give
            enough = True
        low, high = (low, tried) if enough else (tried, high)
    return low


# ---- the benchmark ----


class Benchmark:
    def __init__(self, args: argparse.Namespace):
        given = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
        keys = ("learning_rate", "weight_decay", "warmup_steps", "per_device_train_batch_size", "pruning_end")
        self.recipe = Recipe(8 / 255, *(given[key] for key in keys), given["pruning_interval"])
        self.args, self.given = args, given
        self.data: ImageData = load_image_data(
            args.dataset, augmentation=given["augmentation"], train_limit=args.train_limit, test_limit=args.test_limit
        )
        self.shape = (1, self.data.channels, *self.data.image_size)
        self.results, self.folder = Results(args.results), Path(args.results).parent
        whole = math.ceil(len(self.data.train) / self.recipe.per_device_train_batch_size)
        self.steps = args.steps or args.epochs * whole
        self.dense_steps = args.steps or args.dense_epochs * whole

    def network(self, seed: int):
        torch.manual_seed(seed)
        shape = (self.data.class_names, self.data.image_size, self.data.channels)
        return timm_model(self.given["architecture"], *shape, model_args=self.given["model_args"])

    def identity(self, arm: str) -> RunIdentity:
        options = asdict(self.recipe) | {"steps": self.steps, "dense_steps": self.dense_steps}
        options |= {name: self.given[name] for name in ("architecture", "model_args", "augmentation")}
        options |= {"n": len(self.data.test), "identity": self.data.test.identity["digest"]}
        if arm == "TSCNCTrainer, TSC":
            options |= {"tsc_weight": self.args.tsc_weight, "tsc_a": self.args.tsc_a}
        if arm in PEERS and PEERS[arm].package:
            options["version"] = version(PEERS[arm].package)
        return RunIdentity(options, self.data.train.identity)

    def dense(self, seed: int) -> nn.Module:
        """A new copy of the dense network of a seed, which is trained where it was not."""
        model, _ = self.network(seed)
        options = {"seed": seed, "steps": self.dense_steps}
        path = self.folder / f"dense-s{seed}-{RunIdentity(options, self.identity('').to_dict()).digest()}.safetensors"
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
        if arm == "TSCNCTrainer, TSC":
            options |= {"tsc_weight": self.args.tsc_weight, "tsc_a": self.args.tsc_a}
        if arm == "TSCNCTrainer, channels":
            options = {"target_sparsity": sparsity_for(model, target, self.shape), "pruning_structure": "channels"}
        recipe = {name: value for name, value in asdict(self.recipe).items() if name != "channel_rounds"}
        config = TSCNCConfig(
            folder, objective="pgd-at", adversary="fgsm-rs", pruning_start=0.0, max_steps=steps, seed=1000 + seed,
            lr_scheduler_type="cosine", max_grad_norm=CLIP, eval_strategy="no", save_strategy="no", logging_steps=100,
            report_to="none", disable_tqdm=True, use_cpu=True, **recipe, **options,
        )  # fmt: skip
        return TSCNCTrainer(model, config, train_dataset=self.data.train, processing_class=self.network(0)[1])

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
        return {"n": report.n, "accuracy": {attack.name: attack.accuracy for attack in report.attacks},
                "zeros": sparsity_report(pruned).sparsity, "macs": flops.sparse_macs / dense,
                "parameters": sum(parameter.numel() for parameter in pruned.parameters()),
                "disk": self.left_on_disk(cell.arm, pruned), "seconds": round(seconds, 1)}  # fmt: skip

    def left_on_disk(self, arm: str, model: nn.Module) -> dict[str, dict]:
        """Form -> bytes of its weights, and what stock libraries say to its folder."""
        forms, x = {}, torch.rand(4, *self.shape[1:], generator=torch.Generator().manual_seed(1))
        with tempfile.TemporaryDirectory() as root, torch.no_grad():
            small = slim(model)[0] if arm == "TSCNCTrainer, channels" else model
            folders = {"dense": Path(root, "dense")}
            if arm in OURS:
                folders |= {"packed": Path(root, "packed"), "packed, zstd": Path(root, "zstd")}
            if arm in CHANNELS:
                folders = {"cut": Path(root, "cut")}
            for form, folder in folders.items():
                if form.startswith("packed"):
                    save_sparse(small, folder, compression="zstd" if "zstd" in form else None)
                else:
                    small.save_pretrained(folder, state_dict=disk_state(small))
                weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                forms[form] = {"bytes": weights}
                if arm in OURS and form != "dense":
                    again = (load_slim if form == "cut" else load_sparse)(folder)
                    assert torch.allclose(logits(again, x), logits(model, x), atol=1e-4), (arm, form)
                    forms[form]["tscnc_hf"] = "loads"
                inputs = ((x - MEAN) / STD).contiguous()
                save_file({"inputs": inputs, "logits": logits(model, x)}, folder / "expected.safetensors")
            command = [sys.executable, ROOT / "tests/benchmarks/stock_loading.py", *folders.values()]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            said = [line for line in done.stdout.splitlines() if line.startswith("{")]
            for form, line in zip(forms, said, strict=True):
                forms[form] |= yaml.safe_load(line.replace(root, "..."))
            if arm == "Torch-Pruning":  # as its README has it: a pickle of the module
                torch.save(model, Path(root, "model.pth"))
                forms["pickle"] = {"bytes": Path(root, "model.pth").stat().st_size}
        return forms

    def time_steps(self, target: float, gone: float) -> dict[str, dict]:
        """Arm -> seconds a step, and over the loop without pruning. Each of ours is trained beside it, one with all."""
        times: dict[str, list[tuple[float, float]]] = {}
        for arm in OURS:
            beside = [name for name in PEERS if missing(name) is None] if arm == OURS[0] else ["not pruned"]
            loops = {}
            for name in beside:
                amount = gone if name in CHANNELS else target
                loops[name] = self.loop(name, self.dense(0), amount, self.args.timed_steps, 0)[1]
            turns = InTurn(loops)
            with tempfile.TemporaryDirectory() as folder:
                amount = gone if arm in CHANNELS else target
                trainer = self.trainer(arm, self.dense(0), amount, self.args.timed_steps, 0, folder)
                trainer.add_callback(turns)
                trainer.train()
            bare = turns.times.pop("not pruned")[WARM:]
            times.setdefault("not pruned", []).extend((one, one) for one in bare)
            for name, taken in ({arm: turns.own} | turns.times).items():
                times[name] = list(zip(taken[WARM:], bare, strict=True))
        return {name: spread(pairs) for name, pairs in times.items()}


WARM = 2  # steps that are not counted


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


def spread(pairs: list[tuple[float, float]]) -> dict:
    own, bare = zip(*pairs, strict=True)
    low, middle, high = statistics.quantiles([one / other for one, other in pairs], n=4)
    return {"seconds": statistics.median(own), "ratio": [low, middle, high], "together": sum(own) / sum(bare)}


def say(row: Mapping) -> str:
    if "times" in row:
        lines = [
            f"  {arm:<23} {1e3 * t['seconds']:6.1f} ms a step   {t['ratio'][1]:.3f} ({t['ratio'][0]:.3f} to "
            f"{t['ratio'][2]:.3f}), together {t['together']:.3f}"
            for arm, t in row["times"].items()
        ]
        return "\n".join(["A step over one of the loop without pruning:", *lines])
    shown = ", ".join(f"{name} {value:.1%}" for name, value in row["accuracy"].items())
    disk = ", ".join(f"{form} {said['bytes']:,} bytes" for form, said in row["disk"].items())
    return (
        f"{row['arm']:<23} {row['sparsity']:.0%}, seed {row['seed']}: {shown}; zeros {row['zeros']:.2%}, multiply-adds "
        f"{row['macs']:.1%}; {disk}; {row['seconds']:.0f} s"
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
    parser.add_argument("--dense_epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=4, help="of pruning")
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
    benchmark = Benchmark(args)
    print(f"torch {torch.__version__}, {args.threads} threads; {benchmark.data.description}")
    print(f"{benchmark.dense_steps} steps dense, {benchmark.steps} steps while pruning; rows in {args.results}")
    arms = [arm for arm in args.arms if missing(arm) is None]
    for arm in args.arms:
        if reason := missing(arm):
            print(reason)
    cells = []
    for seed in args.seeds:
        cells += [Cell("a step", args.sparsities[0], seed)] if args.timed_steps and seed == args.seeds[0] else []
        for arm in arms:
            amounts = [0.0] if arm == "not pruned" else [args.channels] if arm in CHANNELS else args.sparsities
            cells += [Cell(arm, amount, seed) for amount in amounts]
    rows = []
    for cell in cells:
        settings = benchmark.identity(cell.arm).digest()
        row = benchmark.results.find("small CNN", cell, settings)
        if row is None:
            if cell.arm == "a step":
                found = {"accuracy": {}, "times": benchmark.time_steps(cell.sparsity, args.channels)}
            else:
                found = benchmark.run(cell)
            row = {"model": "small CNN", "arm": cell.arm, "sparsity": cell.sparsity, "seed": cell.seed}
            row |= {"split": "test"} | found | origin(torch.device("cpu")) | {"settings": settings}
            if cell.arm in PEERS and PEERS[cell.arm].package:
                row["version"] = version(PEERS[cell.arm].package)
            benchmark.results.add(row)
        rows.append(row)
        print(say(row), flush=True)
    print(f"\n{summary(rows)}")


if __name__ == "__main__":
    main()
