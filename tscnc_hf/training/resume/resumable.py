"""Training that survives what happens to processes and disks: kills, SIGTERM, a full disk, a read-only folder."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

from tscnc_hf.artifact.files.atomic import write_json
from tscnc_hf.artifact.files.identity import RunIdentity, code_identity
from tscnc_hf.artifact.models.loading import load_weights
from tscnc_hf.data.epochs import set_epoch
from tscnc_hf.data.identity import dataset_identity
from tscnc_hf.data.streams import has_length
from tscnc_hf.training.resume.checkpoints import (
    ResumeError,
    checkpoints,
    clear_unfinished,
    damage,
    finish_checkpoint,
    last_whole_checkpoint,
    others_text,
    rotate,
    set_aside,
    unfinished_folder,
    whole_checkpoint_text,
)
from tscnc_hf.training.resume.compatible import (
    IDENTITY_FILE,
    IMAGES,
    check_batch,
    check_identity,
    check_length,
    decisive_options,
    images_a_step,
    steps_planned,
    what_differs,
)
from tscnc_hf.training.resume.fsdp import check_optimizer_layout, save_sharded_optimizer
from tscnc_hf.training.resume.storage import check_writable, writing
from tscnc_hf.training.resume.termination import Termination


logger = logging.get_logger(__name__)


class ResumableTrainer(Trainer):
    """
    A `transformers.Trainer`, for any task, that loses nothing that it has computed.

    * A checkpoint is there under its name as a whole, or not at all; older ones go when it is.
    * `train(resume_from_checkpoint=True)` goes on from the last whole one, exactly: with the weights loaded strictly,
      and refused for other options or data (`identity`), another batch, or a new run among old checkpoints.
    * SIGTERM and Ctrl-C end a single process after its step, with a checkpoint.
    * What cannot be written is said in one line, with what there is to go on from.

    Attributes:
        data_identity (`dict`, *optional*): what the data is, plain JSON types, where somebody knows it better than the
            data sets themselves say (`tscnc_hf.data.identity.dataset_identity`).

    Args and everything else as in `Trainer`.
    """

    def __init__(self, model=None, args=None, *positional, **kwargs):
        if args is not None and args.should_save:
            with writing("The output folder", args.output_dir):
                os.makedirs(args.output_dir, exist_ok=True)
        self._unfinished: Path | None = None  # while a checkpoint is being written: where
        self._wrote_here = False  # a checkpoint: from then on those of the folder are this trainer's
        self._identity: RunIdentity | None = None  # while training
        self._steps_planned: int | None = None  # of the run that was resumed, when its checkpoint was written
        self._images_before: int | None = None  # a step of the run that was resumed, where its checkpoint says
        self._beginning: tuple | None = None  # weights and moments, while training may have to begin anew
        self.data_identity: dict | None = None
        self.termination = Termination(can_wait=False)
        super().__init__(model, args, *positional, **kwargs)
        self.callback_handler.callbacks.insert(0, ResumeCallback(self))

    def identity(self) -> RunIdentity:
        """The options that decide what is trained, the data and the code; kept in each checkpoint and compared."""
        options, usual = decisive_options(self.args)
        if self.train_dataset is not None and not has_length(self.train_dataset):  # else `check_batch` sees it
            options[IMAGES] = self._images_a_step()
        data = self.data_identity or {
            part: {name: dataset_identity(one) for name, one in given.items()}
            if isinstance(given, dict)
            else dataset_identity(given)
            for part, given in (("train", self.train_dataset), ("validation", self.eval_dataset))
            if given is not None
        }
        return RunIdentity(options, data, code_identity(), usual=usual)

    def _images_a_step(self) -> int:
        processes = 1 if self.accelerator.split_batches else self.args.world_size
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * processes

    def writing(self, what: str, run_folder: str | os.PathLike):
        """Inside, a full disk or a read-only folder is a `StorageError` that says what there is to go on from."""
        return writing(what, run_folder, lambda: f"; {whole_checkpoint_text(run_folder)}")

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model, trial):
        """
        Upstream writes a checkpoint in place, file by file, and forgets old ones as it goes. Here it does so in a
        hidden folder (`_get_output_dir`); when all processes are done, the checkpoint gets its name, and only then is
        it pushed and are older ones removed.
        """
        args, name = self.args, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        run_folder, wait = self._get_output_dir(trial), self.accelerator.wait_for_everyone
        final, first_here = os.path.join(run_folder, name), args.local_process_index == 0
        with self.writing(name, run_folder):
            if first_here:
                clear_unfinished(run_folder)
            wait()
            try:
                self._unfinished = unfinished_folder(run_folder)
                super()._save_checkpoint(model, trial)
                written, self._unfinished = self._unfinished / name, None
                if args.should_save:
                    made_of = (self._identity or self.identity()).to_dict()
                    write_json(made_of | {IMAGES: self._images_a_step()}, written / IDENTITY_FILE)
                self._record_best(run_folder, written)
                wait()
                # one process does it; on file systems that it does not see, the first of each other machine
                for turn in (self.is_world_process_zero(), first_here):
                    if turn and written.is_dir():
                        finish_checkpoint(written)
                    wait()
            except BaseException:
                self._unfinished = None
                shutil.rmtree(unfinished_folder(run_folder), ignore_errors=True)  # half of it would fill the disk
                raise
        self._wrote_here = True
        if args.push_to_hub:
            self._push_from_checkpoint(final)
        if args.should_save:
            rotate(run_folder, args.save_total_limit, {final, self.state.best_model_checkpoint or final})
        if self.termination.requested:
            self.termination.end()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if what := damage(resume_from_checkpoint):  # upstream goes on without an optimizer that is not there
            raise ResumeError(f"{resume_from_checkpoint} is not whole: {what}. Resume from another checkpoint")
        text = check_identity(resume_from_checkpoint, self._identity or self.identity())
        if text and self.is_world_process_zero():
            logger.warning(text)
        # upstream loads by the names on disk, which are not those in memory for ViT and others, and only warns
        load_weights(self.model, resume_from_checkpoint)
        self._steps_planned = steps_planned(resume_from_checkpoint)
        self._images_before = images_a_step(resume_from_checkpoint)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_rng_state(self, checkpoint):
        text = what_differs(checkpoint, self.args.world_size) if checkpoint else None
        if text and self.is_world_process_zero():
            logger.warning(text)
        super()._load_rng_state(checkpoint)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """Upstream takes one more step where a run that is over is resumed and its last epoch was not whole."""
        args = (max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)
        place = super()._init_training_state(*args)
        if resume_from_checkpoint and self.state.best_global_step:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            beside = os.path.join(os.path.dirname(os.path.normpath(resume_from_checkpoint)), name)
            if os.path.isdir(beside):  # the folder may have moved, and where it was there may be another run
                self.state.best_model_checkpoint = beside
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0
        if self.state.global_step and num_train_epochs == sys.maxsize and not self.args.ignore_data_skip:
            # a stream: the epoch is (pass) + (micro-batches of it) / (those of the whole run, as it was planned)
            passes, share = divmod(self.state.epoch, 1)
            planned = steps_planned(resume_from_checkpoint) * self.args.gradient_accumulation_steps
            return int(passes), round(share * planned)
        return place

    def _run_epoch(
        self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, ignore_keys_for_eval,
        start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch,
    ):  # fmt: skip
        """
        Data is told the epoch: augmentation is a function of (seed, epoch, index). Each pass over a stream begins with
        random states that follow from seed and epoch, so that one which shuffles by them comes in the same order when
        it is resumed; what it draws later, in this process, it draws anew.
        """
        set_epoch((self.train_dataset, getattr(train_dataloader, "dataset", None)), epoch)
        stream, before = not has_length(train_dataloader), self.state.global_step
        if stream:
            set_seed(self.args.seed + epoch)
        try:
            super()._run_epoch(
                model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial,
                ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained,
                steps_trained_in_current_epoch,
            )  # fmt: skip
        except ValueError as error:  # accelerate's, of a stream that gives nothing
            if not stream or "does not contain any data" not in str(error):
                raise
        if not stream:
            return
        model.zero_grad()  # of batches that were too few for a step
        if self.state.global_step == before and not (resume_from_checkpoint and epoch == epochs_trained):
            raise RuntimeError(
                f"the stream gave too few images for an optimizer step in pass {epoch + 1}, after step {before} of "
                f"{self.state.max_steps}; {whole_checkpoint_text(self.args.output_dir)}. A stream must begin anew "
                "whenever it is iterated, with at least per_device_train_batch_size x gradient_accumulation_steps "
                "images for each process"
            )

    def _inner_training_loop(
        self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None
    ):
        """Out of memory (`auto_find_batch_size`), upstream begins anew with the weights and moments of by then."""
        if self.args.auto_find_batch_size:
            if self._beginning is None:
                moments = None if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict())
                self._beginning = copy.deepcopy(self.model.state_dict()), moments
            else:
                weights, moments = self._beginning
                self.model.load_state_dict(weights)
                if moments is None:
                    self.optimizer = None
                else:
                    self.optimizer.load_state_dict(moments)
                if not resume_from_checkpoint and self._wrote_here:
                    self._set_aside()
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.is_fsdp_enabled:  # upstream would write the weights once more, with gates and as a pickle
            save_sharded_optimizer(self, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            check_optimizer_layout(checkpoint, self.is_fsdp_enabled)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _record_best(self, run_folder: str, written: Path) -> None:
        """Where the best checkpoint is, or will be in a moment; upstream has looked beside the unfinished one."""
        state = self.state
        if state.best_global_step:
            best = os.path.join(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
            if os.path.basename(best) == written.name or os.path.isdir(best):
                state.best_model_checkpoint = best
        if self.args.should_save:
            state.save_to_json(str(written / TRAINER_STATE_NAME))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        As `Trainer.train`. `resume_from_checkpoint=True` goes on from the last checkpoint that is whole.

        While it trains, SIGTERM ends the process with status 143, and Ctrl-C ends training with `KeyboardInterrupt`: a
        single process first ends its step and saves a checkpoint (if it saves any, and has not begun to evaluate),
        several leave the last one whole. A second signal ends at once.

        Raises:
            ResumeError: a `ValueError`; no whole checkpoint to go on from, one of a run with other options, or a new
                run among the checkpoints of another.
            StorageError: something could not be written; the last checkpoint is whole.
        """
        folder = self.args.output_dir
        if self.args.should_save:
            check_writable(folder)
            if self.args.local_process_index == 0:
                clear_unfinished(folder)
        self.accelerator.wait_for_everyone()
        self._refuse_others(resume_from_checkpoint)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
        if resume_from_checkpoint or self.args.save_strategy != SaveStrategy.NO:
            self._identity = self.identity()
        self.termination = Termination(self.args.world_size == 1 and self.args.save_strategy != SaveStrategy.NO)
        self._steps_planned = self._images_before = None  # of a run that was resumed before
        self.about_to_train()
        try:
            with self.termination.watching():
                output = super().train(resume_from_checkpoint, *args, **kwargs)
                if self.termination.requested:  # as training ended
                    self.termination.end()
                return output
        except (SystemExit, KeyboardInterrupt):
            if self.termination.ended_by is not None:
                self.is_in_train = False
                if self.is_world_process_zero():
                    advice = "Go on with resume_from_checkpoint=True (--resume true)"
                    if last_whole_checkpoint(folder) is None:
                        advice = "There is nothing to go on from"
                        if self.args.save_strategy == SaveStrategy.NO:
                            advice += ': with save_strategy="no" (--save_strategy no) no checkpoint is ever saved'
                    logger.warning(
                        f"{self.termination.ended_by.name}: training ended after step {self.state.global_step}; "
                        f"{whole_checkpoint_text(folder)}. {advice}"
                    )
            raise
        finally:
            self._identity = self._beginning = None
            self.termination = Termination(can_wait=False)  # evaluating the model that was left does not end again

    def about_to_train(self) -> None:
        """Called by `train` once nothing refuses it that is known before its first step."""

    def _refuse_others(self, resume_from_checkpoint: str | bool | None) -> None:
        """
        A run that does not go on in this folder may not begin where another one left checkpoints. The first process
        looks, so that all decide alike. Where it was this trainer, they are set aside.
        """
        if resume_from_checkpoint is True:
            return
        folder, text = self.args.output_dir, None
        source = Path(resume_from_checkpoint).resolve().parent if resume_from_checkpoint else None
        if source == Path(folder).resolve():
            return
        if self._wrote_here:
            self._set_aside()
            return
        if self.is_world_process_zero():
            text = others_text(folder)
        (text,) = broadcast_object_list([text])
        if text is not None:
            raise ResumeError(text)

    def _set_aside(self) -> None:
        folder, away = self.args.output_dir, None
        if self.args.should_save and self.args.local_process_index == 0:
            with self.writing("The folder of earlier checkpoints", folder):
                away = set_aside(folder)
        if away is not None and self.is_world_process_zero():
            logger.warning(f"Training begins anew: the checkpoints of the run before are in {away} now")
        self.accelerator.wait_for_everyone()

    def _last_checkpoint(self) -> str:
        """The last whole checkpoint of the output folder; those that it passes over are named."""
        folder, skipped = self.args.output_dir, []
        for checkpoint in checkpoints(folder):
            what = damage(checkpoint)
            if what is None:
                for text in skipped:
                    logger.warning(f"Not resumed from {text}. Going on from {checkpoint}")
                return str(checkpoint)
            skipped.append(f"{checkpoint}: {what}")
        raise ResumeError(
            f"{folder} has no whole checkpoint to resume from{''.join(f'; {text}' for text in skipped)}. Name one "
            "elsewhere, or start anew"
        )


class ResumeCallback(TrainerCallback):
    """Connects the trainer's events to what `ResumableTrainer` promises. No state of its own."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if state.global_step == 0:
            return
        if has_length(train_dataloader):
            steps = -(-len(train_dataloader) // args.gradient_accumulation_steps)
            images = self.trainer._images_before, self.trainer._images_a_step()
            check_batch(state.global_step, state.epoch, steps, images)
        text = check_length(state.global_step, state.max_steps, self.trainer._steps_planned)
        if text and state.is_world_process_zero:
            logger.warning(text)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.termination.requested and state.epoch % 1 != 0:  # else what belongs to the epoch's end first
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer.termination.requested:
            control.should_save = True

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.trainer.termination.requested:  # may take long, and a save before it is done would leave it out
            self.trainer.termination.end()
