"""`transformers.Trainer` with adversarial examples, TSCNC terms and gradual pruning: a thin shell around the rooms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from tscnc_hf.data.batches import collate
from tscnc_hf.method.adversarial.noise import seeded_generator
from tscnc_hf.method.adversarial.objectives import objective_terms
from tscnc_hf.method.adversarial.pixels import normalisation
from tscnc_hf.method.constraints import constraint_terms, weight_scales
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.sharding import reshard_
from tscnc_hf.method.units.gates import (
    attach_gates,
    gate_parameters,
    gate_report,
    gate_sparse_constraint,
    gated_layers,
    sample_gates,
)
from tscnc_hf.training.adversary import AttackingTrainer
from tscnc_hf.training.callbacks import MethodCallback
from tscnc_hf.training.checks import check_datasets, check_processes, check_terms
from tscnc_hf.training.compressor import build_pruner, with_dense_ends
from tscnc_hf.training.config import TSCNCConfig
from tscnc_hf.training.metrics import robust_accuracy_metrics
from tscnc_hf.training.resume.compatible import what_differs
from tscnc_hf.training.resume.sharding import check_sharding


logger = logging.get_logger(__name__)


class TSCNCTrainer(AttackingTrainer):
    """
    Adversarial training with the TSCNC constraints and gradual pruning.

    The loss of a step is the sum of named terms (`natural_loss`, `robust_loss`, `tsc_loss`, `cnc_loss`), each in the
    log. Masks are applied right after every optimizer step. `evaluate` reports `eval_accuracy`, `eval_robust_accuracy`
    and the condition numbers together; the best model is chosen only among checkpoints that have reached the target.

    Args:
        model (`nn.Module` or `str`): a classifier of normalised images, or the name of one (folder or Hub id).
        args (`TSCNCConfig`): the options.
        train_dataset, eval_dataset: anything that gives {"pixel_values": (c, h, w) in [0, 1], "labels": int} items.
        processing_class: the image processor, which says how pixels are normalised (may be left out when the model's
            config says so, as timm's does). Saved with the model.
        compute_metrics (`Callable`, *optional*): gets an `EvalPrediction` whose predictions are the pair (clean,
            adversarial) logits; its result is added to the two accuracies.

    Everything else is as in `transformers.Trainer`.

    Raises:
        ValueError: wrong data, a model with nothing to prune, or an option this trainer does not support.
    """

    loss_is_scaled_for_ga = False  # our terms are means over the micro-batch: the Trainer divides by the accumulation
    _tag_names = ("tscnc", "pruning", "sparse", "adversarial-training", "robustness")

    def __init__(
        self,
        model: nn.Module | str | None = None,
        args: TSCNCConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics: Callable | None = None,
        **kwargs,
    ):
        args = TSCNCConfig("tscnc-output") if args is None else args
        if not isinstance(args, TSCNCConfig):
            raise TypeError(f"args is a {type(args).__name__}; TSCNCTrainer needs a TSCNCConfig")
        if kwargs.get("model_init") is not None or kwargs.get("compute_loss_func") is not None:
            raise ValueError("model_init and compute_loss_func are not supported: pass a model, the method has a loss")
        check_processes(args.world_size)
        if isinstance(model, str):
            from tscnc_hf.artifact.models.loading import load_model

            model, loaded_processor = load_model(model)
            processing_class = loaded_processor if processing_class is None else processing_class
        if model is None:
            raise ValueError("model is missing: pass a module, a folder or a Hub id")
        self.pixel_mean, self.pixel_std = normalisation(model, processing_class)
        check_datasets(model, train_dataset, eval_dataset, data_collator or collate)
        args = with_dense_ends(model, args)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        if args.tsc_on == "gates" and not gated_layers(model):
            attach_gates(model, args.gate_layers, args.gate_drop_rate, seeded_generator("cpu", args.seed, "gates"))
        self.pruner = build_pruner(model, args)
        super().__init__(
            model,
            args,
            data_collator=data_collator or collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=robust_accuracy_metrics(compute_metrics),
            **kwargs,
        )
        check_sharding(self)
        # Taken before training, kept in every checkpoint: TSC measures weights in units of their scale at the start.
        self.tsc_scales = weight_scales(weight_matrices(model, args.pruning_exclude))
        self.callback_handler.callbacks.insert(0, MethodCallback(self))  # masks first: whatever follows sees them
        self.clear_terms()
        if isinstance(model, PreTrainedModel):
            model.add_model_tags(list(self._tag_names))

    # ---- one step ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x, y = inputs["pixel_values"], inputs["labels"]
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=True)
        # The attack runs on the module, the forward that trains on the wrapper: that one averages gradients.
        x_adv = self.attack(inner, x, y) if self.args.objective != "natural" else None
        terms = self.objective(self.perturbed(model, inner, x, x_adv, y), x, x_adv, y)
        if self.is_in_train:  # the mean over the step's images: its last micro-batch may have fewer than the others
            share = len(x) * self._accumulation() / self._images
            terms = {name: share * value for name, value in terms.items()}
        if self._micro_batch == 0:  # the same in every micro-batch: paid for once a step
            terms |= self.constraints(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        self._record(terms)
        loss = sum(terms.values())
        return (loss, {"loss": loss}) if return_outputs else loss

    def objective(self, model: Callable, x: Tensor, x_adv: Tensor | None, y: Tensor) -> dict[str, Tensor]:
        """The terms of the objective; `model` is the model, or a function like it."""
        options = {"beta": self.args.trades_beta, "label_smoothing": self.args.label_smoothing_factor}
        return objective_terms(self.args.objective, self.pixel_logits(model), x, x_adv, y, **options)

    def constraints(self, model: nn.Module) -> dict[str, Tensor]:
        """The weighted constraints of this step, to be divided by the number of micro-batches as all terms are."""
        args, share = self.args, self._accumulation()
        reshard_(model)  # after a forward some weights are rounded to the dtype it was computed in
        on_weights = args.tsc_on == "weights"
        now = self.state.global_step % args.cnc_interval == 0
        terms = constraint_terms(
            list(weight_matrices(model)),
            self.tsc_scales,
            tsc_weight=args.tsc_weight if on_weights else 0.0,
            tsc_a=args.tsc_a,
            cnc_weight=args.cnc_weight * args.cnc_interval if now else 0.0,
            cnc_ridge=args.cnc_ridge,
            cnc_form=args.cnc_form,
        )
        if not on_weights and args.tsc_weight > 0:
            value = gate_sparse_constraint(model, args.tsc_a, args.gate_l0, args.gate_l2)
            terms["tsc_loss"] = args.tsc_weight * value
        return {name: share * value for name, value in terms.items()}

    def _accumulation(self) -> int:
        return getattr(self, "current_gradient_accumulation_steps", 1)  # fewer at the end of an epoch

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._images = sum(len(batch["labels"]) for batch in batches)  # of this process in the step to come
        return batches, items

    def clear_terms(self) -> None:
        self._term_sums, self._steps = {}, 0  # since the last log

    def start_step(self) -> None:
        self._micro_batch = 0
        self._steps += 1
        # one sample a step: for the clean and the adversarial images, every micro-batch and every process
        sample_gates(self.model, seeded_generator(self.args.device, self.args.seed, "gates", self.state.global_step))

    def _record(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self._term_sums[name] = self._term_sums.get(name, 0) + value.detach() / self._accumulation()
        self._micro_batch += 1
        if self.args.device.type == "cpu":  # elsewhere looking at a value stalls the device: at log and save only
            self.check_terms()

    def check_terms(self) -> None:
        check_terms(self._term_sums, self.state.global_step, self.args.output_dir)

    def _clip_grad_norm(self, model):
        if self.masks_frozen():
            self.pruner.mask_gradients_()
        return super()._clip_grad_norm(model)

    def masks_frozen(self) -> bool:
        """Whether the masks are final, as of the step being taken."""
        args = self.args
        if args.keep_masks and args.target_sparsity == 0:
            return True
        return args.target_sparsity > 0 and self.state.global_step >= round(args.pruning_end * self.state.max_steps)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weight decay acts on the weights of layers; not on gates, norms, biases, embeddings and tokens."""
        return [record.name for record in weight_matrices(model)]

    def create_optimizer(self, *args, **kwargs):
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        gates = gate_parameters(self.model)
        if made_here and gates:  # a group of their own: another learning rate, no weight decay
            own = {id(parameter) for parameter in gates}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            optimizer.add_param_group({"params": gates, "lr": self.args.gate_learning_rate, "weight_decay": 0.0})
        return optimizer

    # ---- log and evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._term_sums:
            self.check_terms()
            for name, total in self._term_sums.items():
                logs[name] = (self.accelerator.reduce(total, "mean") / self._steps).item()
            if self.args.target_sparsity > 0 or self.args.keep_masks:
                logs["sparsity"] = self.pruner.pruned_count / self.pruner.prunable_count
            if gates := gate_report(self.model).rows:
                logs["gates_open"] = sum(row.expected_open for row in gates) / sum(row.gates for row in gates)
            self.clear_terms()
        super().log(logs, start_time)

    def _load_rng_state(self, checkpoint):
        text = what_differs(checkpoint, self.args.world_size) if checkpoint and self.is_world_process_zero() else None
        if text:
            logger.warning(text)
        super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model, trial):
        self.check_terms()
        super()._save_checkpoint(model, trial)

    def _determine_best_metric(self, metrics, trial) -> bool:
        if self.args.target_sparsity > 0 and not self.masks_frozen():
            return False  # less sparse than asked for, or with masks that are still being chosen: no candidate
        return super()._determine_best_metric(metrics, trial)
