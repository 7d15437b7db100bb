"""`transformers.Trainer` with adversarial examples, TSCNC terms and gradual pruning: a thin shell around the rooms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer_utils import HubStrategy, PredictionOutput
from transformers.utils import logging

from tscnc_hf.artifact.card.formatting import collapse_text, without_paths
from tscnc_hf.artifact.files.identity import RunIdentity, flat, weights_digest
from tscnc_hf.artifact.files.state import STATE_FILE, save_state
from tscnc_hf.artifact.models.config import what_is_computed
from tscnc_hf.artifact.models.loading import holds_weights
from tscnc_hf.artifact.models.preprocessing import preprocessing
from tscnc_hf.artifact.models.saving import check_publishable, disk_state, refuse_parts
from tscnc_hf.artifact.models.weights import has_weights
from tscnc_hf.data.batches import collate, collate_unlabelled
from tscnc_hf.data.class_names import SameClasses
from tscnc_hf.data.identity import dataset_name, random_states_kept
from tscnc_hf.data.streams import FirstItems, TakenItems, has_length, is_stream
from tscnc_hf.evaluation.run import as_published, evaluate
from tscnc_hf.method.adversarial.objectives import objective_terms
from tscnc_hf.method.matrices import computed_weights, weight_matrices
from tscnc_hf.method.sharding import is_sharded, reshard_
from tscnc_hf.method.units.gates import detached_gates, folded_gates, gate_report
from tscnc_hf.method.wrappers import unwrap_
from tscnc_hf.training.adversary import Adversary
from tscnc_hf.training.checks import (
    check_checkpointing,
    check_datasets,
    check_finite_weights,
    check_processes,
    check_terms,
)
from tscnc_hf.training.class_weights import balanced_weights, image_weights
from tscnc_hf.training.compressor import Compressor, with_dense_ends
from tscnc_hf.training.config import TSCNCConfig
from tscnc_hf.training.image_checks import CheckedBatches, as_collated, check_images, first_batch, warn_of_size
from tscnc_hf.training.metrics import Metrics, given, observed, spectral_metrics
from tscnc_hf.training.publisher import Publisher, failed_pushes
from tscnc_hf.training.resume.fsdp import check_sharding
from tscnc_hf.training.resume.resumable import ResumableTrainer
from tscnc_hf.training.speed import Speed
from tscnc_hf.training.teacher import Teacher


logger = logging.get_logger(__name__)


class TSCNCTrainer(ResumableTrainer):
    """
    Adversarial training with the TSCNC constraints and gradual pruning.

    The loss of a step is the sum of named terms (`natural_loss`, `robust_loss`, `distill_loss`, `tsc_loss`,
    `cnc_loss`), each in the log. Masks are applied right after every optimizer step. `evaluate` reports
    `eval_accuracy`, `eval_robust_accuracy` and the condition numbers together; the best model is chosen only among
    checkpoints that have reached the target.

    Attributes:
        adversary (`Adversary`), compressor (`Compressor`), publisher (`Publisher`), teacher (`Teacher`): which do the
            work.
        class_weights (`Tensor`, *optional*): (classes,), of the terms of the objective; None where all are 1.

    Args:
        model (`nn.Module` or `str`): a classifier of normalised images, or the name of one (folder or Hub id).
        args (`TSCNCConfig`): the options.
        train_dataset, eval_dataset: anything that gives {"pixel_values": (c, h, w) in [0, 1], "labels": int} items.
        processing_class: the image processor, which says how the model's inputs are made of pixels: resized, cropped
            and normalised, all of it inside of what is attacked (may be left out when the model's config says so, as
            timm's does). Saved with the model.
        compute_metrics (`Callable`, *optional*): any that a Trainer takes. It gets the predictions of the clean
            images and then, where evaluation attacks, those of the adversarial ones, whose metrics are named
            `robust_...`. What it gives is added to our own metrics, and wins over one of the same name.
            `preprocess_logits_for_metrics` gets the logits in the same turn.

    Everything else is as in `transformers.Trainer`.

    Raises:
        ValueError: wrong data, data sets whose class names are not the model's, a model with nothing to prune, or an
            option this trainer does not support.
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
        model, wrapped = unwrap_(model)
        if wrapped:
            logger.warning(
                f"{', '.join(name or 'the model' for name in wrapped)}: compiled or wrapped for several devices, "
                "which would change the names of weights in what is saved. Trained as the plain module inside; for a "
                "compiled training set torch_compile=True"
            )
        refuse_parts(model)
        check_checkpointing(model, args)
        how = preprocessing(model, processing_class)
        data_collator = data_collator or collate
        check_datasets(model, train_dataset, eval_dataset, data_collator)
        self._classes = SameClasses(model)
        self._classes.check(train_dataset, "train_dataset")
        self._classes.check(eval_dataset, "eval_dataset")
        self.class_weights = balanced_weights(model, train_dataset) if args.class_weights == "balanced" else None
        if isinstance(model, PreTrainedModel):
            check_publishable(model)
        images = (train_dataset, eval_dataset, data_collator, processing_class)
        processing_class, self._outputs, self._shape, seen = check_images(model, how, args, *images)
        args = with_dense_ends(model, args)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        self.adversary, self.compressor = Adversary(args, *how), Compressor(model, args)
        self.publisher, self.speed = Publisher(args, *how), Speed(args.device, args.log_speed)
        self.publisher.data_name = dataset_name(train_dataset)
        self.publisher.image_size = seen and seen[1:]
        self._resize = None if self._shape is None else how.resize(*self._shape[1:])
        with random_states_kept():
            first = first_batch(train_dataset, data_collator) if args.distill_weight > 0 else None
        self.teacher = Teacher(args, model, self._outputs, first and first["pixel_values"])
        given = (model, args, data_collator, train_dataset, eval_dataset, processing_class)
        metrics = Metrics(compute_metrics, args.batch_eval_metrics)
        metrics.check_best(
            args, eval_dataset, self.adversary.evaluates, getattr(getattr(model, "config", None), "num_labels", None)
        )
        smoothing, args.label_smoothing_factor = args.label_smoothing_factor, 0.0  # upstream's asks for model.config
        super().__init__(*given, compute_metrics=metrics, **kwargs)
        args.label_smoothing_factor = smoothing
        check_sharding(self)
        self.callback_handler.callbacks.insert(0, StepCallback(self))  # masks first: whatever follows sees them
        self._micro_batch = self._eval_batches = 0
        self._trained = False
        self._published: str | None = None  # digest of the weights that were last written to the output folder
        self._optimizer_is_ours = False  # made by `create_optimizer`, not given
        self._until_backward: ExitStack | None = None  # during a step: what is undone when it is over
        self.clear_terms()
        if isinstance(model, PreTrainedModel):
            model.add_model_tags(list(self._tag_names))

    def check_schedule(self) -> None:
        """
        What `train` does first, without training.

        Raises:
            ScheduleError: a ValueError; training is too short for a gradual schedule, or to exchange weights after it.
        """
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        self.compressor.check_schedule(max_steps)

    # ---- one step ----

    def training_step(self, *args, **kwargs):
        try:
            with ExitStack() as self._until_backward:
                return super().training_step(*args, **kwargs)
        finally:
            self._until_backward = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x, y = inputs["pixel_values"], inputs["labels"]
        if self._shape is None:  # of a stream
            self._shape = tuple(x.shape[1:])
            self.publisher.image_size = self._shape[1:]
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=True)
        # The attack runs on the module, the forward that trains on the wrapper: that one averages gradients.
        with self.speed.part("attack"):
            x_adv = self.attack(inner, x, y) if self._objective_now() != "natural" else None

        taught = self.taught(x)

        def objective(function: Callable) -> dict[str, Tensor]:
            return self.objective(function, x, x_adv, y, taught)

        def average(gradient: Tensor) -> Tensor:
            return self.accelerator.reduce(gradient, "mean")

        constraints = {}
        if self._micro_batch == 0:  # the same in every micro-batch: paid for once a step
            with self.speed.part("constraints"):
                constraints = self.constraints(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        state = self.state
        with ExitStack() as now:
            perturbed = self.adversary.perturbed(inner, objective, state.global_step, state.max_steps, average)
            (self._until_backward or now).enter_context(perturbed)
            terms = objective(model)
        if self.is_in_train:  # the mean over the step's images: its last micro-batch may have fewer than the others
            share = len(x) * self._accumulation() / self._images
            terms = {name: share * value for name, value in terms.items()}
        terms |= constraints
        self._record(terms)
        loss = sum(terms.values())
        return (loss, {"loss": loss}) if return_outputs else loss

    def attack(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial pixels (b, c, h, w) in [0, 1] for the micro-batch that is being trained on."""
        place = self._place(self._micro_batch, self._train_batch_size)
        return self.adversary.attack(model, x, y, place, self.state.global_step, self.state.max_steps)

    def _objective_now(self) -> str:
        return self.adversary.objective_at(self.state.global_step, self.state.max_steps)

    def taught(self, x: Tensor) -> Tensor | None:
        """The teacher's logits (b, k) of clean pixels; None in a step that follows no teacher."""
        return self.teacher.taught(x, self.state.global_step, self.state.max_steps)

    def objective(
        self, model: Callable, x: Tensor, x_adv: Tensor | None, y: Tensor, taught: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms of the objective, and of the teacher; `model` is the model, or a function like it."""
        options = {"beta": self.args.trades_beta, "label_smoothing": self.args.label_smoothing_factor}
        weights = None if self.class_weights is None else image_weights(self.class_weights, y)
        options["weights"] = weights
        if taught is not None:
            options["also"] = lambda clean, adversarial: self.teacher.terms(taught, clean, adversarial, weights)
        return objective_terms(self._objective_now(), self.adversary.logits(model), x, x_adv, y, **options)

    def constraints(self, model: nn.Module) -> dict[str, Tensor]:
        """The weighted constraints of this step, to be divided by the number of micro-batches as all terms are."""
        terms = self.compressor.constraints(model, self.state.global_step)
        return {name: self._accumulation() * value for name, value in terms.items()}

    def _accumulation(self) -> int:
        return getattr(self, "current_gradient_accumulation_steps", 1)  # fewer at the end of an epoch

    def _place(self, batch: int, size: int) -> int:
        """Of the first image of this process's batch number `batch`; accelerate deals batches of `size` in turn."""
        size = size // self.args.world_size if self.accelerator.split_batches else size
        return (batch * self.args.world_size + self.args.process_index) * size

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._images = sum(len(batch["labels"]) for batch in batches)  # of this process in the step to come
        return batches, items

    def _clip_grad_norm(self, model):
        return self._of_what_is_kept(super()._clip_grad_norm, model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:  # nothing is clipped: for the log
            return self._of_what_is_kept(super()._get_grad_norm, model)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _of_what_is_kept(self, norm_of: Callable, model: nn.Module) -> Tensor | float:
        scaler = self.accelerator.scaler
        self.compressor.before_clipping(self.state.global_step, self.state.max_steps)
        norm = norm_of(model)
        self.compressor.after_clipping(norm, 1.0 if scaler is None else scaler.get_scale())
        return norm

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weight decay acts on the weights of layers; not on gates, norms, biases, embeddings and tokens."""
        decayed = [record.weight for record in weight_matrices(model)]
        for name in computed_weights(model):  # from these; lengths of rows and gains, one for each row, are none
            layer = model.get_submodule(name.rpartition(".")[0])
            decayed += [one for one in layer.parameters() if one.ndim > 1 and one.numel() > len(one)]
        names = {id(parameter): name for name, parameter in model.named_parameters()}  # the first of a tied one
        return list(dict.fromkeys(names[id(parameter)] for parameter in decayed))

    def create_optimizer(self, *args, **kwargs):
        made_here = self.optimizer is None
        self._optimizer_is_ours = made_here or self._optimizer_is_ours
        optimizer = super().create_optimizer(*args, **kwargs)
        self.compressor.check_optimizer(optimizer)
        if made_here:
            self.compressor.group_gates(optimizer)
        elif self.compressor.lacks_gates(optimizer):
            raise ValueError(
                "tsc_on='gates' attaches gates to the model, and the optimizer that was given, which was made before, "
                "would not train them: give optimizer_cls_and_kwargs=(class, options) in place of optimizers=(...)"
            )
        return optimizer

    # ---- log ----

    def start_step(self, optimizer) -> None:
        self._micro_batch = 0
        self._steps += 1
        step, max_steps = self.state.global_step, self.state.max_steps
        self.speed.start_step()
        self.teacher.before_step(step, max_steps, self.compressor, self.adversary.logits)  # before anything is pruned
        self.compressor.before_step(step, max_steps, optimizer)

    def clear_terms(self) -> None:
        self._term_sums, self._steps = {}, 0  # since the last log

    def _record(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self._term_sums[name] = self._term_sums.get(name, 0) + value.detach() / self._accumulation()
        self._micro_batch += 1
        if self.args.device.type == "cpu":  # elsewhere looking at a value stalls the device: at log and save only
            self.check_terms()

    def check_terms(self) -> None:
        check_terms(self._term_sums, self.state.global_step, self.args.output_dir)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._term_sums:
            self.check_terms()
            for name, total in self._term_sums.items():
                logs[name] = (self.accelerator.reduce(total, "mean") / self._steps).item()
            logs |= self.compressor.figures() | self.speed.figures(self.state.global_step, self.state.max_steps)
            self.clear_terms()
        super().log(logs, start_time)

    # ---- evaluation ----

    @property
    def compute_metrics(self) -> Metrics:
        return self._metrics

    @compute_metrics.setter
    def compute_metrics(self, function: Callable | None) -> None:  # also one that is set later gets its turns
        ours = isinstance(function, Metrics)
        self._metrics = function if ours else Metrics(function, self.args.batch_eval_metrics)

    @property
    def preprocess_logits_for_metrics(self) -> None:
        """None for upstream, which would call it on the pair: `prediction_step` does so, in turn."""

    @preprocess_logits_for_metrics.setter
    def preprocess_logits_for_metrics(self, function: Callable | None) -> None:
        self._preprocess = function

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        x, y = inputs["pixel_values"], inputs.get("labels")
        place = self._place(self._eval_batches, self.args.eval_batch_size)
        self._eval_batches += 1
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=True)
        logits = self.adversary.evaluate(inner, x, y, place)
        loss = None if y is None else nn.functional.cross_entropy(logits[0], y)
        return (loss, None, None) if prediction_loss_only else (loss, observed(logits, y, self._preprocess), y)

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        role = {"Training": "train_dataset", "Evaluation": "eval_dataset"}.get(description, "test_dataset")
        self._classes.check(dataset, role)
        if description == "Evaluation" and not has_length(dataset):  # which may have no end
            dataset = FirstItems(dataset, self.args.eval_stream_images)
        given, args = self.data_collator, self.args
        try:
            self.data_collator = CheckedBatches(given, self._outputs, role, dataset)
            if not is_training:  # a last batch may be too small to learn from; it is no less a part of an accuracy
                self.args = copy.copy(args)
                self.args.dataloader_drop_last = False
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.data_collator, self.args = given, args

    def evaluation_loop(self, *args, **kwargs):
        self._eval_batches = 0
        self.compute_metrics.reset()
        # A data loader draws its seed from torch's global generator: evaluating must not change what follows.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with self.speed.aside(), self.compressor.averaged(), torch.random.fork_rng(devices):
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
            if output.metrics.get(f"{prefix}_collapsed"):
                self._say_collapsed(prefix)
        return output

    def _say_collapsed(self, prefix: str) -> None:
        emptied = self.compressor.emptied()
        if self.is_world_process_zero():
            names = getattr(getattr(self.model, "config", None), "id2label", None)
            text = collapse_text(self.compute_metrics.collapsed, emptied, names)
            logger.warning(f"{prefix}, step {self.state.global_step}: {text}")

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> Predictions:
        """
        As `Trainer.predict`: `predictions` are those of the clean images. Those of the adversarial ones are
        `adversarial_predictions`; without labels there are none, and no metrics.
        """
        collator = self.data_collator
        try:
            if collator is collate:
                self.data_collator = collate_unlabelled
            output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.data_collator = collator
        clean, *adversarial = given(output.predictions) or [None]
        found = Predictions(clean, output.label_ids, output.metrics)
        found.adversarial_predictions = adversarial[0] if adversarial else None
        return found

    def _determine_best_metric(self, metrics, trial) -> bool:
        if self.args.target_sparsity > 0 and not self.masks_frozen():
            return False  # less sparse than asked for, or with masks that are still being chosen: no candidate
        if any(value for name, value in metrics.items() if name.endswith("_collapsed")):
            return False
        return super()._determine_best_metric(metrics, trial)

    def masks_frozen(self) -> bool:
        """Whether the masks are final, as of the step being taken."""
        return self.compressor.masks_frozen(self.state.global_step, self.state.max_steps)

    def test(
        self,
        dataset,
        attacks: Sequence[str] = ("clean", "pgd-20"),
        n: int | None = None,
        full: bool = True,
        epsilon: float | str | None = None,
        norm: str | None = None,
        attack_precision: str = "float32",
    ) -> dict:
        """
        The final figures, on data that training has not seen: robustness, sparsity and spectrum. Written to
        `results.json` in the output folder and shown on the card. Several processes share the work. A test that was
        cut off goes on when the same weights are tested again. A model that was trained or changed and not saved since
        is saved first: whatever happens to the test, it is there. ValueError where the folder holds another model,
        which was not written by this trainer.

        Args:
            dataset: its items go through the data collator, as in `evaluate`, unless that mixes images (soft labels).
            attacks: see `make_attack`.
            n (*optional*): as many of the images, drawn with the seed; all by default.
            full (`bool`): False leaves checks, curve, Lipschitz bounds and examples out, which may take longer than
                the attacks.
            epsilon, norm (*optional*): of this test; by default those of the options. What the card says of training
                stays what training was.
            attack_precision (`str`): in which attacks search, as in `evaluate_robustness`.

        Returns:
            `dict`: what `results.json` holds (docs/results_json.md).
        """
        args, publisher, gates = self.args, self.publisher, gate_report(self.model)
        self._classes.check(dataset, "test_dataset")
        name = dataset_name(dataset)
        if is_stream(dataset):
            if n is None:
                raise ValueError("a stream is tested on its first n images: give n")
            dataset, n = TakenItems(dataset, n), None
        if len(dataset):
            with random_states_kept():
                dataset = as_collated(dataset, self.data_collator)
                warn_of_size(self._shape, collate([dataset[0]])["pixel_values"], "test_dataset")
        if not self._is_published():
            self.save_model(_internal_call=True)  # pushes nothing
        with (
            self.compressor.published() as trained,
            as_published(trained) as model,
        ):
            publisher.results = evaluate(
                model,
                dataset,
                attacks=attacks,
                attack_precision=attack_precision,
                epsilon=args.epsilon if epsilon is None else epsilon,
                norm=args.norm if norm is None else norm,
                n=n,
                seed=args.seed,
                batch_size=args.eval_batch_size,
                processing_class=self.processing_class,
                exclude=publisher.options()["pruning_exclude"],
                model_name=without_paths(self.hub_model_id or publisher.folder.resolve().name),
                dataset_name=publisher.card_options.get("dataset_name") or name,
                gates=gates.to_dict() if gates.rows else None,
                full=full,
                folder=args.output_dir,
                mixed=True,
                class_names=getattr(getattr(self.model, "config", None), "id2label", None),
                on_examples=lambda examples: publisher.card_options.update(examples=examples),
                progress=not args.disable_tqdm,
                distributed=args.world_size > 1,
                writing=lambda: self.writing("The results", args.output_dir),
            )
        return publisher.results

    def _is_published(self) -> bool:
        """
        Whether a test has nothing to save: the output folder holds these weights, or the model was neither trained nor
        saved here and the folder has no other. The first process looks, so that all decide alike.

        Raises:
            ValueError: it holds a model that this trainer has not written, with other weights.
        """
        folder, found = Path(self.args.output_dir), None
        with self.compressor.published(self.is_world_process_zero()) as model:
            if self.is_world_process_zero():
                if self._trained or self._published is not None:
                    found = weights_digest(model) == self._published
                else:
                    found = "other" if has_weights(folder) and not holds_weights(folder, model) else True
        (found,) = broadcast_object_list([found])
        if found == "other":
            raise ValueError(
                f"{folder} holds a model with other weights, and results of this one would lie beside it: test with "
                "another output_dir, or call save_model() first, which replaces that model"
            )
        return found

    # ---- saving, loading, publishing ----

    def identity(self) -> RunIdentity:
        """
        As of `ResumableTrainer`, with what is no option and changes the training: what the model computes with its
        weights, as its config says, what the preprocessing does to pixels and to the size of images (not of a stream,
        of which nothing is known yet), and the teacher's weights, wherever they lie.
        """
        found, more = super().identity(), {}
        inputs = self.adversary.preprocessing
        own = {"model": {"type": type(self.model).__name__, **what_is_computed(self.model)}}
        own |= {"image_mean": list(inputs.mean), "image_std": list(inputs.std)}
        if self._resize is not None:
            more["resized"] = self._resize.to_dict()
        if self.teacher.digest is not None:
            more["teacher"] = self.teacher.digest
        usual = {**found.usual, **flat(own)}  # checkpoints of before these were kept say nothing of them, and go on
        return replace(found, options={**found.options, **own, **more}, usual=usual)

    def about_to_train(self) -> None:
        self.publisher.forget_results()  # of other weights, from now on
        self._trained, self._published = True, None
        self.compressor.restart()  # weights may have been frozen since it was made
        if self._optimizer_is_ours:  # of a training before: its moments, and perhaps of other weights
            self.optimizer, self._optimizer_is_ours = None, False

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.publisher.keep_options()

    def _save_checkpoint(self, model, trial):
        self.check_terms()
        with self.speed.aside():
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir=None, state_dict=None):
        """
        A training checkpoint, or the folder that is published. Whatever is written for others has the gates folded
        into the weights: a plain model. Where FSDP2 has sharded the model, it is gathered, by all processes together.
        """
        published, compressor = Path(self.args.output_dir), self.compressor
        folder = Path(output_dir if output_dir is not None else published)
        check_finite_weights(self.model, self.state.global_step, str(published))
        is_checkpoint = (
            self._unfinished is not None and folder.parent == self._unfinished
        )  # whatever others are called
        if not is_checkpoint:
            self._finish_current_push()  # it reads these files
        with (
            nullcontext() if is_checkpoint else self.writing("The model", published),
            compressor.averaged(),
            folded_gates(self.model),
        ):
            self.publisher.describe_(self.model)
            # what was gathered before has gates, and no average
            model, sharded = compressor.whole(self.args.should_save), is_sharded(self.model)
            if compressor.average is not None or sharded:
                state_dict = model.state_dict() if sharded and model is not None else None
            super()._save(str(folder), disk_state(self.model, state_dict))
            if not (self.args.should_save or sharded):
                return
            if not is_checkpoint and self.args.should_save:
                self.publisher.write_extras(folder, model)
                self.publisher.write_results(folder, model)
                self._published = weights_digest(model) if folder == published else self._published
        if is_checkpoint:
            state = compressor.state() | self.teacher.state()
            if self.args.should_save:
                save_state(state, folder / STATE_FILE)
            return
        with self.writing("The card", published):
            self._write_card(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        reshard_(self.model)
        with detached_gates(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.compressor.load_state(resume_from_checkpoint)
        self.teacher.load_state(resume_from_checkpoint)

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=(), **kwargs):
        """
        Write README.md and its figures to the output folder, with what is known at the time.

        Keyword arguments are those of `write_card`; they are kept for later cards of the run.
        """
        self.publisher.keep(model_name=model_name, dataset_name=dataset_name, tags=tags, **kwargs)
        self._write_card(Path(self.args.output_dir))

    def _write_card(self, folder: Path) -> None:
        if not (self.is_world_process_zero() or is_sharded(self.model)):
            return
        with self.compressor.published(self.args.should_save) as model:
            if self.is_world_process_zero():
                self.publisher.write_card(folder, model, self.hub_model_id, self.state.log_history)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Save the model and upload the output folder, its card last, as one commit (`push_folder`).

        Arguments as in `Trainer.push_to_hub`; keyword arguments are those of `create_model_card`.

        Returns:
            `CommitInfo`, a `Future` of it if not `blocking`, or None on other processes than the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=self.args.hub_token if token is None else token, private=private)
        self.publisher.keep(**kwargs)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        options = {"token": token, "revision": revision, "private": private}
        return self.publisher.push(self.hub_model_id, blocking, commit_message, **options)

    def _push_from_checkpoint(self, checkpoint_folder):
        # upstream copies a fixed list of files, without ours but with a pickle: publish the whole folder instead
        if self._unfinished is not None:
            return  # once the checkpoint has its name
        args, pushing = self.args, getattr(self, "push_in_progress", None)  # which the first process alone has
        busy = pushing is not None and not pushing.is_done()
        wanted = self.is_world_process_zero() and args.hub_strategy != HubStrategy.END
        wanted = wanted and (not busy or args.hub_always_push)
        if is_sharded(self.model):  # all gather if the first wants to push
            wanted = bool(self.accelerator.reduce(torch.tensor(float(wanted), device=args.device)))
        if not wanted:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self._save(args.output_dir)
        if self.is_world_process_zero():
            step = self.state.global_step
            self.push_in_progress = self.publisher.push_in_background(self.hub_model_id, step, checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        for error in failed_pushes(getattr(self, "push_in_progress", None)):
            # the run goes on: the next push sends everything, and the last one, which is not in the background, raises
            logger.error(f"A push during training failed, the repository is as it was before: {error!r}")


class Predictions(PredictionOutput):
    """
    Attributes:
        adversarial_predictions: like `predictions`, of the adversarial images; None where nothing was attacked.
    """

    adversarial_predictions = None


def early_ends(args: TSCNCConfig, state: TrainerState, sparsity: float | None) -> list[str]:
    """What a training that somebody ended early has not done: its target, and the choice of the best checkpoint."""
    found = []
    if sparsity is not None and state.global_step < state.max_steps and sparsity < args.target_sparsity - 1e-6:
        found.append(
            f"training was ended after step {state.global_step} of {state.max_steps} with {sparsity:.2%} zeros among "
            f"the prunable weights; target_sparsity is {args.target_sparsity:.2%}"
        )
    best, loaded = state.best_global_step, Path(state.best_model_checkpoint or "the last weights").name
    if args.load_best_model_at_end and best and loaded != f"checkpoint-{best}":
        found.append(
            f"load_best_model_at_end=True, but the best evaluation was after step {best}, which was not saved: this "
            f"is {loaded}. Let save_steps and eval_steps be the same"
        )
    elif args.load_best_model_at_end and state.best_model_checkpoint is None:
        found.append(
            "load_best_model_at_end=True, but no evaluation came after the masks were final, of a network that had "
            "not collapsed: these are the last weights. Evaluate more often, or let pruning_end be earlier"
        )
    return found


class StepCallback(TrainerCallback):
    """Connects the trainer's events to its compressor. No state of its own."""

    def __init__(self, trainer: TSCNCTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.clear_terms()
        self.trainer.publisher.trained_with = None  # what the options are from now on
        self.trainer.compressor.begin(state.global_step, state.max_steps, self.trainer._steps_planned)
        self.trainer.speed.begin(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.check_terms()  # the steps since the last log
        texts = early_ends(args, state, self.trainer.compressor.figures().get("sparsity"))  # all processes count
        if state.is_world_process_zero:
            for text in texts:
                logger.warning(text)
        self.trainer.compressor.end()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.trainer.start_step(optimizer)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        with self.trainer.speed.part("masks"):
            self.trainer.compressor.after_backward(self.trainer.accelerator, state.global_step, state.max_steps)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        # the trainer counts the step only after this event
        with self.trainer.speed.part("masks"):
            self.trainer.compressor.after_step(state.global_step + 1, state.max_steps, optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.speed.end_step(self.trainer._images * args.world_size)
