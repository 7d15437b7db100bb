"""Images and weights made worse, for a Trainer's steps and evaluations: the options, applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from tscnc_hf.method.adversarial.awp import moved, weight_perturbation
from tscnc_hf.method.adversarial.folding import FoldedCopy, folded_copy
from tscnc_hf.method.adversarial.noise import PlacedNoise
from tscnc_hf.method.adversarial.pgd import craft, pgd
from tscnc_hf.method.adversarial.pixels import (
    Geometry,
    LogitsFn,
    Preprocessing,
    attack_mode,
    parameter_dtype,
    pixel_inputs,
    pixel_logits,
)
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.sharding import is_sharded
from tscnc_hf.training.config import TSCNCConfig


class Adversary:
    """
    Makes adversarial images, in training and in `evaluate`, and perturbs weights against the model.

    Noise is keyed by the seed and by where an image stands in the data (`place`): the same however batches are shared
    out among processes and micro-batches.

    Args:
        args (`TSCNCConfig`): the options.
        mean, std, order, geometry: how the model's inputs are made of pixels, as in `Preprocessing`.
    """

    def __init__(
        self, args: TSCNCConfig, mean: Sequence[float], std: Sequence[float], order: Sequence[int] | None = None,
        geometry: Geometry | None = None,
    ):  # fmt: skip
        self.args, self.preprocessing = args, Preprocessing(mean, std, order, geometry)
        self._folded: FoldedCopy | bool | None = None  # None: not tried yet, False: nothing to fold

    def logits(self, model: Callable) -> LogitsFn:
        """From pixels in [0, 1], (b, c, h, w), to float32 logits (b, k); `model` is one, or a function like one."""
        return pixel_logits(model, *self.preprocessing)

    def objective_at(self, step: int, max_steps: int) -> str:
        """The objective of a step: a pure function of it (`natural_fraction`)."""
        return "natural" if step < self._natural_steps(max_steps) else self.args.objective

    def _natural_steps(self, max_steps: int) -> int:
        return round(self.args.natural_fraction * max_steps)

    def epsilon_at(self, step: int, max_steps: int) -> float:
        """The radius in a step, in pixel units: a pure function of it (`epsilon_warmup`)."""
        warmup = self.args.epsilon_warmup * max(max_steps, 1)
        step -= self._natural_steps(max_steps)
        return self.args.epsilon * (min(1.0, max(0.0, (step + 1) / warmup)) if warmup > 0 else 1.0)

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, place: int, step: int, max_steps: int) -> Tensor:
        """Adversarial pixels (b, c, h, w) for a training step; `place` is that of the first image in its batch."""
        args, epsilon, step_size = self.args, self.epsilon_at(step, max_steps), self.args.attack_step_size
        if step_size is not None and args.epsilon > 0:  # given for the whole radius
            step_size = float(step_size) * epsilon / args.epsilon
        options = {"epsilon": epsilon, "steps": args.attack_steps, "step_size": step_size, "norm": args.norm}
        noise = self._noise(x, place, "train", step)
        with attack_mode(model):
            forward = self.logits(self._to_attack(model, x))
            return craft(args.adversary, forward, x, y, generator=noise, turn=step, **options)

    @property
    def evaluates(self) -> bool:
        """Whether evaluations attack."""
        return self.args.eval_attack_steps > 0 and self.args.epsilon > 0

    def evaluate(self, model: nn.Module, x: Tensor, y: Tensor | None, place: int) -> tuple[Tensor, ...]:
        """
        Logits (b, k) of the clean images and, where evaluation attacks and there are labels, of the adversarial ones.
        Of an image that is wrong as it is they are the clean ones: what is right of the second is the robust accuracy.
        """
        args, forward = self.args, self.logits(model)
        with attack_mode(model):
            with torch.no_grad():
                clean = forward(x)
            if not self.evaluates or y is None:
                return (clean,)
            options = {"epsilon": args.epsilon, "steps": args.eval_attack_steps, "norm": args.norm}
            x_adv = pgd(forward, x, y, generator=self._noise(x, place, "eval"), **options)
            with torch.no_grad():
                return clean, torch.where((clean.argmax(-1) == y)[:, None], forward(x_adv), clean)

    def perturbed(
        self, model: nn.Module, terms: Callable[[Callable], Mapping[str, Tensor]], step: int, max_steps: int,
        average: Callable[[Tensor], Tensor],
    ) -> AbstractContextManager[None]:  # fmt: skip
        """
        Inside, and from `awp_start` on, the weights of the module that are not frozen are perturbed by up to
        `awp_gamma`. To be left when the backward is over (`moved`).

        Args:
            terms: from a model to the terms of the loss that the perturbation is to raise.
            average: of a gradient over the processes.
        """
        if self.args.awp_gamma == 0 or step < self.args.awp_start * max_steps:
            return nullcontext()
        weights = {record.name: record.weight for record in weight_matrices(model) if record.weight.requires_grad}

        def loss(function: Callable) -> Tensor:
            return sum(terms(function).values())

        return moved(model, weights, weight_perturbation(model, loss, weights, self.args.awp_gamma, average=average))

    def _noise(self, x: Tensor, place: int, *key: int | str) -> PlacedNoise:
        return PlacedNoise(x.device, (self.args.seed, *key), place, len(x))

    def _to_attack(self, model: nn.Module, x: Tensor) -> nn.Module:
        """The model, or a copy as it is now with batch norms folded away, whose pixel gradients cost less."""
        if not self.args.fold_batch_norm or is_sharded(model):  # a copy would have to gather each step
            return model
        if self._folded is None:
            inputs = pixel_inputs(x[:2], *self.preprocessing)
            self._folded = folded_copy(model, inputs.to(parameter_dtype(model))) or False
        elif self._folded:
            self._folded.refresh()
        return self._folded.model if self._folded else model
