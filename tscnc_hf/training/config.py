"""Every knob of a run, grouped and checked. Nothing but data."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from inspect import get_annotations
from typing import Annotated, Any, get_origin

from accelerate.utils import str_to_bool
from transformers import TrainingArguments

from tscnc_hf.artifact.card.formatting import without_paths
from tscnc_hf.method.adversarial.ball import NORMS
from tscnc_hf.method.adversarial.objectives import OBJECTIVES
from tscnc_hf.method.adversarial.pgd import ADVERSARIES
from tscnc_hf.method.adversarial.pixels import pixel_quantity
from tscnc_hf.method.constraints import CNC_FORMS
from tscnc_hf.method.criteria import RegisteredCriterion, find_criterion
from tscnc_hf.method.pruning.allocation import SCOPES
from tscnc_hf.method.pruning.schedule import SCHEDULES
from tscnc_hf.method.pruning.unit_allocation import UNIT_SCOPES
from tscnc_hf.method.units.groups import KINDS
from tscnc_hf.training.numbers import check_numbers


UNSTRUCTURED = "unstructured"
LESS_IS_BETTER = ("condition_number", "rank_deficient", "collapsed")  # endings of metrics
OWN_DENSE, DENSE_TWIN = "dense", "dense-twin"  # teachers without a folder of their own
UNITS = {"units": KINDS} | {kind: (kind,) for kind in KINDS}
# numbers that an option may be: stated in its annotation
INSIDE = {
    "[1, infinity)": lambda x: 1 <= x < math.inf,
    "(0, infinity)": lambda x: 0 < x < math.inf,
    "[0, infinity)": lambda x: 0 <= x < math.inf,
    "(0, 1)": lambda x: 0 < x < 1,
    "[0, 1]": lambda x: 0 <= x <= 1,
    "[0, 1)": lambda x: 0 <= x < 1,
}
# upstream's numbers, with which nothing would be trained, or something breaks in the middle of a step
UPSTREAM = {
    "[1, infinity)": ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    "[0, infinity)": (
        "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers", "adam_epsilon",
    ),
    "[0, 1)": ("label_smoothing_factor", "adam_beta1", "adam_beta2"),
}  # fmt: skip
# options that change nothing unless others choose what they belong to: the condition, in words and as a function
USED_WITH = {
    'tsc_on="gates"': (
        ("gate_layers", "gate_learning_rate", "gate_drop_rate", "gate_l0", "gate_l2"),
        lambda args: args.tsc_on == "gates",
    ),
    "distill_weight, and target_sparsity or keep_masks=True": (
        ("teacher", "distill_temperature"),
        lambda args: args.distill_weight > 0 and (args.target_sparsity > 0 or args.keep_masks),
    ),
    "target_sparsity above 0 or keep_masks=True": (
        ("distill_weight",), lambda args: args.target_sparsity > 0 or args.keep_masks,
    ),
    "regrow_fraction above 0": (("regrow_interval",), lambda args: args.regrow_fraction > 0),
    "awp_gamma above 0": (("awp_start",), lambda args: args.awp_gamma > 0),
    'objective="trades" or "mart"': (("trades_beta",), lambda args: args.objective in ("trades", "mart")),
    'an objective other than "natural"': (
        ("natural_fraction", "attack_step_size", "epsilon_warmup"), lambda args: args.objective != "natural",
    ),
    'an objective other than "natural" (but attack_steps=1)': (
        ("attack_steps",), lambda args: args.objective != "natural" or args.attack_steps == 1,
    ),
    'adversary="pgd", "cw-pgd" or "kl-pgd"': (
        ("attack_steps",), lambda args: args.adversary in ("pgd", "cw-pgd", "kl-pgd") or args.attack_steps == 1,
    ),
    "an adversary": (("epsilon_warmup",), lambda args: args.adversary != "none"),
    'an adversary with one length of its steps (not "mixed")': (
        ("attack_step_size",), lambda args: args.adversary not in ("none", "mixed"),
    ),
    'pruning_scope="learned"': (("pruning_rate_learning_rate",), lambda args: args.pruning_scope == "learned"),
    "pruning_start before pruning_end": (
        ("pruning_interval", "pruning_latent"),
        lambda args: args.pruning_start != args.pruning_end or args.target_sparsity == 0,
    ),
}  # fmt: skip


def _choice(default: str, choices: tuple[str, ...]):
    return field(default=default, metadata={"choices": choices})


@dataclass
class TSCNCConfig(TrainingArguments):
    """
    `TrainingArguments` plus the options of TSCNC. Wrong values raise `ValueError` here, before any training, and so do
    options that belong to a choice not made, such as gate_layers without tsc_on="gates". A weight or a target of 0
    leaves its term or pruning out, whatever the other options about it say.

    What is said here of an option is also what `--help` (its first sentence) and docs/options.md say.

    Parameters that control the adversary (pixel quantities are in [0, 1] and may be written "8/255"):
        objective (`str`, *optional*, defaults to `"trades"`): what is minimised, "natural", "pgd-at", "trades" or
            "mart".
        adversary (`str`, *optional*, defaults to `"kl-pgd"`): how images are attacked in training, "none", "fgsm-rs",
            "n-fgsm", "pgd", "cw-pgd", "kl-pgd" (TRADES' own) or "mixed" ("fgsm-rs" and two steps of "pgd" in turn).
            The attack maximises the loss of the labels as they are, also with label_smoothing_factor.
        natural_fraction (`float`, *optional*, defaults to 0): fraction of training, from its beginning, with the
            objective "natural" and no attack, e.g. 0.2 for a ViT, which must first learn something.
        epsilon (`float` or `str`, *optional*, defaults to `"8/255"`): radius of the perturbation, in training and
            evaluation.
        norm (`str`, *optional*, defaults to `"linf"`): norm of the perturbation, "linf" or "l2".
        attack_steps (`int`, *optional*, defaults to 10): gradient steps of "pgd", "cw-pgd" and "kl-pgd".
        attack_step_size (`float` or `str`, *optional*): length of a step; by default epsilon / 4, for "fgsm-rs" 1.25
            epsilon, for "n-fgsm" epsilon.
        epsilon_warmup (`float`, *optional*, defaults to 0): fraction of training in which epsilon, and with it the
            step size, grows from 0, after natural_fraction.
        trades_beta (`float`, *optional*, defaults to 6): weight of the divergence in TRADES and MART.
        class_weights (`str`, *optional*, defaults to `"none"`): how much an image counts in the objective, "none" (all
            alike) or "balanced" (inversely to the size of its class among the training images, 1 on average).
        ema_decay (`float`, *optional*, defaults to 0): decay of a moving average of the weights, in [0, 1), e.g.
            0.995; the average is what is evaluated and published. 0 has none.
        awp_gamma (`float`, *optional*, defaults to 0): adversarial weight perturbation, in units of each weight's
            norm, e.g. 0.005; costs a forward and a backward a step. Found for each micro-batch anew: with
            gradient_accumulation_steps it is not what it is for the whole batch. 0 has none.
        awp_start (`float`, *optional*, defaults to 0): fraction of training after which weights are perturbed.
        eval_attack_steps (`int`, *optional*, defaults to 10): PGD steps behind `eval_robust_accuracy`; 0 leaves it
            out.
        eval_stream_images (`int`, *optional*, defaults to 10000): how many images an evaluation reads of a data set
            without a length, which may have no end.

    Parameters that control the constraints:
        tsc_weight (`float`, *optional*, defaults to 0): coefficient of the Transformed Sparse Constraint, a sum over
            weights.
        tsc_a (`float`, *optional*, defaults to 10): shape of transformed l1, > 0; towards 0 it is like l0, large like
            l1.
        tsc_on (`str`, *optional*, defaults to `"weights"`): what TSC makes sparse, "weights" or "gates" (hard-concrete
            gates on hidden units, heads and channels, attached before training and folded into what is published).
        gate_layers (`list[str]`, *optional*): names (or their ends) of the layers whose inputs get gates; found by
            themselves if not given.
        gate_learning_rate (`float`, *optional*, defaults to 0.01): learning rate of the gates, with the run's own
            schedule.
        gate_drop_rate (`float`, *optional*, defaults to 0.3): initial drop rate of the gates, in (0, 1).
        gate_l0 (`float`, *optional*, defaults to 1e-3): cost of a weight behind a gate.
        gate_l2 (`float`, *optional*, defaults to 5e-4): cost of half the square of a weight behind a gate.
        cnc_weight (`float`, *optional*, defaults to 0): coefficient of the Condition Number Constraint, a sum over
            weight matrices.
        cnc_form (`str`, *optional*, defaults to `"scale-invariant"`): form of the constraint, "scale-invariant" or
            "reference", as the first implementation has it, on dense layers only.
        cnc_ridge (`float`, *optional*, defaults to 1e-3): relative ridge of the constraint's log determinant, > 0.
        cnc_interval (`int`, *optional*, defaults to 1): compute the constraint every so many steps, at so many times
            the weight.

    Parameters that control pruning (sparsity is the fraction of zeros among prunable weights, which are not frozen):
        target_sparsity (`float`, *optional*, defaults to 0): sparsity at the end, in [0, 1); 0 trains dense.
        pruning_schedule (`str`, *optional*, defaults to `"cubic"`): how sparsity rises, "cubic", "linear" or
            "one-shot" (all of it at pruning_start).
        pruning_start (`float`, *optional*, defaults to 0.25): fraction of training after which sparsity rises and
            masks are chosen anew.
        pruning_end (`float`, *optional*, defaults to 0.75): fraction of training at which the target is reached and
            the masks are frozen. The rest of training fine-tunes.
        pruning_interval (`int`, *optional*, defaults to 10): steps between two choices of the masks. There is one
            choice where start and end are the same.
        pruning_criterion (`str`, *optional*, defaults to `"magnitude"`): what makes a weight worth keeping,
            "magnitude", "scaled-magnitude" (in units of its layer's scale), "lamp" (beside the larger ones of its
            layer: the zeros are shared so that no layer starves), "taylor", "movement", "gates", "learned" (scores
            that are trained between start and end, with the weights frozen), or one of your own
            (`register_criterion`).
        pruning_scope (`str`, *optional*, defaults to `"global"`): how zeros are shared among the layers, "global"
            (weights are ranked over the whole model), "uniform" (every layer alike), "erk" (Erdos-Renyi-kernel), or
            "learned" (global, with a learned factor for each layer).
        pruning_layer_sparsity (`dict`, *optional*): sparsity of single layers, by a part of their names; the others
            share the rest of the total. On the command line as JSON, `{"part of a name": 0.5}`.
        pruning_layer_floor (`float`, *optional*, defaults to 0): fraction of its weights that every layer keeps.
        pruning_row_floor (`int`, *optional*, defaults to 0): weights that every row of a matrix keeps at least.
        pruning_structure (`str`, *optional*, defaults to `"unstructured"`): what is pruned, single weights
            ("unstructured"), all but N of M consecutive input channels ("N:M" such as "2:4"), or whole units,
            "channels", "hidden" (of an MLP), "heads" or "units" (all three). Units can then be cut out by `slim`;
            their sparsity is the target's or up to a unit more.
        pruning_latent (`bool`, *optional*, defaults to `False`): while the schedule runs, pruned weights go on being
            trained behind their masks (straight-through) and can return in earnest.
        pruning_rate_learning_rate (`float`, *optional*, defaults to 0.01): learning rate of the layers' factors of
            scope "learned".
        pruning_exclude (`list[str]`, *optional*): weights with one of these in their name stay dense. Those that are
            frozen (requires_grad=False) when training begins are left alone, and named here in what is published.
        pruning_dense_first (`bool`, *optional*, defaults to `False`): leave the first prunable weight dense.
        pruning_dense_last (`bool`, *optional*, defaults to `False`): leave the last prunable weight dense.
        regrow_fraction (`float`, *optional*, defaults to 0): after pruning_end, the share of the kept weights that
            goes at first, e.g. 0.3, the least important by the criterion, while as many pruned ones with the largest
            gradients come back, at zero (RigL). It falls to 0 by a cosine over three quarters of the steps that are
            left. 0 exchanges none.
        regrow_interval (`int`, *optional*, defaults to 100): steps between two such exchanges.
        keep_masks (`bool`, *optional*, defaults to `False`): the model is sparse already and its zeros stay.

    Parameters that control distillation (while a network is pruned and fine-tuned, not in dense training):
        teacher (`str`, *optional*): the dense robust network whose predictions are followed, a folder or Hub id,
            "dense" (the run's own network as it is when pruning begins: with pruning_start=0 the one that it was
            given, which is to be trained already), or in recipes "dense-twin" (of compare_dense).
        distill_weight (`float`, *optional*, defaults to 0): coefficient of the divergence from the teacher's
            predictions for clean images, of which 5/6 are of adversarial and 1/6 of clean images; costs a forward of
            the teacher, and with objective "pgd-at" the clean images' forward and backward.
        distill_temperature (`float`, *optional*, defaults to 1): temperature of both predictions, > 0.

    Parameters that control the rest:
        channels_last (`bool`, *optional*, defaults to `False`): memory format for convolutional networks, 1.2 to 1.4
            times as fast.
        fold_batch_norm (`bool`, *optional*, defaults to `True`): attack a copy in which batch norms are folded into
            the convolutions before them: the same gradients for a tenth less time and one more copy of the weights.
        log_speed (`bool`, *optional*, defaults to `False`): also log images a second, which shares of a step attack,
            constraints, masks (with averages) and the rest take, and the seconds left.

    Parameters that control the Trainer (with other defaults than those of `TrainingArguments`):
        remove_unused_columns (`bool`, *optional*, defaults to `False`): off, since a data set's transform needs the
            image column.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`): off, so that a loss that is not finite stops
            the run and is named.
        ddp_find_unused_parameters (`bool`, *optional*, defaults to `False`): off, since every parameter takes part in
            every step.
    """

    objective: str = _choice("trades", OBJECTIVES)
    adversary: str = _choice("kl-pgd", ADVERSARIES)
    natural_fraction: Annotated[float, "[0, 1]"] = 0.0
    epsilon: str = "8/255"
    norm: str = _choice("linf", NORMS)
    attack_steps: Annotated[int, "[1, infinity)"] = 10
    attack_step_size: str | None = None
    epsilon_warmup: Annotated[float, "[0, 1]"] = 0.0
    trades_beta: Annotated[float, "[0, infinity)"] = 6.0
    class_weights: str = _choice("none", ("none", "balanced"))
    ema_decay: Annotated[float, "[0, 1)"] = 0.0
    awp_gamma: Annotated[float, "[0, infinity)"] = 0.0
    awp_start: Annotated[float, "[0, 1]"] = 0.0
    eval_attack_steps: Annotated[int, "[0, infinity)"] = 10
    eval_stream_images: Annotated[int, "[1, infinity)"] = 10_000

    tsc_weight: Annotated[float, "[0, infinity)"] = 0.0
    tsc_a: Annotated[float, "(0, infinity)"] = 10.0
    tsc_on: str = _choice("weights", ("weights", "gates"))
    gate_layers: list[str] = field(default_factory=list)
    gate_learning_rate: Annotated[float, "(0, infinity)"] = 0.01
    gate_drop_rate: Annotated[float, "(0, 1)"] = 0.3
    gate_l0: Annotated[float, "[0, infinity)"] = 1e-3
    gate_l2: Annotated[float, "[0, infinity)"] = 5e-4
    cnc_weight: Annotated[float, "[0, infinity)"] = 0.0
    cnc_form: str = _choice("scale-invariant", CNC_FORMS)
    cnc_ridge: Annotated[float, "(0, infinity)"] = 1e-3
    cnc_interval: Annotated[int, "[1, infinity)"] = 1

    target_sparsity: Annotated[float, "[0, 1)"] = 0.0
    pruning_schedule: str = _choice("cubic", tuple(SCHEDULES))
    pruning_start: Annotated[float, "[0, 1]"] = 0.25
    pruning_end: Annotated[float, "[0, 1]"] = 0.75
    pruning_interval: Annotated[int, "[1, infinity)"] = 10
    pruning_criterion: str = "magnitude"
    pruning_scope: str = _choice("global", SCOPES)
    pruning_layer_sparsity: dict | str | None = None
    pruning_layer_floor: Annotated[float, "[0, 1)"] = 0.0
    pruning_row_floor: Annotated[int, "[0, infinity)"] = 0
    pruning_structure: str = UNSTRUCTURED
    pruning_latent: bool = False
    pruning_rate_learning_rate: Annotated[float, "(0, infinity)"] = 0.01
    pruning_exclude: list[str] = field(default_factory=list)
    pruning_dense_first: bool = False
    pruning_dense_last: bool = False
    regrow_fraction: Annotated[float, "[0, 1)"] = 0.0
    regrow_interval: Annotated[int, "[1, infinity)"] = 100
    keep_masks: bool = False

    teacher: str | None = None
    distill_weight: Annotated[float, "[0, infinity)"] = 0.0
    distill_temperature: Annotated[float, "(0, infinity)"] = 1.0

    channels_last: bool = False
    fold_batch_norm: bool = True
    log_speed: bool = False

    # Upstream defaults that would break or hide something here.
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self):
        if self.deepspeed is not None or str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")):
            raise ValueError(
                "deepspeed is not supported, of no ZeRO stage: masks and constraints need whole weights, and its "
                "engine takes the optimizer's steps on its own. Use DDP (accelerate launch --config_file "
                "recipes/accelerate/ddp.yaml), or FSDP2 (recipes/accelerate/fsdp2.yaml) to share out weights and "
                "moments"
            )
        check_numbers(self)
        for name, kind in get_annotations(TSCNCConfig, eval_str=True).items():
            if get_origin(kind) is Annotated:
                _check_range(name, getattr(self, name), *kind.__metadata__)
        for interval, names in UPSTREAM.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not (name == "max_grad_norm" and value == math.inf):
                    _check_range(name, float(value) if isinstance(value, str) else value, interval)
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs:g} and max_steps={self.max_steps}: nothing would be "
                "trained. Give one of them above 0; evaluate_robustness and tscnc evaluate test a model as it is"
            )
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if self.greater_is_better is None and metric.endswith(LESS_IS_BETTER):
            self.greater_is_better = False  # else it is taken for an accuracy
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch would only warn
        self.epsilon = pixel_quantity("epsilon", self.epsilon, self.norm)
        if self.attack_step_size is not None:
            self.attack_step_size = pixel_quantity("attack_step_size", self.attack_step_size, self.norm)
        for option in fields(TSCNCConfig):
            choices, value = option.metadata.get("choices"), getattr(self, option.name)
            if option.name in TSCNCConfig.__annotations__ and choices and value not in choices:
                raise ValueError(f"{option.name}={value!r} is unknown; use one of {', '.join(choices)}")
        criterion = find_criterion(self.pruning_criterion)
        self.pruning_layer_sparsity = _layer_sparsity(self.pruning_layer_sparsity)
        pattern(self.pruning_structure)
        if self.pruning_structure in UNITS:
            self._check_units()
        if self.adversary == "n-fgsm" and self.norm != "linf":
            raise ValueError("adversary='n-fgsm' is defined for norm='linf' only; use 'fgsm-rs' or 'pgd'")
        if self.objective != "natural" and self.adversary == "none":
            raise ValueError(f"objective={self.objective!r} needs an adversary; use adversary='pgd' or 'kl-pgd'")
        for name in ("pruning_exclude", "gate_layers"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r}: give a list of name parts")

        if ignored := _ignored(self):
            name, condition = next(iter(ignored.items()))
            raise ValueError(
                f"{name}={getattr(self, name)!r} has no effect without {condition}: set that, or leave {name} out"
            )
        if self.distill_weight > 0:
            self._check_teacher()
        if self.regrow_fraction > 0 and self.target_sparsity > 0:
            self._check_regrowth(criterion)
        if self.target_sparsity > 0 or self.keep_masks:
            self._check_optimizer()
        if self.natural_fraction + self.epsilon_warmup > 1:
            raise ValueError(
                f"natural_fraction={self.natural_fraction} and then epsilon_warmup={self.epsilon_warmup} are more "
                "than all of training: the radius would never be reached"
            )
        if self.pruning_end < self.pruning_start:
            raise ValueError(
                f"pruning_end={self.pruning_end} lies before pruning_start={self.pruning_start}; both are fractions "
                "of training in [0, 1], start first"
            )
        learns = criterion.learned or criterion.gathers or self.pruning_scope == "learned"
        if self.target_sparsity > 0 and learns and self.pruning_end == self.pruning_start:
            raise ValueError(
                f"pruning_criterion={self.pruning_criterion!r} with pruning_scope={self.pruning_scope!r} learns from "
                "the steps between pruning_start and pruning_end, which are the same here: let pruning_end be later"
            )
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} rounds the weights themselves after training, and what is saved then: leave it off, and "
                    f"use {name.removesuffix('_full_eval')}=True, under which evaluation is in half precision, too"
                )
        if self.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint saves in the middle of a step, which can not be resumed exactly, and then goes "
                "on as if training were over: leave it off. On SIGTERM a single process ends its step, saves a "
                "checkpoint and exits with status 143"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("epsilon", "attack_step_size") and value is not None and "norm" in vars(self):  # made already
            value = pixel_quantity(name, value, self.norm)
        super().__setattr__(name, value)

    def _check_units(self) -> None:
        if self.pruning_scope not in UNIT_SCOPES:
            raise ValueError(
                f"pruning_scope={self.pruning_scope!r} does not go with pruning_structure={self.pruning_structure!r}; "
                f"use one of {', '.join(UNIT_SCOPES)}"
            )
        for name in ("pruning_layer_sparsity", "pruning_layer_floor", "pruning_row_floor"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for single weights and does not go with "
                    f"pruning_structure={self.pruning_structure!r}, which keeps one unit of each group anyway"
                )

    def _check_teacher(self) -> None:
        if not self.teacher:
            raise ValueError(
                f"distill_weight={self.distill_weight} needs a teacher: a folder, a Hub id or {OWN_DENSE!r}, the "
                "run's own network as it is when pruning begins"
            )
        if self.teacher == OWN_DENSE and self.keep_masks:
            raise ValueError(
                f"teacher={OWN_DENSE!r} is the network before anything is pruned, and with keep_masks=True it is "
                "sparse from the beginning: give the folder of a dense one"
            )

    def _check_optimizer(self) -> None:
        """ValueError where no mask can act between the gradients and the optimizer's step, or on what is evaluated."""
        optim = str(getattr(self.optim, "value", self.optim))
        reasons = {
            "lomo": "takes its steps while gradients are computed",
            "layerwise": "takes its steps while gradients are computed",
            "schedule_free": "has other weights for evaluation than for training, which would not be pruned",
        }
        for part, reason in reasons.items():
            if part in optim:
                raise ValueError(f"optim={optim!r} {reason}: use another one where weights are pruned, as adamw_torch")

    def _check_regrowth(self, criterion: RegisteredCriterion) -> None:
        """ValueError where a weight cannot be exchanged for another one."""
        optim = str(getattr(self.optim, "value", self.optim))
        reasons = {
            "pruning_structure": self.pruning_structure in UNITS
            and "prunes whole units, which come back by no gradient",
            "pruning_criterion": (criterion.learned or criterion.gathers == "movement")
            and "has nothing to judge weights by once the schedule is over; use magnitude or another one",
            "pruning_scope": self.pruning_scope == "learned" and "learns its factors while the schedule runs",
            "keep_masks": self.keep_masks and "says that the zeros of the model stay",
            "optim": ("8bit" in optim or "4bit" in optim)
            and "keeps moments from which single weights cannot be cleared",
        }
        for name, reason in reasons.items():
            if reason:
                raise ValueError(
                    f"regrow_fraction={self.regrow_fraction} exchanges single weights after the schedule, and {name}="
                    f"{optim if name == 'optim' else getattr(self, name)!r} {reason}. Leave regrow_fraction out, or "
                    f"choose another {name}"
                )

    def changed(self, **options: Any) -> TSCNCConfig:
        """A copy with other options; those that have no effect with them are what they are by default."""
        other = copy.copy(self)
        for name, value in options.items():
            setattr(other, name, value)
        usual = _defaults()
        return replace(self, **({name: usual[name] for name in _ignored(other)} | options))

    def method_dict(self) -> dict:
        """
        The options of this class and those of `TrainingArguments` that shape a run, as plain JSON types; those that
        are seldom changed only where they were.
        """
        own = [f.name for f in fields(type(self)) if f.name in TSCNCConfig.__annotations__]
        upstream = (
            "seed", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
            "optim", "learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type", "warmup_steps",
            "label_smoothing_factor", "bf16", "fp16",
        )  # fmt: skip
        seldom = (
            "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules", "lr_scheduler_kwargs",
            "dataloader_drop_last", "data_seed", "neftune_noise_alpha", "full_determinism", "tf32",
        )  # fmt: skip
        selection = ("load_best_model_at_end", "metric_for_best_model", "eval_strategy", "eval_steps")
        hidden = ("remove_unused_columns", "logging_nan_inf_filter", "ddp_find_unused_parameters", "log_speed")
        plain, usual = self.to_dict(), {f.name: f.default for f in fields(type(self))}
        plain["teacher"] = plain["teacher"] and without_paths(plain["teacher"])
        changed = [name for name in seldom if name in plain and plain[name] not in (usual[name], {})]
        changed += selection if self.load_best_model_at_end else ()  # else it decides nothing
        return {name: plain[name] for name in (*own, *upstream, *changed) if name not in hidden}


def _defaults() -> dict[str, Any]:
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(TSCNCConfig)}


def _ignored(args: TSCNCConfig) -> dict[str, str]:
    """Options that are set and have no effect, with the condition under which they would."""
    usual = _defaults()
    return {
        name: condition
        for condition, (names, used) in USED_WITH.items()
        for name in names
        if not used(args) and getattr(args, name) != usual[name]
    }


def pattern(structure: str) -> tuple[int, int] | None:
    """
    (n, m) of "N:M", None of any other structure that has a name.

    Raises:
        ValueError: neither, or n is not less than m.
    """
    if structure in (UNSTRUCTURED, *UNITS):
        return None
    found = re.fullmatch(r"(\d+):(\d+)", structure)
    if found is None:
        names = ", ".join((UNSTRUCTURED, *UNITS))
        raise ValueError(f'pruning_structure={structure!r} is unknown; use one of {names}, or "N:M" such as "2:4"')
    n, m = int(found[1]), int(found[2])
    if not 0 < n < m:
        raise ValueError(f"pruning_structure={structure!r} keeps {n} of {m}; N must be at least 1 and less than M")
    return n, m


def _layer_sparsity(value: dict | str | None) -> dict[str, float]:
    value = json_option("pruning_layer_sparsity", value)
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ValueError(f"pruning_layer_sparsity={value!r}: give a map from parts of names to fractions of zeros")
    for name, share in value.items():
        _check_range(f"pruning_layer_sparsity of {name!r}", share, "[0, 1]")
    return {str(name): float(share) for name, share in value.items()}


def _check_range(name: str, value: float, interval: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; give a number")
    if not INSIDE[interval](value):
        raise ValueError(f"{name}={value} is outside {interval}")


def json_option(name: str, value: Any) -> Any:
    """The value of an option that is JSON on the command line and may be a map in YAML.

    Raises:
        ValueError: a text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={value!r} is not JSON: {error}") from error
