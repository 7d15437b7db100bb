"""What a training run leaves behind: checkpoints that resume exactly, a published folder, its figures and its card."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from tscnc_hf.artifact.atomic import write_json
from tscnc_hf.artifact.checkpoint import load_weights
from tscnc_hf.evaluation.examples import adversarial_examples
from tscnc_hf.method.averaging import WeightAverage
from tscnc_hf.method.gates import detached_gates, folded_gates, gate_report
from tscnc_hf.method.pruning import Pruner
from tscnc_hf.training.checks import check_finite_weights
from tscnc_hf.training.results import measure
from tscnc_hf.training.saving import (
    load_method_state,
    push_in_background,
    save_extras,
    save_method_state,
    write_training_card,
)


RESULTS_FILE = "results.json"


class PublishingTrainer(Trainer):
    """
    The part of `TSCNCTrainer` that knows files and the Hub. It needs `self.pruner` and `self.tsc_scales`.

    Whatever is written for others has the gates folded into the weights: a plain model.
    """

    pruner: Pruner
    tsc_scales: dict[str, Tensor]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.test_results: dict | None = None
        self.card_options: dict = {}
        self.average: WeightAverage | None = None  # while training with ema_decay

    def averaged(self):
        """Inside, the model is the average of its weights, where there is one: what is evaluated and published."""
        return self.average.swapped(self.model) if self.average is not None else nullcontext()

    # ---- saving and loading ----

    def _save(self, output_dir=None, state_dict=None):
        published = Path(self.args.output_dir)
        folder = Path(output_dir if output_dir is not None else published)
        check_finite_weights(self.model, self.state.global_step, str(published))
        is_checkpoint = folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and folder != published
        with nullcontext() if is_checkpoint else self.averaged(), folded_gates(self.model):
            super()._save(str(folder), None if self.average is not None else state_dict)
            if not self.args.should_save:
                return
            if not is_checkpoint:
                save_extras(folder, self.model, self.args)
        if is_checkpoint:
            save_method_state(folder, self.model, self.pruner, self.tsc_scales, self.average)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # upstream loads by the names on disk, which are not those in memory for ViT and others, and only warns
        with detached_gates(self.model):
            load_weights(self.model, resume_from_checkpoint)
        self.average = WeightAverage(self.model, self.args.ema_decay) if self.args.ema_decay > 0 else None
        self.tsc_scales = load_method_state(resume_from_checkpoint, self.model, self.pruner, self.average)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder):
        # upstream copies a fixed list of files, without ours but with a pickle: publish the whole folder instead
        args, busy = self.args, self.push_in_progress is not None and not self.push_in_progress.is_done()
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self._save(args.output_dir)
        self.create_model_card()
        self.push_in_progress = push_in_background(args, self.hub_model_id, self.state.global_step, checkpoint_folder)

    # ---- results ----

    def test(self, dataset, attacks: Sequence[str] = ("clean", "pgd-20"), n: int | None = None) -> dict:
        """
        The final figures, on data that training has not seen: robustness, sparsity and spectrum. Written to
        `results.json` in the output folder and shown on the card. Several processes share the images.

        Returns:
            `dict`: {"robustness", "sparsity", "spectrum", "curve", "lipschitz", "gates"}, each the `to_dict()` of its
            report (the last three where something was attacked, in L-infinity, and where there are gates).
        """
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        gates = gate_report(model)
        with self.averaged(), folded_gates(model):
            self.test_results = measure(
                model,
                dataset,
                processing_class=self.processing_class,
                attacks=attacks,
                epsilon=args.epsilon,
                norm=args.norm,
                n=n,
                seed=args.seed,
                exclude=args.pruning_exclude,
                batch_size=args.eval_batch_size,
                progress=not args.disable_tqdm,
                distributed=args.world_size > 1,
            )
            if "curve" in self.test_results:
                examples = adversarial_examples(
                    model, dataset, epsilon=args.epsilon, norm=args.norm, seed=args.seed,
                    processing_class=self.processing_class,
                )  # fmt: skip
                names = getattr(getattr(model, "config", None), "id2label", None)
                self.card_options["examples"] = examples.for_figure(names) if examples else None
        if gates.rows:
            self.test_results["gates"] = gates.to_dict()
        if args.should_save:
            write_json(self.test_results, Path(args.output_dir) / RESULTS_FILE)
        return self.test_results

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=(), **kwargs):
        """
        Write README.md and its figures to the output folder, with what is known at the time.

        Keyword arguments are those of `tscnc_hf.artifact.card.write_card`; they are kept for later cards of the run.
        """
        if not self.is_world_process_zero():
            return
        options = {"model_name": model_name, "dataset_name": dataset_name, "tags": tags, **kwargs}
        self.card_options |= {key: value for key, value in options.items() if value}
        with self.averaged(), folded_gates(self.model):
            write_training_card(self.args, self.model, self.test_results, self.state.log_history, self.card_options)
