"""Going on with other options, data, code or processes than a checkpoint was written with: what can, what can not."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from tscnc_hf.artifact.files.identity import RunIdentity
from tscnc_hf.training.resume.checkpoints import ResumeError


IDENTITY_FILE = "run_identity.json"
IMAGES = "images_a_step"  # of all processes, accumulation with it
NAMED = 6  # differences in a message: another network has dozens
# Upstream's options that decide what is trained. What decides for how long is looked at when the steps are known
# (`check_length`, `check_batch`); the others say where things go, what is logged and how fast it is.
DECISIVE = (
    "accelerator_config", "adam_beta1", "adam_beta2", "adam_epsilon", "average_tokens_across_devices", "bf16",
    "data_seed", "dataloader_drop_last", "fp16", "full_determinism", "label_smoothing_factor", "learning_rate",
    "length_column_name", "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm", "neftune_noise_alpha",
    "optim", "optim_args", "optim_target_modules", "seed", "tf32", "train_sampling_strategy", "warmup_steps",
    "weight_decay",
)  # fmt: skip


def decisive_options(args: TrainingArguments) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options that decide what is trained: upstream's, and all that a class of its own adds; and their defaults."""
    upstream = {f.name for f in fields(TrainingArguments)}
    mine = [f for f in fields(args) if f.name in DECISIVE or f.name not in upstream]
    plain = args.to_dict()
    usual = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in mine}
    return {f.name: plain[f.name] for f in mine if f.name in plain}, usual


def check_identity(checkpoint: str | Path, now: RunIdentity) -> str | None:
    """
    Refuse to go on with other options or data than a checkpoint was trained with: what is published says that all of
    the training had those of its end. Other code may round otherwise.

    Returns:
        What is to be said of other code, if it is other.

    Raises:
        ResumeError: options or data differ; up to six are named with both values. Or the file that says is damaged.
    """
    path = Path(checkpoint) / IDENTITY_FILE
    try:
        before = RunIdentity.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ResumeError(f"{path} is missing or damaged ({error}). Resume from another checkpoint") from error
    if different := before.differences(now, ("options", "data")):
        asked = [one for one in different if not one.name.endswith(".digest")]  # which say nothing to people
        named = [str(one) for one in sorted(asked or different, key=lambda one: one.name.startswith("model."))]
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        raise ResumeError(
            f"{checkpoint} was trained with {', '.join(named[:NAMED])}{more}: go on with the same options and data, "
            "or start anew in another output_dir"
        )
    if other := before.differences(now, ("code",)):
        return f"{checkpoint} was written with {', '.join(map(str, other))}: what follows may be rounded otherwise"
    return None


def steps_planned(checkpoint: str | Path) -> int | None:
    """How many optimizer steps a run was to have when it wrote a checkpoint; None if it does not say."""
    try:
        return json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["max_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def images_a_step(checkpoint: str | Path) -> int | None:
    """How many images an optimizer step had when a run wrote a checkpoint; None if it does not say."""
    try:
        return json.loads((Path(checkpoint) / IDENTITY_FILE).read_text(encoding="utf-8")).get(IMAGES)
    except (OSError, ValueError, AttributeError):
        return None


def check_length(global_step: int, max_steps: int, planned: int | None) -> str | None:
    """
    What another length of training changes, where the whole run was `planned` to have other than `max_steps` optimizer
    steps; None where it is the same.

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
        f"The run was to have {planned} steps and now has {max_steps}: learning rate and all else that is a fraction "
        f"of training go on as at step {global_step} of {max_steps}; masks that are pruned may get fewer zeros for now"
    )


def check_batch(
    global_step: int, epoch: float, steps_per_epoch: int, images: tuple[int | None, int] = (None, 0)
) -> None:
    """
    Refuse to go on with another number of images a step: `steps_per_epoch` from now on, after `global_step` in `epoch`
    passes over the data. `images`: a step, before and now, which may be others where the steps are as many; None
    where the checkpoint does not say.

    Raises:
        ResumeError: they were others. The schedule and the place in the data are counted in steps.
    """
    before, what = global_step / epoch if epoch else steps_per_epoch, None
    if abs(before - steps_per_epoch) >= 1:  # where accumulation does not divide an epoch, it is a part of a step less
        what = f"{before:.6g} steps an epoch, now there would be {steps_per_epoch}"
    elif images[0] not in (None, images[1]):
        what = f"{images[0]} images a step, now there would be {images[1]}"
    if what is not None:
        raise ResumeError(
            f"the checkpoint was trained with {what}: schedules and data would go on somewhere else. Take the same "
            "training data, and keep processes x per_device_train_batch_size x gradient_accumulation_steps as it was"
        )


def what_differs(checkpoint: str | Path, world_size: int) -> str | None:
    """What is not bit for bit as it would have been; None where as many processes wrote the checkpoint."""
    before = len(list(Path(checkpoint).glob("rng_state*.pth")))  # 0 where it does not say
    if before in (0, world_size):
        return None
    return (
        f"{checkpoint} was written by {before} process{'es' if before > 1 else ''} and goes on with {world_size}. "
        "Masks, gates, schedule, moments, data order, augmentation and attack noise go on as they would have. Not bit "
        "for bit the same: dropout draws other numbers, gradients are summed in another order, and batch norm takes "
        "its statistics from other parts of the batch"
    )
