"""What a run writes beside the weights: the state of the method, and the extras of a published folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from tscnc_hf.artifact.atomic import write_json
from tscnc_hf.artifact.card import write_card
from tscnc_hf.artifact.checkpoint import save_sparse
from tscnc_hf.artifact.state import STATE_FILE, load_state, save_state
from tscnc_hf.method.averaging import WeightAverage
from tscnc_hf.method.gates import gated_layers
from tscnc_hf.method.pruning import Pruner
from tscnc_hf.method.sparsity import sparsity_report
from tscnc_hf.method.spectrum import spectral_report
from tscnc_hf.training.config import TSCNCConfig
from tscnc_hf.training.results import file_sizes


CONFIG_FILE = "tscnc_config.json"


def save_method_state(
    folder: Path,
    model: nn.Module,
    pruner: Pruner,
    scales: Mapping[str, Tensor],
    average: WeightAverage | None = None,
) -> None:
    """
    Masks and what chooses them, scales, gates and averages: what a resumed run needs beside the weights; schedules
    follow from the step.

    The checkpoint's own weights have the gates folded in, so that whoever loads it has the model that was evaluated;
    the unfolded weights of gated layers are kept here.
    """
    tensors = pruner.state() | {f"scale.{name}": scale for name, scale in scales.items()}
    for name, layer in gated_layers(model).items():
        tensors |= {f"gate.{name}": layer.gate.log_alpha.detach(), f"gated.{name}": layer.weight.detach()}
    if average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in average.tensors.items()}
    save_state(tensors, folder / STATE_FILE)


@torch.no_grad()
def load_method_state(
    folder: str | os.PathLike, model: nn.Module, pruner: Pruner, average: WeightAverage | None = None
) -> dict[str, Tensor]:
    """
    Give its state to the pruner, gates and unfolded weights to the model, averages to `average`; return the scales.

    Raises:
        ValueError: masks, gates or averages are not those of this model, or the run prunes in another way.
    """
    tensors, _ = load_state(Path(folder) / STATE_FILE)
    device = next(model.parameters()).device

    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: value.to(device) for name, value in tensors.items() if name.startswith(prefix)}

    layers, gates, weights = gated_layers(model), part("gate."), part("gated.")
    if layers.keys() != gates.keys():
        raise ValueError(
            f"{folder} has {len(gates)} gated layers and the model {len(layers)}: resume with the tsc_on and "
            "gate_layers that the run was started with"
        )
    averages = part("average.")
    if bool(averages) != (average is not None):
        raise ValueError(
            f"{folder} has {'an' if averages else 'no'} average of the weights, this run has "
            f"{'none' if average is None else 'one'}: resume with the ema_decay that the run was started with"
        )
    if average is not None:
        average.load(averages)
    pruner.load_state({name: value.to(device) for name, value in tensors.items()})
    for name, layer in layers.items():
        layer.gate.log_alpha.copy_(gates[name])
        layer.weight.copy_(weights[name])
    return part("scale.")


def save_extras(folder: Path, model: nn.Module, args: TSCNCConfig) -> None:
    """What a published folder has beside the dense model: the packed weights and readable options; no pickle."""
    if isinstance(model, PreTrainedModel):
        save_sparse(model, folder)
    write_json(args.method_dict(), folder / CONFIG_FILE)
    (folder / "training_args.bin").unlink(missing_ok=True)


def push_in_background(args: TSCNCConfig, repo_id: str, step: int, checkpoint_folder: str) -> PushInProgress:
    """Upload the output folder and, if `hub_strategy` says so, the checkpoint; never `training_args.bin`, a pickle."""
    message = f"Training in progress, step {step}"
    paths = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
    options = {"repo_id": repo_id, "token": args.hub_token, "run_as_future": True, "revision": args.hub_revision}
    ignored = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", "training_args.bin"]
    upload = HfApi().upload_folder
    jobs = [upload(folder_path=args.output_dir, commit_message=message, ignore_patterns=ignored, **options)]
    if args.hub_strategy in paths:
        options |= {"path_in_repo": paths[args.hub_strategy], "ignore_patterns": ["training_args.bin"]}
        jobs.append(upload(folder_path=checkpoint_folder, commit_message=f"{message}, checkpoint", **options))
    return PushInProgress(jobs)


def write_training_card(
    args: TSCNCConfig, model: nn.Module, results: Mapping | None, log_history: Sequence[Mapping], options: Mapping
) -> Path:
    """The card of a run, with what is known at the time; `options` are further arguments of `write_card`."""
    known = results or {
        "robustness": None,
        "sparsity": sparsity_report(model, args.pruning_exclude).to_dict(),
        "spectrum": spectral_report(model).to_dict(),
    }
    defaults = {"model_name": Path(args.output_dir).resolve().name, "dataset_name": "the training data"}
    return write_card(
        args.output_dir,
        **known,
        **(defaults | dict(options)),
        config=args.method_dict(),
        log_history=list(log_history),
        sizes=file_sizes(args.output_dir) or None,
    )
