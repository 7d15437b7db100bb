"""What happens around an optimizer step. No state of its own: all is in the trainer or follows from the step."""

from __future__ import annotations

from transformers import TrainerCallback
from transformers.utils import logging

from tscnc_hf.method.averaging import WeightAverage
from tscnc_hf.method.units.gates import clamp_gates_
from tscnc_hf.training.compressor import before_optimizer_step, prune_after_step, schedule_steps, start_pruning
from tscnc_hf.training.resume.compatible import check_batch, check_length


logger = logging.get_logger(__name__)


class MethodCallback(TrainerCallback):
    """Connects the trainer's events to the method."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if state.global_step > 0 and hasattr(train_dataloader, "__len__"):
            check_batch(state.global_step, state.epoch, -(-len(train_dataloader) // args.gradient_accumulation_steps))
        if state.global_step > 0:
            text = check_length(state.global_step, state.max_steps, self.trainer.steps_planned)
            if text and state.is_world_process_zero:
                logger.warning(text)
        if args.target_sparsity > 0:
            schedule_steps(args, state.max_steps)
        self.trainer.clear_terms()
        if args.ema_decay > 0 and (state.global_step == 0 or self.trainer.average is None):
            self.trainer.average = WeightAverage(self.trainer.model, args.ema_decay)

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.check_terms()  # the steps since the last log
        if self.trainer.average is not None:  # the model that was evaluated is the one that the user gets
            self.trainer.average.copy_to_(self.trainer.model)
            self.trainer.average = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        dataset = self.trainer.train_dataset
        if hasattr(dataset, "set_epoch"):  # augmentation is a function of (seed, epoch, index)
            dataset.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        start_pruning(self.trainer.pruner, args, state.global_step, state.max_steps, optimizer)
        self.trainer.start_step()

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.termination.requested and state.epoch % 1 != 0:  # else what belongs to the epoch's end first
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer.termination.requested:
            control.should_save = True

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.trainer.termination.requested:  # may take long, and a save before it is done would leave it out
            self.trainer.termination.end()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        before_optimizer_step(self.trainer.pruner, self.trainer.model, args, self.trainer.accelerator)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        # the trainer counts the step only after this event
        prune_after_step(self.trainer.pruner, args, state.global_step + 1, state.max_steps, optimizer)
        clamp_gates_(self.trainer.model)
        if self.trainer.average is not None:
            self.trainer.average.update(self.trainer.model, state.global_step + 1, self.trainer.pruner.local_masks)
