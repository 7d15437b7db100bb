"""What a training run leaves behind: checkpoints that resume exactly, a published folder, its figures and its card."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, HfApi
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging

from tscnc_hf.artifact.files.atomic import write_json
from tscnc_hf.artifact.files.state import STATE_FILE, save_state
from tscnc_hf.artifact.models.checkpoint import disk_state, load_weights
from tscnc_hf.artifact.models.narrowed import width_record
from tscnc_hf.artifact.models.weights import whole_copy
from tscnc_hf.artifact.repository.push import push_folder
from tscnc_hf.artifact.repository.repository import RESULTS_FILE
from tscnc_hf.evaluation.measures.examples import adversarial_examples
from tscnc_hf.evaluation.run import as_published, measure
from tscnc_hf.method.averaging import WeightAverage
from tscnc_hf.method.pruning.pruner import Pruner
from tscnc_hf.method.sharding import is_sharded, reshard_
from tscnc_hf.method.units.gates import detached_gates, folded_gates, gate_report
from tscnc_hf.training.checks import check_finite_weights
from tscnc_hf.training.resume.checkpoints import FILE_LIST, ResumeError, damage
from tscnc_hf.training.resume.compatible import check_options, steps_planned, write_options
from tscnc_hf.training.resume.resumable import SurvivingTrainer
from tscnc_hf.training.saving import (
    failed_pushes,
    load_method_state,
    method_state,
    push_in_background,
    run_facts,
    save_extras,
    write_training_card,
)


logger = logging.get_logger(__name__)


class PublishingTrainer(SurvivingTrainer):
    """
    The part of `TSCNCTrainer` that knows files and the Hub. It needs `self.pruner`, `self.tsc_scales` and how pixels
    are normalised.

    Whatever is written for others has the gates folded into the weights: a plain model. Where FSDP2 has sharded the
    model, it is gathered for that, so all processes save, test and push together.
    """

    pruner: Pruner
    tsc_scales: dict[str, Tensor]
    pixel_mean: Sequence[float]
    pixel_std: Sequence[float]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.test_results: dict | None = None
        self.card_options: dict = {}
        self.average: WeightAverage | None = None  # while training with ema_decay
        self.steps_planned: int | None = None  # of the run that was resumed, when its checkpoint was written

    def averaged(self):
        """Inside, the model is the average of its weights, where there is one: what is evaluated and published."""
        return self.average.swapped(self.model) if self.average is not None else nullcontext()

    @contextmanager
    def published(self, everywhere: bool = False) -> Iterator[nn.Module | None]:
        """
        Inside, what others get: averaged and with gates folded. Of a sharded model it is a whole copy, which the
        process that writes has, or each process if `everywhere`; None on the others.
        """
        with self.averaged(), folded_gates(self.model):
            yield self._whole(everywhere or self.args.should_save)

    def _whole(self, keep: bool) -> nn.Module | None:
        if not is_sharded(self.model):
            return self.model
        whole = whole_copy(self.model, keep)
        return whole if whole is None else whole.to(self.args.device)

    # ---- saving and loading ----

    def _save(self, output_dir=None, state_dict=None):
        published = Path(self.args.output_dir)
        folder = Path(output_dir if output_dir is not None else published)
        check_finite_weights(self.model, self.state.global_step, str(published))
        is_checkpoint = folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and folder != published
        if not is_checkpoint:
            self._finish_current_push()  # it reads these files
        with (
            nullcontext() if is_checkpoint else self.writing("The model", published),
            nullcontext() if is_checkpoint else self.averaged(),
            folded_gates(self.model),
        ):
            if isinstance(self.model, PreTrainedModel):
                normalised = {"image_mean": list(self.pixel_mean), "image_std": list(self.pixel_std)}
                widths = width_record(self.model.config)
                self.model.config.tscnc = self.args.method_dict() | normalised | widths
            model = self._whole(self.args.should_save)  # what was gathered before has gates, and no average
            sharded = is_sharded(self.model)
            if self.average is not None or sharded:
                state_dict = model.state_dict() if sharded and model is not None else None
            super()._save(str(folder), disk_state(self.model, state_dict))
            if not (self.args.should_save or sharded):
                return
            if not is_checkpoint and self.args.should_save:
                save_extras(folder, model, self.args, self.card_facts())
        if is_checkpoint:
            state = method_state(self.model, self.pruner, self.tsc_scales, self.average)
            if self.args.should_save:
                save_state(state, folder / STATE_FILE)
                write_options(self.args, folder)
        else:
            with self.writing("The card and the results", published):
                if self.args.should_save and self.test_results is not None:
                    write_json(self.test_results, folder / RESULTS_FILE)
                elif self.args.should_save and self.state.global_step > 0:
                    (folder / RESULTS_FILE).unlink(missing_ok=True)  # of the weights that were here before
                self._write_card(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        check_options(resume_from_checkpoint, self.args)
        # upstream loads by the names on disk, which are not those in memory for ViT and others, and only warns
        reshard_(self.model)
        with detached_gates(self.model):
            load_weights(self.model, resume_from_checkpoint)
        self.steps_planned = steps_planned(resume_from_checkpoint)
        self.average = WeightAverage(self.model, self.args.ema_decay) if self.args.ema_decay > 0 else None
        self.tsc_scales = load_method_state(resume_from_checkpoint, self.model, self.pruner, self.average)
        listed = os.path.exists(os.path.join(resume_from_checkpoint, FILE_LIST))
        if listed and (what := damage(resume_from_checkpoint)):
            # upstream goes on without an optimizer or generators that are not there
            raise ResumeError(f"{resume_from_checkpoint} is not whole: {what}. Resume from another checkpoint")

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ---- the Hub ----

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
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        token = args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._keep_card_options(**kwargs)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        options = {"message": commit_message, "token": token, "revision": revision or args.hub_revision}
        options["private"] = args.hub_private_repo if private is None else private
        if blocking:
            return push_folder(args.output_dir, self.hub_model_id, **options)
        return HfApi().run_as_future(push_folder, args.output_dir, self.hub_model_id, **options)

    def _push_from_checkpoint(self, checkpoint_folder):
        # upstream copies a fixed list of files, without ours but with a pickle: publish the whole folder instead
        if self.is_writing_checkpoint:
            return  # once it has its name
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
        if not self.is_world_process_zero():
            return
        self.push_in_progress = push_in_background(args, self.hub_model_id, self.state.global_step, checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        for error in failed_pushes(getattr(self, "push_in_progress", None)):
            # the run goes on: the next push sends everything, and the last one, which is not in the background, raises
            logger.error(f"A push during training failed, the repository is as it was before: {error!r}")

    # ---- results ----

    def test(self, dataset, attacks: Sequence[str] = ("clean", "pgd-20"), n: int | None = None) -> dict:
        """
        The final figures, on data that training has not seen: robustness, sparsity and spectrum. Written to
        `results.json` in the output folder and shown on the card. Several processes share the images.

        Returns:
            `dict`: {"robustness", "sparsity", "spectrum", "curve", "lipschitz", "gates"}, each the `to_dict()` of its
            report (the last three where something was attacked, in L-infinity, and where there are gates).
        """
        args, gates = self.args, gate_report(self.model)
        with self.published(everywhere=True) as trained, as_published(trained) as model:
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
            with self.writing("The results", args.output_dir):
                write_json(self.test_results, Path(args.output_dir) / RESULTS_FILE)
        return self.test_results

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=(), **kwargs):
        """
        Write README.md and its figures to the output folder, with what is known at the time.

        Keyword arguments are those of `write_card`; they are kept for later cards of the run.
        """
        self._keep_card_options(model_name=model_name, dataset_name=dataset_name, tags=tags, **kwargs)
        self._write_card(Path(self.args.output_dir))

    def train(self, *args, **kwargs):
        self.test_results = None  # of other weights, from now on
        return super().train(*args, **kwargs)

    def card_facts(self) -> dict:
        """What the card says of the run that is in no option: plain JSON types, kept in `tscnc_config.json`."""
        return run_facts(self.model, self.card_options)

    def _keep_card_options(self, **options) -> None:
        self.card_options |= {key: value for key, value in options.items() if value}

    def _write_card(self, folder: Path) -> None:
        if not (self.is_world_process_zero() or is_sharded(self.model)):
            return
        options = {"model_name": self.hub_model_id or folder.resolve().name} | self.card_options
        options |= {"robustness": None, **(self.test_results or {}), "config": self.args.method_dict()}
        options |= self.card_facts() | {"log_history": list(self.state.log_history)}
        with self.published() as model:
            if self.is_world_process_zero():
                write_training_card(folder, model, self.args.pruning_exclude, options)
