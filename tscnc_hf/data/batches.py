"""What a batch is, and the one function that makes it: pixels in [0, 1] and integer labels, never normalised."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from tscnc_hf.data.decoding import to_planes


TOLERANCE = 1e-6
LABEL_KEYS = ("labels", "label")


class NotFinite(ValueError):
    """Pixels that are NaN or infinite."""


def collate(items: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Make one batch of a list of items, or check the ready batch that a data set's `__getitems__` returned.

    Args:
        items: either a dict with `pixel_values` (b, c, h, w) and `labels` (b,), or a non-empty list of dicts with
            `pixel_values` (c, h, w) and `labels` (an int or a 0-d integer tensor). Pixels are floats in [0, 1] or
            uint8 (then divided by 255), or an image is PIL's, in mode RGB or L. The key `label` is read where
            `labels` is missing; other keys are dropped.

    Returns:
        `{"pixel_values": float32 (b, c, h, w) in [0, 1], "labels": int64 (b,)}`.

    Raises:
        ValueError: a key is missing, shapes differ, labels are no integers, or pixels lie outside [0, 1] by more than
            1e-6 (NaN included).
    """
    if isinstance(items, Mapping):
        pixels, labels = _read_pixels(items), _read_labels(items)
    else:
        if len(items) == 0:
            raise ValueError("collate was given an empty list; a batch needs at least one item.")
        parts = [_read_pixels(item) for item in items]
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) > 1 or len({part.dtype for part in parts}) > 1:
            dtypes = sorted({str(part.dtype) for part in parts})
            raise ValueError(
                f"the images of a batch differ: shapes {sorted(shapes)}, dtypes {dtypes}. "
                "Resize them to one size and one type in the data set."
            )
        pixels, labels = torch.stack(parts), torch.stack([_read_labels(item) for item in items])
    if pixels.ndim != 4 or labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"a batch is pixel_values (b, c, h, w) and labels (b,), got {tuple(pixels.shape)} and "
            f"{tuple(labels.shape)}. Each item needs pixel_values (c, h, w) and one class id."
        )
    if pixels.dtype == torch.uint8:
        pixels = pixels.float().div_(255)
    else:
        check_range(pixels)
    return {"pixel_values": pixels.float(), "labels": labels.long()}


def collate_unlabelled(items: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """`collate`, or without "labels" where the items have none: for predictions."""
    ready = isinstance(items, Mapping)
    if any(key in (items if ready else items[0]) for key in LABEL_KEYS):
        return collate(items)
    labels = torch.zeros(len(items["pixel_values"]), dtype=torch.int64) if ready else 0
    batch = collate({**items, "labels": labels} if ready else [{**item, "labels": labels} for item in items])
    return {"pixel_values": batch["pixel_values"]}


class CollatedItems:
    """
    The items of a data set as a collator makes them, each alone: what a batch of it holds.

    Attributes:
        dataset: whose items they are; with a length, and items that are found by number.
        data_split (`str`, *optional*): the split that they are from.
    """

    def __init__(self, dataset: Any, collator: Callable, data_split: str | None = None):
        self.dataset, self.collator, self.data_split = dataset, collator, data_split

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = self.collator([self.dataset[index]])
        return {"pixel_values": batch["pixel_values"][0], "labels": batch["labels"][0]}


def check_items(dataset: Any) -> None:
    """
    Raises:
        ValueError: what is given is no data set with a length whose items are found by number: a loader, a generator,
            a batch, a pair of tensors, a dictionary of splits. The message says what to give instead.
    """
    kind, advice = type(dataset).__name__, "Give a data set with a length and numbered items, or a list of items"
    if isinstance(dataset, torch.utils.data.DataLoader):
        raise ValueError("the data set is a DataLoader, which has batches: give its images, loader.dataset.")
    if isinstance(dataset, Mapping):
        if "pixel_values" in dataset:
            advice = "Give a list of such dicts, one an image"
        else:
            advice = f"Give one of its parts: {', '.join(map(repr, list(dataset)[:5]))}"
        raise ValueError(f"the data set is a {kind}: {advice}.")
    if isinstance(dataset, tuple) and any(isinstance(part, torch.Tensor) for part in dataset):
        raise ValueError(
            "the data set is a tuple of tensors: give items, such as "
            '[{"pixel_values": image, "labels": label} for image, label in zip(images, labels)].'
        )
    try:
        len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise ValueError(f"the data set is a {kind}, which has no length. {advice}.") from error
    if not hasattr(dataset, "__getitem__"):
        raise ValueError(f"the data set is a {kind}, whose items have no numbers. {advice}.")


def _read_pixels(item: Mapping[str, Any]) -> torch.Tensor:
    if not isinstance(item, Mapping):
        raise ValueError(
            f"a batch item is a {type(item).__name__}; give a dict with pixel_values (c, h, w), floats in [0, 1], and "
            "labels, one class id. Wrap a data set of (image, label) pairs so that it returns such dicts."
        )
    if "pixel_values" not in item:
        raise ValueError(
            f"a batch item has no 'pixel_values', only {sorted(item)}. Give pixel_values, floats in [0, 1], and "
            "labels; with transformers.Trainer also set remove_unused_columns=False."
        )
    pixels = item["pixel_values"]
    if isinstance(pixels, Image.Image):
        if pixels.mode not in ("RGB", "L"):
            raise ValueError(
                f"pixel_values is an image of PIL in mode {pixels.mode}: convert it to RGB, or to L for one channel."
            )
        pixels = to_planes(pixels).copy()
    try:
        pixels = torch.as_tensor(pixels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"pixel_values is a {type(pixels).__name__} ({error}); give floats in [0, 1] or uint8, (c, h, w)."
        ) from error
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise ValueError(f"pixel_values have dtype {pixels.dtype}; give floats in [0, 1] or uint8.")
    return pixels


def _read_labels(item: Mapping[str, Any]) -> torch.Tensor:
    key = next((key for key in LABEL_KEYS if key in item), None)
    if key is None:
        raise ValueError(f"a batch item has neither 'labels' nor 'label', only {sorted(item)}. Give one class id.")
    if isinstance(item[key], str):
        raise ValueError(f"{key!r} is the text {item[key]!r}; give integer class ids.")
    labels = torch.as_tensor(item[key])
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{key!r} has dtype {labels.dtype}; give integer class ids.")
    return labels


def check_range(pixels: torch.Tensor) -> None:
    """ValueError unless pixels are floats in [0, 1], within 1e-6; NaN is refused."""
    if not pixels.is_floating_point():
        raise ValueError(f"pixel_values have dtype {pixels.dtype}; a batch needs floats in [0, 1].")
    if pixels.numel() == 0:
        return
    low, high = (float(bound) for bound in pixels.aminmax())  # both NaN where a pixel is
    if not (math.isfinite(low) and math.isfinite(high)):
        wrong = (~pixels.isfinite()).flatten(1)
        images = wrong.any(1).nonzero().flatten().tolist()
        raise NotFinite(
            f"pixel_values are nan or infinite, allowed is [0, 1]: {int(wrong.sum())} values in {len(images)} of "
            f"{len(pixels)} images, the first of which is number {images[0]} of this batch. Find out what makes them, "
            "such as a division by a range that is 0, or leave these images out."
        )
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise ValueError(
            f"pixel_values lie in [{low:.4g}, {high:.4g}], allowed is [0, 1]. Normalised inputs are a mistake here: "
            "mean and std are applied on the model side, after the attack. Drop the normalisation from the data "
            "pipeline (and divide 0..255 floats by 255)."
        )
