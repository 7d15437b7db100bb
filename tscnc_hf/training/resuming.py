"""Going on with other processes than a checkpoint was written by: what stays the same, and what can not."""

from __future__ import annotations

from pathlib import Path


def check_batch(global_step: int, epoch: float, steps_per_epoch: int) -> None:
    """
    Refuse to go on with another number of images a step.

    Args:
        global_step (`int`): optimizer steps taken.
        epoch (`float`): passes over the data that these were.
        steps_per_epoch (`int`): optimizer steps of a pass from now on.

    Raises:
        ValueError: they were others. The schedule and the place in the data are counted in steps.
    """
    before = global_step / epoch if epoch else steps_per_epoch
    if abs(before - steps_per_epoch) >= 1:  # where accumulation does not divide an epoch, it is a part of a step less
        raise ValueError(
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
