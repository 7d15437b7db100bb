"""What a run writes beside the weights: the state of the method, and the extras of a published folder."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from tscnc_hf.artifact.card.card import write_card
from tscnc_hf.artifact.card.words import plain
from tscnc_hf.artifact.files.atomic import write_json
from tscnc_hf.artifact.files.state import STATE_FILE, load_state
from tscnc_hf.artifact.models.checkpoint import save_sparse
from tscnc_hf.artifact.models.narrowed import recorded_widths
from tscnc_hf.artifact.packed.limit import storage_limit
from tscnc_hf.artifact.repository.push import push_folder
from tscnc_hf.artifact.repository.recard import RUN_FACTS
from tscnc_hf.artifact.repository.repository import METHOD_FILE, folder_sizes, read_tensors
from tscnc_hf.method.averaging import WeightAverage
from tscnc_hf.method.matrices import full_tensor
from tscnc_hf.method.pruning.pruner import Pruner
from tscnc_hf.method.reports.sparsity import sparsity_report
from tscnc_hf.method.reports.spectrum import spectral_report
from tscnc_hf.method.sharding import copy_whole_
from tscnc_hf.method.units.gates import gated_layers
from tscnc_hf.training.config import TSCNCConfig


@torch.no_grad()
def method_state(
    model: nn.Module, pruner: Pruner, scales: Mapping[str, Tensor], average: WeightAverage | None = None
) -> dict[str, Tensor]:
    """
    Masks and what chooses them, scales, gates and averages: what a resumed run needs beside the weights; schedules
    follow from the step. All tensors are whole: where the model is sharded, all processes call this.

    The checkpoint's own weights have the gates folded in, so that whoever loads it has the model that was evaluated;
    the unfolded weights of gated layers are kept here.
    """
    tensors = pruner.state() | {f"scale.{name}": scale for name, scale in scales.items()}
    for name, layer in gated_layers(model).items():
        tensors |= {f"gate.{name}": full_tensor(layer.gate.log_alpha), f"gated.{name}": full_tensor(layer.weight)}
    if average is not None:
        tensors |= {f"average.{name}": full_tensor(tensor) for name, tensor in average.tensors.items()}
    return {name: tensor.detach() for name, tensor in tensors.items()}


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
        copy_whole_(layer.gate.log_alpha, gates[name])
        copy_whole_(layer.weight, weights[name])
    return part("scale.")


def save_extras(folder: Path, model: nn.Module, args: TSCNCConfig, facts: Mapping[str, Any]) -> None:
    """What a published folder has beside the dense model: the packed weights and readable options; no pickle."""
    if isinstance(model, PreTrainedModel):
        save_sparse(model, folder)
    write_json(args.method_dict() | dict(facts), folder / METHOD_FILE)
    (folder / "training_args.bin").unlink(missing_ok=True)


def run_facts(model: nn.Module, card_options: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a run beside its options (`RUN_FACTS`), without paths of this machine."""
    known = {"base_model": getattr(model, "name_or_path", None), "versions": _versions()}
    known |= {key: card_options[key] for key in RUN_FACTS if card_options.get(key)}
    return {key: plain(value) for key, value in known.items() if value}


def push_in_background(args: TSCNCConfig, repo_id: str, step: int, checkpoint_folder: str) -> PushInProgress:
    """
    Upload the output folder and, if `hub_strategy` says so, the checkpoint with it, in one commit; never
    `training_args.bin`, a pickle. Until that is done nobody may write to the output folder; the checkpoint may be
    removed by its rotation.
    """
    paths = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
    options = {
        "message": f"Training in progress, step {step}",
        "token": args.hub_token,
        "revision": args.hub_revision,
        "private": args.hub_private_repo,
    }
    if args.hub_strategy not in paths:
        return PushInProgress([HfApi().run_as_future(push_folder, args.output_dir, repo_id, **options)])
    links = Path(args.output_dir) / "_pushed-checkpoint"
    shutil.rmtree(links, ignore_errors=True)  # of a run that was killed
    try:
        shutil.copytree(checkpoint_folder, links, copy_function=os.link)
    except OSError:  # a file system without links
        shutil.copytree(checkpoint_folder, links, dirs_exist_ok=True)

    def push() -> CommitInfo:
        try:
            path = paths[args.hub_strategy]
            return push_folder(args.output_dir, repo_id, checkpoint=links, checkpoint_path=path, **options)
        finally:
            shutil.rmtree(links, ignore_errors=True)

    return PushInProgress([HfApi().run_as_future(push)])


def failed_pushes(pushes: PushInProgress | None) -> list[BaseException]:
    """The errors of pushes in the background that are over; each is returned once."""
    done = [job for job in (pushes.jobs if pushes is not None else ()) if job.done()]
    errors = [job.exception() for job in done if not job.cancelled()]
    if pushes is not None:
        pushes.jobs = [job for job in pushes.jobs if job not in done]
    return [error for error in errors if error is not None]


def write_training_card(folder: Path, model: nn.Module, exclude: Sequence[str], options: Mapping[str, Any]) -> Path:
    """The card of a run, with what is known at the time; `options` are arguments of `write_card`, which win."""
    measured = {}
    if "sparsity" not in options:
        measured = {
            "sparsity": sparsity_report(model, exclude).to_dict(),
            "spectrum": spectral_report(model).to_dict(),
        }
    names = [str(name) for name in (getattr(getattr(model, "config", None), "id2label", None) or {}).values()]
    sizes = folder_sizes(folder) if folder.is_dir() else {}
    if sizes:
        sizes["limit_bytes"] = storage_limit(read_tensors(folder))
    named = not all(name.startswith("LABEL_") for name in names)
    defaults = {"dataset_name": None, "class_names": names if named else None, "sizes": sizes or None}
    defaults["own_widths"] = bool(recorded_widths(getattr(model, "config", None)))
    if not options.get("base_model"):  # else that model's licence decides, and nobody has said which it is
        defaults["license"] = "apache-2.0"
    return write_card(folder, **(defaults | measured | dict(options)))


def _versions() -> dict[str, str]:
    names = ("tscnc-hf", "torch", "transformers", "timm", "accelerate", "datasets")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
