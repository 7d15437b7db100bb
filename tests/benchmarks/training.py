"""
What the Trainer costs over a bare PyTorch loop that does the same mathematics, at batch 128: `make bench-training`.

Both sides train the same network on the same batches in the same order: adversarial images, objective, TSC, CNC,
clipped gradients, SGD, pruning. The bare loop is written out below, without Trainer, accelerate, data loader,
callbacks or log. They take their steps in turn in one process, so that what disturbs the machine disturbs both; the
Trainer's step is timed from the end of one to the end of the next, with its log every 10 steps. That they do the same
is checked first, on small batches and with a radius so small that the signs of pixel gradients, which rounding decides
here and there, do not matter: after four steps their weights may be apart by rounding only, measured by how far they
have moved. Ratios are of neighbouring steps: median and quartiles.

The last part is the profile of a TRADES-10 step of the Trainer: where its time goes, without and with a teacher.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from constraints import resnet18
from torch import Tensor, nn
from transformers import TrainerCallback

from tscnc_hf import TSCNCConfig, TSCNCTrainer
from tscnc_hf.artifact.models.building import timm_model, vit_from_config
from tscnc_hf.data.loading import load_image_data
from tscnc_hf.method.adversarial.noise import PlacedNoise
from tscnc_hf.method.adversarial.pgd import fgsm_rs, kl_pgd
from tscnc_hf.method.adversarial.pixels import attack_mode
from tscnc_hf.method.constraints import constraint_terms, weight_scales
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning.pruner import Pruner
from tscnc_hf.method.pruning.schedule import sparsity_at


RATE, MOMENTUM, DECAY, CLIP = 0.02, 0.9, 5e-4, 1.0
EPSILON, BETA, STEPS = 8 / 255, 6.0, 10
TSC, A, CNC, TARGET, INTERVAL = 1e-6, 10.0, 1e-2, 0.9, 10
MEAN = STD = 0.5
TOLERANCE = 1e-3  # of the way that the weights have gone


class Pixels:
    """How both sides normalise."""

    image_mean, image_std = [MEAN] * 3, [STD] * 3


def small_cnn(names: list[str]) -> nn.Module:
    shape = {"channels": [32, 64, 64, 64], "layers": [2, 2, 1, 1], "stem_type": "deep", "stem_width": 16}
    return timm_model("resnet18", names, (32, 32), 3, model_args=shape | {"output_stride": 8})[0]


def small_vit(names: list[str]) -> nn.Module:
    shape = {"patch_size": 8, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3}
    return vit_from_config(names, (32, 32), 3, **shape)[0]


MODELS: dict[str, Callable] = {
    "small CNN": small_cnn,
    "small ViT": small_vit,
    "ResNet-18": lambda names: resnet18(),
}
CASES = [("small CNN", "pgd-at"), ("small ViT", "pgd-at"), ("ResNet-18", "pgd-at"), ("small CNN", "trades")]


def bare_steps(
    model: nn.Module, data, order: list[list[int]], objective: str, steps: int, seed: int, epsilon: float
) -> Iterator:
    """A training loop written by hand; `next` takes a step."""

    def forward(x: Tensor) -> Tensor:
        found = model((x - MEAN) / STD)
        return found if isinstance(found, Tensor) else found.logits

    matrices = list(weight_matrices(model))
    scales, pruner = weight_scales(matrices), Pruner(matrices)
    decayed = {id(record.weight) for record in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in decayed]
    groups = [{"params": [record.weight for record in matrices], "weight_decay": DECAY}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, RATE, momentum=MOMENTUM)
    start, end = round(0.25 * steps), round(0.75 * steps)
    for step in range(steps):
        if step == start:
            pruner.update(0.0)
        batch = data.__getitems__(order[step])
        x, y = batch["pixel_values"], batch["labels"]
        noise = PlacedNoise("cpu", (seed, "train", step), 0, len(x))
        with attack_mode(model):
            if objective == "trades":
                x_adv = kl_pgd(forward, x, epsilon=epsilon, steps=STEPS, generator=noise)
            else:
                x_adv = fgsm_rs(forward, x, y, epsilon=epsilon, generator=noise)
        if objective == "trades":
            clean, adversarial = forward(torch.cat([x, x_adv])).chunk(2)
            target = F.log_softmax(clean, -1)
            divergence = F.kl_div(F.log_softmax(adversarial, -1), target, reduction="batchmean", log_target=True)
            loss = F.cross_entropy(clean, y) + BETA * divergence
        else:
            loss = F.cross_entropy(forward(x_adv), y)
        terms = constraint_terms(matrices, scales, tsc_weight=TSC, tsc_a=A, cnc_weight=CNC)
        (loss + sum(terms.values())).backward()
        aside = {}
        if step >= end:
            pruner.mask_gradients_()
        else:
            aside = pruner.set_gradients_aside_()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        longer = torch.maximum(norm, torch.nn.utils.get_total_norm(aside.values())) if aside else norm
        pruner.put_gradients_back_(aside, (CLIP / (longer + 1e-6)).clamp(max=1.0))
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done == end or (start < done < end and (done - start) % INTERVAL == 0):
            pruner.update(sparsity_at(done, start, end, TARGET))
        pruner.apply_()
        yield


class InTurn(TrainerCallback):
    """After each step of the Trainer one of the bare loop, both timed."""

    def __init__(self, bare: Iterator, ours: nn.Module, theirs: nn.Module):
        self.bare, self.ours, self.theirs, self.times = bare, ours, theirs, []
        self.origin = torch.nn.utils.parameters_to_vector(ours.parameters()).detach().clone()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        own = time.perf_counter() - self.start
        start = time.perf_counter()
        next(self.bare)
        self.times.append((own, time.perf_counter() - start))
        if state.global_step == 4:  # pruning, in which a weight more or less may differ, begins after the fifth
            one, two = (torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in (self.ours, self.theirs))
            self.apart = float((one - two).norm() / (two - self.origin).norm())
        self.start = time.perf_counter()


class Recorded(torch.utils.data.Dataset):
    """The data, and in which order the Trainer asks for them."""

    def __init__(self, data):
        self.data, self.order = data, []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.data[index]

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        self.order.append(list(indices))
        return self.data.__getitems__(indices)


def make_trainer(
    folder: str,
    model: nn.Module,
    data,
    objective: str,
    steps: int,
    batch: int,
    epsilon: float = EPSILON,
    interval: int = INTERVAL,
    **options,
):
    adversary = {"trades": "kl-pgd", "pgd-at": "fgsm-rs"}[objective]
    config = TSCNCConfig(
        folder, objective=objective, adversary=adversary, epsilon=epsilon, attack_steps=STEPS, trades_beta=BETA,
        tsc_weight=TSC, tsc_a=A, cnc_weight=CNC, target_sparsity=TARGET, pruning_interval=interval, max_steps=steps,
        per_device_train_batch_size=batch, optim="sgd", optim_args=f"momentum={MOMENTUM}", learning_rate=RATE,
        weight_decay=DECAY, lr_scheduler_type="constant", max_grad_norm=CLIP, logging_steps=10, save_strategy="no",
        eval_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    return TSCNCTrainer(model, config, train_dataset=data, processing_class=Pixels())


def take_turns(name: str, objective: str, data, steps: int, batch: int, epsilon: float) -> InTurn:
    torch.manual_seed(0)
    ours, theirs = MODELS[name](data.class_names), MODELS[name](data.class_names)
    theirs.load_state_dict(ours.state_dict())
    recorded = Recorded(data.train)
    with tempfile.TemporaryDirectory() as folder:
        # Folded batch norms would make the Trainer cheaper than the loop: not what is asked here.
        trainer = make_trainer(folder, ours, recorded, objective, steps, batch, epsilon, fold_batch_norm=False)
        bare = bare_steps(theirs, data.train, recorded.order, objective, steps, trainer.args.seed, epsilon)
        turns = InTurn(bare, ours, theirs)
        trainer.add_callback(turns)
        trainer.train()
    return turns


def compare(name: str, objective: str, data, steps: int, batch: int) -> None:
    apart = take_turns(name, objective, data, 2 * INTERVAL, 8, 1e-7).apart
    if not apart < TOLERANCE:
        raise SystemExit(f"error: {name}, {objective}: the two sides are {apart:.1e} of their way apart")
    times = take_turns(name, objective, data, steps, batch, EPSILON).times[2:]  # the first warm up
    ratios = [own / bare for own, bare in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    own, bare = (statistics.median(side) for side in zip(*times, strict=True))
    print(
        f"  {name:<10} {objective:<7} {own:7.3f} s {bare:7.3f} s   {middle:.3f} ({low:.3f} to {high:.3f})   "
        f"the same but for {apart:.0e} of the way after 4 steps",
        flush=True,
    )


def profile(name: str, data, batch: int, **options) -> None:
    """Shares of one TRADES-10 step of the Trainer, by what it calls."""
    phases = {"attack": "attack", "forward and objective": "objective", "constraints": "constraints"}
    phases |= {"teacher's forward": "taught"} if "teacher" in options else {}
    seconds = dict.fromkeys([*phases, "the whole step"], 0.0)

    class Timed(TSCNCTrainer):
        """Its methods timed: nothing else is changed."""

        def training_step(self, *args, **kwargs):
            return timed("the whole step", super().training_step, *args, **kwargs)

    def timed(phase: str, function: Callable, *args, **kwargs):
        start = time.perf_counter()
        found = function(*args, **kwargs)
        seconds[phase] += time.perf_counter() - start
        return found

    for phase, method in phases.items():
        function = getattr(TSCNCTrainer, method)
        setattr(Timed, method, lambda *args, phase=phase, function=function, **kw: timed(phase, function, *args, **kw))
    steps, warm = 12, 2
    with tempfile.TemporaryDirectory() as folder:
        given = (folder, MODELS[name](data.class_names), data.train, "trades", steps, batch)
        trainer = make_trainer(*given, interval=3, **options)
        trainer.__class__ = Timed
        whole = []

        class Clock(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == warm:
                    seconds.update(dict.fromkeys(seconds, 0.0))
                    self.start = time.perf_counter()

            def on_train_end(self, args, state, control, **kwargs):
                whole.append(time.perf_counter() - self.start)

        trainer.add_callback(Clock())
        trainer.train()
    per_step = whole[0] / (steps - warm)
    inside = seconds.pop("the whole step")
    found = {phase: value / whole[0] for phase, value in seconds.items()}
    found["backward"] = (inside - sum(seconds.values())) / whole[0]
    found["optimizer, masks, data, log"] = 1 - inside / whole[0]
    shares = ", ".join(f"{phase} {100 * share:.1f} %" for phase, share in found.items())
    print(f"  {name:<10} {per_step:.2f} s a step: {shares}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load_image_data("digits", image_size=32, augmentation="crop")
    print(f"torch {torch.__version__}, {args.threads} threads, batch {args.batch_size}, {args.steps} steps, 32x32 px")
    print("Seconds a step, Trainer and bare loop, and their ratio: median (quartiles)")
    for name, objective in CASES:
        compare(name, objective, data, args.steps, args.batch_size)
    print("\nWhere a TRADES-10 step of the Trainer goes (batch norms folded in the attack, as by default)")
    for name in MODELS:
        profile(name, data, args.batch_size // 2)
        profile(name, data, args.batch_size // 2, teacher="dense", distill_weight=1.0, pruning_start=0.0)


if __name__ == "__main__":
    main()
