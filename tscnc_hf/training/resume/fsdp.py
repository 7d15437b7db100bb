"""Training that FSDP2 shards over processes: what can not be right there, and the optimizer's part of a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME


RECIPE = "recipes/accelerate/fsdp2.yaml"


def check_sharding(trainer: Trainer) -> None:
    """
    Raises:
        ValueError: an option, of the trainer or of FSDP, with which the method would not be exact on sharded weights.
    """
    refused = {
        f"the model is sharded already: load it whole on every process, and let FSDP2 ({RECIPE}) shard it as training "
        "begins": any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters()),
        f"fsdp_config xla is not supported: use FSDP2 ({RECIPE})": trainer.is_fsdp_xla_enabled,
    }
    if trainer.is_fsdp_enabled:
        refused |= _refused_with_fsdp(trainer, trainer.accelerator.state.fsdp_plugin)
    for what, given in refused.items():
        if given:
            raise ValueError(what)


def _refused_with_fsdp(trainer: Trainer, plugin) -> dict[str, bool]:
    model, args, offload = trainer.model, trainer.args, plugin.cpu_offload  # False, or a policy of torch
    offloads = bool(offload) and type(offload).__name__ != "OffloadPolicy"
    refused = {
        "fsdp_cpu_ram_efficient_loading: masks and scales are taken from the weights before they are sharded, so "
        "every process must have them. Set it to false": plugin.cpu_ram_efficient_loading,
        "fsdp_offload_params: masks and constraints need weights on the device. Set it to false": offloads,
        "fsdp_activation_checkpointing renames layers. Use activation_checkpointing=True, of the training options": (
            plugin.activation_checkpointing
        ),
        "torch_compile renames layers of a sharded model. Leave it off, or use DDP": args.torch_compile,
        "awp_gamma: perturbed weights are not sharded ones. Set it to 0, or use DDP": args.awp_gamma > 0,
        "auto_find_batch_size: a sharded model can not be wrapped anew. Set the batch size": args.auto_find_batch_size,
        f"a {type(model).__name__}: what is saved is rebuilt from a config. Use a transformers model (timm's: "
        "TimmWrapperForImageClassification), or DDP": not isinstance(model, PreTrainedModel),
    }
    return {
        f"FSDP version {plugin.fsdp_version} is not supported, it flattens weights, whose matrices and masks are "
        f"lost: use FSDP2 (fsdp_version: 2, see {RECIPE})": plugin.fsdp_version != 2,
        "fsdp_state_dict_type must be FULL_STATE_DICT: checkpoints are whole, so that one process can load them and "
        "any number of them can go on": "FULL_STATE_DICT" not in str(plugin.state_dict_type),
    } | {f"FSDP2 does not go with {what}": given for what, given in refused.items()}


def save_sharded_optimizer(trainer: Trainer, folder: str) -> None:
    """Gather the optimizer's state into one file; the weights are in the checkpoint already. All processes call it."""
    from accelerate.utils import save_fsdp_optimizer

    plugin = trainer.accelerator.state.fsdp_plugin
    save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, folder)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), os.path.join(folder, SCHEDULER_NAME))


def check_optimizer_layout(checkpoint: str | os.PathLike, sharded: bool) -> None:
    """
    Raises:
        ValueError: the optimizer's state is that of a run with FSDP2 and this one is without, or the other way round;
            or there is none (`save_only_model`).
    """
    names = {True: OPTIMIZER_NAME_BIN, False: OPTIMIZER_NAME}
    there = {kind: (Path(checkpoint) / name).is_file() for kind, name in names.items()}
    if not any(there.values()):
        raise ValueError(
            f"{checkpoint} holds a model only (save_only_model=True): without the optimizer's moments and the place "
            "in the schedule another model would come of it. Start a new run from its weights (model_name_or_path), "
            "or save with save_only_model=False"
        )
    if there[not sharded] and not there[sharded]:
        was, now = ("with", "without") if not sharded else ("without", "with")
        raise ValueError(
            f"{checkpoint} is of a run {was} FSDP2 and this one is {now} it: moments of the optimizer are kept in "
            f"another form. Resume {was} FSDP2 (any number of processes will do), or start a new run from its weights"
        )
