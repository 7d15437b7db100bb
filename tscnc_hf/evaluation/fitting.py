"""Do model, labels and dense model fit together? Asked before anything is attacked, with one image and no more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from tscnc_hf.artifact.models.preprocessing import preprocessing
from tscnc_hf.data.batches import collate
from tscnc_hf.data.class_names import class_names_of, has_no_names
from tscnc_hf.data.identity import random_states_kept, stored_labels
from tscnc_hf.method.adversarial.pixels import LogitsFn, Preprocessing, attack_mode, pixel_logits


def check_outputs(low: int, high: int, outputs: int, names: Sequence[str] | None = None) -> None:
    """ValueError where labels from `low` to `high` are not those of a model of so many outputs."""
    if low >= 0 and high < outputs:
        return
    if low < 0:
        advice = "those below 0 are of images without a class, which are to be left out"
    else:
        advice = "is this the data set that it was trained for, with its classes in the same order?"
        if names and high < len(names) and not has_no_names(names):
            advice += f" Label {high} is {names[high]!r}: leave out images of classes that the model does not have"
    raise ValueError(
        f"the labels lie between {low} and {high}, the model has {outputs} outputs (0 to {outputs - 1}): {advice}"
    )


def check_stored_labels(dataset: Any, places: Sequence[int], outputs: int) -> None:
    """
    ValueError where one of the images at these places has a label that a model of so many outputs has not; no more
    than two images are read, and nothing is said of a data set whose labels are in its items alone.
    """
    labels = stored_labels(dataset)
    if labels is None:
        return
    mine = labels[list(places)]
    ends = (places[int(mine.argmin())], places[int(mine.argmax())])
    if 0 <= labels[ends[0]] and labels[ends[1]] < outputs:
        return
    with random_states_kept():  # the items have the last word: they may number what is stored anew
        low, high = sorted(int(collate([dataset[place]])["labels"][0]) for place in ends)
    check_outputs(low, high, outputs, class_names_of(dataset))


def device_of(model: nn.Module) -> torch.device:
    """Where a model is: its parameters, or else its buffers; the CPU where it has neither."""
    return next(chain(model.parameters(), model.buffers()), torch.empty(0, device="cpu")).device


def one_image(model: nn.Module, forward: LogitsFn, x: Tensor) -> Tensor:
    """What a model, as a function of pixels, makes of an image (1, c, h, w); modes and random states stay."""
    with attack_mode(model), random_states_kept(), torch.no_grad():
        return forward(x)


def dense_preprocessing(dense: nn.Module, processing_class: object | None, x: Tensor, outputs: int) -> Preprocessing:
    """
    How the inputs of the dense model are made of pixels.

    Args:
        x: an image, (1, c, h, w), which is sent through it.
        outputs: of the model that is evaluated.

    Raises:
        ValueError: nothing says how its inputs are made, the image does not go through it, or it has other outputs.
    """
    parameter = next(dense.parameters(), x)
    try:
        how = preprocessing(dense, processing_class)
        logits = one_image(dense, pixel_logits(dense, *how), x.to(parameter.device))
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
        if isinstance(error, RuntimeError) and should_reduce_batch_size(error):
            raise
        shape = "x".join(map(str, x.shape[1:]))
        raise ValueError(
            f"dense_model: an image of {shape} does not go through the {type(dense).__name__}: {error}. Give the "
            "model before pruning, which takes the same images, with its own image processor"
        ) from error
    if logits.ndim != 2 or logits.shape[1] != outputs:
        raise ValueError(
            f"dense_model: the {type(dense).__name__} returns {tuple(logits.shape)} of one image, and the model that "
            f"is evaluated has {outputs} outputs. Give the model before pruning, which has the same classes"
        )
    return how
