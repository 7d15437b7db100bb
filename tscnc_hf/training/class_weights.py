"""Weights of classes of uneven size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tscnc_hf.data.identity import stored_labels


def balanced_weights(model: nn.Module, dataset: Any) -> Tensor:
    """
    Weights of the classes, float32 (classes,), on the CPU: n / (k n_c) of n images, n_c of them in class c, in k
    classes that have images (those of scikit-learn's "balanced"). Their mean over the images is 1.

    Args:
        model: its config says how many classes there are; as many as are labelled, where it does not.
        dataset: a training set whose labels are integers. Where they cannot be had alone, each image is read once.

    Raises:
        ValueError: there is no such data set, it is a stream, or its labels are not single classes.
    """
    if dataset is None or not hasattr(dataset, "__len__"):
        what = "a stream" if dataset is not None else "no train_dataset"
        raise ValueError(
            f"class_weights='balanced' counts the classes of the training images before training, and this is {what}: "
            "give a data set with a length, or leave class_weights out"
        )
    labels = np.asarray(labels_of(dataset))
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"class_weights='balanced' needs one class an image; these labels are {labels.dtype} of shape "
            f"{labels.shape[1:]}"
        )
    known = getattr(getattr(model, "config", None), "num_labels", None) or 0
    counts = np.bincount(labels, minlength=known)
    there = counts > 0
    return torch.from_numpy(np.where(there, len(labels) / (there.sum() * np.maximum(counts, 1)), 0.0)).float()


def image_weights(weights: Tensor, y: Tensor) -> Tensor:
    """The weights (b,) of images with labels y: (b,) int64, or (b, k) shares of the classes."""
    weights = weights.to(y.device)
    return weights[y] if y.ndim == 1 else y.to(weights.dtype) @ weights


def labels_of(dataset: Any) -> Any:
    """The labels of a data set with a length, in its order; images are read only where there is no other way."""
    if (labels := stored_labels(dataset)) is not None:
        return labels
    items = (dataset[place] for place in range(len(dataset)))
    if len(dataset) and not {"labels", "label"} & set(dataset[0]):
        raise ValueError(
            f"class_weights='balanced' counts the classes of all images: an item needs labels or label, and has "
            f"{', '.join(map(str, dataset[0]))}"
        )
    return [np.asarray(item["labels"] if "labels" in item else item["label"]) for item in items]
