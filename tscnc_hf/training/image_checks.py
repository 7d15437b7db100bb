"""What one batch of each data set says of a run before it starts: sizes, outputs, labels, and what is to be saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from tscnc_hf.artifact.models.finetuning import described
from tscnc_hf.data.batches import CollatedItems, NotFinite, check_range, collate
from tscnc_hf.data.identity import dataset_split, random_states_kept
from tscnc_hf.evaluation.measures.robustness import refuse_probabilities
from tscnc_hf.method.adversarial.pixels import Preprocessing, attack_mode, pixel_logits
from tscnc_hf.training.checks import check_labels
from tscnc_hf.training.config import TSCNCConfig


logger = logging.get_logger(__name__)

SEARCHED = 10.0  # seconds, for what a message is clearer with


def check_images(
    model: nn.Module, preprocessing: Preprocessing, args: TSCNCConfig, train_dataset, eval_dataset, collator: Callable,
    processor: object | None,
) -> tuple[object | None, int | None, tuple[int, ...] | None, tuple[int, ...] | None]:  # fmt: skip
    """
    Two images of each data set go through the collator and one through the model. Data sets without numbered items
    are left to the batches to come.

    Returns:
        The image processor to save with the model, which makes of an image what is trained on (`described`), the
        number of the model's outputs, None where nothing was sent through it, and the shapes (c, h, w) of the training
        images and of the first that there were of any data set, each None where it is not known yet.

    Raises:
        ValueError: images that do not go through the model, or are resized in a way that cannot be reproduced; labels
            that the model has no output for; soft labels where class ids are needed; a last batch of one image, whose
            statistics a batch norm cannot have.
    """
    outputs, seen, trained = getattr(getattr(model, "config", None), "num_labels", None), None, None
    with random_states_kept():
        for role, dataset in _parts(train_dataset, eval_dataset):
            batch = first_batch(dataset, collator)
            if batch is None:
                continue
            images = batch["pixel_values"]
            try:
                found, alone = _send_one(model, preprocessing, images)
                if None not in (found, outputs) and found != outputs:
                    raise ValueError(
                        f"the model returns {found} numbers of an image, and its config says num_labels={outputs}: "
                        "nobody could load what is saved. Set model.config.num_labels and id2label to its classes"
                    )
                outputs = found if outputs is None else outputs
                _check_batch(dataset, batch, outputs, args, role)
                if alone and role == "train_dataset":
                    _check_last_batch(len(dataset), args, alone)
            except ValueError as error:
                raise ValueError(f"{role}: {error}") from error
            if seen is None:
                seen = tuple(images.shape[1:])
                trained = seen if role == "train_dataset" else None
            warn_of_size(trained, images, role)
        if seen is not None:
            processor, said = described(model, processor, preprocessing, seen)
            if said:
                logger.warning(said[0].upper() + said[1:])
    return processor, outputs, trained, seen


def warn_of_size(trained: tuple[int, ...] | None, images: Tensor, role: str) -> None:
    """Say that images (b, c, h, w) are not of the shape (c, h, w) that is trained on, if that is known."""
    if trained is not None and tuple(images.shape[1:]) != tuple(trained):
        found, wanted = ("x".join(map(str, size)) for size in (images.shape[1:], trained))
        logger.warning(
            f"{role}: images are {found}, and the model is trained on {wanted}: accuracies are those at another size. "
            f"Resize the images to {wanted} unless that is what you want to know"
        )


@dataclass
class CheckedBatches:
    """
    A collator whose batches have pixels in [0, 1], which attacks take for granted, and labels that the model has
    outputs for: cross-entropy takes no notice of -100, and an index that is too large is an error of an index
    somewhere.

    Args:
        role, dataset: what the batches are of, for messages.

    Raises:
        ValueError: as `check_range` and `check_labels`, or of the collator; with the index of the first image that is
            not finite, where one is found within `SEARCHED` seconds.
    """

    collator: Callable
    outputs: int | None
    role: str = "the data set"
    dataset: Any = None

    def __call__(self, items) -> Mapping[str, Any]:
        try:
            return self._checked(items)
        except ValueError as error:
            index = _first_not_finite(self.dataset) if isinstance(error, NotFinite) else None
            found = "" if index is None else f" In the data set, the first image that is not finite has index {index}."
            raise ValueError(f"{self.role}: {error}{found}") from error

    def _checked(self, items) -> Mapping[str, Any]:
        batch = self.collator(items)
        found = batch if isinstance(batch, Mapping) else {}
        labels, pixels = found.get("labels"), found.get("pixel_values")
        if isinstance(pixels, Tensor):
            check_range(pixels)
        if self.outputs is not None and isinstance(labels, Tensor) and not labels.is_floating_point():
            check_labels(labels, self.outputs)
        return batch


def _first_not_finite(dataset) -> int | None:
    until = time.monotonic() + SEARCHED
    try:
        for index in range(len(dataset)):
            if not torch.as_tensor(dataset[index]["pixel_values"]).isfinite().all():
                return index
            if time.monotonic() > until:
                break
    except (TypeError, KeyError, NotImplementedError, ValueError, RuntimeError):  # a stream, or images of another kind
        pass
    return None


def _parts(train_dataset, eval_dataset) -> Iterator[tuple[str, Any]]:
    for role, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        for part in dataset.values() if isinstance(dataset, dict) else (dataset,):
            yield role, part


def first_batch(dataset, collator: Callable) -> Mapping[str, Tensor] | None:
    """Two images of a data set; None of one without numbered items."""
    try:
        items = [dataset[0], dataset[min(1, len(dataset) - 1)]]
    except (TypeError, NotImplementedError, KeyError):  # None, or a stream
        return None
    return collator(items)


def as_collated(dataset, collator: Callable):
    """
    A data set with a length, as batches of the collator hold its items; as it is where the collator is ours, which
    measuring uses anyway, or makes soft labels: one that mixes images is for training.
    """
    if collator is collate or first_batch(dataset, collator)["labels"].is_floating_point():
        return dataset
    return CollatedItems(dataset, collator, dataset_split(dataset))


def _send_one(model: nn.Module, preprocessing: Preprocessing, images: Tensor) -> tuple[int | None, str | None]:
    """The number of outputs, and the name of a batch norm that sees one value a channel of an image; or None."""
    shape, channels = "x".join(map(str, images.shape[1:])), max(len(preprocessing.mean), len(preprocessing.std))
    if channels not in (1, images.shape[1]):
        raise ValueError(
            f"images have {images.shape[1]} channels, and inputs are normalised with {channels} means and deviations"
        )
    resize = preprocessing.resize(*images.shape[2:])
    if resize is not None:
        shape += f", resized to {resize.output[0]}x{resize.output[1]},"
    weight, alone = next(model.parameters(), None), []
    if weight is None or weight.device.type == "meta":
        return None, None

    def look(name: str) -> Callable:
        return lambda module, inputs: alone.append(name) if inputs[0].numel() == inputs[0].shape[1] else None

    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(look(name)) for name, norm in norms]
    try:
        with attack_mode(model), torch.no_grad():
            logits = pixel_logits(model, *preprocessing)(images[:1].to(weight.device))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        if isinstance(error, NotImplementedError) and weight.dtype != torch.float32:
            return None, None  # this device lacks an operation in that precision; the one that trains may have it
        raise ValueError(f"images of {shape} do not go through the model: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if logits.ndim != 2:
        raise ValueError(f"the model returns {tuple(logits.shape)} of one image; logits (batch, classes) are needed")
    refuse_probabilities(logits)
    return logits.shape[1], alone[0] if alone else None


def _check_batch(dataset, batch: Mapping[str, Tensor], outputs: int | None, args: TSCNCConfig, role: str) -> None:
    labels = batch["labels"]
    if not labels.is_floating_point():
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise ValueError(
                f"the collator makes labels of {labels.dtype} and shape {tuple(labels.shape)}: class ids are int64 of "
                "shape (batch,); one-hot rows become ids by labels.argmax(1), or soft labels by labels.float()"
            )
        if outputs is not None:
            check_labels(labels, outputs)
            try:
                check_labels(dataset, outputs)
            except TypeError:  # they cannot be read without all images
                pass
        return
    if role == "eval_dataset":
        raise ValueError(
            "the collator makes soft labels of shape "
            f"{tuple(labels.shape)}: an accuracy needs one class id an image. Mix images in training only"
        )
    if outputs is not None and labels.shape[1:] != (outputs,):
        raise ValueError(f"soft labels have shape {tuple(labels.shape)}, the model has {outputs} outputs")
    for name, value in (("objective", "mart"), ("adversary", "cw-pgd"), ("class_weights", "balanced")):
        if getattr(args, name, None) == value and (name != "adversary" or args.objective != "natural"):
            raise ValueError(
                f"the collator makes soft labels, and {name}={getattr(args, name)!r} needs one class id an image: use "
                "objective='pgd-at' or 'trades' with adversary='pgd' or 'kl-pgd', or mix no images"
            )


def _check_last_batch(size: int, args: TSCNCConfig, norm: str) -> None:
    """ValueError where a step would have one image alone, and a batch norm one value a channel."""
    batch = args.train_batch_size
    left, whole = size % batch, size // batch
    last_is_read = args.max_steps <= 0 or args.max_steps * args.gradient_accumulation_steps > whole
    alone = batch == 1 or (left == 1 and not args.dataloader_drop_last and last_is_read)
    # other objectives have clean and adversarial images in one batch; of several processes all get as many
    single = args.objective in ("natural", "pgd-at") or args.natural_fraction > 0
    if alone and args.world_size == 1 and single:
        raise ValueError(
            f"{size} images in batches of {batch} leave one alone, and the batch norm {norm} sees one value a channel "
            "of it, which has no variance. Set dataloader_drop_last=True (--dataloader_drop_last true), or another "
            "per_device_train_batch_size"
        )
