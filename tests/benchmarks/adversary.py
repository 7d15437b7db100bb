"""
What adversarial examples cost, beside hand-written loops and other libraries, in one run: `make bench-adversary`.

A ResNet-18 (3x3 stem) is first trained for some steps on digits enlarged to 32 x 32, so that an attack succeeds on a
part of the images. Then, round by round, one after the other:

* a whole TRADES-10 step of `TSCNCTrainer` (attack, loss, backward, optimizer); the least that a loop written by hand
  can do (channels_last, clean prediction once, gradients of the pixels only, one concatenated forward); and the
  published loop, which computes the clean prediction anew in every attack step and goes forward three times at last;
* PGD-10 as an evaluation runs it (an image is left alone once it is misclassified) and as training does (all steps for
  all images), beside torchattacks, foolbox and ART with the same steps, step size and random start.

Ratios are medians over rounds, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from constraints import resnet18, seconds
from torch import Tensor, nn

from tscnc_hf import TSCNCConfig, TSCNCTrainer
from tscnc_hf.data.loading import load_image_data
from tscnc_hf.evaluation.attacks import make_attack
from tscnc_hf.method.adversarial.pgd import fgsm_rs, pgd, seeded_generator
from tscnc_hf.method.adversarial.pixels import attack_mode


STEPS, BETA, RATE = 10, 6.0, 0.01


class Pixels:
    """Says that the model takes pixels as they are: normalising costs every side the same."""

    image_mean, image_std = [0.0], [1.0]


def trained(epsilon: float, steps: int, batch_size: int, data) -> nn.Module:
    torch.manual_seed(0)
    model = resnet18().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = seeded_generator("cpu", "benchmark")
    for _ in range(steps):
        x, y = batch_of(data, torch.randint(len(data), (batch_size,), generator=generator).tolist())
        with attack_mode(model):
            x_adv = fgsm_rs(model, x, y, epsilon=epsilon, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        optimizer.step()
    return model


def batch_of(data, indices: list[int]) -> tuple[Tensor, Tensor]:
    batch = data.__getitems__(indices)
    return batch["pixel_values"].contiguous(), batch["labels"]


def library_trades(model: nn.Module, data, epsilon: float, folder: str) -> Callable:
    """One step as the Trainer takes it."""
    config = TSCNCConfig(
        folder, objective="trades", adversary="kl-pgd", epsilon=epsilon, attack_steps=STEPS, trades_beta=BETA,
        optim="sgd", learning_rate=RATE, channels_last=True, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = TSCNCTrainer(model, config, train_dataset=data, eval_dataset=data, processing_class=Pixels())
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # as the training loop sets it

    def step(x: Tensor, y: Tensor) -> None:
        trainer.start_step()
        optimizer.zero_grad()
        trainer.training_step(model, {"pixel_values": x, "labels": y})
        optimizer.step()

    return step


def minimal_trades(model: nn.Module, epsilon: float) -> Callable:
    optimizer = torch.optim.SGD(model.parameters(), RATE)

    def step(x: Tensor, y: Tensor) -> None:
        x = x.contiguous(memory_format=torch.channels_last)
        model.eval()
        with torch.no_grad():
            target = F.softmax(model(x), -1)
        lower, upper = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(STEPS):
            x_adv.requires_grad_()
            loss = F.kl_div(F.log_softmax(model(x_adv), -1), target, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = torch.clamp(x_adv.detach() + epsilon / 4 * gradient.sign(), lower, upper)
        model.train()
        optimizer.zero_grad()
        clean, adversarial = model(torch.cat([x, x_adv])).chunk(2)
        divergence = F.kl_div(F.log_softmax(adversarial, -1), F.softmax(clean, -1), reduction="batchmean")
        (F.cross_entropy(clean, y) + BETA * divergence).backward()
        optimizer.step()

    return step


def published_trades(model: nn.Module, epsilon: float) -> Callable:
    """The structure of the loop that came with the paper, on contiguous tensors: 39 forward units instead of 27."""
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    divergence = nn.KLDivLoss(reduction="sum")

    def step(x: Tensor, y: Tensor) -> None:
        model.eval()
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(STEPS):
            x_adv.requires_grad_()
            loss = divergence(F.log_softmax(model(x_adv), -1), F.softmax(model(x), -1))
            (gradient,) = torch.autograd.grad(loss, [x_adv])
            x_adv = x_adv.detach() + epsilon / 4 * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss = loss + BETA / len(x) * divergence(F.log_softmax(model(x_adv), -1), F.softmax(model(x), -1))
        loss.backward()
        optimizer.step()

    return step


def attacks(model: nn.Module, epsilon: float) -> dict[str, Callable]:
    """Name -> (x, y) -> x_adv; those of libraries that are not installed are left out, and named."""
    evaluation = make_attack(f"pgd-{STEPS}", epsilon)
    size = evaluation.parameters["step_size"]
    generator = seeded_generator("cpu", "benchmark")
    made = {
        "ours, evaluation": lambda x, y: evaluation.run(model, x, y, torch.arange(len(x)), 0),
        "ours, training": partial(pgd, model, epsilon=epsilon, steps=STEPS, step_size=size, generator=generator),
    }
    try:
        import torchattacks

        made["torchattacks"] = torchattacks.PGD(model, eps=epsilon, alpha=size, steps=STEPS, random_start=True)
    except ImportError as error:
        print(f"torchattacks is left out: {error}")
    try:
        import foolbox

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        attack = foolbox.attacks.LinfPGD(abs_stepsize=size, steps=STEPS, random_start=True)
        made["foolbox"] = lambda x, y: attack(wrapped, x, y, epsilons=epsilon)[1]
    except ImportError as error:
        print(f"foolbox is left out: {error}")
    try:
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier

        options = {"clip_values": (0, 1), "input_shape": (3, 32, 32), "nb_classes": 10, "device_type": "cpu"}
        classifier = PyTorchClassifier(model, loss=nn.CrossEntropyLoss(), **options)
        options = {"eps": epsilon, "eps_step": size, "max_iter": STEPS, "num_random_init": 1, "verbose": False}
        theirs = ProjectedGradientDescentPyTorch(classifier, batch_size=1024, **options)
        made["ART"] = lambda x, y: torch.from_numpy(theirs.generate(x.numpy(), y.numpy()))
    except ImportError as error:
        print(f"ART is left out: {error}")
    return made


def compare(title: str, times: dict[str, list[float]], ours: str, more: dict[str, str] | None = None) -> None:
    print(f"{title}: seconds, and {ours} over it: median (smallest to largest)")
    for name, values in times.items():
        ratios = [own / value for own, value in zip(times[ours], values, strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        extra = f"   {more[name]}" if more else ""
        print(f"  {name:<20} {statistics.median(values):7.2f} s   {middle:.3f} ({low:.3f} to {high:.3f}){extra}")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epsilon", type=float, default=8 / 255, help="of the TRADES step")
    parser.add_argument("--attack_epsilon", type=float, default=16 / 255, help="of PGD")
    parser.add_argument("--training_steps", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, batch {args.batch_size}, {args.rounds} rounds")
    data = load_image_data("digits", image_size=32, augmentation="none")
    model = trained(args.attack_epsilon, args.training_steps, args.batch_size, data.train)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = batch_of(data.test, list(range(len(data.test))))
    with attack_mode(model), torch.no_grad():  # as an evaluation does: what is wrong when clean is not attacked
        right = torch.cat([model(part) for part in x.split(args.batch_size)]).argmax(-1) == y
    x, y = x[right][: args.batch_size].contiguous(), y[right][: args.batch_size]
    print(f"{right.double().mean():.1%} of the test images are right; {len(x)} of them are attacked")

    def fresh(memory_format: torch.memory_format) -> nn.Module:
        copy = resnet18()
        copy.load_state_dict(state)
        return copy.to(memory_format=memory_format)

    with tempfile.TemporaryDirectory() as folder:
        steps = {
            "library": library_trades(fresh(torch.channels_last), data.train, args.epsilon, folder),
            "minimal": minimal_trades(fresh(torch.channels_last), args.epsilon),
            "published": published_trades(fresh(torch.contiguous_format), args.epsilon),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for index in range(args.rounds + 1):
            for name, step in steps.items():
                elapsed = seconds(step, x, y)
                if index:
                    times[name].append(elapsed)
    compare("\nTRADES-10 step", times, "library")

    for memory_format in (torch.contiguous_format, torch.channels_last):
        attacked = fresh(memory_format).eval()
        made = attacks(attacked, args.attack_epsilon)
        times, broken = {name: [] for name in made}, dict.fromkeys(made, "")
        for index in range(args.rounds + 1):
            for name, attack in made.items():
                result = []
                elapsed = seconds(lambda attack=attack, result=result: result.append(attack(x, y)))
                with torch.no_grad():
                    broken[name] = f"breaks {int((attacked(result[0]).argmax(-1) != y).sum())} of {len(y)}"
                if index:
                    times[name].append(elapsed)
        kind = str(memory_format).removeprefix("torch.")
        compare(f"PGD-{STEPS}, {kind}", times, "ours, evaluation", broken)
        if memory_format == torch.contiguous_format:
            usual = times
    both = {"ours, evaluation": times["ours, evaluation"], "ours, training": times["ours, training"]}
    both |= {name: values for name, values in usual.items() if not name.startswith("ours")}
    for ours in ("ours, evaluation", "ours, training"):
        compare("PGD, ours on channels_last, theirs on contiguous", both, ours)


if __name__ == "__main__":
    main()
