"""What makes a model small while it is trained: one object around an optimizer step.

Masks, the scales of TSC, gates and the average of the weights live here, and are saved and loaded together. All else
follows from the step that is being taken, so that a resumed run goes on as an uncut one.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers.utils import logging

from tscnc_hf.artifact.files.state import STATE_FILE, load_state
from tscnc_hf.artifact.models.saving import whole_copy
from tscnc_hf.method.adversarial.noise import seeded_generator
from tscnc_hf.method.averaging import WeightAverage, load_tensors_, own_tensors
from tscnc_hf.method.constraints import constraint_terms, weight_scales
from tscnc_hf.method.matrices import WeightMatrix, computed_weights, full_tensor, unknown_weights, weight_matrices
from tscnc_hf.method.pruning.allocation import Allocation
from tscnc_hf.method.pruning.pruner import Pruner
from tscnc_hf.method.pruning.regrowth import regrow_end, regrow_share
from tscnc_hf.method.pruning.schedule import sparsity_at
from tscnc_hf.method.pruning.unit_allocation import unit_allocation
from tscnc_hf.method.sharding import copy_whole_, is_sharded, reshard_, share_buffers_
from tscnc_hf.method.units.gates import (
    attach_gates,
    clamp_gates_,
    folded_gates,
    gate_parameters,
    gate_report,
    gate_sparse_constraint,
    gated_layers,
    sample_gates,
)
from tscnc_hf.training.config import UNITS, TSCNCConfig, pattern


logger = logging.get_logger(__name__)


class ScheduleError(ValueError):
    """A run too short for its pruning schedule: known only when the steps of training are."""


class Compressor:
    """
    Prunes a model, constrains it, gates it and averages it, as the options say.

    Weights with requires_grad=False are left alone, by pruning and by constraints. Those that are frozen when training
    begins are named among `args.pruning_exclude`, so that a sparsity is a share of the same weights everywhere.

    In training it is called in this order: `begin`; for each step `before_step`, `constraints`, `before_clipping`,
    `after_clipping`, `after_backward` and `after_step`; `end`. Steps are counted from 0, `after_step` gets the number
    of those taken.

    Args:
        model (`nn.Module`): gates are attached to it here, if the options ask for some. Scales of TSC are those of its
            weights when training begins.
        args (`TSCNCConfig`): the options, with the dense ends named (`with_dense_ends`); changed as said above.

    Raises:
        ValueError: see `build_pruner` and `attach_gates`.
    """

    def __init__(self, model: nn.Module, args: TSCNCConfig):
        self.model, self.args = model, args
        self._excluded = list(args.pruning_exclude)  # as asked for
        if args.tsc_on == "gates" and not gated_layers(model):
            attach_gates(model, args.gate_layers, args.gate_drop_rate, seeded_generator("cpu", args.seed, "gates"))
        self.restart()

    def restart(self) -> None:
        """
        Forget all masks, scales and averages: what training begins with is a model as it is now.

        Raises:
            ValueError: see `build_pruner`.
        """
        args, before = self.args, getattr(self, "pruner", None)
        self._given_up = 0 if before is None or args.keep_masks else before.pruned_count
        self._frozen = [r.name for r in weight_matrices(self.model) if not r.weight.requires_grad]
        args.pruning_exclude = list(dict.fromkeys([*self._excluded, *self._frozen]))
        self.pruner = build_pruner(self.model, args)
        self.scales = weight_scales(weight_matrices(self.model, args.pruning_exclude))
        self.average: WeightAverage | None = None  # while training with ema_decay
        self._fresh, self._frozen_later = True, False
        self._overdue = False  # whether the schedule ended before the step that a resumed run begins with
        self._gradients: dict[str, Tensor] | None = None  # of a step after which weights are exchanged
        self._aside: dict[str, Tensor] = {}  # gradients of pruned weights, while the others are clipped

    # ---- around an optimizer step ----

    def begin(self, step: int, max_steps: int, planned: int | None = None) -> None:
        """
        Training begins, or goes on after `step` steps. At step 0 nothing is left of a training before. Where the run
        was `planned` to have more steps, so that its schedule was not over and now is, the next step ends it.

        Raises:
            ScheduleError: it is too short for a gradual schedule, or to end one.
        """
        self.check_schedule(max_steps)
        before = max_steps if planned is None else planned
        self._overdue = False
        self._overdue = step > 0 and self.masks_frozen(step, max_steps) and not self.masks_frozen(step, before)
        if self._overdue and step >= max_steps:
            raise ScheduleError(
                f"the run was to have {before} steps, its masks are not final after {step}, and training would end "
                f"with {max_steps}: set max_steps to {step + 1} or more (or raise num_train_epochs)"
            )
        if step == 0 and not self._fresh:
            self.restart()
        if step == 0 and self._given_up and self.args.process_index == 0:
            logger.warning(
                f"Training begins anew: the {self._given_up:,} weights that the one before has pruned are trained "
                "again, as if it were the first. keep_masks=True keeps them zero"
            )
        if self._frozen and self.args.process_index == 0:
            logger.warning(self._frozen_text())
        self.scales = {name: scale.to(self.args.device) for name, scale in self.scales.items()}
        if self.args.ema_decay > 0 and (step == 0 or self.average is None):
            if half := [n for n, p in self.model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)]:
                raise ValueError(
                    f"ema_decay={self.args.ema_decay}, and {half[0]} and {len(half) - 1} more weights are of half "
                    "precision, in which an average does not move: load the model in float32 (model.float()); with "
                    "bf16=True it computes in bfloat16 all the same"
                )
            self.average = WeightAverage(self.model, self.args.ema_decay)

    def before_step(self, step: int, max_steps: int, optimizer: torch.optim.Optimizer | None) -> None:
        """The schedule begins at this step, or did so before an interruption; gates are drawn for it."""
        args, pruner, self._fresh = self.args, self.pruner, False
        if args.target_sparsity > 0:
            start, end = self._schedule(max_steps)
            if (start <= step < end or self._overdue) and not pruner.active:
                pruner.begin(_inner(optimizer))
            if step == start < end and not pruner.criterion.gathers:  # what gradients would say is not there yet
                pruner.update(self._sparsity(step, start, end))
                pruner.apply_()
        # one sample a step: for the clean and the adversarial images, every micro-batch and every process
        sample_gates(self.model, seeded_generator(args.device, args.seed, "gates", step))

    def constraints(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """The weighted constraints of a step: "tsc_loss" and "cnc_loss", scalars, those that are on."""
        args = self.args
        reshard_(model)  # after a forward some weights are rounded to the dtype it was computed in
        on_weights = args.tsc_on == "weights"
        now = step % args.cnc_interval == 0
        records = [record for record in weight_matrices(model) if record.weight.requires_grad]
        terms = constraint_terms(
            records,
            {record.name: self.scales[record.name] for record in records if record.name in self.scales},
            tsc_weight=args.tsc_weight if on_weights else 0.0,
            tsc_a=args.tsc_a,
            cnc_weight=args.cnc_weight * args.cnc_interval if now else 0.0,
            cnc_ridge=args.cnc_ridge,
            cnc_form=args.cnc_form,
        )
        if not on_weights and args.tsc_weight > 0:
            value = gate_sparse_constraint(model, args.tsc_a, args.gate_l0, args.gate_l2)
            terms["tsc_loss"] = args.tsc_weight * value
        return terms

    def before_clipping(self, step: int, max_steps: int) -> None:
        """
        What is pruned, or stands still while scores are learned, is no part of the norm to clip by. Scores all move,
        those of pruned weights as well: their gradients count. Also called where nothing is clipped.
        """
        self._keep_gradients(step, max_steps)
        self.pruner.freeze_others(self.model)
        if self.masks_frozen(step, max_steps):
            self.pruner.mask_gradients_()
        elif not self.pruner.learns_scores:
            self._aside = self.pruner.set_gradients_aside_()

    def after_clipping(self, norm: Tensor, scale: float = 1.0) -> None:
        """
        As long as the schedule runs, pruned weights get their gradients back, clipped by the same factor, or by more
        where they are longer than the others: what may return is not to leap ahead of what is there. Without
        `max_grad_norm` they come back as they were.

        Args:
            norm (`Tensor`): of the gradients without them, before they were clipped.
            scale (`float`): by which a gradient scaler had made gradients too large, until they were clipped.
        """
        if self._aside and not self.args.max_grad_norm:
            self.pruner.put_gradients_back_(self._aside, 1 / scale)
        elif self._aside:
            own = full_tensor(get_total_norm(self._aside.values())) / scale
            longer = torch.maximum(own, full_tensor(norm).to(own.device, own.dtype))
            kept, factor = (
                (self.args.max_grad_norm / (length.to(own.device, own.dtype) + 1e-6)).clamp(max=1.0)
                for length in (full_tensor(norm), longer)
            )  # as clip_grad_norm_ has it
            self.pruner.put_gradients_back_(self._aside, factor / scale, factor / kept)
        self._aside = {}

    def after_backward(self, accelerator, step: int, max_steps: int) -> None:
        """After clipping, right before the optimizer's step."""
        self._keep_gradients(step, max_steps)  # where nothing is clipped
        if not self.pruner.active:
            return
        if self.args.fp16 and not self.args.max_grad_norm:  # clipping would have done it
            try:
                accelerator.unscale_gradients()
            except RuntimeError as error:  # versions that log the gradients' norm have done it by now
                if "has already been called" not in str(error):
                    raise
        self.pruner.freeze_others(self.model)
        self.pruner.before_step()

    def after_step(self, step: int, max_steps: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After optimizer step `step` (from 1): masks are chosen anew while the schedule runs, and applied always."""
        args, pruner = self.args, self.pruner
        if args.world_size > 1:  # each has its images' statistics: all attack, average, evaluate and save the first's
            share_buffers_(self.model)
        pruner.after_step()
        skipped = getattr(optimizer, "step_was_skipped", False)  # as one is after an overflow
        if args.target_sparsity > 0:
            start, end = self._schedule(max_steps)
            last = step == end or self._overdue
            if last or (start < step < end and (step - start) % args.pruning_interval == 0):
                pruner.update(self._sparsity(step, start, end))
                self._say_what_was_frozen_since()
            if last:
                pruner.apply_()
                pruner.finish(_inner(optimizer))
                self._overdue = False
            if self._gradients is not None and not skipped:
                pruner.regrow(self._regrow_share(step, max_steps), self._gradients, _inner(optimizer))
        self._gradients = None
        pruner.apply_()
        clamp_gates_(self.model)
        if self.average is not None:
            self.average.update(self.model, step, pruner.local_masks)

    def _keep_gradients(self, step: int, max_steps: int) -> None:
        """Those of a step after which weights are exchanged, before pruned ones lose theirs."""
        if self._gradients is None and self._regrow_share(step + 1, max_steps) > 0 and not self._overdue:
            self._gradients = self.pruner.gradients()

    def _regrow_share(self, step: int, max_steps: int) -> float:
        """Share of the kept weights that are exchanged after step `step` (from 1); 0 where none are."""
        args = self.args
        if args.regrow_fraction == 0 or args.target_sparsity == 0:
            return 0.0
        _, start = self._schedule(max_steps)
        if (step - start) % args.regrow_interval:
            return 0.0
        return regrow_share(step, start, regrow_end(start, max_steps), args.regrow_fraction)

    def _frozen_text(self) -> str:
        weights = list(weight_matrices(self.model))
        left = (
            f"{len(self._frozen)} of {len(weights)} weights have requires_grad=False and are left alone by pruning, "
        )
        left += f"constraints and weight perturbation: {', '.join(self._frozen[:3])}"
        left += ", ..." if len(self._frozen) > 3 else ""
        if self.args.target_sparsity == 0:
            return left
        all_of_them = sum(record.weight.numel() for record in weights)
        return (
            f"{left}. target_sparsity={self.args.target_sparsity} is a share of the {self.pruner.prunable_count:,} "
            f"weights that are pruned, of {all_of_them:,} in all"
        )

    def _say_what_was_frozen_since(self) -> None:
        frozen = self.pruner.frozen
        if not frozen or self._frozen_later or self.args.process_index != 0:
            return
        self._frozen_later = True
        logger.warning(
            f"{', '.join(frozen[:3])}{', ...' if len(frozen) > 3 else ''} got requires_grad=False after training had "
            f"begun: such weights keep the zeros that they have, and target_sparsity={self.args.target_sparsity} is a "
            "share of the others from now on"
        )

    def end(self) -> None:
        """Training is over: the model that was evaluated, the average, is the one that the user gets."""
        if self.average is not None:
            self.average.copy_to_(self.model)
            self.average = None

    def masks_frozen(self, step: int, max_steps: int) -> bool:
        """Whether the schedule is over: masks are final, but for weights that are exchanged one for one."""
        args = self.args
        if args.keep_masks and args.target_sparsity == 0:
            return True
        return args.target_sparsity > 0 and step >= round(args.pruning_end * max_steps) and not self._overdue

    def group_gates(self, optimizer: torch.optim.Optimizer) -> None:
        """Give gates a parameter group of their own: another learning rate, no weight decay."""
        if gates := gate_parameters(self.model):
            own = {id(parameter) for parameter in gates}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            optimizer.add_param_group({"params": gates, "lr": self.args.gate_learning_rate, "weight_decay": 0.0})

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """
        ValueError where something is pruned and the optimizer swaps weights by itself, outside of its steps: what is
        evaluated and saved then is not what was masked.
        """
        if (self.args.target_sparsity > 0 or self.args.keep_masks) and callable(getattr(optimizer, "eval", None)):
            raise ValueError(
                f"the optimizer {type(optimizer).__name__} has other weights for evaluation than for training, as "
                "schedule-free ones do, and those would not be pruned: use another one, and ema_decay for an average"
            )

    def lacks_gates(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether there are gates that no group of the optimizer has: somebody made it before they were attached."""
        there = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return any(id(parameter) not in there for parameter in gate_parameters(self.model))

    def figures(self) -> dict[str, float]:
        """For the log: "sparsity" of the prunable weights and "gates_open", both fractions, where there are any."""
        found = {}
        if self.args.target_sparsity > 0 or self.args.keep_masks:
            found["sparsity"] = self.pruner.pruned_count / self.pruner.prunable_count
        if gates := gate_report(self.model).rows:
            found["gates_open"] = sum(row.expected_open for row in gates) / sum(row.gates for row in gates)
        return found

    def emptied(self) -> list[str]:
        """Prunable weights that are zero throughout; of a model that is sharded, all processes call this."""
        return [record.name for record in weight_matrices(self.model) if not full_tensor(record.weight).any()]

    # ---- what others get ----

    def averaged(self):
        """Inside, the model is the average of its weights, where there is one: what is evaluated and published."""
        return self.average.swapped(self.model) if self.average is not None else nullcontext()

    @contextmanager
    def published(self, keep: bool = True) -> Iterator[nn.Module | None]:
        """
        Inside, what others get: averaged and with gates folded. Of a model that FSDP2 has sharded it is a whole copy,
        for which all processes call this; those that do not `keep` it get None.
        """
        with self.averaged(), folded_gates(self.model):
            yield self.whole(keep)

    def whole(self, keep: bool) -> nn.Module | None:
        """The model; of a sharded one a whole copy, where it is kept."""
        if not is_sharded(self.model):
            return self.model
        copied = whole_copy(self.model, keep)
        return copied if copied is None else copied.to(self.args.device)

    # ---- what a checkpoint keeps ----

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """
        Masks and what chooses them, scales, gates and averages. All tensors are whole: where the model is sharded, all
        processes call this.

        The checkpoint's own weights are the average, with the gates folded in, so that whoever loads it has the model
        that was evaluated; what training goes on with, and the unfolded weights of gated layers, are kept here.
        """
        tensors = self.pruner.state() | {f"scale.{name}": scale for name, scale in self.scales.items()}
        for name, layer in gated_layers(self.model).items():
            tensors |= {f"gate.{name}": full_tensor(layer.gate.log_alpha), f"gated.{name}": full_tensor(layer.weight)}
        if self.average is not None:
            tensors |= {f"average.{name}": full_tensor(tensor) for name, tensor in self.average.tensors.items()}
            tensors |= {f"trained.{name}": full_tensor(tensor) for name, tensor in own_tensors(self.model).items()}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state(self, folder: str | os.PathLike) -> None:
        """
        Take back the state in a checkpoint's folder, the weights that training goes on with where there is an average,
        and the unfolded ones of gated layers.

        Raises:
            ValueError: masks, gates or averages are not those of this model, or the run prunes in another way.
        """
        self._fresh = False
        tensors, _ = load_state(Path(folder) / STATE_FILE)
        tensors = {name: value.to(next(self.model.parameters()).device) for name, value in tensors.items()}

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        layers, gates, weights, averages = gated_layers(self.model), part("gate."), part("gated."), part("average.")
        if layers.keys() != gates.keys():
            raise ValueError(
                f"{folder} has {len(gates)} gated layers and the model {len(layers)}: resume with the tsc_on and "
                "gate_layers that the run was started with"
            )
        if bool(averages) != (self.args.ema_decay > 0):
            raise ValueError(
                f"{folder} has {'an' if averages else 'no'} average of the weights, this run has "
                f"{'one' if self.args.ema_decay > 0 else 'none'}: resume with the ema_decay that the run was started "
                "with"
            )
        self.average = WeightAverage(self.model, self.args.ema_decay) if averages else None
        if self.average is not None:
            self.average.load(averages)
            load_tensors_(own_tensors(self.model), part("trained."))
        self.pruner.load_state(tensors)
        for name, layer in layers.items():
            copy_whole_(layer.gate.log_alpha, gates[name])
            copy_whole_(layer.weight, weights[name])
        self.scales = part("scale.")

    # ---- the schedule ----

    def _schedule(self, max_steps: int) -> tuple[int, int]:
        """First and last optimizer step (counted from 1) of the pruning schedule; ScheduleError where it is none."""
        args = self.args
        start, end = round(args.pruning_start * max_steps), max(1, round(args.pruning_end * max_steps))
        gradual = args.target_sparsity > 0 and args.pruning_start != args.pruning_end
        if gradual and end - start < args.pruning_interval:
            raise ScheduleError(
                f"training has {max_steps} optimizer steps, so pruning from {args.pruning_start} to "
                f"{args.pruning_end} of it has {end - start}; it needs at least pruning_interval="
                f"{args.pruning_interval}. Train longer, widen the schedule, lower pruning_interval, or prune at once "
                "with pruning_start = pruning_end"
            )
        return start, end

    def check_schedule(self, max_steps: int) -> None:
        """ScheduleError where a run of so many steps is too short for its schedule, or for the exchanges after it."""
        args, (_, start) = self.args, self._schedule(max_steps)
        until = regrow_end(start, max_steps)
        if args.regrow_fraction > 0 and args.target_sparsity > 0 and start + args.regrow_interval >= until:
            raise ScheduleError(
                f"regrow_fraction={args.regrow_fraction} exchanges weights every regrow_interval="
                f"{args.regrow_interval} steps after step {start}, where pruning ends, and before step {until}: there "
                f"is no such step. Train longer than {max_steps} steps, or lower regrow_interval or pruning_end"
            )

    def _sparsity(self, step: int, start: int, end: int) -> float:
        args, initial = self.args, self.pruner.initial_sparsity
        return sparsity_at(step, start, end, args.target_sparsity, initial=initial, schedule=args.pruning_schedule)


def with_dense_ends(model: nn.Module, args: TSCNCConfig) -> TSCNCConfig:
    """A copy of the options, with the first and the last weight among `pruning_exclude` where they stay dense."""
    names = [record.name for record in weight_matrices(model)]
    ends = (names[:1] if args.pruning_dense_first else []) + (names[-1:] if args.pruning_dense_last else [])
    args = copy.copy(args)
    args.pruning_exclude = list(dict.fromkeys([*args.pruning_exclude, *ends]))
    return args


def build_pruner(model: nn.Module, args: TSCNCConfig) -> Pruner:
    """
    The pruner of a run. With `keep_masks` it takes over the zeros of the model.

    Raises:
        ValueError: nothing to prune, or most weights are not what their layers multiply with; `pruning_exclude` names
            what is not there; a target that cannot be reached;
            `keep_masks` for a model without zeros, or with more of them than the target.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for part in args.pruning_exclude:
        if not any(part in name for name in names):
            raise ValueError(
                f"pruning_exclude names {part!r}, which no parameter has in its name; print(weight_matrices(model)) "
                f"shows them, e.g. {', '.join(record.name for record in list(weight_matrices(model))[:3])}"
            )
    records = list(weight_matrices(model, args.pruning_exclude))
    if args.target_sparsity > 0 or args.keep_masks or not records:
        _check_left(model, records, args.pruning_exclude)
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
        if not any(bool((full_tensor(record.weight) == 0).any()) for record in weight_matrices(model)):
            raise ValueError("keep_masks=True, but no prunable weight of the model is zero: load a sparse checkpoint")
        if 0 < args.target_sparsity < pruner.initial_sparsity:
            raise ValueError(
                f"target_sparsity={args.target_sparsity} is less than the {pruner.initial_sparsity:.6g} that the "
                "model has already and keep_masks=True keeps: raise the target, or leave it out to fine-tune"
            )
        *_, last = weight_matrices(model)
        if not full_tensor(last.weight).any():
            raise ValueError(
                f"keep_masks=True keeps zeros, and {last.name}, the last layer of the model, has nothing else: it "
                "would stay so, and all images look alike. A new head that begins at zero has to be initialised, with "
                "torch.nn.init.trunc_normal_(weight, std=0.02) for example, or named in pruning_exclude"
            )
    if args.target_sparsity > 0:
        pruner.check(args.target_sparsity)
    return pruner


def _check_left(model: nn.Module, records: list[WeightMatrix], exclude: Sequence[str]) -> None:
    """A share of zeros among what little is left would be called that of the network."""
    computed, unknown = (
        {name: why for name, why in found(model).items() if not any(part in name for part in exclude)}
        for found in (computed_weights, unknown_weights)
    )
    sizes = {name: _stored(model, name).numel() for name in (*computed, *unknown)}
    prunable = sum(record.weight.numel() for record in records)
    if sum(sizes.values()) <= prunable:
        return
    if computed:
        size, name = sum(map(sizes.get, computed)), max(computed, key=sizes.get)
        raise ValueError(
            f"{len(computed)} layers of {type(model).__name__} with {size:,} weights multiply with other numbers than "
            f"they store, so that zeros would not stay zeros, and {prunable:,} weights are left to prune. {name}: "
            f"{computed[name]}. Fold such weights, take another architecture, or name them in pruning_exclude to "
            "prune the rest alone"
        )
    size, name = sum(map(sizes.get, unknown)), max(unknown, key=sizes.get)
    raise ValueError(
        f"{len(unknown)} parameters of {type(model).__name__} with {size:,} weights belong to layers of types that "
        f"are not known, and {prunable:,} weights are left to prune. {name}: {unknown[name]}. Register one "
        "(register_matrix_view), or name such weights in pruning_exclude to prune the rest alone"
    )


def _stored(model: nn.Module, name: str) -> Tensor:
    owner, _, parameter = name.rpartition(".")
    return getattr(model.get_submodule(owner), parameter)


def _inner(optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
    """What accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
