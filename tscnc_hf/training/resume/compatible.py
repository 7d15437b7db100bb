"""Going on with other options or processes than a checkpoint was written with: what stays, and what can not."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from tscnc_hf.artifact.files.atomic import write_json
from tscnc_hf.training.config import TSCNCConfig
from tscnc_hf.training.resume.checkpoints import ResumeError


OPTIONS_FILE = "tscnc_options.json"
# What else is looked at when the steps are known: `check_length` and `check_batch`.
MAY_DIFFER = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")


def write_options(args: TSCNCConfig, checkpoint: Path) -> None:
    """Keep the options that shape the run in its checkpoint, for `check_options`."""
    write_json(args.method_dict(), checkpoint / OPTIONS_FILE)


def check_options(checkpoint: str | Path, args: TSCNCConfig) -> None:
    """
    Refuse to go on with other options than a checkpoint was trained with: what is published says that all of the
    training had those of its end. A checkpoint of an earlier version, which does not say its options, passes.

    Raises:
        ResumeError: options differ; each is named with both values.
    """
    path = Path(checkpoint) / OPTIONS_FILE
    if not path.is_file():
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ResumeError(f"{path} is damaged ({error}). Resume from another checkpoint") from error
    now, usual = json.loads(json.dumps(args.method_dict())), _defaults(args)  # one that is not there has its default
    names = [name for name in {**before, **now} if name in usual and name not in MAY_DIFFER]
    pairs = {name: [options.get(name, usual[name]) for options in (before, now)] for name in names}
    different = [f"{name}={was!r} (now {is_now!r})" for name, (was, is_now) in pairs.items() if was != is_now]
    if different:
        raise ResumeError(
            f"{checkpoint} was trained with {', '.join(different)}: go on with the same options, or start anew in "
            "another output_dir"
        )


def steps_planned(checkpoint: str | Path) -> int | None:
    """How many optimizer steps a run was to have when it wrote a checkpoint; None if it does not say."""
    try:
        return json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["max_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_length(global_step: int, max_steps: int, planned: int | None) -> str | None:
    """
    What another length of training changes; None where it is the same.

    Args:
        global_step (`int`): optimizer steps taken.
        max_steps (`int`): those of the whole run from now on.
        planned (`int`, *optional*): those of the whole run until now.

    Raises:
        ResumeError: the run is to be shorter than it is already.
    """
    if global_step > max_steps:
        raise ResumeError(
            f"the checkpoint has {global_step} steps and training would end after {max_steps}: raise max_steps or "
            "num_train_epochs, or resume from an earlier checkpoint"
        )
    if planned in (None, max_steps):
        return None
    return (
        f"The run was to have {planned} steps and now has {max_steps}: learning rate, pruning and all else that is a "
        f"fraction of training go on as at step {global_step} of {max_steps}, and masks may get fewer zeros for now"
    )


def _defaults(args: TSCNCConfig) -> dict[str, Any]:
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(args)}


def check_batch(global_step: int, epoch: float, steps_per_epoch: int) -> None:
    """
    Refuse to go on with another number of images a step.

    Args:
        global_step (`int`): optimizer steps taken.
        epoch (`float`): passes over the data that these were.
        steps_per_epoch (`int`): optimizer steps of a pass from now on.

    Raises:
        ResumeError: they were others. The schedule and the place in the data are counted in steps.
    """
    before = global_step / epoch if epoch else steps_per_epoch
    if abs(before - steps_per_epoch) >= 1:  # where accumulation does not divide an epoch, it is a part of a step less
        raise ResumeError(
            f"the checkpoint was trained with {before:.6g} steps an epoch, now there would be {steps_per_epoch}: "
            "pruning, learning rate and data would go on somewhere else. Take the same training data, and keep "
            "processes x per_device_train_batch_size x gradient_accumulation_steps as it was"
        )


def processes_of(checkpoint: str | Path) -> int:
    """How many processes wrote a checkpoint; 0 if it does not say."""
    return len(list(Path(checkpoint).glob("rng_state*.pth")))


def what_differs(checkpoint: str | Path, world_size: int) -> str | None:
    """What is not bit for bit as it would have been; None where the number of processes is the same."""
    before = processes_of(checkpoint)
    if before in (0, world_size):
        return None
    return (
        f"{checkpoint} was written by {before} process{'es' if before > 1 else ''} and goes on with {world_size}. "
        "Masks, gates, schedule, moments, data order, augmentation and attack noise go on as they would have. Not bit "
        "for bit the same: dropout draws other numbers, gradients are summed in another order, and batch norm takes "
        "its statistics from other parts of the batch"
    )
