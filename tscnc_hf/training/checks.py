"""Wrong input and broken runs, found early and named."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from tscnc_hf.data.batches import check_range
from tscnc_hf.data.identity import stored_labels
from tscnc_hf.data.streams import is_stream
from tscnc_hf.training.resume.checkpoints import whole_checkpoint_text


def check_processes(world_size: int) -> None:
    """
    Raises:
        RuntimeError: a launcher has started several processes, and accelerate, which decides from what it finds when
            the options are made, runs each alone: they would train one model each and write it to one folder.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != world_size:
        raise RuntimeError(
            f"{started} processes were started, but each would train alone, of {world_size}: without GPUs set "
            "use_cpu=True (--use_cpu true) or ACCELERATE_USE_CPU=1, with them start at most one process for each"
        )


def check_checkpointing(model: nn.Module, args: TrainingArguments) -> None:
    """
    Raises:
        ValueError: activations are to be computed again in the backward pass, and the model cannot do so when asked.
    """
    kinds = [kind for kind in ("activation", "gradient") if getattr(args, f"{kind}_checkpointing", False)]
    if kinds and not any(hasattr(model, f"{kind}_checkpointing_enable") for kind in ("activation", "gradient")):
        raise ValueError(
            f"{kinds[0]}_checkpointing=True, and {type(model).__name__} has no method {kinds[0]}_checkpointing_enable "
            "as models of transformers do: leave the option out, and where the model can do it by itself, as timm's "
            "do, call model.set_grad_checkpointing(True) before training"
        )


def check_datasets(model: nn.Module, train_dataset, eval_dataset, collator: Callable) -> None:
    """
    One item of each data set goes through the collator; sizes, channels and labels must fit the model.

    Raises:
        ValueError: an empty data set, an item without image or label, pixels outside [0, 1], a label that the model
            has no output for, or images that do not fit the model.
    """
    for role, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        for part in dataset.values() if isinstance(dataset, dict) else (dataset,):
            try:
                if part is not None and not is_stream(part):  # whose items the collator checks as they come
                    _check_dataset(model, part, collator)
            except ValueError as error:
                raise ValueError(f"{role}: {error}") from error


def _check_dataset(model: nn.Module, dataset, collator: Callable) -> None:
    if len(dataset) == 0:
        raise ValueError("the data set is empty: at least one image is needed")
    batch = collator([dataset[0], dataset[min(1, len(dataset) - 1)]])  # two, for collators that mix pairs
    if missing := {"pixel_values", "labels"} - set(batch):
        raise ValueError(f"a batch needs pixel_values and labels; {', '.join(sorted(missing))} missing")
    check_range(batch["pixel_values"])
    config = getattr(model, "config", None)
    channels, given = _channels(config), batch["pixel_values"].shape[1]
    if channels not in (None, given):
        raise ValueError(f"images have {given} channels, the model takes {channels}")
    num_labels = getattr(config, "num_labels", None)
    if num_labels is not None:
        try:
            check_labels(dataset, num_labels)
        except TypeError:  # they cannot be read without all images: each batch is looked at
            if not batch["labels"].is_floating_point():  # of a collator that mixes images
                check_labels(batch["labels"], num_labels)


def _channels(config) -> int | None:
    timm_size = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    return timm_size[0] if timm_size else getattr(config, "num_channels", None)


def check_terms(sums: Mapping[str, Tensor], step: int, output_dir: str) -> None:
    """FloatingPointError naming the loss terms that are NaN or infinite, the step and the last good checkpoint."""
    broken = [name for name, total in sums.items() if not torch.isfinite(total)]
    if broken:
        values = ", ".join(f"{name} = {sums[name].item()}" for name in broken)
        raise FloatingPointError(
            f"{values} after step {step}: training stopped; {whole_checkpoint_text(output_dir)}. Lower the learning "
            "rate, or the weight of the term named"
        )


def check_finite_weights(model: nn.Module, step: int, output_dir: str) -> None:
    """FloatingPointError naming a parameter that is not finite, before it is written to a checkpoint."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise FloatingPointError(
                f"{name} is not finite after step {step}: nothing was saved; {whole_checkpoint_text(output_dir)}. "
                "Lower the learning rate"
            )


def check_labels(dataset_or_labels: Any, num_labels: int) -> None:
    """ValueError when a label lies outside [0, num_labels).

    Args:
        dataset_or_labels: class ids (tensor, array, list), a data set with `.labels`, a `datasets.Dataset` with a
            column `labels` or `label`, or a list of item dicts.
        num_labels: the number of the model's outputs.

    Raises:
        TypeError: the labels cannot be read without reading every image.
    """
    values = _labels_of(dataset_or_labels)
    labels = torch.as_tensor(values)
    if labels.numel() == 0:
        raise ValueError("there are no labels to check; the data set is empty.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_labels:
        wrong = torch.unique(labels[(labels < 0) | (labels >= num_labels)]).tolist()
        advice = f"Build the model with num_labels={high + 1} or more, or give it the data set it was made for"
        if low < 0:
            advice = (
                f"Labels below 0 ({int((labels < 0).sum())} of {labels.numel()}) stand for images without a class, "
                "which nothing here leaves out: drop these images from the data set, or number all classes from 0"
            )
        raise ValueError(
            f"labels run from {low} to {high}, but the model has {num_labels} outputs: 0 .. {num_labels - 1}. "
            f"Outside: {', '.join(map(str, wrong[:5]))}{', ...' if len(wrong) > 5 else ''}. {advice}."
        )


def _labels_of(given: Any) -> Any:
    items = isinstance(given, Sequence) and len(given) and isinstance(given[0], Mapping)
    if isinstance(given, (torch.Tensor, np.ndarray, Sequence)) and not items:
        return given
    if (labels := stored_labels(given)) is not None:
        return labels
    raise TypeError(f"cannot read labels off {type(given).__name__}; give the class ids as a tensor or a list.")
