"""The options of a run, as pruning: what is prunable, when it is pruned, and what happens around an optimizer step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning.allocation import Allocation
from tscnc_hf.method.pruning.pruner import Pruner
from tscnc_hf.method.pruning.schedule import sparsity_at
from tscnc_hf.method.pruning.unit_allocation import unit_allocation
from tscnc_hf.training.config import UNITS, TSCNCConfig, pattern


class ScheduleError(ValueError):
    """A run too short for its pruning schedule: known only when the steps of training are."""


def with_dense_ends(model: nn.Module, args: TSCNCConfig) -> TSCNCConfig:
    """The options with the names of the first and the last weight among `pruning_exclude`, where they stay dense."""
    names = [record.name for record in weight_matrices(model)]
    ends = (names[:1] if args.pruning_dense_first else []) + (names[-1:] if args.pruning_dense_last else [])
    return replace(args, pruning_exclude=list(dict.fromkeys([*args.pruning_exclude, *ends]))) if ends else args


def build_pruner(model: nn.Module, args: TSCNCConfig) -> Pruner:
    """
    The pruner of a run. With `keep_masks` it takes over the zeros of the model.

    Raises:
        ValueError: nothing to prune; `pruning_exclude` names what is not there; a target that cannot be reached;
            `keep_masks` for a model without zeros, or with more of them than the target.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in args.pruning_exclude:
        if not any(part in name for name in names):
            raise ValueError(
                f"pruning_exclude names {part!r}, which no parameter has in its name; print(weight_matrices(model)) "
                f"shows them, e.g. {', '.join(record.name for record in list(weight_matrices(model))[:3])}"
            )
    records = list(weight_matrices(model, args.pruning_exclude))
    if args.pruning_structure in UNITS:
        allocation = unit_allocation(model, records, UNITS[args.pruning_structure], args.pruning_scope)
    else:
        allocation = Allocation(
            scope=args.pruning_scope,
            layer_sparsity=args.pruning_layer_sparsity,
            layer_floor=args.pruning_layer_floor,
            row_floor=args.pruning_row_floor,
            pattern=pattern(args.pruning_structure),
        )
    pruner = Pruner(
        records,
        args.pruning_criterion,
        allocation,
        latent=args.pruning_latent,
        rate_learning_rate=args.pruning_rate_learning_rate,
    )
    if args.keep_masks:
        pruner.keep_zeros()
        if pruner.pruned_count == 0:
            raise ValueError("keep_masks=True, but no prunable weight of the model is zero: load a sparse checkpoint")
        if 0 < args.target_sparsity < pruner.initial_sparsity:
            raise ValueError(
                f"target_sparsity={args.target_sparsity} is less than the {pruner.initial_sparsity:.6g} that the "
                "model has already and keep_masks=True keeps: raise the target, or leave it out to fine-tune"
            )
    if args.target_sparsity > 0:
        pruner.check(args.target_sparsity)
    return pruner


def schedule_steps(args: TSCNCConfig, max_steps: int) -> tuple[int, int]:
    """
    First and last optimizer step (counted from 1) of the pruning schedule.

    Raises:
        ScheduleError: training is too short for a gradual schedule.
    """
    start, end = round(args.pruning_start * max_steps), max(1, round(args.pruning_end * max_steps))
    one_shot = args.pruning_start == args.pruning_end
    if not one_shot and end - start < args.pruning_interval:
        raise ScheduleError(
            f"training has {max_steps} optimizer steps, so pruning from {args.pruning_start} to {args.pruning_end} of "
            f"it has {end - start}; it needs at least pruning_interval={args.pruning_interval}. Train longer, widen "
            "the schedule, lower pruning_interval, or prune at once with pruning_start = pruning_end"
        )
    return start, end


def start_pruning(
    pruner: Pruner, args: TSCNCConfig, step: int, max_steps: int, optimizer: torch.optim.Optimizer | None
) -> None:
    """Before optimizer step `step` (counted from 0): the schedule begins here, or did so before an interruption."""
    if args.target_sparsity == 0:
        return
    start, end = schedule_steps(args, max_steps)
    if start <= step < end and not pruner.active:
        pruner.begin(getattr(optimizer, "optimizer", optimizer))
    if step == start < end and not pruner.criterion.gathers:  # what is gathered from gradients is not there yet
        pruner.update(_sparsity(pruner, args, step, start, end))
        pruner.apply_()


def before_optimizer_step(pruner: Pruner, model: nn.Module, args: TSCNCConfig, accelerator) -> None:
    """After backward and clipping."""
    if not pruner.active:
        return
    if args.fp16 and not args.max_grad_norm:  # clipping would have done it
        try:
            accelerator.unscale_gradients()
        except RuntimeError as error:  # versions that log the gradients' norm have done it by now
            if "has already been called" not in str(error):
                raise
    pruner.freeze_others(model)
    pruner.before_step()


def prune_after_step(
    pruner: Pruner, args: TSCNCConfig, step: int, max_steps: int, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """After optimizer step `step` (counted from 1): masks are chosen anew while the schedule runs, then frozen."""
    pruner.after_step()
    if args.target_sparsity > 0:
        start, end = schedule_steps(args, max_steps)
        if step == end or (start < step < end and (step - start) % args.pruning_interval == 0):
            pruner.update(_sparsity(pruner, args, step, start, end))
        if step == end:
            pruner.apply_()
            pruner.finish(getattr(optimizer, "optimizer", optimizer))
    pruner.apply_()


def _sparsity(pruner: Pruner, args: TSCNCConfig, step: int, start: int, end: int) -> float:
    return sparsity_at(
        step, start, end, args.target_sparsity, initial=pruner.initial_sparsity, schedule=args.pruning_schedule
    )
