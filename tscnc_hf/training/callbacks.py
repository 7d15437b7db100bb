"""What happens around an optimizer step. No state of its own: all is in the trainer or follows from the step."""

from __future__ import annotations

from transformers import TrainerCallback

from tscnc_hf.method.averaging import WeightAverage
from tscnc_hf.method.gates import clamp_gates_
from tscnc_hf.method.pruning import Pruner, sparsity_at
from tscnc_hf.training.config import TSCNCConfig


def schedule_steps(args: TSCNCConfig, max_steps: int) -> tuple[int, int]:
    """
    First and last optimizer step (counted from 1) of the pruning schedule.

    Raises:
        ValueError: training is too short for a gradual schedule.
    """
    start, end = round(args.pruning_start * max_steps), max(1, round(args.pruning_end * max_steps))
    one_shot = args.pruning_start == args.pruning_end
    if not one_shot and end - start < args.pruning_interval:
        raise ValueError(
            f"training has {max_steps} optimizer steps, so pruning from {args.pruning_start} to {args.pruning_end} of "
            f"it has {end - start}; it needs at least pruning_interval={args.pruning_interval}. Train longer, widen "
            "the schedule, lower pruning_interval, or prune at once with pruning_start = pruning_end"
        )
    return start, end


def prune_after_step(pruner: Pruner, args: TSCNCConfig, step: int, max_steps: int) -> None:
    """Masks after optimizer step `step` (counted from 1): chosen anew while the schedule runs, then frozen."""
    if args.target_sparsity == 0:
        return
    start, end = schedule_steps(args, max_steps)
    if step == end or (start < step < end and (step - start) % args.pruning_interval == 0):
        pruner.update(sparsity_at(step, start, end, args.target_sparsity))
    pruner.apply_()


class MethodCallback(TrainerCallback):
    """Connects the trainer's events to the method."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
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

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.start_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        # the trainer counts the step only after this event
        prune_after_step(self.trainer.pruner, args, state.global_step + 1, state.max_steps)
        clamp_gates_(self.trainer.model)
        if self.trainer.average is not None:
            self.trainer.average.update(self.trainer.model, state.global_step + 1, self.trainer.pruner.masks)
