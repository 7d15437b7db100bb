"""A Trainer's adversary: the images that training and evaluation see, and weights perturbed against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tscnc_hf.method.adversarial.awp import perturbed_model
from tscnc_hf.method.adversarial.folding import FoldedCopy, folded_copy
from tscnc_hf.method.adversarial.noise import PlacedNoise
from tscnc_hf.method.adversarial.pgd import craft, pgd
from tscnc_hf.method.adversarial.pixels import LogitsFn, attack_mode, pixel_logits
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.sharding import is_sharded, reshard_
from tscnc_hf.training.metrics import spectral_metrics
from tscnc_hf.training.publisher import PublishingTrainer


class AttackingTrainer(PublishingTrainer):
    """
    The part of `TSCNCTrainer` that makes adversarial images, in training and in `evaluate`. Noise is keyed by the seed
    and by where an image stands in the data: the same however batches are shared out.
    """

    pixel_mean: Sequence[float]
    pixel_std: Sequence[float]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._micro_batch = self._eval_batches = 0
        self._folded: FoldedCopy | bool | None = None  # None: not tried yet, False: nothing to fold

    # ---- training ----

    def pixel_logits(self, model: nn.Module) -> LogitsFn:
        return pixel_logits(model, self.pixel_mean, self.pixel_std)

    def epsilon_now(self) -> float:
        """The radius of this step: a pure function of the step (`epsilon_warmup`)."""
        warmup = self.args.epsilon_warmup * max(self.state.max_steps, 1)
        return self.args.epsilon * (min(1.0, (self.state.global_step + 1) / warmup) if warmup > 0 else 1.0)

    def attack(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        """Adversarial pixels for training; None when there is no adversary. Noise is keyed by seed and step."""
        args = self.args
        noise = self._noise(x, self._micro_batch, self._train_batch_size, "train", self.state.global_step)
        epsilon, step_size = self.epsilon_now(), args.attack_step_size
        if step_size is not None and args.epsilon > 0:  # given for the whole radius
            step_size = float(step_size) * epsilon / args.epsilon
        with attack_mode(model):
            return craft(
                args.adversary,
                self.pixel_logits(self._to_attack(model, x)),
                x,
                y,
                epsilon=epsilon,
                steps=args.attack_steps,
                step_size=step_size,
                generator=noise,
                norm=args.norm,
            )

    def _noise(self, x: Tensor, batch: int, size: int, *key: int | str) -> PlacedNoise:
        """For the pixels of this process's batch number `batch`; accelerate deals batches of `size` out in turn."""
        size = size // self.args.world_size if self.accelerator.split_batches else size
        first = (batch * self.args.world_size + self.args.process_index) * size
        return PlacedNoise(x.device, (self.args.seed, *key), first, len(x))

    def _to_attack(self, model: nn.Module, x: Tensor) -> nn.Module:
        """The model, or a copy as it is now with batch norms folded away, whose pixel gradients cost less."""
        if not self.args.fold_batch_norm or is_sharded(model):  # a copy would have to gather each step
            return model
        if self._folded is None:
            self._folded = folded_copy(model, x[:2]) or False
        elif self._folded:
            self._folded.refresh()
        return self._folded.model if self._folded else model

    def perturbed(self, model: nn.Module, inner: nn.Module, x: Tensor, x_adv: Tensor | None, y: Tensor) -> Callable:
        """The model, with its weights perturbed adversarially if `awp_gamma` says so and `awp_start` is reached."""
        args = self.args
        if args.awp_gamma == 0 or self.state.global_step < args.awp_start * self.state.max_steps:
            return model
        return perturbed_model(
            model,
            lambda function: sum(self.objective(function, x, x_adv, y).values()),
            {record.name: record.weight for record in weight_matrices(inner)},
            args.awp_gamma,
            inner=inner,
            average=lambda gradient: self.accelerator.reduce(gradient, "mean"),
        )

    # ---- evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        args, inputs = self.args, self._prepare_inputs(inputs)
        x, y = inputs["pixel_values"], inputs["labels"]
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=True)
        forward = self.pixel_logits(inner)
        with attack_mode(inner):
            with torch.no_grad():
                clean = forward(x)
            predictions = clean
            if args.eval_attack_steps > 0 and args.epsilon > 0:
                noise = self._noise(x, self._eval_batches, args.eval_batch_size, "eval")
                options = {"epsilon": args.epsilon, "steps": args.eval_attack_steps, "norm": args.norm}
                x_adv = pgd(forward, x, y, generator=noise, **options)
                with torch.no_grad():
                    predictions = (clean, forward(x_adv))
        self._eval_batches += 1
        loss = nn.functional.cross_entropy(clean, y)
        return (loss, None, None) if prediction_loss_only else (loss, predictions, y)

    def evaluation_loop(self, *args, **kwargs):
        self._eval_batches = 0
        # A data loader draws its seed from torch's global generator: evaluating must not change what follows.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with self.averaged(), torch.random.fork_rng(devices):
            if self.is_fsdp_enabled and not is_sharded(self.model):
                raise RuntimeError(
                    "FSDP2 shards a model together with its optimizer, when training begins: evaluate after train(), "
                    "or as it begins with eval_on_start=True (--eval_on_start true)"
                )
            output = super().evaluation_loop(*args, **kwargs)
            reshard_(self.model)
            prefix = kwargs.get("metric_key_prefix", "eval")
            spectra = spectral_metrics(self.accelerator.unwrap_model(self.model))
            output.metrics.update({f"{prefix}_{name}": value for name, value in spectra.items()})
        return output
